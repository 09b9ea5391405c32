"""``setup.py``: what it asks of the compiler, and what it says where that is not enough."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ARM64 = {"neon_bf16", "neon"}
X86_64 = {"amx", "avx512_bf16", "avx512", "avx2", "baseline"}
ROOT = Path(__file__).parents[2]
setuptools = pytest.importorskip("setuptools", reason="it is what builds")
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the compilers here are GCC and Clang"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="installed without its source"),
]


@pytest.fixture
def build(monkeypatch):
    """``build(compiler, ...)``: the command `build_ext` of setup.py with that compiler."""

    def make(*command):
        if not shutil.which(command[0]):
            pytest.skip(f"no {command[0]} here")
        made = namespace["BuildKernels"](setuptools.Distribution())
        made.compiler = SimpleNamespace(compiler=list(command), compiler_type="unix")
        return made

    monkeypatch.setenv("FASTATTN_NO_EXTENSION", "1")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    namespace = runpy.run_path("setup.py")
    return make


@pytest.mark.parametrize(
    ("compiler", "sets"),
    [
        (["aarch64-linux-gnu-gcc"], ARM64),
        (["clang", "--target=aarch64-linux-gnu"], ARM64),
        (["clang", "--target=x86_64-linux-gnu"], X86_64),
        (["clang", "--target=powerpc64le-linux-gnu"], {"baseline"}),
    ],
    ids=lambda x: " ".join(sorted(x) if isinstance(x, set) else x),
)
def test_kernels_are_those_of_the_compilers_target(build, compiler, sets):
    """Not those of this machine: an extension of others' kernels builds, and cannot be loaded."""
    assert set(build(*compiler).instruction_sets()) == sets


def test_two_architectures_at_once_are_refused(build):
    both = build("cc", "-arch", "x86_64", "-O2", "-arch", "arm64")
    with pytest.raises(SystemExit, match="expected one architecture, got arm64 and x86_64"):
        both.check_compiler()


def test_no_compiler(build):
    with pytest.raises(SystemExit, match=r"no working C compiler .'false'"):
        build("false").check_compiler()


def test_errors_of_probes_are_shown(build, capsys):
    compiler = build("cc", "-DBROKEN", "-include", "/nowhere.h")
    assert compiler.openmp().compile == []
    assert "/nowhere.h" in capsys.readouterr().out
    compiler.tiles()
    told = capsys.readouterr().out
    assert "is left out" in told and "/nowhere.h" in told


def test_open_symbols_end_the_build(build, tmp_path):
    """A shared library links without them, and cannot be loaded."""
    compiler = build("cc")
    whole, lacks = tmp_path / "whole", tmp_path / "lacks"
    for path, body in ((whole, "1"), (lacks, "missing_kernel()")):
        path.with_suffix(".c").write_text(
            "int missing_kernel(void);\n"
            "extern const int N_INSTRUCTION_SETS; const int N_INSTRUCTION_SETS = 1;\n"
            f"int table(void) {{ return {body}; }}\n"
        )
        subprocess.run(["cc", "-c", f"{path}.c", "-o", f"{path}.o"], check=True)
    none = compiler.openmp()._replace(compile=[], link=[])
    compiler.check_symbols([f"{whole}.o"], none)
    with pytest.raises(SystemExit, match="missing_kernel"):
        compiler.check_symbols([f"{lacks}.o"], none)
