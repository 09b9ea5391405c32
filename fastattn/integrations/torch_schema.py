"""The operators ``torch.ops.fastattn.scaled_dot`` and those of its derivatives: what they take, in
which order and by which names. It is derived from the table of options.
"""

from __future__ import annotations

import torch

from ..core.option_table import OPTIONS

__all__ = [
    "BACKWARD", "FORWARD", "LIBRARY", "OPTIONAL", "SECOND", "SOURCES", "TANGENTS", "WORDS",
]  # fmt: skip

_TYPES: dict[str | type, str] = {
    float: "float?",
    bool: "bool",
    int: "SymInt?",
    tuple: "SymInt[]?",
    str: "str?",
}
_HERE = [option for option in OPTIONS.values() if "torch" not in option.without]

WORDS = {  # the option that an operand is part of
    name: option.name
    for option in _HERE
    for name, kind in option.parts.items()
    if isinstance(kind, str)
}
OPTIONAL = tuple(WORDS)
# The operands that have gradients and tangents. Each has a place of its own, with None where there
# is none: torch makes no batches of lists, for ``is_grads_batched=True`` of torch.autograd.grad.
SOURCES = ("q", "k", "v", *(x for x in OPTIONAL if OPTIONS[WORDS[x]].differentiable))


def _values(results: bool) -> str:
    """Values of the options that are about results, or of the others."""
    parts = (x.parts.items() for x in _HERE if (x.about == "results") is results)
    pairs = (part for each in parts for part in each if not isinstance(part[1], str))
    return ", ".join(
        f"{_TYPES[kind]} {name}={'False' if kind is bool else None}" for name, kind in pairs
    )


_TENSORS = "".join(f"Tensor? {name}=None, " for name in OPTIONAL) + "*,"
_OPTIONS = _values(results=False)
_GRADS = f"({', '.join('Tensor' for _ in SOURCES)})"
_ALONG = ", ".join(f"Tensor? d_{name}" for name in SOURCES)

# A library of its own rather than torch.library.custom_op: a call takes 10 us less.
LIBRARY = torch.library.Library("fastattn", "DEF")
LIBRARY.define(
    f"scaled_dot(Tensor q, Tensor k, Tensor v, {_TENSORS} {_values(results=True)}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)"
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
