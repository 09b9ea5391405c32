"""What a call would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .core.option_table import check
from .core.problem import Problem, make_problem
from .dispatch import (
    BACKENDS,
    NAMED_ONLY,
    ON_HOST,
    cannot_run,
    select,
    unsupported,
    unsupported_backward,
)

__all__ = ["Explanation", "available_backends", "explain", "show_config"]


# Options beyond those of `scaled_dot`: of `flex`, and of `vjp`.
_BESIDES = {"score_mod", "mask_mod", "block_mask", "score_grad", "wrt"}


@dataclass(frozen=True)
class Explanation:
    """How a call would be served. ``print`` shows it as a small table.

    Attributes
    ----------
    backend : str
        Which would run.
    plan : dict of str
        What it says of itself: kernel, instruction set, tile, threads, share of tiles skipped; and,
        where it leaves `top_keys` to NumPy, why.
    copies : tuple of str
        The arguments that would be copied first.
    passed_over : dict of str
        The backends before it in the order, or that were not asked for, with the reason of each.
    gradients : str
        Which backend would compute those of q, k and v, and why not another; and, where it leaves
        them to NumPy, why.
    """

    backend: str
    plan: dict[str, str]
    copies: tuple[str, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict)
    gradients: str = ""

    def __str__(self) -> str:
        rows = {"backend": self.backend, **self.plan, "copies": ", ".join(self.copies) or "none"}
        rows["gradients"] = self.gradients
        rows |= {f"not {name}": reason for name, reason in self.passed_over.items()}
        width = max(map(len, rows))
        return "\n".join(f"{key:{width}}  {value}" for key, value in rows.items())


def explain(q, k, v, *, backend=None, **options) -> Explanation:
    """Which backend, kernel, instruction set, tiles and threads `scaled_dot` or `flex` would use.

    Parameters
    ----------
    q, k, v, backend, **options
        As of `fastattn.scaled_dot`, or, with functions, of `fastattn.flex`.

    Returns
    -------
    Explanation
        Printed, a table; its attributes hold the same.

    Raises
    ------
    TypeError, ValueError
        As `scaled_dot` would.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> q = k = v = np.zeros((1, 8, 1000, 64), np.float32)
    >>> fastattn.explain(q, k, v, causal=True, backend="numpy").backend
    'numpy'
    """
    check("explain", options.keys() - _BESIDES)
    problem = make_problem(q, k, v, gradients=True, **options)
    chosen = select(problem, backend)
    passed_over = {}
    order = BACKENDS + NAMED_ONLY
    for place, other in enumerate(BACKENDS):
        if other is not chosen:
            if other not in ON_HOST:
                unasked = "only when named, or for arrays on a CUDA device"
            else:
                unasked = "comes later" if place > order.index(chosen) else "another was named"
            passed_over[other.name] = unsupported(other, problem) or unasked
    plan = chosen.describe(problem)
    for what in ("top_keys", "tangents"):
        left = _left_to_numpy(chosen, problem, what)
        plan |= {what: left} if left else {}
    gradients = _gradients(problem, backend)
    return Explanation(chosen.name, plan, problem.copied, passed_over, gradients)


def _gradients(problem: Problem, backend) -> str:
    try:
        chosen = select(problem, backend, unsupported_backward)
    except ValueError as error:
        return f"none: {error}"
    before = BACKENDS[: BACKENDS.index(chosen)] if chosen in BACKENDS else ()
    reasons = ((b.name, unsupported_backward(b, problem)) for b in before)
    left = _left_to_numpy(chosen, problem, "gradients")
    told = (chosen.name, left, *(f"not {name}: {why}" for name, why in reasons if why))
    return ", ".join(filter(None, told))


def _left_to_numpy(backend, problem: Problem, what: str) -> str:
    """That `backend` has this computed by NumPy, and why, or nothing."""
    if not hasattr(backend, "left_to_numpy"):
        return ""
    why = backend.left_to_numpy(problem).get(what)
    return f"by NumPy: {why}" if why else ""


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can run here, in the order tried.

    Returns
    -------
    tuple of str
        Without ``reference``, which runs only when named.

    Examples
    --------
    >>> import fastattn
    >>> "numpy" in fastattn.available_backends()
    True
    """
    plain = make_problem([[0.0]], [[0.0]], [[0.0]])
    return tuple(b.name for b in BACKENDS if cannot_run(b, plain) is None)


def show_config() -> None:
    """Print what is here, as ``python -m fastattn info`` does.

    These are the versions, the machine, its instruction sets, the threads and the backends.
    """
    from .bench.machine import info
    from .bench.report import print_info

    print_info(info())
