"""What the environment decides, and which backend serves (contract, sections 1 and 3)."""

import importlib.machinery
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.problems import Shape
from helpers.targets import features, instruction_sets

import fastattn
from fastattn import dispatch, reference
from fastattn.core import extension

ARRAYS = Shape(1, 2, 5, 7, 8).arrays()


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that have run."""
    ran = []
    for backend in (*dispatch.BACKENDS, *dispatch.NAMED_ONLY):

        def run(problem, result, original=backend.run, name=backend.name):
            ran.append(name)
            return original(problem, result)

        monkeypatch.setattr(backend, "run", run)
    return ran


def able():
    """The backends that serve `ARRAYS`, in order."""
    from fastattn.core.problem import make_problem

    return [b.name for b in dispatch.BACKENDS if b.unsupported(make_problem(*ARRAYS)) is None]


class TestBackend:
    """``backend=``, then FASTATTN_BACKEND, then the order of the contract."""

    def test_order(self, calls):
        fastattn.scaled_dot(*ARRAYS)
        assert calls == able()[:1]
        names = [b.name for b in dispatch.BACKENDS]
        assert names == [n for n in ("cython", "cuda", "numba", "numpy") if n in names]

    @pytest.mark.parametrize("name", ["numpy", "reference"])
    def test_environment(self, calls, monkeypatch, name):
        monkeypatch.setenv("FASTATTN_BACKEND", name)
        fastattn.scaled_dot(*ARRAYS)
        assert calls == [name]

    def test_argument_wins(self, calls, monkeypatch):
        monkeypatch.setenv("FASTATTN_BACKEND", "reference")
        fastattn.scaled_dot(*ARRAYS, backend="numpy")
        assert calls == ["numpy"]

    def test_named_runs_and_no_other(self, target, calls):
        target.attend(*ARRAYS)
        assert calls == [target.backend]

    def test_unknown_name(self, monkeypatch):
        with pytest.raises(ValueError, match=r"^backend: expected .*numpy.*, got 'nunpy'$"):
            fastattn.scaled_dot(*ARRAYS, backend="nunpy")
        monkeypatch.setenv("FASTATTN_BACKEND", "nunpy")
        with pytest.raises(ValueError, match=r"^FASTATTN_BACKEND: expected .*numpy.*, got 'nunpy'"):
            fastattn.scaled_dot(*ARRAYS)

    @pytest.mark.parametrize("name", [3, b"numpy", ["numpy"]], ids=repr)
    def test_no_name(self, name):
        with pytest.raises(TypeError, match=r"^backend: "):
            fastattn.scaled_dot(*ARRAYS, backend=name)

    @pytest.mark.parametrize("by", ["backend", "FASTATTN_BACKEND"])
    def test_named_that_cannot_says_why(self, calls, monkeypatch, by):
        monkeypatch.setattr(reference, "unsupported", lambda problem: "it rests on Sundays")
        options = {}
        if by == "backend":
            options["backend"] = "reference"
        else:
            monkeypatch.setenv(by, "reference")
        with pytest.raises(ValueError, match=rf"^{by}: 'reference' .*it rests on Sundays"):
            fastattn.scaled_dot(*ARRAYS, **options)
        assert calls == []

    def test_only_none_falls_back(self, calls, monkeypatch):
        first, *rest = able()
        if not rest:
            pytest.skip("one backend alone serves here")
        monkeypatch.setattr(dispatch.named(first), "unsupported", lambda problem: "it rests")
        fastattn.scaled_dot(*ARRAYS)
        assert calls == rest[:1]

    def test_reference_only_when_named(self, calls, monkeypatch):
        assert reference not in dispatch.BACKENDS
        fastattn.scaled_dot(*ARRAYS, backend="reference")
        assert calls == ["reference"]


SETS = instruction_sets()
built = pytest.mark.skipif(not SETS, reason="the compiled extension is not built")


@built
class TestInstructionSets:
    """FASTATTN_DISABLE_CPU_FEATURES and FASTATTN_ENABLE_CPU_FEATURES: names separated by spaces or
    commas.
    """

    @pytest.fixture(autouse=True)
    def _slow_ones_too(self, monkeypatch):
        monkeypatch.setenv("FASTATTN_ENABLE_CPU_FEATURES", features())

    @pytest.mark.parametrize("setting", ["avx9000", "avx2,avx9000", "avx512 avx9000", "AVX9000;"])
    @pytest.mark.parametrize("variable", ["DISABLE", "ENABLE"])
    def test_unknown_name(self, monkeypatch, variable, setting):
        variable = f"FASTATTN_{variable}_CPU_FEATURES"
        monkeypatch.setenv(variable, setting)
        with pytest.raises(ValueError, match=rf"^{variable}: .*(?i:avx9000)"):
            fastattn.scaled_dot(*ARRAYS, backend="cython")

    def test_unknown_name_in_a_new_process(self, run_python):
        program = """
try:
    import fastattn, numpy
    fastattn.scaled_dot(*[numpy.ones((3, 4), "f4")] * 3)
except ValueError as error:
    print(error)
"""
        message = run_python(program, FASTATTN_DISABLE_CPU_FEATURES="avx9000")
        assert message.startswith("FASTATTN_DISABLE_CPU_FEATURES: ") and "avx9000" in message

    @pytest.mark.parametrize("separator", [" ", ",", ", ", "  "])
    def test_separators(self, monkeypatch, separator):
        from fastattn import _kernels

        monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", separator.join(SETS[:-1]))
        assert _kernels.instruction_set() == SETS[-1]
        fastattn.scaled_dot(*ARRAYS, backend="cython")

    def test_read_at_every_call(self, monkeypatch):
        from fastattn import _kernels

        for n, isa in enumerate(SETS):
            monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", " ".join(SETS[:n]))
            assert _kernels.instruction_set() == isa

    def test_slow_ones_are_passed_over_unless_enabled(self, monkeypatch):
        from fastattn import _kernels

        slow = _kernels.slow_instruction_sets()
        for n, isa in enumerate(SETS):
            monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", " ".join(SETS[:n]))
            monkeypatch.setenv("FASTATTN_ENABLE_CPU_FEATURES", "")
            assert _kernels.instruction_set() == next(x for x in SETS[n:] if x not in slow)
            if isa in slow:
                monkeypatch.setenv("FASTATTN_ENABLE_CPU_FEATURES", isa)
                assert _kernels.instruction_set() == isa

    def test_disabled_ones_stay_so(self, monkeypatch):
        from fastattn import _kernels

        monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", features())
        assert _kernels.instruction_set() == SETS[-1]

    @pytest.mark.skipif("avx2" not in SETS, reason="no AVX2 here")
    def test_avx2_disables_avx512_too(self, monkeypatch):
        from fastattn import _kernels

        monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", "avx2")
        assert _kernels.instruction_set() == "baseline"

    def test_each_is_near_the_others(self, monkeypatch):
        """That the switch switches: results of two sets differ by rounding, if at all."""
        q, k, v = Shape(1, 2, 60, 80, 64).arrays()
        results = []
        for n in range(len(SETS)):
            monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", " ".join(SETS[:n]))
            results.append(fastattn.scaled_dot(q, k, v, backend="cython"))
        for out in results[1:]:
            np.testing.assert_allclose(out, results[0], atol=1e-5)


ASKED_EVERYWHERE = """
import contextlib, io, sys, warnings
path, name, reason = sys.argv[1:]
sys.path.insert(0, path)
import numpy as np
import fastattn
from fastattn.__main__ import main

q = np.ones((3, 4), np.float32)

def printed(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as told:
        function(*arguments)
    return " ".join(told.getvalue().split())  # folded as it is

assert name not in fastattn.available_backends()
try:
    fastattn.scaled_dot(q, q, q, backend=name)
except ValueError as error:
    assert str(error).startswith(f"backend: {name!r}") and reason in str(error), error
else:
    raise AssertionError("it has run")
assert reason in fastattn.explain(q, q, q, backend="numpy").passed_over[name]
assert f"{name}: " in printed(fastattn.show_config) and reason in printed(fastattn.show_config)
assert reason in printed(main, ["info"])
import fastattn.selftest  # a few problems are enough
few = dict(list(fastattn.selftest.problems().items())[:2])
fastattn.selftest.problems = lambda: few
assert reason in printed(main, ["selftest"])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fastattn.scaled_dot(q, q, q)
        fastattn.vjp(fastattn.scaled_dot, q, q, q)[1](q)
print(*(f"{w.category.__name__} {w.message}" for w in caught), sep="\\n")
"""


@pytest.fixture
def copied(tmp_path):
    """``copied(content)``: a copy of the package whose extension is a file of that content."""

    def copy(content=None, name=None):
        package = Path(fastattn.__file__).parent
        leave = shutil.ignore_patterns("_kernels*.so", "_kernels*.pyd", "*.nbi", "*.nbc")
        shutil.copytree(package, tmp_path / "fastattn", ignore=leave)
        if content is not None:
            suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
            (tmp_path / "fastattn" / (name or f"_kernels{suffix}")).write_bytes(content)
        return str(tmp_path)

    return copy


class TestBroken:
    """What is there and does not work says so everywhere, in the same words, and warns once."""

    def check(self, run_python, name, reason, path, warns=True):
        program = ASKED_EVERYWHERE
        # A copy has nothing in Numba's cache, and to compile is not what this is about.
        idle = {} if name == "numba" else {"NUMBA_DISABLE_JIT": "1"}
        told = run_python(program, path, name, reason, timeout=120, **idle).split("\n")
        assert told[0].startswith(f"RuntimeWarning fastattn: {name} " if warns else "")
        assert told[1:] == [""] and (reason in told[0]) == warns

    @built
    @pytest.mark.parametrize("share", [0.00003, 0.5, 0.999])
    def test_truncated_extension(self, run_python, copied, share):
        """Loading all of one that ends early would be a bus error."""
        whole = Path(extension.kernels.__file__).read_bytes()
        path = copied(whole[: int(share * len(whole))])
        self.check(run_python, "cython", "the extension cannot be loaded", path)

    def test_extension_of_something_else(self, run_python, copied):
        self.check(
            run_python, "cython", "the extension cannot be loaded", copied(b"no such format" * 99)
        )

    def test_extension_of_another_python(self, run_python, copied):
        path = copied(b"", "_kernels.cpython-27-x86_64-linux-gnu.so")
        self.check(run_python, "cython", "built for another Python: _kernels.cpython-27", path)

    def test_no_extension(self, run_python, copied):
        """What is absent was never promised."""
        path = copied()
        self.check(run_python, "cython", "the extension was not built", path, warns=False)

    def test_numba_that_refuses_numpy(self, run_python, copied, tmp_path):
        (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
        path = copied()
        self.check(run_python, "numba", "numba cannot be imported (Numba needs NumPy 1.0", path)

    @built
    def test_wrong_setting(self, run_python):
        """An error of each call, not of the import, and a reason to whoever asks."""
        program = """
import contextlib, io
import numpy as np
import fastattn
with contextlib.redirect_stdout(io.StringIO()) as told:
    fastattn.show_config()
told = " ".join(told.getvalue().split())
assert "cython: FASTATTN_DISABLE_CPU_FEATURES: expected some of avx2 avx512" in told, told
assert "neon_bf16, got 'avx9000'" in told, told
assert "FASTATTN_NUM_THREADS: expected an integer, got 'many'" in told, told
assert "cython" not in fastattn.available_backends()
q = np.ones((3, 4), np.float32)
for call in (fastattn.scaled_dot, fastattn.explain):
    try:
        call(q, q, q)
    except ValueError as error:
        assert str(error).startswith("FASTATTN_DISABLE_CPU_FEATURES: "), error
    else:
        raise AssertionError("it has run")
print("fine")
"""
        environment = {"FASTATTN_DISABLE_CPU_FEATURES": "avx9000", "FASTATTN_NUM_THREADS": "many"}
        assert run_python(program, **environment).strip() == "fine"
