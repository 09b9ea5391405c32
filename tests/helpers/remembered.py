"""What oracles found, kept for the other targets of a test, which ask them the same."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from functools import partial, wraps
from hashlib import blake2b
from types import FunctionType

import numpy as np

from fastattn.core.problem import Problem

MOST_BYTES = 200 << 20
# What an oracle does not look at.
UNREAD = {"out", "threads", "copied", "return_lse", "return_max", "return_weights"}

_found: OrderedDict[tuple[str, bytes], tuple[tuple[np.ndarray, ...], int]] = OrderedDict()


def remembered(oracle):
    """An oracle that finds some arrays: asked the same again, it finds those.

    What has functions of the user's in it is computed each time.
    """

    @wraps(oracle)
    def ask(*question, **more):
        if any(isinstance(x, Problem) and x.is_flex for x in question):
            return oracle(*question, **more)
        hashed = blake2b(digest_size=16)
        _feed((*question, *sorted(more.items())), hashed.update)
        key = f"{oracle.__module__}.{oracle.__qualname__}", hashed.digest()
        if key not in _found:
            _keep(key, oracle(*question, **more))
        _found.move_to_end(key)
        return _found[key][0]

    return ask


def _keep(key, answer) -> None:
    for x in answer:
        x.flags.writeable = False
    _found[key] = tuple(answer), sum(x.nbytes for x in answer)
    while sum(size for _, size in _found.values()) > MOST_BYTES and len(_found) > 1:
        _found.popitem(last=False)


def _feed(x, update) -> None:
    """Tell values and dtypes apart, and not how they lie in memory."""
    update(f"{type(x).__qualname__}(".encode())
    if isinstance(x, np.ndarray):
        x = x.astype(x.dtype.newbyteorder("="), copy=False)
        update(f"{x.dtype.name}{x.shape}".encode())
        update(x.tobytes())
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        for field in dataclasses.fields(x):
            if field.name not in UNREAD:
                _feed(getattr(x, field.name), update)
    elif isinstance(x, partial):
        _feed((x.func, x.args, *sorted(x.keywords.items())), update)
    elif isinstance(x, FunctionType):
        assert "<" not in x.__qualname__, "expected a function that its name tells from others"
        update(f"{x.__module__}.{x.__qualname__}".encode())
    elif isinstance(x, tuple | list):
        for each in x:
            _feed(each, update)
    else:
        assert isinstance(x, None | bool | int | float | str | np.generic | np.dtype | type), type(
            x
        )
        update(repr(x).encode())
    update(b")")
