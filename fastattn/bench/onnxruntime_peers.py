"""The operators of onnxruntime that compute attention on the CPU; a row has the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .base import Candidate, Prepared
from .cases import Case
from .options import biases

__all__ = ["ONNXRUNTIME"]


class OnnxRuntime(Candidate):
    """``com.microsoft.MultiHeadAttention``, in its own layout (batch, length, H * D)."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")
    dtypes = ("float32",)
    options = ("relative_bias",)
    grouped = windows = causal_at_the_end = False

    def grids(self, case: Case) -> int:
        # Its flash kernel has no causal mask, and no biases.
        return 2 if case.option == "relative_bias" else int(case.causal)

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        feed = {name: _packed(x) for name, x in zip("qkv", (q, k, v), strict=True)}
        operands = [*feed]
        if case.option == "relative_bias":
            feed["bias"] = biases(case)[None]
            operands += ["", "", "bias"]
        session = _session(
            "MultiHeadAttention", feed, {"out": feed["q"]}, threads, domain="com.microsoft",
            operands=operands, num_heads=case.heads, unidirectional=int(case.causal),
        )  # fmt: skip
        return Prepared(lambda: session.run(None, feed)[0], lambda out: _by_head(out, q.shape))


class OnnxRuntimeAttention(Candidate):
    """``Attention`` of ONNX's opset 23, in the layout (batch, heads, length, D)."""

    name = "onnxruntime-attention"
    packages = ("onnxruntime", "onnx")
    dtypes = ("float32",)
    options = ("relative_bias",)
    windows = causal_at_the_end = False

    def grids(self, case: Case) -> int:
        return 1 + (case.option == "relative_bias")

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        feed = {"q": q, "k": k, "v": v}
        if case.option == "relative_bias":
            feed["mask"] = biases(case)[None]
        session = _session("Attention", feed, {"out": q}, threads, is_causal=int(case.causal))
        return Prepared(lambda: session.run(None, feed)[0], np.asarray)


class OnnxRuntimeGroupQuery(Candidate):
    """``com.microsoft.GroupQueryAttention``: causal, by its flash kernel, with the keys and values
    in a buffer of its own that takes the new ones in place (IO binding).
    """

    name = "onnxruntime-gqa"
    packages = ("onnxruntime", "onnx")
    dtypes = ("float32",)

    def unavailable(self, case: Case, threads: int) -> str | None:
        reason = super().unavailable(case, threads)
        if reason is None and not case.causal and not case.decodes:
            reason = "is always causal"
        if reason is None and case.batch > 1 and case.n_queries not in (1, case.n_keys):
            reason = "takes one sequence where it goes on with several tokens"
        return reason

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        import onnxruntime

        new = (slice(None), slice(None), slice(case.n_keys - case.n_queries, None))
        lengths = np.full(case.batch, case.n_keys - 1, np.int32)  # less one, as it wants them
        feed = {
            "q": _packed(q), "k": _packed(k[new]), "v": _packed(v[new]), "past_k": k.copy(),
            "past_v": v.copy(), "lengths": lengths, "longest": np.array([case.n_keys], np.int32),
        }  # fmt: skip
        results = {"out": feed["q"], "present_k": k, "present_v": v}
        left = -1 if case.window is None else case.window[0] + 1
        session = _session(
            "GroupQueryAttention", feed, results, threads, domain="com.microsoft",
            num_heads=case.heads, kv_num_heads=k.shape[1], local_window_size=left,
        )  # fmt: skip
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in feed.items()}
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out")
        for name in "kv":
            binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])

        def call():
            session.run_with_iobinding(binding)
            return binding.get_outputs()[0]

        return Prepared(call, lambda out: _by_head(out.numpy(), q.shape))


def _packed(x: np.ndarray) -> np.ndarray:
    """(batch, heads, length, dim) as (batch, length, heads * dim)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)


def _by_head(x: np.ndarray, shape) -> np.ndarray:
    """The inverse of `_packed`."""
    batch, heads, length, dim = shape
    return x.reshape(batch, length, heads, dim).swapaxes(1, 2)


def _session(
    operator: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], threads: int,
    domain: str = "", operands: Sequence[str] = (), **attributes: Any,
):  # fmt: skip
    """A session with a graph of one node, whose operands are like the arrays given; `operands` are
    their names, where one that it does without, "", comes before another.
    """
    import onnxruntime
    from onnx import helper

    def described(arrays):
        return [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in arrays.items()
        ]

    node = helper.make_node(
        operator, operands or [*inputs], [*outputs], domain=domain, **attributes
    )
    graph = helper.make_graph([node], "attention", described(inputs), described(outputs))
    opsets = [
        helper.make_opsetid("", 17 if domain else 23),
        helper.make_opsetid("com.microsoft", 1),
    ]
    # The runtime reads older formats, not ones that are newer than itself.
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


ONNXRUNTIME: tuple[Candidate, ...] = (
    OnnxRuntime(),
    OnnxRuntimeAttention(),
    OnnxRuntimeGroupQuery(),
)
