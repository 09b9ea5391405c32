"""What the environment decides, and which backend serves (contract, sections 1 and 3)."""

import numpy as np
import pytest
from cases import Shape

import fastattn
from conftest import instruction_sets
from fastattn import dispatch, reference

ARRAYS = Shape(1, 2, 5, 7, 8).arrays()


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that have run."""
    ran = []
    for backend in (*dispatch.BACKENDS, *dispatch.NAMED_ONLY):

        def run(problem, original=backend.run, name=backend.name):
            ran.append(name)
            return original(problem)

        monkeypatch.setattr(backend, "run", run)
    return ran


def able():
    """The backends that serve `ARRAYS`, in order."""
    from fastattn.problem import pose

    return [b.name for b in dispatch.BACKENDS if b.unsupported(pose(*ARRAYS)) is None]


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
        with pytest.raises(ValueError, match=r"^backend: 'nunpy' given, .*numpy"):
            fastattn.scaled_dot(*ARRAYS, backend="nunpy")
        monkeypatch.setenv("FASTATTN_BACKEND", "nunpy")
        with pytest.raises(ValueError, match=r"^FASTATTN_BACKEND: 'nunpy' given, .*numpy"):
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
    """FASTATTN_DISABLE_CPU_FEATURES: names separated by spaces or commas."""

    @pytest.mark.parametrize("setting", ["avx9000", "avx2,avx9000", "avx512 avx9000", "AVX9000;"])
    def test_unknown_name(self, monkeypatch, setting):
        monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", setting)
        with pytest.raises(ValueError, match=r"^FASTATTN_DISABLE_CPU_FEATURES: .*(?i:avx9000)"):
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
