"""Functions for a `score_mod` of `fastattn.flex` that LLVM vectorises; Numba is needed.

``math.exp`` and ``math.tanh`` call the C library for one score at a time. These take a float32 or
float64 in ``@numba.njit`` code, and from Python as well.

Examples
--------
>>> import math
>>> from fastattn.vectormath import tanh
>>> def softcap(score, batch, head, i, j):
...     return 20 * tanh(score / 20)
>>> abs(tanh(0.5) - math.tanh(0.5)) < 1e-15
True
"""

from .backends.numba.exponential import exp, tanh

__all__ = ["exp", "tanh"]
