"""What options cost: ``python benchmarks/options.py [benchmarks/results/NAME-options.json]``.

Each beside the same call without it and beside what a user of PyTorch or NumPy would write instead,
with as many threads, in its best spelling. The calls of a group run in turns; medians are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn.bench import machine, timing
from fastattn.bench.candidates import limit_blas
from fastattn.bench.ranking import conditions

SHAPE = (1, 8, 2048, 64)
RATE = 0.1
REACH = 128
NODES, NEIGHBOURS = 100_000, 16
SHORTEST, LONGEST, SEQUENCES = 16, 512, 64
CHUNK = 250  # nodes whose neighbours NumPy gathers at once: more leaves the cache

Calls = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, help="of the JSON file to write")
    parser.add_argument("--repeat", type=int, default=11, help="rounds of a group; default: 11")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    chosen = parser.parse_args()
    threads = machine.default_threads()
    use_threads(threads)
    groups = {}
    for name in chosen.only:
        times = timing.interleave(dict(warmed(GROUPS[name]())), chosen.repeat)
        groups[name] = {call: taken.median for call, taken in times.items()}
        first = next(iter(groups[name].values()))
        print(name)
        for call, seconds in groups[name].items():
            print(f"  {call:42} {1e3 * seconds:10.2f} ms {seconds / first:8.2f}x")
    if chosen.path is not None:
        found = {**conditions(threads), "repeat": chosen.repeat, "groups": groups}
        chosen.path.write_text(json.dumps(found, indent=1) + "\n")


def use_threads(threads: int) -> None:
    import torch

    limit_blas(threads)
    torch.set_num_threads(threads)


def warmed(calls: Calls) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, call in calls.items():
        call()
        yield name, call


def arrays(shape=SHAPE, n=3, seed=0) -> list[np.ndarray]:
    """Standard normal arrays of one shape."""
    return list(np.random.default_rng(seed).standard_normal((n, *shape), np.float32))


def tensors(found, gradients=False):
    import torch

    return [torch.from_numpy(x).requires_grad_(gradients) for x in found]


def forward() -> Calls:
    import torch

    q, k, v = arrays()
    bias = arrays((8, 2 * REACH + 1), 1)[0]
    query, key, value = tensors((q, k, v))
    grid = torch.from_numpy(on_grid(bias))[None]
    attend = torch.inference_mode()(torch.nn.functional.scaled_dot_product_attention)
    ours = partial(fastattn.scaled_dot, q, k, v)
    return {
        "fastattn": ours,
        "fastattn, dropout": partial(ours, dropout=(RATE, 1)),
        "fastattn, relative_bias": partial(ours, relative_bias=bias),
        "fastattn, return_max": partial(ours, return_max=True),
        "torch": partial(attend, query, key, value),
        "torch, dropout_p": partial(attend, query, key, value, dropout_p=RATE),
        "torch, attn_mask of relative biases": partial(attend, query, key, value, attn_mask=grid),
    }


def on_grid(bias: np.ndarray) -> np.ndarray:
    """The bias of each query and key, (heads, queries, keys)."""
    i = np.arange(SHAPE[2])
    return bias[:, np.clip(i - i[:, None], -REACH, REACH) + REACH]


def backward() -> Calls:
    import torch

    q, k, v = arrays()
    grad = arrays(n=1, seed=1)[0]
    bias = arrays((8, 2 * REACH + 1), 1)[0]

    def ours(wrt=(), **options):
        _, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, wrt=wrt, **options)
        return partial(pullback, grad)

    sources = tensors((q, k, v), gradients=True)
    learned = tensors([bias], gradients=True)
    i = torch.arange(SHAPE[2])
    distance = (i - i[:, None]).clip(-REACH, REACH) + REACH

    def torchs(more, attn_mask=None, dropout_p=0.0):
        out = torch.nn.functional.scaled_dot_product_attention(
            *sources, attn_mask=attn_mask, dropout_p=dropout_p
        )
        return partial(
            torch.autograd.grad, out, sources + more, torch.from_numpy(grad), retain_graph=True
        )

    return {
        "fastattn": ours(),
        "fastattn, dropout": ours(dropout=(RATE, 1)),
        "fastattn, relative_bias and its gradient": ours(("relative_bias",), relative_bias=bias),
        "torch": torchs([]),
        "torch, dropout_p": torchs([], dropout_p=RATE),
        "torch, relative biases and their gradient": torchs(learned, learned[0][None, :, distance]),
    }


def forward_mode() -> Calls:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, dq, dk, dv = arrays(n=6)
    primals, tangents = tuple(tensors((q, k, v))), tuple(tensors((dq, dk, dv)))

    def torchs():
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the kernel that has a rule
            attend = torch.nn.functional.scaled_dot_product_attention
            return torch.func.jvp(attend, primals, tangents)

    ours = partial(fastattn.jvp, fastattn.scaled_dot, (q, k, v))
    return {
        "fastattn, no tangent": partial(fastattn.scaled_dot, q, k, v),
        "fastattn.jvp, of q": partial(ours, (dq, None, None)),
        "fastattn.jvp, of q, k and v": partial(ours, (dq, dk, dv)),
        "torch.func.jvp, of q, k and v": torchs,
    }


def graph() -> Calls:
    """A node attends to its neighbours: 8 heads, 100 000 nodes."""
    import scipy.sparse
    import torch

    q, k, v = arrays((8, NODES, 64))
    # Sorted draws, each moved by its place: no neighbour comes twice.
    neighbours = np.random.default_rng(0).integers(0, NODES - NEIGHBOURS, (NODES, NEIGHBOURS))
    neighbours = np.sort(neighbours, axis=1) + np.arange(NEIGHBOURS)
    starts = np.arange(0, NODES * NEIGHBOURS + 1, NEIGHBOURS)
    entries = np.ones(neighbours.size, bool)
    mask = scipy.sparse.csr_array((entries, neighbours.ravel(), starts), (NODES, NODES))

    def numpys():
        out = np.empty_like(v)
        for head, first in np.ndindex(8, NODES // CHUNK):
            rows = slice(first * CHUNK, (first + 1) * CHUNK)
            near = neighbours[rows]
            s = k[head].take(near, axis=0) @ (q[head, rows] * np.float32(1 / 8))[..., None]
            s -= s.max(axis=1, keepdims=True)
            np.exp(s, out=s)
            s /= s.sum(axis=1, keepdims=True)
            out[head, rows] = (s.swapaxes(1, 2) @ v[head].take(near, axis=0))[:, 0]
        return out

    query, key, value, near = tensors((q, k, v, neighbours))
    indices = torch.from_numpy(starts), near.ravel()
    pattern = torch.sparse_csr_tensor(*indices, torch.zeros(near.numel()), (NODES, NODES))

    @torch.inference_mode()
    def torchs():
        out = torch.empty_like(value)
        for head in range(8):
            s = torch.sparse.sampled_addmm(pattern, query[head], key[head].T, beta=0, alpha=1 / 8)
            weights = torch.softmax(s.values().view(NODES, NEIGHBOURS), dim=1)
            out[head] = torch.nn.functional.embedding_bag(
                near, value[head], mode="sum", per_sample_weights=weights
            )
        return out

    ours = partial(fastattn.scaled_dot, q, k, v, mask=mask)
    for other in (numpys(), torchs().numpy()):
        np.testing.assert_allclose(ours(), other, atol=1e-5)
    return {
        "fastattn, mask of CSR": ours,
        "NumPy, take and matmul": numpys,
        "torch, sampled_addmm and embedding_bag": torchs,
    }


def packed() -> Calls:
    """Sequences of 16 to 512 tokens, 8 heads, packed and padded; seconds for the same results."""
    import torch

    lengths = np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, SEQUENCES)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v = arrays((int(bounds[-1]), 8, 64))
    padded = [np.zeros((SEQUENCES, 8, LONGEST, 64), np.float32) for _ in "qkv"]
    for to, x in zip(padded, (q, k, v), strict=True):
        for b, (start, stop) in enumerate(pairwise(bounds)):
            to[b, :, : stop - start] = x[start:stop].swapaxes(0, 1)
    visible = torch.from_numpy(np.arange(LONGEST) < lengths[:, None])[:, None, None]
    own = tensors(x.swapaxes(0, 1) for x in (q, k, v))
    attend = torch.inference_mode()(torch.nn.functional.scaled_dot_product_attention)

    def one_by_one():
        for start, stop in pairwise(bounds):
            attend(*(x[None, :, start:stop] for x in own))

    return {
        "fastattn.varlen": partial(fastattn.varlen, q, k, v, lengths=lengths),
        "fastattn, padded, kv_lengths": partial(fastattn.scaled_dot, *padded, kv_lengths=lengths),
        "torch, one call a sequence": one_by_one,
        "torch, padded, attn_mask": partial(attend, *tensors(padded), attn_mask=visible),
    }


GROUPS = {f.__name__.replace("_", " "): f for f in (forward, backward, forward_mode, graph, packed)}

if __name__ == "__main__":
    main()
