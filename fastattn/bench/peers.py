"""The libraries that fastattn is measured against, each in the spelling that it runs best on.

A package is imported in the one `prepare` that needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np

from .base import Candidate, Prepared
from .cases import Case
from .onnxruntime_peers import ONNXRUNTIME
from .option_peers import OPTION_PEERS
from .options import biases, on_grid, relative_biases
from .torch_peers import Torch, TorchCuda, TorchFlex

__all__ = ["PEERS", "Jax"]


class Jax(Candidate):
    """``jax.nn.dot_product_attention``, compiled, in its layout (batch, length, H, D)."""

    name = "jax"
    packages = ("jax", "jaxlib")
    dtypes: tuple[str, ...] = ("float32",)  # its softmax is float32 whatever comes in
    inside: tuple[str, ...] = ("", "jax")
    options: tuple[str, ...] = ("relative_bias",)
    gradients = forward_mode = True
    causal_at_the_end = False

    def unavailable(self, case: Case, threads: int) -> str | None:
        if "jax" in sys.modules and os.environ.get("NPROC") != str(threads):
            return f"was started with other than {threads} threads, and keeps them"
        return super().unavailable(case, threads)

    def grids(self, case: Case) -> int:
        own = case.option == "relative_bias"
        return (2 if case.work == "forward" else 4) + own

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        os.environ["NPROC"] = str(threads)  # how XLA is told, before it starts
        import jax

        jax.config.update("jax_platforms", "cpu")
        attention = self.attention()

        where = on_grid(case) if case.option == "relative_bias" else None

        def attend(q, k, v, *biased):
            options = {"is_causal": case.causal, "local_window_size": case.window}
            if biased:  # in a forward pass for each query and key, else learned
                learned = case.work != "forward"
                options["bias"] = biased[0][None, :, where] if learned else biased[0]
            return attention(q, k, v, **options)

        def array(x):
            return jax.numpy.asarray(np.ascontiguousarray(x.swapaxes(1, 2)))

        arrays = [array(x) for x in (q, k, v)]
        if case.option == "relative_bias":
            made = biases(case)[None] if case.work == "forward" else relative_biases(case)
            arrays.append(jax.numpy.asarray(made))
        more = [array(x) for x in case.tangents() or [case.grad_out()]]
        function, arguments = self.program(attend, arrays, more, case)
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*arguments))

        def read(found):
            if case.work != "forward":
                found = found[1] if case.forward_mode else found[0]
            return np.asarray(found).swapaxes(1, 2)

        return Prepared(lambda: jax.block_until_ready(compiled(*arguments)), read)

    @staticmethod
    def program(attend: Callable, arrays: list, more: list, case: Case) -> tuple[Callable, list]:
        """The work of `case` as a function, and its arguments; `more` are tangents or gradients."""
        import jax

        def push(arrays, tangents):
            n = len(tangents)
            return jax.jvp(lambda *first: attend(*first, *arrays[n:]), arrays[:n], tangents)

        def train(arrays, grad_out):
            return jax.vjp(attend, *arrays)[1](grad_out)

        def differentiate(pullback, grad_out):
            return pullback(grad_out)

        if case.work == "forward":
            return attend, arrays
        if case.forward_mode:
            return push, [arrays, more]
        if case.work == "training step":
            return train, [arrays, *more]
        pullback = jax.jit(lambda *x: jax.vjp(attend, *x)[1])(*arrays)
        return differentiate, [pullback, *more]

    def attention(self) -> Callable:
        import jax

        return jax.nn.dot_product_attention


class OpenVino(Candidate):
    """OpenVINO's ``scaled_dot_product_attention``, compiled for latency, in float32 throughout."""

    name = "openvino"
    packages = ("openvino",)
    dtypes = ("float32",)
    options = ("relative_bias",)
    grouped = windows = causal_at_the_end = False

    def grids(self, case: Case) -> int:
        return int(case.option == "relative_bias")

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        # Otherwise importing it forks a process that reports to its makers, unasked.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino  # type: ignore
        from openvino import opset13

        arrays = [q, k, v]
        if case.option == "relative_bias":
            arrays.append(biases(case)[None])
        inputs = [opset13.parameter(x.shape, np.float32) for x in arrays]
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
        for index, x in enumerate(arrays):
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
    *OPTION_PEERS,
)
