"""What a cache keeps of a token in each head: the fields of its key, and of its value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .arguments import count, flag
from .dtypes import as_real
from .page_pool import PagePool
from .storage import Storage, storage

__all__ = ["TokenLayout", "token_layout"]


class TokenLayout(NamedTuple):
    """How keys and values lie in the pages of a pool. A field is an array of it: the numbers of the
    keys, those of the values, then the scales of both if there are some.
    """

    storage: Storage
    dims: tuple[int, int]  # of a key and of a value
    values_in_keys: bool  # are the values the first columns of the keys, with no fields of theirs?

    def new_pool(self, kv_heads: int, pages: int) -> PagePool:
        """A pool of so many pages."""
        dims = self.dims[:1] if self.values_in_keys else self.dims
        pool = PagePool(kv_heads, _by_field([self.storage.fields(dim) for dim in dims]))
        pool.grow(pages)
        return pool

    def rounded(self, tokens: Sequence[np.ndarray], counts: np.ndarray | None) -> list[np.ndarray]:
        """The fields of `tokens`, (batch, kv_heads, n, dim) arrays of keys and maybe values; of the
        first ``counts[b]`` of each sequence, if given.
        """
        live = None
        if counts is not None:
            live = np.arange(tokens[0].shape[2]) < counts[:, None, None]
        named = zip("kv", tokens, strict=False)
        return _by_field([self.storage.rounded(name, x, live) for name, x in named])

    def operands(self, fields: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """The pools of keys and of values, then those of their scales."""
        if not self.values_in_keys:
            return fields
        of_values = self.storage.fields(self.dims[1])
        values = [k[..., : shape[0]] for k, (shape, _) in zip(fields, of_values, strict=True)]
        return tuple(_by_field([fields, values]))

    def widened(self, fields: list[np.ndarray], dim: int) -> np.ndarray:
        """Rows of `dim` numbers in float32, or in float64 where that is stored."""
        real = np.float64 if self.storage.dtype == np.float64 else np.float32
        return as_real(fields[0], fields[1] if fields[1:] else None, real, dim)


def token_layout(head_dim, value_dim, values_in_keys, dtype) -> TokenLayout:
    """The layout that these arguments of a cache ask for, or an error."""
    head_dim = count("head_dim", head_dim)
    value_dim = head_dim if value_dim is None else count("value_dim", value_dim)
    values_in_keys = flag("values_in_keys", values_in_keys)
    if values_in_keys and value_dim > head_dim:
        raise ValueError(
            f"value_dim: expected at most head_dim {head_dim} with values_in_keys, got {value_dim}"
        )
    return TokenLayout(storage(dtype), (head_dim, value_dim), values_in_keys)


def _by_field(stored: Iterable) -> list:
    """Of the fields of keys and maybe of values: the numbers of both, then the scales of both."""
    return [field for fields in zip(*stored, strict=True) for field in fields]
