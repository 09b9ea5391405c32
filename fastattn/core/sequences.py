"""Sequences of tokens on a pool of pages: they grow, share pages and give them back.

A row of a page is written once, before anything refers to it. So a sequence that has others' tokens
behind its own in its last page copies that page, and a reader of a `Snapshot` needs no lock.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .page_pool import PAGE, Page, PagePool
from .pages import page_runs, rows_in_pages

__all__ = ["Sequences", "Snapshot"]

Pages = tuple[Page | None, ...]  # of a sequence, in order; None: given back


class _Epoch:
    """Lives as long as a snapshot of it is held."""

    __slots__ = ("__weakref__",)


class Snapshot(NamedTuple):
    """The sequences at one moment. It is replaced, never changed."""

    pages: tuple[Pages, ...]
    table: np.ndarray  # (batch, pages), int64: their numbers; what is given back is any page
    views: tuple[np.ndarray, ...]  # the pool's
    lengths: np.ndarray  # (batch,), int64
    last: np.ndarray  # (batch,), int64: the tokens of the last append that are still there
    longest: int
    ragged: bool  # do the lengths differ?
    epoch: _Epoch  # in which sequences have only grown

    def of(self, pages, table, lengths, last) -> Snapshot:
        """Other sequences on the same pool."""
        longest = int(lengths.max())
        ragged = bool((lengths != longest).any())
        return Snapshot(pages, table, self.views, lengths, last, longest, ragged, self.epoch)


class Sequences:
    """The sequences of a cache. With a `window`, only the last tokens of each are kept, and the
    first `keep_first`.
    """

    def __init__(self, pool: PagePool, batch: int, window: int | None, keep_first: int):
        self.pool, self.window, self.keep_first = pool, window, keep_first
        self._lock = threading.Lock()  # held by a thread that changes something
        none = np.zeros(batch, np.int64)
        table = np.zeros((batch, 0), np.int64)
        self.now = Snapshot(((),) * batch, table, pool.views, none, none, 0, False, _Epoch())
        self._earlier: list[weakref.ref] = []  # epochs of which a reader may hold a snapshot

    def held(self, state: Snapshot, b: int) -> list[tuple[int, int]]:
        """The tokens of a sequence that some query from the last append on may see."""
        n = int(state.lengths[b])
        if self.window is None:
            return [(0, n)]
        first = max(0, n - int(state.last[b]) - self.window + 1)
        kept = min(self.keep_first, first)
        return [(0, kept), (first, n)] if kept < first else [(0, n)]

    def rows(self, state: Snapshot, b: int, view: np.ndarray) -> np.ndarray:
        """What is held of a sequence, in order: (heads, n, ...)."""
        runs = [rows_in_pages(view, state.table[b], *run) for run in self.held(state, b)]
        return np.concatenate(runs, axis=1)

    def packed(self) -> dict:
        """The whole state, in arrays of its own: for pickles and copies."""
        state = self.now
        filled = {p.number: p.filled for own in state.pages for p in own if p is not None}
        numbers = sorted(filled)
        index = {number: i for i, number in enumerate(numbers)}
        return {
            "window": self.window,
            "keep_first": self.keep_first,
            "pages": [[None if p is None else index[p.number] for p in own] for own in state.pages],
            "rows": [view[numbers] for view in state.views],
            "filled": [filled[number] for number in numbers],
            "lengths": state.lengths,
            "last": state.last,
        }

    @classmethod
    def unpacked(cls, new_pool: Callable[[int], PagePool], packed: dict) -> Sequences:
        """The inverse of `packed`."""
        n_pages, lengths = len(packed["rows"][0]), packed["lengths"]
        pool = new_pool(max(n_pages, len(lengths)))
        own = pool.take(n_pages)
        for view, rows in zip(pool.views, packed["rows"], strict=True):
            view[[page.number for page in own]] = rows
        for page, filled in zip(own, packed["filled"], strict=True):
            page.filled = filled
        made = cls(pool, len(lengths), packed["window"], packed["keep_first"])
        pages = tuple(tuple(None if i is None else own[i] for i in x) for x in packed["pages"])
        table = made._wider(made.now.table, max(map(len, pages)))
        for b, x in enumerate(pages):
            table[b, : len(x)] = [pool.some_page if page is None else page.number for page in x]
        made.now = made.now.of(pages, table, lengths, packed["last"])
        return made

    def append(self, fields, counts: int | np.ndarray, most: int | None) -> None:
        """Write the first tokens of each row of `fields`, (batch, heads, n, ...), behind those that
        are there: `counts` of them. No sequence is to have more than `most` tokens.
        """
        with self._lock:
            old = self.now
            lengths = old.lengths + counts
            if isinstance(counts, int):
                last = lengths - old.lengths if counts else old.last
                longest = old.longest + counts
                state = Snapshot(
                    old.pages, old.table, old.views, lengths, last, longest, old.ragged, old.epoch
                )
            else:
                last = np.where(counts > 0, counts, old.last)
                state = old.of(old.pages, old.table, lengths, last)
            state = self._with_room(old, state, most)
            for pages, rows, source in _places(old, state):
                for view, x in zip(state.views, fields, strict=True):
                    view[pages, :, rows] = x[source]
            self.now = state if self.window is None else self._without_unseen(state)

    def truncate(self, n: int | np.ndarray) -> None:
        with self._lock:
            old = self.now
            lengths = np.minimum(old.lengths, n)
            last = np.maximum(old.last - (old.lengths - lengths), 0)
            tokens = lengths.tolist()
            pages = tuple([p[: -(-m // PAGE)] for p, m in zip(old.pages, tokens, strict=True)])
            longest = max(tokens)
            ragged = min(tokens) != longest
            self._begin(
                Snapshot(pages, old.table, old.views, lengths, last, longest, ragged, _Epoch())
            )

    def reorder(self, indices: np.ndarray) -> None:
        with self._lock:
            old = self.now
            pages = tuple(old.pages[b] for b in indices)
            table, lengths, last = (x[indices] for x in (old.table, old.lengths, old.last))
            self._begin(old.of(pages, table, lengths, last)._replace(epoch=_Epoch()))

    def replace(self, b: int, other: int | None) -> None:
        """Let sequence `b` be what the other is; None: empty."""
        with self._lock:
            old = self.now
            pages, lengths, last = list(old.pages), old.lengths.copy(), old.last.copy()
            table = old.table
            if other is None:
                pages[b], lengths[b], last[b] = (), 0, 0
            else:
                table = table.copy()
                pages[b], table[b] = pages[other], table[other]
                lengths[b], last[b] = lengths[other], last[other]
            self._begin(old.of(tuple(pages), table, lengths, last)._replace(epoch=_Epoch()))

    def _begin(self, state: Snapshot) -> None:
        """The first state of a new epoch."""
        self._earlier = [x for x in self._earlier if x() is not None]
        self._earlier.append(weakref.ref(self.now.epoch))
        self.now = state

    def _is_read(self, state: Snapshot, page: Page, i: int) -> bool:
        """Does anything but one sequence of `state` read rows of its page `i`? A sequence that
        shares it has it at the same place, and a snapshot in which a sequence was longer, or shared
        it, is of an earlier epoch.
        """
        if any(x() is not None for x in self._earlier):
            return True
        return sum(len(pages) > i and pages[i] is page for pages in state.pages) > 1

    def _with_room(self, old: Snapshot, state: Snapshot, most: int | None) -> Snapshot:
        """`state`, whose sequences have pages of their own for the tokens that they gain."""
        changed: dict[int, list] = {}
        copies, missing = [], 0
        for b, (before, after) in enumerate(zip(old.lengths.tolist(), state.lengths.tolist(),
                                                strict=True)):  # fmt: skip
            if before == after:
                continue
            pages: Any = old.pages[b]
            rows = before % PAGE
            if rows:
                tail = pages[-1]
                # Behind its tokens there may be those of others.
                if tail.filled > rows and self._is_read(old, tail, len(pages) - 1):
                    changed[b] = list(pages)
                    copies.append((b, rows))
                else:
                    tail.filled = min(PAGE, rows + after - before)
            more = -(-after // PAGE) - len(pages)
            if more > 0:
                changed.setdefault(b, list(pages))
                missing += more
        if not changed:
            return state
        limit = None if most is None else len(old.lengths) * -(-most // PAGE)
        taken = iter(self.pool.take(missing + len(copies), limit))
        views = self.pool.views
        for b, rows in copies:
            own = next(taken)
            for view in views:
                view[own.number, :, :rows] = view[changed[b][-1].number, :, :rows]
            changed[b][-1] = own
        table = self._wider(state.table, -(-state.longest // PAGE))
        for b, pages in changed.items():
            after = int(state.lengths[b])
            pages += [next(taken) for _ in range(-(-after // PAGE) - len(pages))]
            for i in range(int(old.lengths[b]) // PAGE, len(pages)):
                pages[i].filled = max(pages[i].filled, min(PAGE, after - i * PAGE))
                table[b, i] = pages[i].number
        all_pages = tuple(tuple(changed[b]) if b in changed else p for b, p in enumerate(old.pages))
        return state._replace(pages=all_pages, table=table, views=views)

    def _wider(self, table: np.ndarray, pages: int) -> np.ndarray:
        """A copy with columns for so many pages at least, of which the new ones are not read."""
        wider = np.full((len(table), max(pages, table.shape[1])), self.pool.some_page)
        wider[:, : table.shape[1]] = table
        return wider

    def _without_unseen(self, state: Snapshot) -> Snapshot:
        """`state` without the pages of which no token is held."""
        table, pages = None, list(state.pages)
        own: Any
        for b, own in enumerate(pages):
            kept, *rest = self.held(state, b)
            begin, end = -(-kept[1] // PAGE), (rest[0][0] // PAGE if rest else 0)
            if begin >= end or own[end - 1] is None:
                continue
            if table is None:
                table = state.table.copy()
            pages[b] = (*own[:begin], *(None,) * (end - begin), *own[end:])
            table[b, begin:end] = own[-1].number
        return state if table is None else state._replace(pages=tuple(pages), table=table)


def _places(old: Snapshot, new: Snapshot) -> Iterator[tuple]:
    """``(pages, rows, source)``: which rows of which pages the tokens of each sequence go to, those
    of all at once where they are alike.
    """
    source: tuple
    if not (old.ragged or new.ragged):
        for n, rows in page_runs(old.longest, new.longest, PAGE):
            first = n * PAGE + rows.start - old.longest
            source = (slice(None), slice(None), slice(first, first + rows.stop - rows.start))
            if len(new.table) == 1:
                yield int(new.table[0, n]), rows, (0, *source[1:])
            else:
                yield new.table[:, n], rows, source
        return
    for b, (before, after) in enumerate(zip(old.lengths.tolist(), new.lengths.tolist(),
                                            strict=True)):  # fmt: skip
        for n, rows in page_runs(before, after, PAGE):
            first = n * PAGE + rows.start - before
            source = (b, slice(None), slice(first, first + rows.stop - rows.start))
            yield int(new.table[b, n]), rows, source
