"""Whole models of Hugging Face Transformers, attention by fastattn and in the library's own ways.

Attention is a part of a model's time only, so what it brings to a user shows here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

import fastattn

from . import timing
from .ranking import add_ratios

__all__ = ["IMPLEMENTATIONS", "MODELS", "ModelCase", "prepare", "rank", "unavailable"]

# As `attn_implementation` knows them, the one that all must agree with last.
IMPLEMENTATIONS = ("fastattn", "sdpa", "eager")

SMALL = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 8192, "sliding_window": 512,
}  # fmt: skip
# The classes' prefix and the configuration: the first is that of SmolLM-135M.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "Gemma2": {**SMALL, "query_pre_attn_scalar": 64},
    "GptOss": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
NO_SDPA = {"Gemma2": "has no softcap", "GptOss": "has no sinks"}


class ModelCase(NamedTuple):
    """Work of a model of random weights on one sequence in float32."""

    family: str  # a key of FAMILIES
    work: str  # "prefill", "decoding step" after that many tokens, or "training step"
    length: int

    def __str__(self) -> str:
        return f"{self.family} {self.work}, {self.length} tokens"

    @property
    def tokens(self) -> int:
        """How many go through the model in one call."""
        return 1 if self.work == "decoding step" else self.length


MODELS: dict[str, ModelCase] = {
    "model-prefill": ModelCase("Llama", "prefill", 2048),
    "model-decode": ModelCase("Llama", "decoding step", 2048),
    "model-training": ModelCase("Llama", "training step", 1024),
    "model-softcap": ModelCase("Gemma2", "prefill", 2048),
    "model-sinks": ModelCase("GptOss", "prefill", 2048),
}


def unavailable(case: ModelCase, implementation: str) -> str | None:
    """Why a model cannot run in this way, or None."""
    absent = [p for p in ("transformers", "torch") if find_spec(p) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    return NO_SDPA.get(case.family) if implementation == "sdpa" else None


def prepare(
    case: ModelCase, threads: int, implementations=IMPLEMENTATIONS
) -> dict[str, Callable[[], np.ndarray]]:
    """The calls to time by implementation; each returns the last token's logits."""
    import torch
    import transformers

    from ..integrations.transformers import register

    register()
    transformers.logging.set_verbosity_error()  # it finds a GPT-OSS so short remarkable
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{case.family}Config")
    model_class = getattr(transformers, f"{case.family}ForCausalLM")
    weights = None
    calls = {}
    for implementation in implementations:
        options = {**FAMILIES[case.family], "attn_implementation": implementation}
        model = model_class(config_class(**options))
        if weights is None:
            weights = model.state_dict()
        model.load_state_dict(weights, assign=True)  # all have the same, once in memory
        calls[implementation] = _work(case, model.train(case.work == "training step"))
    return calls


def _work(case: ModelCase, model) -> Callable[[], np.ndarray]:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, case.length), generator=generator)

    @torch.inference_mode()
    def prefill():
        return model(ids, logits_to_keep=1, use_cache=False).logits[0, -1].numpy()

    def train():
        model.zero_grad()
        result = model(ids, labels=ids, use_cache=False)
        result.loss.backward()
        return result.logits[0, -1].detach().numpy()

    @torch.inference_mode()
    def decode():
        logits = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1].numpy()
        cache.crop(-1)  # each step at the same length
        return logits

    if case.work == "decoding step":
        with torch.inference_mode():
            cache = model(ids, logits_to_keep=1, use_cache=True).past_key_values
        return decode
    return train if case.work == "training step" else prefill


def rank(
    name: str,
    case: ModelCase,
    threads: int,
    repeat: int = 5,
    tick: Callable[[str], Any] = lambda name: None,
) -> dict[str, Any]:
    """Measure `case` and return its ranking, fastest first, as `fastattn.bench.ranking.rank`.

    The error is the root-mean-square distance of the logits from eager's.
    """
    reasons = {name: unavailable(case, name) for name in IMPLEMENTATIONS}
    tick("preparing the models")
    calls = prepare(case, threads, [n for n, reason in reasons.items() if reason is None])
    logits = {implementation: call() for implementation, call in calls.items()}
    times = timing.interleave(calls, repeat, tick)
    entries: list[dict[str, Any]] = []
    for implementation, taken in times.items():
        ours = implementation == "fastattn"
        distance = logits[implementation] - logits["eager"]
        entries.append({
            "name": "fastattn" if ours else f"transformers-{implementation}",
            "version": fastattn.__version__ if ours else version("transformers"),
            "ours": ours,
            "median": taken.median,
            "best": taken.best,
            "samples": taken.samples,
            "tokens per second": case.tokens / taken.median,
            "share of peak": None,
            "memory": None,
            "error": float(np.sqrt(np.mean(np.square(distance)))),
        })  # fmt: skip
    entries.sort(key=lambda entry: entry["median"])
    add_ratios(entries)
    absent = {f"transformers-{n}": reason for n, reason in reasons.items() if reason}
    return {
        "name": name,
        "case": str(case),
        **case._asdict(),
        "tokens": case.tokens,
        "peak": None,
        "entries": entries,
        "absent": absent,
    }
