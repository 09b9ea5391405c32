"""Every backend on every instruction set of this machine against the definition. NumPy is enough.

The tolerance is the package's promise: a root-mean-square error of at most twice that of plain
NumPy in the same dtype, plus 2 ulp of the largest result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from . import reference
from .bench.machine import kernels
from .core.backward import Backward
from .core.problem import Problem, make_problem
from .dispatch import BACKENDS, unsupported, unsupported_backward

__all__ = ["Outcome", "count", "selftest"]

DISABLE, ENABLE = "FASTATTN_DISABLE_CPU_FEATURES", "FASTATTN_ENABLE_CPU_FEATURES"


class Outcome(NamedTuple):
    """How one backend did on one problem."""

    problem: str  # or its gradients
    target: str  # a backend, with its instruction set where it has several
    error: float | None  # in units of what is allowed; None: not served
    reason: str | None  # why not

    @property
    def ok(self) -> bool:
        return self.error is None or self.error <= 1  # a NaN fails


def count() -> int:
    """How many outcomes `selftest` has."""
    return 2 * len(problems()) * len(list(targets()))


def selftest() -> Iterator[Outcome]:
    """Solve every problem, and find its gradients, on every target of this machine."""
    for title, problem in problems().items():
        grad_out = np.random.default_rng(1).standard_normal(problem.rows(problem.value_dim))
        grad_out = grad_out.astype(problem.dtype)
        exact = _exact(problem, grad_out)
        allowed = {
            name: 2 * _rms(plain - exact[name]) + 2 * _ulp(exact[name], problem.dtype)
            for name, plain in _plain_numpy(problem, grad_out).items()
        }
        for row, cannot, solve, names in (
            (title, unsupported, _attend, ("out",)),
            (f"{title}: gradients", unsupported_backward, _differentiate, ("q", "k", "v")),
        ):
            for target, backend, disabled in targets():
                with _disabled_features(disabled):
                    reason = cannot(backend, problem)
                    if reason is not None:
                        yield Outcome(row, target, None, reason)
                        continue
                    found = solve(backend, problem, grad_out)
                errors = [_rms(found[name] - exact[name]) / allowed[name] for name in names]
                yield Outcome(row, target, float(np.max(errors)), None)  # a NaN is the largest


def _attend(backend, problem: Problem, grad_out) -> dict[str, np.ndarray]:
    out = problem.new_result()
    out.fill(np.nan)
    backend.run(problem, out)
    return {"out": out}


def _differentiate(backend, problem: Problem, grad_out) -> dict[str, np.ndarray]:
    out = problem.new_result()
    lse, *_ = backend.run(problem, out)
    return backend.run_backward(Backward(problem, out, lse, grad_out, None))


def targets() -> Iterator[tuple[str, Any, str]]:
    """``(name, backend, features to disable)`` of everything that can run here."""
    for backend in BACKENDS:
        compiled = kernels() if backend.name == "cython" else None
        if compiled is None:
            yield backend.name, backend, ""
            continue
        sets = compiled.instruction_sets()
        for n, isa in enumerate(sets):
            yield f"{backend.name} {isa}", backend, " ".join(sets[:n])


def problems() -> dict[str, Problem]:
    """The problems, by what they try."""
    rng = np.random.default_rng(0)

    def arrays(batch, heads, n_queries, n_keys, head_dim, kv_heads=None, value_dim=None, dtype="f"):
        kv = (batch, kv_heads or heads, n_keys)
        shapes = (
            (batch, heads, n_queries, head_dim), (*kv, head_dim), (*kv, value_dim or head_dim)
        )  # fmt: skip
        return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)

    square = arrays(2, 4, 200, 200, 64)
    bias = rng.standard_normal((4, 200, 200)).astype("f")
    slopes = np.array([0.5, 0.25, 0.125, 0.0625])
    start = rng.integers(0, 150, (4, 200))
    sequence_first = tuple(x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in square)
    padded = {"kv_lengths": [120, 200], "q_offset": 0}
    calls: dict[str, tuple[tuple[np.ndarray, ...], dict[str, Any]]] = {
        "float32": (square, {}),
        "float64": (arrays(1, 2, 150, 150, 64, dtype="d"), {}),
        "float16": (arrays(1, 2, 100, 100, 64, dtype="e"), {}),
        "causal": (square, {"causal": True}),
        "causal, float64": (arrays(1, 2, 130, 130, 32, dtype="d"), {"causal": True}),
        "causal, 100 new queries": (arrays(1, 2, 100, 700, 64), {"causal": True}),
        "window (40, 10)": (square, {"window": (40, 10)}),
        "kv_lengths, causal": (square, {"causal": True, **padded}),
        "spans": (square, {"spans": (start, start + rng.integers(0, 80, start.shape))}),
        "8 query heads on 2": (arrays(1, 8, 90, 90, 128, kv_heads=2), {}),
        "1 query, 8 heads on 2": (arrays(1, 8, 1, 1500, 128, kv_heads=2), {}),
        "odd sizes": (arrays(3, 5, 77, 131, 33), {}),
        "head_dim 1": (arrays(1, 2, 50, 60, 1), {}),
        "value_dim 40": (arrays(1, 3, 65, 127, 80, value_dim=40), {}),
        "two-dimensional": (tuple(x[0, 0] for x in square), {}),
        "sequence first": (sequence_first, {}),
        "1100 keys": (arrays(1, 1, 64, 1100, 64), {}),
        "large scores": (square, {"scale": 10.0}),
        "mask": (square, {"mask": rng.random((200, 200)) < 0.7}),
        "bias": (square, {"bias": bias}),
        "alibi": (square, {"alibi": slopes, "causal": True}),
        "relative bias": (square, {"relative_bias": rng.standard_normal((4, 65))}),
        "a scale for each head": (square, {"scale": slopes}),
        "softcap": (square, {"softcap": 3.0}),
        "sinks": (square, {"sinks": slopes}),
        "score_mod": (square, {"score_mod": _nearer_is_more, "score_grad": _slope}),
        "mask_mod": (square, {"mask_mod": _checkerboard, "causal": True}),
    }
    return {
        title: make_problem(q, k, v, return_lse=True, gradients=True, **options)
        for title, ((q, k, v), options) in calls.items()
    }


def _nearer_is_more(score, batch, head, i, j):
    return score - abs(i - j) / (head + 2)


def _slope(score, batch, head, i, j):
    return 1.0


def _checkerboard(batch, head, i, j):
    return (i // 20 + j // 30 + batch + head) % 2 == 0


@contextmanager
def _disabled_features(features: str) -> Iterator[None]:
    """All others are used, slow ones too."""
    compiled = kernels()
    before = {name: os.environ.get(name) for name in (DISABLE, ENABLE)}
    os.environ[DISABLE] = features
    os.environ[ENABLE] = " ".join(compiled.FEATURES) if compiled else ""
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _exact(p: Problem, grad_out) -> dict[str, np.ndarray]:
    """The result and the gradients by the definition."""
    real = np.longdouble if p.dtype == np.float64 else np.float64
    out, lse, _ = reference.attend(p, real)
    return {"out": out, **reference.gradients(Backward(p, out, lse, grad_out, None), real)}


def _plain_numpy(p: Problem, grad_out) -> dict[str, np.ndarray]:
    """The textbook formulae of the result and the gradients, every step in the problem's dtype."""
    real = p.dtype.type
    s = np.where(reference.visible(p), reference.scores(p, real).astype(real), real(-np.inf))
    top = s.max(axis=-1, keepdims=True)
    if p.sinks is not None:
        sinks = p.sinks.astype(real)[:, None, None]
        top = np.maximum(top, sinks)
    shift = np.where(np.isfinite(top), top, real(0))
    weights = np.exp(s - shift)
    total = weights.sum(axis=-1, keepdims=True)
    if p.sinks is not None:
        total = total + np.exp(sinks - shift)
    weights = weights / np.where(total == 0, real(1), total)
    k, v = (reference.per_query_head(x, p) for x in (p.k, p.v))
    out = weights @ v
    delta = (grad_out * out).sum(axis=-1, keepdims=True)
    grad_s = weights * (grad_out @ v.swapaxes(-1, -2) - delta)
    if p.softcap is not None:
        grad_s = grad_s * (1 - (reference.capped_products(p, real) / real(p.softcap)) ** 2)
    grad_s = grad_s * reference.scale_of(p, real)
    return {
        "out": out,
        "q": grad_s @ k,
        "k": reference.per_key_head(grad_s.swapaxes(-1, -2) @ p.q, p),
        "v": reference.per_key_head(weights.swapaxes(-1, -2) @ grad_out, p),
    }


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(error))))


def _ulp(exact: np.ndarray, dtype: np.dtype) -> float:
    """The distance from the largest result to the next number of `dtype`."""
    return float(np.spacing(np.abs(exact).max().astype(dtype)))
