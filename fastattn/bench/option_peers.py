"""What users write for dropout, a graph and packed documents, where no operator is as fast."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .base import Candidate, Prepared
from .cases import Case
from .options import RATE, neighbours
from .torch_peers import Torch

__all__ = ["OPTION_PEERS"]

CHUNK = 250  # queries whose keys are gathered at once: a few MiB, which the caches hold


class NumpyGather(Candidate):
    """The keys and values of each query's neighbours gathered and multiplied, a chunk of queries at
    a time, one head on each thread: the products are too small for those of BLAS. All queries have
    as many neighbours, so that they are products.
    """

    name = "numpy-gather"
    packages = ("numpy",)
    options = ("graph",)
    only_options = True
    grouped = False

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        near = neighbours(case).astype(np.intp)  # what `take` would convert them to
        scale = q.dtype.type(1 / math.sqrt(case.head_dim))

        def attend(q, k, v, out):
            for begin in range(0, len(q), CHUNK):
                rows = slice(begin, begin + CHUNK)
                keys = near[rows]
                s = k.take(keys, axis=0) @ (q[rows] * scale)[..., None]
                s -= s.max(axis=1, keepdims=True)
                np.exp(s, out=s)
                s /= s.sum(axis=1, keepdims=True)
                np.matmul(s.swapaxes(1, 2), v.take(keys, axis=0), out=out[rows, None])

        pool = ThreadPoolExecutor(threads)

        def call():
            out = np.empty_like(q)
            heads = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, out))
            list(pool.map(attend, *heads))
            return out

        return Prepared(call, np.asarray)


class TorchFormula(Torch):
    """The formula in place: less to write than the kernel of `scaled_dot_product_attention` that
    has dropout.
    """

    name = "torch-formula"
    options = ("dropout",)
    only_options = True
    grouped = gradients = forward_mode = False

    def attention(self, case: Case) -> Callable:
        import torch
        from torch.nn.functional import dropout

        scale = 1 / math.sqrt(case.head_dim)

        def attend(query, key, value):
            scores = (query * scale) @ key.mT
            weights = torch.softmax(scores, dim=-1, out=scores)
            return dropout(weights, RATE, inplace=True) @ value

        return attend


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

        near = torch.from_numpy(neighbours(case).astype(np.int64))  # faster than int32
        starts = torch.arange(len(near) + 1) * near.shape[1]
        zeros = torch.zeros(near.numel(), dtype=getattr(torch, case.dtype))
        with warnings.catch_warnings(action="ignore"):  # its sparse tensors are a beta
            pattern = torch.sparse_csr_tensor(starts, near.flatten(), zeros, case.grid)
        scale = 1 / math.sqrt(case.head_dim)

        def attend_head(query, key, value):
            pairs = torch.sparse.sampled_addmm(pattern, query, key.mT, beta=0.0, alpha=scale)
            weights = torch.softmax(pairs.values().view(near.shape), dim=-1)
            return embedding_bag(near, value, per_sample_weights=weights, mode="sum")

        def attend(query, key, value):
            if case.work == "forward":  # where a result may be written into an array
                out = torch.empty_like(query)
                for b, h in np.ndindex(case.batch, case.heads):
                    out[b, h] = attend_head(query[b, h], key[b, h], value[b, h])
                return out
            heads = zip(*(x.flatten(0, 1).unbind() for x in (query, key, value)), strict=True)
            return torch.stack([attend_head(*one) for one in heads]).view(query.shape)

        return attend


class TorchPacked(Torch):
    """A call for each document: on a CPU faster than one on padded or nested tensors."""

    name = "torch-packed"
    options = ("packed",)
    functions = True
    forward_mode = False

    def belongs(self, case: Case) -> bool:
        return case.documents

    def unavailable(self, case: Case, threads: int) -> str | None:
        if not case.documents:
            return "is for documents end to end alone"
        return super().unavailable(case, threads)

    def grids(self, case: Case) -> int:
        return 0

    def attention(self, case: Case) -> Callable:
        from torch.nn.functional import scaled_dot_product_attention

        def attend(*arrays):
            documents = zip(*(self.split(x, case) for x in arrays), strict=True)
            return [
                scaled_dot_product_attention(
                    *one, is_causal=case.causal, enable_gqa=case.grouped
                )
                for one in documents
            ]  # fmt: skip

        return attend

    @staticmethod
    def split(x, case: Case):
        """The documents of a tensor, as views."""
        return x.split(np.diff(case.document_bounds()).tolist(), dim=2)

    def like_result(self, x, case: Case):
        return self.split(x, case)

    def result(self, found) -> np.ndarray:
        import torch

        return self.read(torch.cat(found, dim=2))


OPTION_PEERS: tuple[Candidate, ...] = (
    NumpyGather(),
    TorchFormula(),
    TorchSparse(),
    TorchPacked(),
)
