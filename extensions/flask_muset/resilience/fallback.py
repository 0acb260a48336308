"""What is given in place of a result that could not be had."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from flask_muset.resilience.guards import AsyncCall, Call, Part
from flask_muset.signals import Decision

__all__ = ["Fallback"]


class Fallback(Part):
    """Give a value, or what a function makes, in place of an exception.

    Args:
        value_or_function: A value; a class such as `list`, called without arguments; or a function,
            called with the exception if it requires an argument. Where the call is awaited, an
            awaitable that it returns is awaited too. In place of a generator, what is iterated.
        on: Classes of exceptions that are answered so. `BaseException` that is no `Exception`, such
            as a foreign `gevent.Timeout`, always passes.
    """

    kind = "fallback"
    repeats = True

    def __init__(
        self,
        value_or_function: Any,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
    ) -> None:
        classes = on if isinstance(on, tuple) else (on,)
        if not all(isinstance(cls, type) and issubclass(cls, Exception) for cls in classes):
            raise ValueError(f"Fallback: on must be classes of Exception, got {on!r}.")
        self._options = {"value_or_function": value_or_function, "on": on}
        self._on = on
        self._make = _maker(value_or_function)
        super().__init__()

    def layer(self, inner: Call) -> Call:
        """Put it round plain calls."""
        on = self._on

        def falling_back(
            fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            try:
                return inner(fn, args, kwargs)
            except on as error:
                self.tell(Decision.FELL_BACK, error=error)
                return self._make(error)

        return falling_back

    def async_layer(self, inner: AsyncCall) -> AsyncCall:
        """Put it round awaited calls."""

        async def falling_back(
            fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            try:
                return await inner(fn, args, kwargs)
            except self._on as error:
                self.tell(Decision.FELL_BACK, error=error)
                made = self._make(error)
                return await made if inspect.isawaitable(made) else made

        return falling_back


def _maker(value_or_function: Any) -> Callable[[Exception], Any]:
    if not callable(value_or_function):
        return lambda _error: value_or_function
    if isinstance(value_or_function, type) or not _requires_one(value_or_function):
        return lambda _error: value_or_function()
    return value_or_function  # type: ignore[no-any-return]


def _requires_one(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin that does not tell
        return False
    return any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
        for parameter in parameters
    )
