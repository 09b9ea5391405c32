"""The operators ``torch.ops.fastattn.scaled_dot`` and those of its derivatives: what they take, in
which order and by which names.
"""

from __future__ import annotations

import torch

__all__ = [
    "BACKWARD", "FORWARD", "LIBRARY", "OPTIONAL", "SECOND", "SOURCES", "TANGENTS", "WORDS",
]  # fmt: skip

_TENSORS = """
    Tensor? bias=None, Tensor? alibi=None, Tensor? sinks=None, Tensor? mask=None,
    Tensor? offsets=None, Tensor? kv_lengths=None, Tensor? start=None, Tensor? stop=None,
    Tensor? seed=None, Tensor? relative_bias=None, Tensor? scales=None, *,
"""
_OPTIONS = """
    float? scale=None, float? softcap=None, bool causal=False, SymInt? left=None,
    SymInt? right=None, SymInt? q_offset=None, str? backend=None, SymInt? threads=None,
    str? precision=None, float? rate=None, SymInt[]? place=None
"""

# The operands that have gradients and tangents. Each has a place of its own, with None where there
# is none: torch makes no batches of lists, for ``is_grads_batched=True`` of torch.autograd.grad.
SOURCES = ("q", "k", "v", "bias", "alibi", "sinks", "relative_bias", "scales")
_GRADS = f"({', '.join('Tensor' for _ in SOURCES)})"
_ALONG = ", ".join(f"Tensor? d_{name}" for name in SOURCES)

# A library of its own rather than torch.library.custom_op: a call takes 10 us less.
LIBRARY = torch.library.Library("fastattn", "DEF")
LIBRARY.define(
    f"scaled_dot(Tensor q, Tensor k, Tensor v, {_TENSORS} bool return_lse=False, {_OPTIONS})"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "scaled_dot_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_TENSORS} str[] wrt, {_OPTIONS}) -> {_GRADS}"
)
LIBRARY.define(
    f"scaled_dot_tangents({_ALONG}, Tensor q, Tensor k, Tensor v, {_TENSORS} {_OPTIONS})"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"scaled_dot_second({_ALONG}, Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
    f"Tensor v, {_TENSORS} str[] wrt, {_OPTIONS}) -> {_GRADS}"
)
FORWARD = torch.ops.fastattn.scaled_dot.default
BACKWARD = torch.ops.fastattn.scaled_dot_backward.default
TANGENTS = torch.ops.fastattn.scaled_dot_tangents.default
SECOND = torch.ops.fastattn.scaled_dot_second.default
OPTIONAL = (  # among them those of SOURCES, in their order
    "bias", "alibi", "sinks", "mask", "offsets", "kv_lengths", "start", "stop", "seed",
    "relative_bias", "scales",
)  # fmt: skip
WORDS = {  # where an operand's is another
    "offsets": "q_offset", "start": "spans", "stop": "spans", "seed": "dropout", "scales": "scale",
}  # fmt: skip
