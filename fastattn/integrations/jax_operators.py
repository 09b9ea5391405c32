"""One differentiable operator for `jax`: what is traced, what runs on XLA's own buffers, and how
the two are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback

import fastattn

from ..core.option_table import PARTS, joined
from ..core.problem import Problem, make_problem
from ..dispatch import select
from .jax_derivatives import DIFFERENTIABLE, tangents_of

__all__ = ["Call", "attend"]

# Arrays with leading axes of the problem's, and the axes behind them.
LEADING = {"q": "hqd", "k": "hjd", "v": "hjd"} | {
    name: part.kind[1:]
    for name, part in PARTS.items()
    if isinstance(part.kind, str) and part.kind[0] == "b"
}


class Call(NamedTuple):
    """What is static in a call: hashable, so that `jax.jit` knows which compiled one serves it."""

    names: tuple[str, ...]  # of the arrays: q, k, v and parts of options
    values: tuple[tuple[str, type, Any], ...]  # the other parts; by type too: True equals 1
    backend: str | None
    return_lse: bool
    return_max: bool
    axes: int  # of q, k and v each; what `jax.vmap` adds goes in front
    sequence_first: bool  # (..., length, heads, dim) instead of (..., heads, length, dim)

    def words(self, arrays: Sequence[np.ndarray]) -> dict[str, Any]:
        """All arguments of `fastattn.scaled_dot` by their names."""
        parts: dict[str, Any] = dict(zip(self.names, arrays, strict=True))
        parts.update((name, x) for name, _, x in self.values)
        parts.update((name, self.swapped(parts[name])) for name in "qkv")
        if "seed" in parts:
            low, high = parts["seed"]
            parts["seed"] = int(low) | int(high) << 32
        return joined(parts)

    def swapped(self, x: np.ndarray) -> np.ndarray:
        """A view of q, k, v, out or a gradient of theirs in the layout of `fastattn.scaled_dot`, or
        back in that of the call.
        """
        return x.swapaxes(-3, -2) if self.sequence_first else x

    def make_problem(self, arrays: Sequence[jax.Array], **gradients) -> Problem:
        """The problem of arrays of which only shapes and dtypes are known, or an error."""
        blank = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in arrays]
        return self.problem_of(blank, **gradients)

    def problem_of(self, arrays: Sequence[np.ndarray], **gradients) -> Problem:
        """The problem of arrays."""
        return make_problem(**self.words(arrays), return_lse=True, **gradients)

    @property
    def vmap_method(self) -> str:
        """`fastattn.scaled_dot` broadcasts what has leading axes; what heads have, and a seed, have
        none.
        """
        return "expand_dims" if LEADING.keys() >= set(self.names) else "sequential"


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(call: Call, *arrays):
    problem = call.make_problem(arrays)
    select(problem, call.backend)
    out = call.swapped(np.broadcast_to(0, problem.rows(problem.value_dim)))
    results = [jax.ShapeDtypeStruct(out.shape, problem.dtype)]
    n_sums = call.return_lse + call.return_max
    results += [jax.ShapeDtypeStruct(problem.rows(), problem.accumulator)] * n_sums
    return buffer_callback(partial(_run, call), results, vmap_method=call.vmap_method)(*arrays)


@partial(_attend.defjvp, symbolic_zeros=True)
def _with_tangents(call: Call, arrays, tangents):
    out, lse, *row_max = _attend(call._replace(return_lse=True), *arrays)
    able = ("q", "k", "v", *DIFFERENTIABLE)
    moving = {
        name: x
        for name, x in zip(call.names, tangents, strict=True)
        if name in able and not isinstance(x, SymbolicZero)
    }
    d_out, d_lse = tangents_of(call, moving, arrays, out, lse)
    d_max = [jax.numpy.zeros_like(x) for x in row_max]
    if call.return_lse:
        return [out, lse, *row_max], [d_out, d_lse, *d_max]
    return [out, *row_max], [d_out, *d_max]


# ``attend(call, q, k, v, *arrays)`` is ``[out]``, then lse and the maximum, (..., Hq, Sq), if
# asked.
attend = jax.jit(_attend, static_argnums=0)


# ------------------------------------------------------------- on arrays that are XLA's own memory


def _run(call: Call, context, results, *buffers) -> None:
    out, *sums = (np.asarray(x) for x in results)
    found = fastattn.scaled_dot(
        **call.words(_batched(call, out, buffers)), out=call.swapped(out),
        return_lse=call.return_lse, return_max=call.return_max, backend=call.backend,
    )  # fmt: skip
    for target, x in zip(sums, found[1:] if sums else (), strict=True):
        target[...] = x


def _batched(call: Call, result: np.ndarray, buffers) -> list[np.ndarray]:
    """The buffers as arrays, each with all of the axes that `jax.vmap` put in front: what is the
    same along one has length 1 there, but a gradient for each place.
    """
    arrays = [np.asarray(x) for x in buffers]
    added = result.ndim - call.axes
    if not added:
        return arrays
    front = result.shape[:added]
    return [np.broadcast_to(x, front + x.shape[added:]) for x in arrays]
