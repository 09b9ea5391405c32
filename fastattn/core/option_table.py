"""The options of `fastattn.scaled_dot` in one table, from which other functions derive theirs.

A new option is a row here, an argument of `scaled_dot`, `scaled_dot_backward` and `make_problem`, a
field of `Problem`, and what the backends make of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .arguments import flag
from .options import dropout_of, dropout_start, span_sides, window_sides

__all__ = [
    "DIFFERENTIABLE", "OPTIONS", "PARTS", "Option", "Part", "check", "differentiable", "joined",
    "refuse", "split",
]  # fmt: skip


class Option(NamedTuple):
    """A row of the table."""

    name: str
    about: str  # "score", "visibility", "dropout", "results" or "execution"
    # What an operator of another library takes: by name the axes of an array, or the type of a
    # value. Where the option's own name is not among them it is made of all, in this order;
    # otherwise it is one of them, and an array has another name than a value.
    #
    # Of the axes b stands for all leading ones, h, q and j for query heads, queries and keys, a
    # point for an axis of its own. All but a point may be missing or of length 1, if there is a b.
    parts: dict[str, str | type]
    differentiable: bool = False
    without: tuple[str, ...] = ()  # the functions that do not have it

    @property
    def takes_arrays(self) -> bool:
        return any(isinstance(kind, str) for kind in self.parts.values())


_OPERATORS = ("torch", "jax", "dask")  # `scaled_dot` of that integration
_MAPS = ("key_importance", "attention_map", "top_keys")

_TABLE = (
    Option("scale", "score", {"scales": "h", "scale": float}, True,
           ("dot", "cosine", "gaussian", "additive")),
    Option("softcap", "score", {"softcap": float}, False, ("gaussian",)),
    Option("bias", "score", {"bias": "bhqj"}, True, ("varlen",)),
    Option("relative_bias", "score", {"relative_bias": "h."}, True),
    Option("alibi", "score", {"alibi": "h"}, True),
    Option("sinks", "score", {"sinks": "h"}, True),
    Option("causal", "visibility", {"causal": bool}),
    Option("window", "visibility", {"left": int, "right": int}),
    Option("q_offset", "visibility", {"offsets": "b", "q_offset": int}, False, ("attend",)),
    Option("kv_lengths", "visibility", {"kv_lengths": "b"}, False, ("attend", "varlen")),
    Option("spans", "visibility", {"start": "bhq", "stop": "bhq"}, False, ("varlen",)),
    Option("mask", "visibility", {"mask": "bhqj"}, False, ("varlen",)),
    Option("block_table", "visibility", {"block_table": ".."}, False,
           ("attend", "varlen", "cosine", "gaussian", "MultiHeadAttention", *_MAPS, *_OPERATORS)),
    Option("dropout", "dropout", {"rate": float, "seed": "."}, False, _MAPS),
    Option("dropout_offset", "dropout", {"place": ".", "dropout_offset": tuple}, False, _MAPS),
    Option("return_lse", "results", {"return_lse": bool}, False, _MAPS),
    Option("return_max", "results", {"return_max": bool}, False, _MAPS),
    Option("return_weights", "results", {"return_weights": bool}, False,
           ("varlen", *_MAPS, *_OPERATORS)),
    Option("out", "results", {"out": "bhq."}, False, (*_MAPS, *_OPERATORS)),
    Option("backend", "execution", {"backend": str}),
    Option("threads", "execution", {"threads": int}),
    Option("precision", "execution", {"precision": str}),
)  # fmt: skip

OPTIONS = {option.name: option for option in _TABLE}
DIFFERENTIABLE = tuple(name for name, option in OPTIONS.items() if option.differentiable)


class Part(NamedTuple):
    """What an operator takes of an option."""

    option: str
    kind: str | type


PARTS = {
    name: Part(option.name, kind)
    for option in OPTIONS.values()
    for name, kind in option.parts.items()
}


def check(function: str, options: Iterable[str]) -> None:
    """An error of the first of the `options` that `function` does not have."""
    has = _HAS.get(function, _ALL)
    for name in options:
        if name not in has:
            where = f"integrations.{function}.scaled_dot" if function in _OPERATORS else function
            listed = ", ".join(option for option in OPTIONS if option in has)
            raise TypeError(f"{name}: {where}() has no such option; it has {listed}")


def refuse(score: str, options: dict) -> None:
    """Drop from `options` those that a score function does not have, which must be None there; an
    error for one that no function has.
    """
    for name in [name for name in options if name in OPTIONS and score in OPTIONS[name].without]:
        value = options.pop(name)
        if value is not None:
            raise TypeError(
                f"{name}: expected None, got {type(value).__name__}; {score} has no {name}"
            )
    check(score, options)


def differentiable(score: str, options: dict) -> dict:
    """Those of `options` that a score function has a gradient for, None where not given."""
    has = (name for name in DIFFERENTIABLE if score not in OPTIONS[name].without)
    return {name: options.get(name) for name in has}


_ALL = frozenset(OPTIONS)
_HAS = {
    function: frozenset(name for name, x in OPTIONS.items() if function not in x.without)
    for function in {function for x in OPTIONS.values() for function in x.without}
}


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(arrays, values)``: the parts of the options that are given, by name."""
    arrays: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, x in options.items():
        if x is None:
            continue
        parts = OPTIONS[name].parts
        pieces = zip(parts, _APART[name](x), strict=True) if name in _APART else ((name, x),)
        for part, piece in pieces:
            if isinstance(parts.get(part), str):
                arrays[part] = piece
            elif part == name and len(parts) > 1 and _is_array(piece, parts[part]):
                arrays[next(iter(parts))] = piece
            elif piece is not None:
                values[part] = _value(part, piece, parts[part])
    return arrays, values


def joined(parts: dict[str, Any]) -> dict[str, Any]:
    """The options of which `split` made these parts; what else there is goes on as it is."""
    options: dict[str, Any] = {}
    for name, x in parts.items():
        option = PARTS[name].option if name in PARTS else name
        if option in _APART and option != name:
            x = tuple(parts.get(part) for part in OPTIONS[option].parts)
        options[option] = x
    return options


def _value(name: str, x, kind):
    """`x`, checked where every operator would have to."""
    if kind is bool:
        return flag(name, x)
    return dropout_start(x) if kind is tuple else x


def _is_array(x, kind) -> bool:
    """Is `x` an array, where a value is of `kind`?"""
    return _is_foreign(x) if kind is tuple else not isinstance(x, (int, float))


def _is_foreign(x) -> bool:
    """Is `x` an array of another library, of which values may not be known yet?"""
    return hasattr(x, "ndim") and not isinstance(x, (np.ndarray, np.generic))


def _rate_and_seed(dropout) -> tuple[float, Any]:
    """``(rate, seed)``, checked where it is known."""
    seed = dropout[-1] if isinstance(dropout, (tuple, list)) and len(dropout) == 2 else None
    dropout_of((dropout[0], 0) if _is_foreign(seed) else dropout, None)
    return float(dropout[0]), seed


_APART = {"window": window_sides, "spans": span_sides, "dropout": _rate_and_seed}
