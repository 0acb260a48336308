"""Several building blocks under one name, in an order that makes sense."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from flask_muset.locks import refuse_asyncio_under_gevent
from flask_muset.resilience.bulkhead import Bulkhead
from flask_muset.resilience.circuit_breaker import CircuitBreaker
from flask_muset.resilience.fallback import Fallback
from flask_muset.resilience.guards import (
    AsyncCall,
    Call,
    Guard,
    Part,
    call_directly,
    current_outcome,
    is_coroutine_function,
    is_plain,
)
from flask_muset.resilience.rate_limit import RateLimit
from flask_muset.resilience.retrying import RetryStrategy
from flask_muset.resilience.timeout import Timeout
from flask_muset.signals import Decision

__all__ = ["PARTS", "Outcome", "Policy", "breaker_of"]

#: The order, the outermost first, and what would go wrong if a part stood further in.
PARTS: Mapping[type[Part], str] = {
    Fallback: "inside of another part it would hide from it that the call failed",
    RetryStrategy: "inside of the breaker all attempts of a call would count as one",
    CircuitBreaker: "inside of a limit, calls that are not made would use the limit up",
    RateLimit: "inside of the bulkhead, calls that are refused would hold a permit",
    Bulkhead: "inside of the time-out, the wait for a permit would count as the dependency's time",
    Timeout: "",
}
_ORDER = tuple(PARTS)


@dataclass(slots=True)
class Outcome:
    """How a call went.

    Attributes:
        value: The result, None if there is none.
        error: The exception, None if there is none.
        attempts: How often the function was called.
        waits: Seconds between the attempts.
        decided_by: The kind of the part that ended it other than by the function's own result:
            `fallback`, `retry`, `circuit_breaker`, `rate_limit`, `bulkhead`, `timeout`; else None.
        stop_reason: `succeeded`, `failed`, or the `flask_muset.signals.Decision` that ended it.
        parts: Whose decisions are noted.
    """

    value: Any = None
    error: Exception | None = None
    attempts: int = 0
    waits: list[float] = field(default_factory=list)
    decided_by: str | None = None
    stop_reason: str = "succeeded"
    parts: tuple[Part, ...] = field(default=(), repr=False)

    def note(self, part: Part, decision: Decision, wait_s: float) -> None:
        """Take note of one decision of the policy's own parts."""
        if (part.owner or part) not in self.parts:
            return
        if decision is Decision.RETRIED:
            self.waits.append(wait_s)
            self.decided_by = None
        elif decision is Decision.NOT_RETRYABLE and self.decided_by is not None:
            pass  # whoever refused the call has decided
        elif decision not in (Decision.WOULD_REJECT, Decision.OVERRUN):
            self.decided_by, self.stop_reason = part.kind, decision.value

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take note of what is decided in the block, and of how it ends."""
        token = current_outcome.set(self)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is what the caller asked for
            self.error = error
            if self.decided_by is None:
                self.stop_reason = "failed"
        else:
            if self.stop_reason != Decision.FELL_BACK:
                self.decided_by, self.stop_reason = None, "succeeded"
        finally:
            current_outcome.reset(token)

    def result(self) -> Any:
        """The value, or the exception raised."""
        if self.error is not None:
            raise self.error
        return self.value


class Policy(Guard):
    """A name and parts, the first the outermost.

    Used as decorator, by `.call(function, ...)`, or as a `with` block where no part repeats.

    Args:
        name: For people, events and metrics.
        parts: In the order Fallback, RetryStrategy, CircuitBreaker, RateLimit, Bulkhead, Timeout;
            each at most once. A Timeout may also stand first, as a total.

    Raises:
        ValueError: The name is empty, or the order is another one; the text says why it matters.
    """

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        if not (isinstance(name, str) and name):
            raise ValueError(f"a policy's name must be a text that is not empty, got {name!r}.")
        check_order(name, parts)
        self.name = name
        #: Whether an app has its parts; the next one gets others like them.
        self.is_bound = False
        self._blocks = []
        self._current: Callable[[], tuple[Part, ...]] | None = None
        self.use(parts)

    def use(self, parts: Sequence[Part]) -> None:
        """Guard with these parts from now on."""
        self._own, self._current = tuple(parts), None
        for part in parts:
            part.name = part.name or self.name
        self._chain = chain(self._own)
        self._async_chain = async_chain(self._own)

    def use_by(
        self, current: Callable[[], tuple[Part, ...]], all_parts: Sequence[tuple[Part, ...]]
    ) -> None:
        """Guard with the parts that `current` returns, which are among `all_parts`."""
        for parts in all_parts:
            for part in parts:
                part.name = part.name or self.name
        plain = {id(parts): chain(parts) for parts in all_parts}
        awaited = {id(parts): async_chain(parts) for parts in all_parts}
        self._current = current
        self._chain = lambda fn, args, kwargs: plain[id(current())](fn, args, kwargs)
        self._async_chain = lambda fn, args, kwargs: awaited[id(current())](fn, args, kwargs)

    def put_inside(self, innermost: Call, async_innermost: AsyncCall) -> Callable[[], None]:
        """Call the function through something else, such as a script of faults.

        Returns:
            What puts it back as it was.
        """
        before = self._chain, self._async_chain
        parts = self.parts
        self._chain = chain(parts, innermost)
        self._async_chain = async_chain(parts, async_innermost)

        def restore() -> None:
            self._chain, self._async_chain = before

        return restore

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, the outermost first; with several apps the current one's."""
        return self._own if self._current is None else self._current()

    def _parts(self) -> tuple[Part, ...]:
        return self.parts

    @property
    def breaker(self) -> CircuitBreaker | None:
        """Its circuit breaker, if it has one."""
        return breaker_of(self.parts)

    def outcome(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function and say how it went; an `Exception` is returned, not raised.

        Args:
            fn: A plain function, or a coroutine function.
            *args: Its arguments.
            **kwargs: Its keyword arguments.

        Returns:
            An `Outcome`, of a coroutine function an awaitable that gives one.

        Raises:
            TypeError: It is a generator, whose outcome is not known when it is called.
        """
        if is_coroutine_function(fn):
            return self._async_outcome(fn, args, kwargs)
        if not is_plain(fn):
            raise TypeError(f"a generator has no outcome while it runs, got {fn!r}; use call.")
        outcome = Outcome(parts=self.parts)

        def counted(*args: Any, **kwargs: Any) -> Any:
            outcome.attempts += 1
            return fn(*args, **kwargs)

        with outcome.taken():
            outcome.value = self._chain(counted, args, kwargs)
        return outcome

    async def _async_outcome(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Outcome:
        outcome = Outcome(parts=self.parts)

        async def counted(*args: Any, **kwargs: Any) -> Any:
            outcome.attempts += 1
            return await fn(*args, **kwargs)

        refuse_asyncio_under_gevent()
        with outcome.taken():
            outcome.value = await self._async_chain(counted, args, kwargs)
        return outcome


def breaker_of(parts: Sequence[Part]) -> CircuitBreaker | None:
    """The circuit breaker among the parts of a policy."""
    return next((part for part in parts if isinstance(part, CircuitBreaker)), None)


def chain(parts: Sequence[Part], innermost: Call = call_directly) -> Call:
    """The parts round plain calls."""
    guarded = innermost
    for part in reversed(parts):
        guarded = part.layer(guarded)
    return guarded


def async_chain(parts: Sequence[Part], innermost: AsyncCall = call_directly) -> AsyncCall:
    """The parts round awaited calls."""
    guarded = innermost
    for part in reversed(parts):
        guarded = part.async_layer(guarded)
    return guarded


def check_order(name: str, parts: Sequence[Part]) -> None:
    """Refuse an order that would not do what its author expects.

    Raises:
        ValueError: Names the policy, the parts and the reason.
    """
    for part in parts:
        if not isinstance(part, _ORDER):
            known = ", ".join(cls.__name__ for cls in _ORDER)
            raise ValueError(f"policy {name!r}: {part!r} is no part; use {known}.")
    total = len(parts) > 1 and isinstance(parts[0], Timeout)
    ranks = [_ORDER.index(type(part)) for part in parts[total:]]
    for outer, inner in pairwise(ranks):
        if outer == inner:
            raise ValueError(f"policy {name!r} has more than one {_ORDER[inner].__name__}.")
        if outer > inner:
            before, after = _ORDER[inner], _ORDER[outer]
            raise ValueError(
                f"policy {name!r}: {before.__name__} must stand before {after.__name__}: "
                f"{PARTS[before]}."
            )
