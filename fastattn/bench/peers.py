"""The libraries that fastattn is measured against, each in the spelling that it runs best on.

A package is imported in the one `prepare` that needs it.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .base import Candidate, Prepared
from .cases import Case
from .onnxruntime_peers import ONNXRUNTIME
from .options import RATE, on_grid, relative_biases

__all__ = ["PEERS", "Jax", "Torch", "TorchCuda"]


class Torch(Candidate):
    """``torch.nn.functional.scaled_dot_product_attention``, which takes its flash kernel."""

    name = "torch"
    packages = ("torch",)
    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "bfloat16")
    options: tuple[str, ...] = ("dropout", "relative_bias", "return_max")
    device = "cpu"
    gradients = forward_mode = True

    def grids(self, case: Case) -> int:
        # Its kernel without an array of scores has no dropout, no rule for tangents, no maxima.
        alone = not case.option and case.work != "forward mode"
        return 0 if alone else 2 if case.work == "forward" else 6

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        import torch

        torch.set_num_threads(threads)
        sources = [self.tensor(x) for x in (q, k, v)]
        attend = self.attention(case)

        def read(found):
            return self.read(found[0] if isinstance(found, tuple) else found)

        if case.work == "forward":
            return Prepared(partial(torch.inference_mode()(attend), *sources), read)
        if case.work == "forward mode":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            tangents = tuple(self.tensor(x) for x in case.tangents())

            def push():
                with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the kernel that has a rule
                    return torch.func.jvp(attend, tuple(sources), tangents)

            return Prepared(push, lambda found: self.read(found[1]))
        if case.option == "relative_bias":
            sources.append(self.tensor(relative_biases(case)))
        for x in sources:
            x.requires_grad_()
        grad_out = self.tensor(case.grad_out())

        def train():
            return torch.autograd.grad(attend(*sources), sources, grad_out)

        out = attend(*sources)

        def differentiate():
            return torch.autograd.grad(out, sources, grad_out, retain_graph=True)

        return Prepared(train if case.work == "training step" else differentiate, read)

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
        if case.option == "relative_bias":
            where = self.tensor(on_grid(case))
            if case.work == "forward":
                mask = self.tensor(relative_biases(case))[None, :, where]

        def attend(query, key, value, *learned):
            bias = learned[0][None, :, where] if learned else mask
            out = scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)
            if case.option != "return_max":
                return out
            return out, (query @ key.mT).amax(dim=-1) / math.sqrt(case.head_dim)

        return attend

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
    options: tuple[str, ...] = ()
    gradients = windows = False

    def belongs(self, case: Case) -> bool:
        return bool(case.function) and super().belongs(case)

    def unavailable(self, case: Case, threads: int) -> str | None:
        if not case.function or case.causal:
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


class Jax(Candidate):
    """``jax.nn.dot_product_attention``, compiled, in its layout (batch, length, H, D)."""

    name = "jax"
    packages = ("jax", "jaxlib")
    dtypes: tuple[str, ...] = ("float32",)  # its softmax is float32 whatever comes in
    inside: tuple[str, ...] = ("", "jax")
    gradients = forward_mode = True
    causal_at_the_end = False

    def unavailable(self, case: Case, threads: int) -> str | None:
        if "jax" in sys.modules and os.environ.get("NPROC") != str(threads):
            return f"was started with other than {threads} threads, and keeps them"
        return super().unavailable(case, threads)

    def grids(self, case: Case) -> int:
        return 2 if case.work == "forward" else 4

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        os.environ["NPROC"] = str(threads)  # how XLA is told, before it starts
        import jax

        jax.config.update("jax_platforms", "cpu")
        attention = self.attention()

        def attend(q, k, v):
            return attention(q, k, v, is_causal=case.causal, local_window_size=case.window)

        def array(x):
            return jax.numpy.asarray(np.ascontiguousarray(x.swapaxes(1, 2)))

        def train(q, k, v, grad_out):
            return jax.vjp(attend, q, k, v)[1](grad_out)

        def differentiate(pullback, grad_out):
            return pullback(grad_out)

        def push(*arrays):
            return jax.jvp(attend, arrays[:3], arrays[3:])

        arrays = [array(x) for x in (q, k, v)]
        function: Callable = attend
        arguments: list = arrays
        if case.work == "forward mode":
            function, arguments = push, [*arrays, *(array(x) for x in case.tangents())]
        elif case.work != "forward":
            function, arguments = train, [*arrays, array(case.grad_out())]
        if case.work == "backward":
            pullback = jax.jit(lambda *x: jax.vjp(attend, *x)[1])(*arrays)
            function, arguments = differentiate, [pullback, arguments[3]]
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*arguments))

        def read(found):
            if case.work != "forward":
                found = found[1] if case.work == "forward mode" else found[0]
            return np.asarray(found).swapaxes(1, 2)

        return Prepared(lambda: jax.block_until_ready(compiled(*arguments)), read)

    def attention(self) -> Callable:
        import jax

        return jax.nn.dot_product_attention


class OpenVino(Candidate):
    """OpenVINO's ``scaled_dot_product_attention``, compiled for latency, in float32 throughout."""

    name = "openvino"
    packages = ("openvino",)
    dtypes = ("float32",)
    grouped = windows = causal_at_the_end = False

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        # Otherwise importing it forks a process that reports to its makers, unasked.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino  # type: ignore
        from openvino import opset13

        inputs = [opset13.parameter(x.shape, np.float32) for x in (q, k, v)]
        node = opset13.scaled_dot_product_attention(*inputs, causal=case.causal)
        compiled = openvino.Core().compile_model(
            openvino.Model([node], inputs, "attention"),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        request = compiled.create_infer_request()
        for index, x in enumerate((q, k, v)):
            request.set_input_tensor(index, openvino.Tensor(x, shared_memory=True))

        def call():
            request.infer()
            return request.get_output_tensor().data

        return Prepared(call, np.asarray)


PEERS: tuple[Candidate, ...] = (
    Torch(),
    TorchFlex(),
    TorchCuda(),
    *ONNXRUNTIME,
    Jax(),
    OpenVino(),
)
