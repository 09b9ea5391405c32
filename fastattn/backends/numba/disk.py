"""Compiled kernels on disk. What cannot be read or written there is compiled all the same."""

from __future__ import annotations

import hashlib
import pickle
import warnings

from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps

__all__ = ["keep_on_disk"]


def keep_on_disk(dispatcher) -> None:
    """Let a function of Numba's be compiled by the first process alone, if that is possible."""
    try:
        dispatcher._cache = _Cache(dispatcher.py_func)
    except RuntimeError as error:  # nowhere to write, neither beside the file nor in the user's
        _warn(error)


_warned = False


def _warn(error: Exception) -> None:
    """Once: it is the same for all kernels of a process."""
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        "fastattn: kernels are compiled without Numba's disk cache, which takes some seconds in "
        f"each process: {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=2,
    )


class _Checked(CompileResultCacheImpl):
    """Machine code that is not what was written must not be run."""

    def reduce(self, cres):
        data = dumps(super().reduce(cres))
        return hashlib.sha256(data).digest(), data

    def rebuild(self, target_context, payload):
        digest, data = payload
        if hashlib.sha256(data).digest() != digest:
            raise ValueError(f"a damaged file in {self.locator.get_cache_path()}")
        return super().rebuild(target_context, pickle.loads(data))


class _Cache(FunctionCache):
    """One whose broken files, which raise anything when they are read, are replaced."""

    _impl_class = _Checked

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn(error)
            self._start_anew()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(error)

    def _start_anew(self) -> None:
        """Let an empty index take the place of one that cannot be read."""
        try:
            self.flush()
        except OSError as error:
            _warn(error)
