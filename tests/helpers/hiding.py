"""Options that hide one key from some queries, and what may be stored there."""

import numpy as np

KEY = 40
POISON = [np.nan, np.inf, -np.inf]


def _mask():
    mask = np.ones((70, 90), bool)
    mask[::3, KEY] = False
    return mask


HIDING = {
    "causal": {"causal": True, "q_offset": 0},
    "window": {"window": (5, 9)},
    "kv_lengths": {"kv_lengths": [KEY, 90]},
    "spans": {"spans": (np.where(np.arange(70) % 3 == 0, KEY + 1, 0), 90)},
    "spans from the right": {"spans": (0, np.where(np.arange(70) % 3 == 0, KEY, 90))},
    "mask": {"mask": _mask()},
    "bias": {"bias": np.where(_mask(), 0.25, -np.inf).astype(np.float32)},
}
