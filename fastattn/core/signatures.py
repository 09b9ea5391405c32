"""What type checkers know of functions whose flags decide what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

__all__ = ["attention"]

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]
    Yes: TypeAlias = Literal[True]
    No: TypeAlias = Literal[False]

    class Attention(Protocol):
        """Returns ``out``, then the log-sum-exp, the maximum and the weights, each if asked for."""

        __kwdefaults__: Any

        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: No = ...,
            return_max: No = ...,
            return_weights: No = ...,
            **options: Any,
        ) -> Array: ...
        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: Yes,
            return_max: No = ...,
            return_weights: No = ...,
            **options: Any,
        ) -> tuple[Array, Array]: ...
        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: No = ...,
            return_max: Yes,
            return_weights: No = ...,
            **options: Any,
        ) -> tuple[Array, Array]: ...
        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: No = ...,
            return_max: No = ...,
            return_weights: Yes,
            **options: Any,
        ) -> tuple[Array, Array]: ...
        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: Yes,
            return_max: Yes,
            return_weights: No = ...,
            **options: Any,
        ) -> tuple[Array, Array, Array]: ...
        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: Yes,
            return_max: No = ...,
            return_weights: Yes,
            **options: Any,
        ) -> tuple[Array, Array, Array]: ...
        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: No = ...,
            return_max: Yes,
            return_weights: Yes,
            **options: Any,
        ) -> tuple[Array, Array, Array]: ...
        @overload
        def __call__(
            self,
            *arrays: Any,
            return_lse: Yes,
            return_max: Yes,
            return_weights: Yes,
            **options: Any,
        ) -> tuple[Array, Array, Array, Array]: ...
        @overload  # flags that are known at run time only
        def __call__(
            self,
            *arrays: Any,
            return_lse: bool = ...,
            return_max: bool = ...,
            return_weights: bool = ...,
            **options: Any,
        ) -> Any: ...


def attention(function: Callable[..., Any]) -> Attention:
    """The function as it is."""
    return function
