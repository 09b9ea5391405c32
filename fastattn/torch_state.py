"""The parameters of a ``torch.nn.MultiheadAttention`` by the names that they have here."""

from __future__ import annotations

import numpy as np

__all__ = ["renamed"]

_NAMES = {
    "q_proj_weight": "w_q",
    "k_proj_weight": "w_k",
    "v_proj_weight": "w_v",
    "out_proj.weight": "w_o",
    "out_proj.bias": "b_o",
}
_PACKED = {
    "in_proj_weight": ("w_q", "w_k", "w_v"),
    "in_proj_bias": ("b_q", "b_k", "b_v"),
}


def renamed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a state dict as those of a `MultiHeadAttention`; unknown names stay."""
    found: dict[str, np.ndarray] = {}
    for name, x in state.items():
        if name in _PACKED:
            found |= zip(_PACKED[name], (part.T for part in np.array_split(x, 3)), strict=True)
        else:
            found[_NAMES.get(name, name)] = x.T
    return found
