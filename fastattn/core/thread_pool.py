"""Threads for kernels that have none of their own: they are called without the GIL."""

from __future__ import annotations

import os
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["share"]

# More are of no use, whatever `threads=` says, and each takes memory for its stack.
MOST_HELPERS = 255

# All helpers, and the idle ones, each by the queue that it takes its work from. They belong to no
# executor, which refuses work once the main thread has ended, and the interpreter does not wait for
# them at exit.
_helpers: list[SimpleQueue] = []
_idle: deque[SimpleQueue] = deque()


def _forget_helpers() -> None:
    _helpers.clear()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)  # a child has no threads of its parent's


def share(items: int, step: int, threads: int, start: Callable[[], Callable]) -> None:
    """Work through ``range(items)`` on at most that many threads, one of them the caller's.

    Each thread calls `start` for a ``launch(begin, end)`` of its own, and that for `step` items at
    a time. Between launches Python answers Ctrl-C; what one thread raises ends all. No launch runs
    or begins after this has returned or raised. Where no thread can be had, there are fewer.
    """
    work = _Work(items, step, start)
    try:
        try:
            for _ in range(min(threads, len(work.begins)) - 1):
                if not _hire(work):
                    break
            work.carry_out(start())
        finally:
            work.end()
    finally:
        work.end()  # a signal's handler may have raised out of the other, or before it began
    if work.errors:
        raise work.errors[0]


class _Work:
    """What some threads share out among themselves."""

    def __init__(self, items: int, step: int, start: Callable[[], Callable]):
        self.items, self.step, self.start = items, step, start
        self.begins = deque(range(0, items, step))
        # Its methods are atomic. A thread registers here before it takes an item, so once no item
        # is left and none is registered, no launch runs, and none will.
        self.helping: deque[None] = deque()
        self.ended: SimpleQueue[None] = SimpleQueue()
        self.errors: list[BaseException] = []

    def carry_out(self, launch: Callable[[int, int], None]) -> None:
        while self.begins:
            try:
                begin = self.begins.popleft()
            except IndexError:  # another thread was quicker
                return
            launch(begin, min(begin + self.step, self.items))

    def start_if_possible(self) -> Callable[[int, int], None] | None:
        try:
            return self.start()
        except MemoryError:  # the others have what they need
            return None

    def help(self) -> None:
        """Carry out what is left, on a thread of the pool."""
        self.helping.append(None)
        try:
            if self.begins and (launch := self.start_if_possible()):
                self.carry_out(launch)
        except BaseException as error:
            self.begins.clear()
            self.errors.append(error)
        self.helping.pop()
        self.ended.put(None)

    def end(self) -> None:
        """Let no more launches begin, and wait for those that run, whatever a signal raises."""
        raised = None
        self.begins.clear()
        while self.helping:
            try:
                self.ended.get()  # who ends says so: there is an entry to come
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised


def _hire(work: _Work) -> bool:
    """Let another thread help, if one can be had."""
    try:
        queue = _idle.pop()
    except IndexError:
        if len(_helpers) >= MOST_HELPERS:
            return False
        queue = SimpleQueue()
        try:
            start_new_thread(_serve, (queue,))
        except (RuntimeError, MemoryError):
            return False
        _helpers.append(queue)
    queue.put(work)
    return True


def _serve(queue: SimpleQueue) -> None:
    while True:
        queue.get().help()
        _idle.append(queue)
