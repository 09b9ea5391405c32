"""What a candidate of the ranking is."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from .cases import Case

__all__ = ["Candidate", "Prepared", "missing_package"]

# A candidate that makes arrays of queries x keys sits out where they need more than this.
MOST_GRID_BYTES = 4 << 30


class Prepared(NamedTuple):
    """A call to time, and how to read its result as (batch, heads, n_queries, head_dim): what
    attention returns, or its tangent, or the gradient of the queries, where that is the work.
    """

    call: Callable[[], Any]
    read: Callable[[Any], np.ndarray]


class Candidate:
    """One way to compute attention. A subclass is one library and its best spelling.

    Attributes
    ----------
    name : str
        As the tables, the command line and the JSON call it.
    ours : bool
        Is it a backend of fastattn?
    only_named : bool
        Does it take part only where it is named? Those on a GPU: they are a ranking of their own.
    packages : tuple of str
        What must be installed; the first gives the version.
    dtypes : tuple of str
        What it computes in, not merely accepts.
    inside : tuple of str
        The libraries in whose programs it can be; "" is a call from Python.
    options : tuple of str
        The options of cases that it has.
    """

    name: str
    ours = False
    only_named = False
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "float64")
    inside: tuple[str, ...] = ("",)
    options: tuple[str, ...] = ()
    only_options = False  # does it compete in cases with these options alone?
    functions = False  # does it take functions of the user's?
    gradients = False  # does it compute them?
    forward_mode = False  # does it push tangents forward?
    grouped = True
    windows = True
    causal_at_the_end = True  # with n_queries != n_keys, does the last query see the last key?

    def version(self) -> str:
        return version(self.packages[0])

    def belongs(self, case: Case) -> bool:
        """Does it compete in cases of this kind?"""
        if case.option not in (self.options if case.option or self.only_options else ("",)):
            return False
        return case.inside in self.inside and (self.functions or not case.function)

    def draws_its_own(self, case: Case) -> bool:
        """Are its results others by chance, so that they have no error to measure?"""
        return case.option == "dropout" and not self.ours

    def missing(self) -> str | None:
        """Why this candidate cannot run here at all, or None."""
        return missing_package(*self.packages)

    def unavailable(self, case: Case, threads: int) -> str | None:
        """Why this candidate cannot take part in `case`, or None."""
        missing = self.missing()
        if missing:
            return missing
        if case.inside not in self.inside:
            return f"is not called inside {case.inside}" if case.inside else "is called inside only"
        if case.function and not self.functions:
            return "takes no functions of the user's"
        if case.dtype not in self.dtypes:
            return f"does not compute in {case.dtype}"
        if case.option and case.option not in self.options:
            return f"has no option {case.option}"
        if self.only_options and not case.option:
            return f"is for {' and '.join(self.options)} alone"
        if case.forward_mode and not self.forward_mode:
            return "pushes no tangents forward"
        if case.backward and not self.gradients:
            return "computes no gradients"
        if case.grouped and not self.grouped:
            return "has no grouped heads"
        if case.window is not None and not self.windows:
            return "has no window"
        if case.causal and case.n_queries != case.n_keys and not self.causal_at_the_end:
            return "aligns a causal mask at the first key"
        if self.grids(case) * case.grid_bytes > MOST_GRID_BYTES:
            return f"needs {self.grids(case) * case.grid_bytes / 2**30:.0f} GiB for its scores"
        return None

    def grids(self, case: Case) -> int:
        """How many arrays of queries x keys it makes."""
        return 0

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        """Do everything that a program would do once, and return the call to be timed."""
        raise NotImplementedError


def missing_package(*names: str) -> str | None:
    """Which of these are not installed, or None."""
    absent = [name for name in names if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None
