"""Builds ``fastattn._kernels``: one macro-kernel, and the tile kernels once per instruction set."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What csrc/instruction_sets.c expects, by the compiler's macro for the architecture of its output:
# the flags of each instruction set, and what tile.c is compiled for. Never -march=native: a wheel
# runs on every machine of its architecture and chooses at run time.
FULL = {"float32": [], "float64": ["-DREAL_IS_DOUBLE"]}
# -O3 takes GCC twice as long as -O2. Without it float64 takes up to 1.5 times as long (a bias of
# another dtype), AVX-512 up to 1.1 times; float32 in AVX2 and baseline is as fast or faster.
O2_FLOAT32 = {**FULL, "float32": ["-O2"]}
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma",
          "-mprefer-vector-width=512"]  # fmt: skip
ARCHITECTURES = {
    "__x86_64__": {
        "amx": (
            [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
            {
                "float32": ["-DBF16_TERMS=3"],
                "float16": ["-DBF16_TERMS=2"],
                "bfloat16": ["-DBF16_TERMS=1"],
            },
        ),
        "avx512_bf16": ([*AVX512, "-mavx512bf16"], {"bfloat16": ["-DBF16_TERMS=1"]}),
        "avx512": (AVX512, FULL),
        "avx2": (["-mavx2", "-mfma", "-mf16c"], O2_FLOAT32),
        "baseline": ([], O2_FLOAT32),
    },
    "__aarch64__": {
        "neon_bf16": (["-march=armv8.2-a+bf16"], {"bfloat16": ["-DBF16_TERMS=1"]}),
        "neon": ([], FULL),
    },
}
ANY_ARCHITECTURE = {"baseline": ([], FULL)}

OPTIMIZE = ["-O3", "-g0", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math",
            "-Werror=implicit-function-declaration"]  # fmt: skip

CSRC = Path("csrc")
HEADERS = [str(path) for path in sorted(CSRC.glob("*.h"))]


class OpenMP(NamedTuple):
    """How a compiler is told to use OpenMP, and the linker where its runtime is."""

    compile: list[str]
    link: list[str]


def openmp_ways():
    """GCC's and Clang's; Apple's Clang takes the runtime of ``brew install libomp``."""
    yield OpenMP(["-fopenmp"], ["-fopenmp"])
    if sys.platform == "darwin":
        apple = OpenMP(["-Xpreprocessor", "-fopenmp"], ["-lomp"])
        yield apple
        for prefix in map(Path, ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")):
            if prefix.exists():
                yield OpenMP(
                    [*apple.compile, f"-I{prefix / 'include'}"],
                    [f"-L{prefix / 'lib'}", *apple.link],
                )


class Source(NamedTuple):
    """A file to compile, and the folder of its object."""

    path: str
    folder: str
    flags: list[str]


class BuildKernels(build_ext):
    """Compiles tile.c once per instruction set and dtype, and links all into the extension."""

    def build_extension(self, ext):
        if self.compiler.compiler_type == "msvc":
            self.use_clang_cl()
        else:
            ext.libraries.append("m")
        self.check_compiler()
        openmp = self.openmp()
        tiles, without = self.tiles()
        plain = [Source(path, "", [*OPTIMIZE, *openmp.compile, *without]) for path in ext.sources]
        objects = self.compile(ext, tiles + plain)
        self.check_symbols([x for x in objects if Path(x).stem != "kernels"], openmp)
        # What is left is to link them.
        ext.depends += [*ext.sources, "setup.py"]
        ext.sources = []
        ext.extra_objects += objects
        ext.extra_link_args += openmp.link
        super().build_extension(ext)

    def compile(self, ext, sources):
        """Compile on every core, and return the objects."""

        def compile_one(source):
            (compiled,) = self.compiler.compile(
                [source.path],
                output_dir=str(Path(self.build_temp) / source.folder),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=self.spelled(source.flags),
            )
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, sources))

    def tiles(self):
        """What tile.c and sparse.c are compiled for, the slowest to compile first; and the
        definitions that tell instruction_sets.c what is left out.
        """
        tiles, without = [], []
        for isa, (flags, kernels) in reversed(self.instruction_sets().items()):
            error = self.error_of(flags)
            if error:
                print(f"fastattn: {isa} is left out, as the compiler is too old for it:\n{error}")
                without.append(f"-DWITHOUT_{isa}")
                continue
            named = [("tile.c", f"{isa}_{dtype}", x) for dtype, x in kernels.items()]
            if kernels.keys() == FULL.keys():
                named += [("sparse.c", f"{isa}_sparse_{dtype}", x) for dtype, x in FULL.items()]
            for name, table, defines in named:
                defines = [*flags, *defines, f"-DTABLE={table}"]
                tiles.append(Source(str(CSRC / name), table, OPTIMIZE + defines))
        return tiles, without

    def instruction_sets(self):
        """Those of the architecture that is compiled for, which may not be this machine's."""
        for macro, sets in ARCHITECTURES.items():
            if not self.error_of([], f"#ifndef {macro}\n#error\n#endif\n"):
                return sets
        return ANY_ARCHITECTURE

    def openmp(self):
        """How to use OpenMP, or nothing where the compiler lacks it: one thread then."""
        errors = []
        for way in openmp_ways():
            error = self.error_of(way.compile, "#include <omp.h>\n", way.link)
            if not error:
                return way
            errors.append(error)
        print("fastattn: without OpenMP, so with one thread:", *errors, sep="\n")
        return OpenMP([], [])

    def check_compiler(self):
        architectures = {y for x, y in pairwise(self.command) if x == "-arch"}
        if len(architectures) > 1:
            sys.exit(
                f"fastattn: expected one architecture, got {' and '.join(sorted(architectures))}: "
                f"each has its own instruction sets. Set ARCHFLAGS='-arch {architectures.pop()}'."
            )
        error = self.error_of([])
        if error:
            sys.exit(
                f"fastattn: no working C compiler ({self.command[0]!r}); install GCC or Clang, or "
                f"set FASTATTN_NO_EXTENSION=1 to install the pure-Python part.\n{error}"
            )

    def check_symbols(self, objects, openmp):
        """Link what needs no Python into a program. A symbol that is open ends that, while a shared
        library would be made, and not load.
        """
        program = "extern const int N_INSTRUCTION_SETS;\n#define STATUS (N_INSTRUCTION_SETS == 0)\n"
        libraries = [] if self.compiler.compiler_type == "msvc" else ["-lm"]
        error = self.error_of(openmp.compile, program, [*objects, *openmp.link, *libraries])
        if error:
            sys.exit(f"fastattn: the kernels cannot be linked:\n{error}")

    def error_of(self, flags, declarations="", link=()):
        """What the compiler says against a small program, and the linker if given what to link;
        None if it works.
        """
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "probe.c", str(Path(folder) / "probe")
            source.write_text(
                f"{declarations}#ifndef STATUS\n#define STATUS 0\n#endif\n"
                "int main(void) { return STATUS; }\n"
            )
            last = ["-o", made, *link] if link else ["-c", "-o", made]
            command = [*self.command, *self.spelled(flags), str(source), *last]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                return str(error)
            return f"{' '.join(command)}\n{done.stderr}" if done.returncode else None

    @property
    def command(self):
        """The compiler, with the flags of the environment."""
        return getattr(self.compiler, "compiler", None) or [self.compiler.cc]

    def spelled(self, flags):
        """As the compiler wants to be told."""
        return [f"/clang:{x}" for x in flags] if self.compiler.compiler_type == "msvc" else flags

    def use_clang_cl(self):
        """In the place of Microsoft's own compiler, which lacks GNU C's vectors and atomics."""
        if not self.compiler.initialized:
            self.compiler.initialize()
        self.compiler.cc = shutil.which("clang-cl") or "clang-cl"


def kernels():
    if os.environ.get("FASTATTN_NO_EXTENSION", "0") not in ("", "0"):
        return []
    import Cython
    import numpy
    from Cython.Build import cythonize

    # Generated C fits the Cython and the NumPy that it was made with, and is not made again when
    # only these change.
    made_with = f"cython-{Cython.__version__}-numpy-{numpy.__version__}"
    return cythonize(
        Extension(
            "fastattn._kernels",
            [str(CSRC / "kernels.pyx"), str(CSRC / "instruction_sets.c")],
            include_dirs=[str(CSRC), numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
            depends=[*HEADERS, str(CSRC / "tile.c"), str(CSRC / "sparse.c")],
        ),
        build_dir=str(Path("build") / made_with),
        # No state is shared but what OpenMP itself guards: a Python without a GIL stays so.
        compiler_directives={"freethreading_compatible": True},
    )


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
