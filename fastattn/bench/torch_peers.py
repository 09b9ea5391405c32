"""PyTorch, in each spelling of attention that it runs best on."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .base import Candidate, Prepared
from .cases import Case
from .options import RATE, REACH, biases, on_grid, relative_biases

__all__ = ["Torch", "TorchCuda", "TorchFlex"]

ROWS = 128  # queries whose scores are made at a time for their largest


class Torch(Candidate):
    """``torch.nn.functional.scaled_dot_product_attention``, which takes its flash kernel."""

    name = "torch"
    packages = ("torch",)
    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "bfloat16")
    options: tuple[str, ...] = ("dropout", "relative_bias", "return_max")
    device = "cpu"
    gradients = forward_mode = True

    def grids(self, case: Case) -> int:
        if case.option == "return_max" and case.work == "forward":
            return 0
        # Its kernel without an array of scores has no dropout, biases only if they are not learned,
        # and no rule for tangents.
        if case.option or case.forward_mode:
            return 2 if case.work == "forward" else 6
        return 0

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        import torch

        torch.set_num_threads(threads)
        sources = [self.tensor(x) for x in (q, k, v)]
        attend = self.attention(case)
        if case.work == "forward":
            return Prepared(partial(torch.inference_mode()(attend), *sources), self.result)
        if case.forward_mode:
            return self.push(attend, sources, [self.tensor(x) for x in case.tangents()])
        if case.option == "relative_bias":
            sources.append(self.tensor(relative_biases(case)))
        for x in sources:
            x.requires_grad_()
        grad_out = self.like_result(self.tensor(case.grad_out()), case)

        def train():
            return torch.autograd.grad(attend(*sources), sources, grad_out)

        out = attend(*sources)

        def differentiate():
            return torch.autograd.grad(out, sources, grad_out, retain_graph=True)

        call = train if case.work == "training step" else differentiate
        return Prepared(call, lambda gradients: self.read(gradients[0]))

    def push(self, attend: Callable, sources: list, tangents: list) -> Prepared:
        """Forward mode along tangents of the first of the sources."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        n = len(tangents)

        def along(*first):
            return attend(*first, *sources[n:])

        def call():
            with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the kernel that has a rule
                return torch.func.jvp(along, tuple(sources[:n]), tuple(tangents))

        return Prepared(call, lambda found: self.read(found[1]))

    def attention(self, case: Case) -> Callable:
        """A function of query, key, value and, where it is learned, the relative bias."""
        from torch.nn.functional import scaled_dot_product_attention

        # `is_causal` is its fast way, but starts at the first key; a mask says all else.
        is_causal = case.causal and case.window is None and case.n_queries == case.n_keys
        seen = None if is_causal else case.mask()
        mask = None if seen is None else self.tensor(seen)
        options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": case.grouped}
        if case.option == "dropout":
            options["dropout_p"] = RATE
        if case.option == "relative_bias" and case.work == "forward":
            mask = self.tensor(biases(case)[None])
        where = self.tensor(on_grid(case).ravel()) if case.option == "relative_bias" else None

        def attend(query, key, value, *learned):
            bias = mask
            for table in learned:  # the gradient of `index_select` is a fifth of that of an index
                bias = table.index_select(1, where).view(1, case.heads, *case.grid)
            out = scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)
            return (out, largest(query, key)) if case.option == "return_max" else out

        return attend

    def result(self, found) -> np.ndarray:
        """What `attention` returned; a largest score is one number more."""
        if not isinstance(found, tuple):
            return self.read(found)
        out, row_max = found
        return np.concatenate([self.read(out), self.read(row_max)], axis=-1)

    def like_result(self, x, case: Case):
        """A tensor in the form in which `attention` returns its result."""
        return x

    def tensor(self, x):
        """`x` as a tensor where this one computes."""
        import torch

        if x.dtype.name == "bfloat16":  # torch reads NumPy's own dtypes only
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(x).to(self.device)

    def read(self, out) -> np.ndarray:
        import torch

        # Nor does NumPy know bfloat16.
        return out.to(torch.promote_types(out.dtype, torch.float32)).cpu().numpy()


class TorchFlex(Torch):
    """``torch.nn.attention.flex_attention``, compiled, with its own block mask."""

    name = "torch-flex"
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    functions = True
    options: tuple[str, ...] = ("relative_bias",)
    gradients = forward_mode = windows = False

    def belongs(self, case: Case) -> bool:
        return bool(case.function or case.option) and super().belongs(case)

    def grids(self, case: Case) -> int:
        return 0

    def unavailable(self, case: Case, threads: int) -> str | None:
        if not (case.function or case.option) or case.causal:
            return "is called for functions of the user's alone"
        return super().unavailable(case, threads)

    def missing(self) -> str | None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "torch.compile finds no C++ compiler"
        return super().missing()

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.set_num_threads(threads)
        functions: dict[str, Any] = dict(case.functions(torch.from_numpy))
        if case.option == "relative_bias":
            functions["score_mod"] = biased(case)
        if "mask_mod" in functions:
            functions["block_mask"] = create_block_mask(
                functions.pop("mask_mod"), None, None, case.n_queries, case.n_keys, device="cpu"
            )
        arrays = [self.tensor(x) for x in (q, k, v)]
        attend = torch.compile(flex_attention, dynamic=False)

        def call():
            with torch.inference_mode():
                return attend(*arrays, enable_gqa=case.grouped, **functions)

        call()  # compiles
        return Prepared(call, self.read)


class TorchCuda(Torch):
    """The same on a GPU, where it takes whichever of its kernels it thinks the best."""

    name = "torch-cuda"
    only_named = True
    options: tuple[str, ...] = ()
    forward_mode = False
    device = "cuda"

    def missing(self) -> str | None:
        absent = super().missing()
        if absent is None:
            import torch

            absent = None if torch.cuda.is_available() else "torch finds no CUDA device"
        return absent

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        return self.finished(super().prepare(q, k, v, case, threads))

    @staticmethod
    def finished(prepared: Prepared) -> Prepared:
        """The same, whose call waits until the result is there."""
        import torch

        def call():
            out = prepared.call()
            torch.cuda.synchronize()
            return out

        return Prepared(call, prepared.read)


def largest(query, key):
    """The largest score of each query: some queries at a time, which the caches hold."""
    import torch

    keys = key.mT
    found = [(some @ keys).amax(dim=-1, keepdim=True) for some in query.split(ROWS, dim=2)]
    return torch.cat(found, dim=2) / math.sqrt(query.shape[-1])


def biased(case: Case) -> Callable:
    """A score with its relative bias, for `flex_attention`."""
    import torch

    table = torch.from_numpy(relative_biases(case))
    first = case.n_keys - case.n_queries

    def score_mod(score, batch, head, i, j):
        return score + table[head, torch.clamp(j - i - first, -REACH, REACH) + REACH]

    return score_mod
