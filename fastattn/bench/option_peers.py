"""What users write for a graph and for packed documents, where no library has an operator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from .base import Candidate, Prepared
from .cases import Case
from .machine import cannot_limit_blas, limit_blas
from .options import neighbours
from .peers import Torch

__all__ = ["OPTION_PEERS"]

CHUNK = 250  # queries whose keys are gathered at once: a few MiB, which the caches hold


class NumpyGather(Candidate):
    """The keys and values of each query's neighbours gathered and multiplied, a chunk of queries at
    a time. All have as many neighbours, so that these are matrix products.
    """

    name = "numpy-gather"
    packages = ("numpy",)
    options = ("graph",)
    only_options = True
    grouped = False

    def unavailable(self, case: Case, threads: int) -> str | None:
        return super().unavailable(case, threads) or cannot_limit_blas(threads)

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        limit_blas(threads)
        near = neighbours(case)
        scale = q.dtype.type(1 / math.sqrt(case.head_dim))

        def call():
            out = np.empty_like(q)
            for b, h, begin in np.ndindex(case.batch, case.heads, -(-case.n_queries // CHUNK)):
                rows = slice(begin * CHUNK, (begin + 1) * CHUNK)
                gathered = k[b, h].take(near[rows], axis=0)
                s = (gathered @ (q[b, h, rows, :, None] * scale))[..., 0]
                s -= s.max(axis=1, keepdims=True)
                np.exp(s, out=s)
                s /= s.sum(axis=1, keepdims=True)
                gathered = v[b, h].take(near[rows], axis=0)
                np.matmul(s[:, None], gathered, out=out[b, h, rows, None])
            return out

        return Prepared(call, np.asarray)


class TorchSparse(Torch):
    """Products of the listed pairs alone by ``torch.sparse.sampled_addmm``, and ``embedding_bag``
    for the weighted sums: a few calls a head, and no gathered keys or values.
    """

    name = "torch-sparse"
    dtypes = ("float32", "float64")
    options = ("graph",)
    only_options = True
    grouped = forward_mode = False

    def grids(self, case: Case) -> int:
        return 0

    def attention(self, case: Case) -> Callable:
        import torch
        from torch.nn.functional import embedding_bag

        near = torch.from_numpy(neighbours(case)).long()
        starts = torch.arange(len(near) + 1) * near.shape[1]
        zeros = torch.zeros(near.numel(), dtype=getattr(torch, case.dtype))
        with warnings.catch_warnings(action="ignore"):  # its sparse tensors are a beta
            pattern = torch.sparse_csr_tensor(starts, near.flatten(), zeros, case.grid)
        scale = 1 / math.sqrt(case.head_dim)

        def attend(query, key, value):
            found = []
            for b, h in np.ndindex(case.batch, case.heads):
                pairs = torch.sparse.sampled_addmm(
                    pattern, query[b, h], key[b, h].mT, beta=0.0, alpha=scale
                )
                weights = torch.softmax(pairs.values().view(near.shape), dim=-1)
                found.append(embedding_bag(near, value[b, h], per_sample_weights=weights,
                                           mode="sum"))  # fmt: skip
            return torch.stack(found).view(query.shape)

        return attend


class TorchPacked(Torch):
    """A call for each document: on a CPU faster than one on padded or nested tensors."""

    name = "torch-packed"
    options = ("packed",)
    only_options = True
    forward_mode = False

    def grids(self, case: Case) -> int:
        return 0

    def attention(self, case: Case) -> Callable:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        bounds = case.document_bounds().tolist()

        def attend(*arrays):
            found = [
                scaled_dot_product_attention(
                    *(x[:, :, start:stop] for x in arrays),
                    is_causal=case.causal, enable_gqa=case.grouped,
                )
                for start, stop in pairwise(bounds)
            ]  # fmt: skip
            return torch.cat(found, dim=2)

        return attend


OPTION_PEERS: tuple[Candidate, ...] = (NumpyGather(), TorchSparse(), TorchPacked())
