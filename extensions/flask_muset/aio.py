"""The asynchronous names, for processes that run asyncio: scripts and ASGI applications.

The building blocks are the same ones: what they guard decides the colour, so a decorated coroutine
function stays one. Only what takes functions and returns their results has a form of its own here.
asyncio does not work in a process that gevent has patched; there these names raise RuntimeError.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from werkzeug.local import LocalProxy

from flask_muset import context
from flask_muset.deadline import deadline
from flask_muset.locks import refuse_asyncio_under_gevent
from flask_muset.resilience import (
    Bulkhead,
    CircuitBreaker,
    Fallback,
    Policy,
    RateLimit,
    RetryBudget,
    RetryStrategy,
    Timeout,
    retry,
    retry_async,
)
from flask_muset.resilience.recovery import ErrorRecovery as _ErrorRecovery

if TYPE_CHECKING:
    from flask_muset.cache_strategies.asynchronous import (
        AsyncCacheStrategy as CacheStrategy,
    )
    from flask_muset.cache_strategies.asynchronous import cache_manager, cached

__all__ = [
    "Bulkhead",
    "CacheStrategy",
    "CircuitBreaker",
    "ErrorRecovery",
    "Fallback",
    "Policy",
    "RateLimit",
    "RetryBudget",
    "RetryStrategy",
    "Timeout",
    "cache_manager",
    "cached",
    "deadline",
    "error_recovery",
    "retry",
    "retry_async",
]


class ErrorRecovery(_ErrorRecovery):
    """Circuit breakers by name, and recovery in steps that are awaited."""

    async def recover_from_error(  # type: ignore[override] # the colour is what differs
        self, error: BaseException, recovery_actions: Iterable[Callable[[], Awaitable[Any] | Any]]
    ) -> bool:
        """Run actions in order until one succeeds, which means: returns.

        Args:
            error: What happened; the failures of actions are added to it as notes.
            recovery_actions: Coroutine functions or plain functions without arguments, each bounded
                in time.

        Returns:
            Whether one succeeded.
        """
        refuse_asyncio_under_gevent()

        async def run(action: Callable[[], Awaitable[Any] | Any]) -> None:
            made = action()
            if inspect.isawaitable(made):
                await made

        bounded = Timeout(self.action_timeout)(run)
        for action in recovery_actions:
            try:
                await bounded(action)
            except Exception as failure:  # noqa: BLE001 - the next action is tried
                self.note(error, failure)
            else:
                return True
        return False


def _current() -> ErrorRecovery:
    plain: _ErrorRecovery = context.state("resilience", "Resilience").recovery
    recovery = ErrorRecovery(plain.action_timeout)
    recovery.share_breakers(plain)
    return recovery


#: The current app's ErrorRecovery; it has the same breakers as the plain one.
error_recovery: ErrorRecovery = LocalProxy(_current)  # type: ignore[assignment]

#: Loaded when they are first used, because they need the extra `cache`.
_CACHE = {
    "CacheStrategy": "AsyncCacheStrategy",
    "cache_manager": "cache_manager",
    "cached": "cached",
}


def __getattr__(name: str) -> Any:
    if name not in _CACHE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("flask_muset.cache_strategies.asynchronous"), _CACHE[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
