"""Which models of Hugging Face Transformers compute attention through the library's interface."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import cache, wraps

from transformers import AttentionInterface, ContinuousBatchingManager, PreTrainedModel

__all__ = ["keep_in_continuous_batching", "refuse_models_without_interface"]

# Layers chosen by the implementation's name from a table that holds those of the library.
_TABLE = re.compile(r"_CLASSES\[[^\]]*_attn_implementation")


def refuse_models_without_interface(attention: Callable) -> None:
    """From now on, a model is not made with an implementation that is `attention` but ignores it.

    The library checks, when a model is made, whether it supports ``"sdpa"`` or flash attention, and
    checks no other implementation; this extends the check.
    """
    check = PreTrainedModel.get_correct_attn_implementation
    if hasattr(check, "fastattn_checks"):
        return

    @wraps(check)
    def checked(self, requested_attention, is_init_check=False):
        chosen = check(self, requested_attention, is_init_check)
        # Told later, a model that cannot is left as it is, with the library's warning.
        if is_init_check and _is(chosen, attention):
            why = _why_not(type(self))
            if why:
                raise ValueError(
                    f'attn_implementation: expected "eager" or "sdpa" for {type(self).__name__}, '
                    f"got {chosen!r}; {why}"
                )
        return chosen

    checked.fastattn_checks = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked


def keep_in_continuous_batching(attention: Callable) -> None:
    """From now on, ``generate_batch`` leaves a model on an implementation that is `attention`.

    The library allows its own there, by their names; a model with any other is an error or, with
    flash attention installed, switched to that.
    """
    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if hasattr(switch, "fastattn_checks"):
        return

    @wraps(switch)
    def checked(self, model, *args, **kwargs):
        if not _is(model.config._attn_implementation, attention):
            switch(self, model, *args, **kwargs)

    checked.fastattn_checks = True  # type: ignore[attr-defined]
    ContinuousBatchingManager.switch_to_cb_friendly_attn = checked


def _is(implementation: str, attention: Callable) -> bool:
    """Is `attention` registered by that name?"""
    return AttentionInterface._global_mapping.get(implementation) is attention


@cache
def _why_not(model: type[PreTrainedModel]) -> str | None:
    """What keeps models of this class from being made with an attention function of others."""
    try:
        code = inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):  # typed in; the masks are there to refuse what is wrong
        return None
    if not model._can_set_attn_implementation():
        return (
            "it computes attention by itself; if it is a part of another model, make that so and "
            "call its set_attn_implementation(), which leaves this part out"
        )
    if _TABLE.search(code):
        return (
            "some layers are made for the library's own implementations only; make it so and call "
            "its set_attn_implementation(), which tells the rest"
        )
    return None
