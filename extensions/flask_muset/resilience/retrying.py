"""Retries: exponential backoff with full jitter, inside a deadline and a budget."""

from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from itertools import repeat
from typing import Any, TypeVar, overload

from flask_muset import context
from flask_muset.clock import SYSTEM, Clock
from flask_muset.configuration import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    EXCEPTIONS,
    Key,
    check,
    flag,
    optional,
)
from flask_muset.deadline import deadline
from flask_muset.errors import MusetError
from flask_muset.locks import refuse_asyncio_under_gevent
from flask_muset.resilience.budget import RetryBudget
from flask_muset.resilience.guards import (
    AsyncCall,
    Call,
    Part,
    error_of,
)
from flask_muset.resilience.timeout import Timeout
from flask_muset.signals import Decision

__all__ = ["RetryStrategy", "retry", "retry_async", "retry_call"]

if find_spec("backoff") is None:
    raise ModuleNotFoundError(
        "flask_muset.resilience needs backoff: pip install 'flask-muset[resilience]'"
    )

F = TypeVar("F", bound=Callable[..., Any])
#: Which errors are tried again: classes, or a function of the exception.
RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]

_ALLOWED = {
    "max_retries": Key(
        None,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
        "a whole number of at least 0",
    ),
    "initial_delay": AT_LEAST_ZERO,
    "max_delay": AT_LEAST_ZERO,
    "exponential_base": AT_LEAST_ONE,
    "jitter": flag(True),
    "max_elapsed": optional(ABOVE_ZERO),
    "retry_on": optional(EXCEPTIONS),
}
#: The mark of a retry that goes on around the current call: of nested ones the outermost decides. A
#: list that is emptied when it ends, because tasks and greenlets that began in it live on with it.
_retrying: ContextVar[list[bool] | None] = ContextVar("flask_muset.retrying", default=None)


class RetryStrategy(Part):
    """Try again what failed in a way that may pass.

    The wait before retry n (the first is 0) is drawn from [0, min(max_delay, initial_delay *
    exponential_base ** n)], or is that bound without jitter; a Retry-After that came with the error
    is waited for in full, with the drawn wait after it. What is tried again is what the error table
    calls retryable, but never a refusal by this process itself: an open circuit, a full bulkhead or
    a limit of ours would only refuse again, and a fallback or a stale value is there at once. No
    wait goes past the deadline.
    Of nested retries the outermost decides; the inner ones make one attempt.

    Args:
        max_retries: Retries after the first call, at least 0; 3 means at most four calls.
        initial_delay: Bound of the first wait, in seconds, at least 0.
        max_delay: Bound of every wait, in seconds, at least `initial_delay`. An error whose
            Retry-After is longer is not tried again, for it would be too early.
        exponential_base: Growth of the bound from one retry to the next, at least 1.
        jitter: Draw the wait; without it callers that failed together come back together.
        max_elapsed: Seconds for all attempts and waits, the attempt in flight too; None for none.
        retry_on: Exception classes, or a function of the exception; None asks the error table.
        budget: Shared by the calls that draw on it; None for none.
        clock: Time and chance; None takes the system's.

    Source: M. Brooker, "Exponential Backoff and Jitter", 2015 ("full jitter"); the waits are made
    by `backoff.expo`.
    """

    kind = "retry"
    repeats = True

    def __init__(
        self,
        max_retries: int = 3,
        initial_delay: float = 1.0,
        max_delay: float = 60.0,
        exponential_base: float = 2.0,
        jitter: bool = True,
        *,
        max_elapsed: float | None = None,
        retry_on: RetryOn | None = None,
        budget: RetryBudget | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._options = {
            "max_retries": max_retries,
            "initial_delay": initial_delay,
            "max_delay": max_delay,
            "exponential_base": exponential_base,
            "jitter": jitter,
            "max_elapsed": max_elapsed,
            "retry_on": retry_on,
            "budget": budget,
            "clock": clock,
        }
        check("RetryStrategy", self._options, _ALLOWED)
        if max_delay < initial_delay:
            raise ValueError(
                f"RetryStrategy: max_delay must be at least initial_delay ({initial_delay!r}), "
                f"got {max_delay!r}."
            )
        self.max_retries = max_retries
        self.initial_delay = initial_delay
        self.max_delay = max_delay
        self.exponential_base = exponential_base
        self.jitter = jitter
        self.max_elapsed = max_elapsed
        self.retry_on = retry_on
        self.budget = budget
        self.clock = clock or SYSTEM
        super().__init__()

    def waits(self) -> Iterator[float]:
        """The bounds of the waits, in seconds, without end."""
        from backoff import expo  # at the first retry: with asyncio it takes a worker 1.3 MB

        bounds = expo(self.exponential_base, self.initial_delay, self.max_delay)
        next(bounds)  # backoff's generators begin with a value that is no wait
        bound = next(bounds)
        while 0 < bound < self.max_delay and self.exponential_base > 1:
            yield bound
            bound = next(bounds)
        # Its last value for ever, for expo itself overflows at some retry.
        yield from repeat(bound)

    def retries(self, error: BaseException, known: MusetError) -> bool:
        """Whether an error may pass; the number of attempts is not looked at.

        Args:
            error: As it was raised.
            known: The same in the words of the error table.
        """
        if known.refusal:
            return False
        on = self.retry_on
        if on is None:
            return known.retryable
        if isinstance(on, type | tuple):
            return isinstance(error, on)
        return bool(on(error))

    def begin(self) -> "_Attempts":
        """The state of one call that has failed for the first time."""
        return _Attempts(self)

    def layer(self, inner: Call) -> Call:
        """Put the retries round plain calls."""
        begin, sleep, budget = self.begin, self._sleep, self.budget

        def retrying(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if _retrying.get():
                return inner(fn, args, kwargs)
            mark = [True]
            token = _retrying.set(mark)
            attempts = None
            try:
                if budget is not None:
                    budget.deposit()
                while True:
                    try:
                        return inner(fn, args, kwargs)
                    except Exception as error:
                        if attempts is None:
                            attempts = begin()
                        wait_s = attempts.wait_after(error)
                        if wait_s is None:
                            raise
                    sleep(wait_s)
            finally:
                mark.clear()
                _retrying.reset(token)

        elapsed = self._elapsed()
        return retrying if elapsed is None else elapsed.layer(retrying)

    def _elapsed(self) -> Timeout | None:
        if self.max_elapsed is None:
            return None
        part = Timeout(self.max_elapsed)
        part.name, part.owner = self.name, self
        return part

    def _sleep(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    def async_layer(self, inner: AsyncCall) -> AsyncCall:
        """Put the retries round awaited calls."""

        async def retrying(
            fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if _retrying.get():
                return await inner(fn, args, kwargs)
            mark = [True]
            token = _retrying.set(mark)
            attempts = None
            try:
                if self.budget is not None:
                    self.budget.deposit()
                while True:
                    try:
                        return await inner(fn, args, kwargs)
                    except Exception as error:
                        attempts = attempts or self.begin()
                        wait_s = attempts.wait_after(error)
                        if wait_s is None:
                            raise
                    await self._asleep(wait_s)
            finally:
                mark.clear()
                _retrying.reset(token)

        elapsed = self._elapsed()
        return retrying if elapsed is None else elapsed.async_layer(retrying)

    async def _asleep(self, seconds: float) -> None:
        if self.clock.is_virtual:
            self.clock.sleep(seconds)
        else:
            import asyncio  # only where it runs already

            await asyncio.sleep(seconds)


class _Attempts:
    """What is known of one call between its attempts."""

    def __init__(self, strategy: RetryStrategy) -> None:
        self._strategy = strategy
        self._bounds = strategy.waits()
        self._retries = 0

    def wait_after(self, error: Exception) -> float | None:
        """Seconds to wait before the next attempt, None if there is none."""
        strategy = self._strategy
        known = error_of(error)
        if not strategy.retries(error, known):
            return self._stop(Decision.NOT_RETRYABLE, error)
        if self._retries >= strategy.max_retries:
            return self._stop(Decision.RETRIES_EXHAUSTED, error)
        wait_s = next(self._bounds)
        if strategy.jitter:
            wait_s = strategy.clock.uniform(0.0, wait_s)
        told, left = known.retry_after_s, deadline.remaining()
        if told is not None:
            # Beside what was told, or all who were told the same would come back together.
            wait_s = told if left is not None and told + wait_s >= left else told + wait_s
        too_long = told is not None and told > strategy.max_delay
        if too_long or (left is not None and wait_s >= left):
            return self._stop(Decision.RETRY_TOO_LATE, error)
        if strategy.budget is not None and not strategy.budget.withdraw():
            return self._stop(Decision.RETRY_BUDGET_EXHAUSTED, error)
        self._retries += 1
        strategy.tell(Decision.RETRIED, wait_s=wait_s, error=error)
        return wait_s

    def _stop(self, decision: Decision, error: Exception) -> float | None:
        self._strategy.tell(decision, error=error)
        return None


class _Configured(RetryStrategy):
    """The strategy of the current app's configuration, looked up when a call has failed."""

    def __init__(self, max_retries: int | None) -> None:
        super().__init__(3 if max_retries is None else max_retries)
        self._max_retries = max_retries

    def begin(self) -> _Attempts:
        configured = context.find("resilience")
        strategy: RetryStrategy = self if configured is None else configured.retry_strategy
        if self._max_retries is not None and strategy.max_retries != self._max_retries:
            strategy = RetryStrategy(**{**strategy._options, "max_retries": self._max_retries})
        return _Attempts(strategy)


@lru_cache(maxsize=64)
def _configured(max_retries: int | None) -> _Configured:
    return _Configured(max_retries)


def _chosen(max_retries: int | None, strategy: RetryStrategy | None) -> RetryStrategy:
    if strategy is None:
        return _configured(max_retries)
    if max_retries is not None:
        raise ValueError("give max_retries or a strategy, not both: the strategy has its own.")
    return strategy


@overload
def retry(max_retries: F) -> F: ...
@overload
def retry(
    max_retries: int | None = None, *, strategy: RetryStrategy | None = None
) -> Callable[[F], F]: ...
def retry(max_retries: Any = None, *, strategy: RetryStrategy | None = None) -> Any:
    """Decorate a function, coroutine function or generator so that it is tried again.

    Args:
        max_retries: Retries after the first call; None takes MAX_RETRIES of the current app's
            configuration, without one 3. The waits are the configuration's too.
        strategy: In place of both.

    Raises:
        ValueError: Both are given, or one is not allowed.
    """
    if callable(max_retries):
        return _chosen(None, strategy)(max_retries)
    return _chosen(max_retries, strategy)


def retry_call(
    fn: Callable[..., Any],
    /,
    *args: Any,
    max_retries: int | None = None,
    strategy: RetryStrategy | None = None,
    **kwargs: Any,
) -> Any:
    """Call a plain function and try again what may pass.

    Args:
        fn: The function.
        *args: Its arguments.
        max_retries: As of `retry`.
        strategy: As of `retry`.
        **kwargs: Its keyword arguments.
    """
    return _chosen(max_retries, strategy).call(fn, *args, **kwargs)


async def retry_async(
    fn: Callable[..., Awaitable[Any]],
    /,
    *args: Any,
    max_retries: int | None = None,
    strategy: RetryStrategy | None = None,
    **kwargs: Any,
) -> Any:
    """Await a coroutine function and try again what may pass.

    Args:
        fn: The coroutine function, or a function that returns an awaitable.
        *args: Its arguments.
        max_retries: As of `retry`.
        strategy: As of `retry`.
        **kwargs: Its keyword arguments.

    Raises:
        RuntimeError: gevent has patched this process; asyncio does not work there.
    """
    refuse_asyncio_under_gevent()
    return await _chosen(max_retries, strategy)._async_chain(fn, args, kwargs)
