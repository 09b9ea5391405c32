"""What each query's keys sum up to: gradients of a bias along the keys, and of slopes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["RowSums", "sink_weights"]


def sink_weights(sinks, weights) -> np.ndarray:
    """What sinks take of a softmax: `weights`, but nothing or all of it if they are infinite."""
    return np.where(np.isinf(sinks), sinks > 0, weights)


class RowSums(NamedTuple):
    """Sums over the keys that each query sees, in float64."""

    weights: np.ndarray
    grads: np.ndarray  # of the scores
    distances: np.ndarray  # weighted; or another factor of a parameter of the scores
    slopes: np.ndarray  # gradients of the scores times the distances

    def settled(self, mean, from_lse, sink, tolerance) -> tuple[np.ndarray, np.ndarray]:
        """``(grads, slopes)``, without what the rounding of `out` adds to every score's gradient.

        `mean` is that of the gradients of the weights, `sink` the weight of a sink. If all the
        weight that the sink leaves is seen here, within `tolerance`, the gradients of the scores
        add up to nothing but what passes by the keys. Otherwise the row's `lse` is that of more
        keys, and their sum is what it is.
        """
        seen = 1 - sink
        whole = (np.abs(self.weights - seen) <= tolerance) & (self.weights != 0)
        excess = np.where(whole, self.grads - (mean * sink + from_lse * seen), 0)
        mean_distance = self.distances / np.where(self.weights == 0, 1, self.weights)
        return self.grads - excess, self.slopes - excess * mean_distance
