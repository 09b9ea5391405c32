"""Threads for kernels that have none of their own: they are called without the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["share"]

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a child has none of its parent's threads


def share(items: int, step: int, threads: int, start: Callable[[], Callable]) -> None:
    """Work through ``range(items)`` on at most that many threads, one of them the caller's.

    Each thread calls `start` for a ``launch(begin, end)`` of its own, and that for `step` items at
    a time. Between launches Python answers Ctrl-C; what one thread raises ends all.
    """
    global _pool
    begins = deque(range(0, items, step))

    def work() -> None:
        try:
            launch = start()
            while (begin := _take(begins)) is not None:
                launch(begin, min(begin + step, items))
        except BaseException:
            begins.clear()
            raise

    helpers = []
    if min(threads, len(begins)) > 1:
        if _pool is None:
            from concurrent.futures import ThreadPoolExecutor

            _pool = ThreadPoolExecutor(256, "fastattn")  # starts a thread when none is idle
        helpers = [_pool.submit(work) for _ in range(min(threads, len(begins)) - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _take(begins: deque[int]) -> int | None:
    try:
        return begins.popleft()  # atomic, where a look before it would not be
    except IndexError:
        return None
