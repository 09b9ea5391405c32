"""Memory in pages of a fixed number of tokens, which never moves: a pool grows by slabs."""

from __future__ import annotations

from collections import deque

import numpy as np

__all__ = ["PAGE", "Page", "PagePool"]

# Tokens of a page: SUB_BLOCK_K of the compiled kernels, so that a sub-block lies in one page.
PAGE = 64
_ALIGNMENT = 64


class Page:
    """A page in use. Once no sequence holds it the pool gives it out again."""

    __slots__ = ("_released", "filled", "number")

    def __init__(self, number: int, released: deque):
        self.number = number
        self.filled = 0  # rows from there on have never been read: they may be written
        self._released = released

    def __del__(self):
        self._released.append(self.number)  # which is atomic: it may be any thread's last act


class PagePool:
    """Pages of records of several fields: (n_pages, heads, PAGE, ...) arrays each.

    All slabs lie at whole pages from each other, so that one array spans them, with memory that is
    not ours in between: a page's number is its index in this array. Views of it keep the slabs.
    """

    def __init__(self, heads: int, fields):
        """`fields` are the shape and the dtype of what is kept of a token and head."""
        self._shapes = [((heads, PAGE, *shape), dtype) for shape, dtype in fields]
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._shapes]
        ends = np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()
        self._offsets, self.page_bytes = [0, *ends[:-1]], ends[-1]
        self._slabs: list[np.ndarray] = []
        self._first = 0  # address of the page numbered 0, if it were ours
        self._free: list[int] = []  # the next one last
        self._released: deque[int] = deque()
        self.pages = 0
        self.some_page = 0  # the number of one that is there
        self.views: tuple[np.ndarray, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def free(self) -> int:
        """How many pages are there to take."""
        return len(self._free) + len(self._released)

    def grow(self, pages: int) -> None:
        """Make a slab of so many pages more."""
        slab = np.empty((pages + 1) * self.page_bytes + _ALIGNMENT, np.uint8)
        begin = slab.__array_interface__["data"][0]
        if not self._slabs:
            self._first = -(-begin // _ALIGNMENT) * _ALIGNMENT % self.page_bytes
            self._first = self._first or self.page_bytes
        number = -((self._first - begin) // self.page_bytes)
        self.some_page = number
        self._slabs = [*self._slabs, slab]
        self.pages += pages
        self._free = [*reversed(range(number, number + pages)), *self._free]
        self.views = tuple(self._views())

    def take(self, pages: int, most: int | None = None) -> list[Page]:
        """So many pages; a pool without them doubles, up to `most` pages if it can."""
        while self._released:
            self._free.append(self._released.popleft())
        missing = pages - len(self._free)
        if missing > 0:
            more = self.pages if most is None else min(self.pages, most - self.pages)
            self.grow(max(missing, more))
        return [Page(self._free.pop(), self._released) for _ in range(pages)]

    def _views(self):
        last = max(x.__array_interface__["data"][0] + x.nbytes for x in self._slabs)
        pages = (last - self._first) // self.page_bytes
        memory = np.asarray(_Span(self._first, pages * self.page_bytes, self._slabs))
        for (shape, dtype), offset in zip(self._shapes, self._offsets, strict=True):
            strides = (self.page_bytes, *np.empty(shape, dtype).strides)
            yield np.ndarray((pages, *shape), dtype, memory, offset, strides)


class _Span:
    """Bytes from an address on, of which only some are ours: those of the slabs that it keeps."""

    def __init__(self, address: int, nbytes: int, slabs):
        self._slabs = slabs
        self.__array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False),
        }  # fmt: skip
