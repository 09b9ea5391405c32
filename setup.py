"""Builds ``fastattn._kernels``: one macro-kernel, and the tile kernels once per instruction set."""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What csrc/instruction_sets.c expects: the flags of each instruction set, and what tile.c is
# compiled for. Never -march=native: a wheel runs on every machine of its architecture and chooses
# at run time.
FULL = {"float32": [], "float64": ["-DREAL_IS_DOUBLE"]}
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma",
          "-mprefer-vector-width=512"]  # fmt: skip
X86_64 = {
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
    "avx2": (["-mavx2", "-mfma", "-mf16c"], FULL),
    "baseline": ([], FULL),
}
INSTRUCTION_SETS = {
    "x86_64": X86_64,
    "AMD64": X86_64,
    "aarch64": {"neon": ([], FULL)},
    "arm64": {"neon": ([], FULL)},
}.get(platform.machine(), {"baseline": ([], FULL)})
OPTIMIZE = ["-O3", "-g0", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math",
            "-Werror=implicit-function-declaration"]  # fmt: skip

CSRC = Path("csrc")
HEADERS = [str(path) for path in sorted(CSRC.glob("*.h"))]


class BuildKernels(build_ext):
    """Compiles tile.c once per instruction set and dtype, and links all into the extension."""

    def build_extension(self, ext):
        self.check_compiler()
        openmp = self.openmp_flags()
        ext.extra_compile_args += OPTIMIZE + openmp
        ext.extra_link_args += openmp
        for isa, (flags, kernels) in INSTRUCTION_SETS.items():
            if not self.compiles(flags):
                print(f"fastattn: the compiler is too old for {isa}, which is left out")
                ext.extra_compile_args.append(f"-DWITHOUT_{isa}")
                continue
            for dtype, defines in kernels.items():
                ext.extra_objects += self.compiler.compile(
                    [str(CSRC / "tile.c")],
                    output_dir=str(Path(self.build_temp) / f"{isa}_{dtype}"),
                    extra_postargs=[*OPTIMIZE, *flags, *defines, f"-DTABLE={isa}_{dtype}"],
                    depends=[*HEADERS, str(CSRC / "tile.c")],
                )
        super().build_extension(ext)

    def check_compiler(self):
        if not self.compiles([]):
            command = " ".join(getattr(self.compiler, "compiler_so", ["cc"])[:1])
            sys.exit(
                f"fastattn: no working C compiler ({command!r}); install GCC or Clang, or set "
                "FASTATTN_NO_EXTENSION=1 to install the pure-Python part"
            )

    def openmp_flags(self):
        """What switches OpenMP on, or nothing where the compiler lacks it: one thread then."""
        if self.compiles(["-fopenmp"], "#include <omp.h>\n"):
            return ["-fopenmp"]
        print("fastattn: the compiler lacks OpenMP; the kernels will use one thread")
        return []

    def compiles(self, flags, include=""):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.c"
            source.write_text(include + "int main(void) { return 0; }\n")
            compiler = getattr(self.compiler, "compiler", ["cc"])
            command = [*compiler, *flags, str(source), "-o", str(Path(folder) / "probe")]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


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
            depends=[*HEADERS, str(CSRC / "tile.c")],
        ),
        build_dir=str(Path("build") / made_with),
    )


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
