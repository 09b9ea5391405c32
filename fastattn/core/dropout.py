"""Which weights are dropped: a function of the seed and of where a weight is, and of nothing else.

The generator is Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 3.3): a bijection of a counter of four 32-bit words under a key of two. The lowest word
comes first, and indices are those of the whole call, offset included:

- the key of entry b and head h is the first two words of the counter (b, b >> 32, h, h >> 32) under
  the key (seed, seed >> 32);
- under it the counter (j // 8, j // 8 >> 32, i, i >> 32) gives four words for query i and the eight
  keys from j // 8 * 8 on. Key j has word j % 8 // 2, an odd one with its halves exchanged, so that
  the leading 16 bits of no two keys are the same;
- the weight is dropped if that number is below ``threshold``, the rate in steps of 2**-32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["KEYS", "ROUNDS", "Dropout", "philox"]

ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., table 2)
KEYS = 8  # that share a counter

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _HALF, _WORD = np.uint64(0xFFFFFFFF), np.uint64(16), np.uint64(32)


class Dropout(NamedTuple):
    """Which weights of a problem are dropped."""

    rate: float  # 0 < rate < 1
    seed: int  # 64 bits
    offset: tuple[int, int, int, int]  # of (batch, head, query, key): where in a whole this is

    @property
    def threshold(self) -> int:
        """Numbers below it drop their weight."""
        return min(round(self.rate * 2**32), 2**32 - 1)

    @property
    def factor(self) -> float:
        """What weights that are kept are multiplied by."""
        return 1 / (1 - self.rate)

    def shifted(self, *start: int) -> Dropout:
        """That of a part which starts there."""
        b, h, i, j = (a + b for a, b in zip(self.offset, start, strict=True))
        return self._replace(offset=(b, h, i, j))

    def key_of(self, batch, head) -> tuple[np.ndarray, np.ndarray]:
        """The two words of the key of a flattened batch index and a query head, or of arrays."""
        words = _words(batch, self.offset[0]) + _words(head, self.offset[1])
        first, second, *_ = philox(words, _words(self.seed))
        return first, second

    def kept(self, batch, head, query, keys: slice) -> np.ndarray:
        """Is the weight kept? bool, of the shape to which the indices broadcast and the keys."""
        key = (word[..., None] for word in self.key_of(batch, head))
        rows = (word[..., None] for word in _words(query, self.offset[2]))
        first = self.offset[3] + keys.start
        blocks = np.arange((keys.stop - keys.start + first % KEYS + KEYS - 1) // KEYS)
        numbers = _numbers((*_words(blocks, first // KEYS), *rows), key)
        kept = np.stack([x >= np.uint64(self.threshold) for x in numbers], axis=-1)
        kept = kept.reshape(*kept.shape[:-2], kept.shape[-2] * kept.shape[-1])
        return kept[..., first % KEYS :][..., : keys.stop - keys.start]

    def kept_of(self, batch, head, query, key) -> np.ndarray:
        """Likewise of single weights, (n,), one head's."""
        j = np.asarray(key, np.uint64) + np.uint64(self.offset[3])
        counter = (*_words(j // np.uint64(KEYS)), *_words(query, self.offset[2]))
        numbers = np.stack(_numbers(counter, self.key_of(batch, head)))
        own = np.take_along_axis(numbers, (j % np.uint64(KEYS)).astype(np.intp)[None], axis=0)
        return own[0] >= np.uint64(self.threshold)


def _numbers(counter, key) -> list[np.ndarray]:
    """Of each key of a block the number that says whether its weight is kept."""
    words = philox(counter, key)
    exchanged = ((word << _HALF | word >> _HALF) & _LOW for word in words)
    return [x for pair in zip(words, exchanged, strict=True) for x in pair]


def philox(counter, key, rounds: int = ROUNDS) -> tuple[np.ndarray, ...]:
    """Philox4x32: four 32-bit words of the four of a counter and two of a key, all in uint64."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> _WORD) ^ c1 ^ k0, b & _LOW, (a >> _WORD) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _words(index, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high word of an index, of a whole in which it starts at `offset`."""
    x = np.asarray(index, np.uint64) + np.asarray(offset, np.uint64)
    return x & _LOW, x >> _WORD
