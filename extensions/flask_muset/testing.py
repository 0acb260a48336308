"""Tests of what waits, chances and fails, without waiting, chance or a failing dependency.

    with virtual_clock() as clock, faults(policy, {1: ConnectionError(), 2: 3.0}):
        ...

Nothing in here is used by the extensions themselves.
"""

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.resilience.guards import current_outcome
from flask_muset.resilience.policy import Policy

if TYPE_CHECKING:
    from flask_muset.cache_strategies.conformance import CacheStoreSuite

__all__ = ["CacheStoreSuite", "Faults", "VirtualClock", "faults", "virtual_clock"]

#: 2030-01-01, so that virtual times are not taken for real ones.
_EPOCH_S = 1_893_456_000.0


class VirtualClock:
    """Time that stands still unless somebody sleeps or advances it.

    Attributes:
        now: Seconds since some moment.
    """

    def __init__(self) -> None:
        self.now = 1_000.0

    def advance(self, seconds: float) -> None:
        """Let time pass without anybody waiting; a deadline that passes so is an overrun."""
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        """What a sleep does: time passes, and a deadline that is passed cuts the sleeper off."""
        scope = deadline.current()
        until = self.now + max(0.0, seconds)
        if scope is not None and scope.at < until:
            self.now = max(self.now, scope.at)
            raise scope.expire()
        self.now = until


@contextmanager
def virtual_clock(seed: int = 1) -> Iterator[VirtualClock]:
    """Put a virtual clock, and chance that repeats, in place of the system's.

    It holds for all building blocks that were given no clock of their own, made before or within
    the block. Sleeps of the retries advance it at once; `flask_muset.clock.SYSTEM.sleep` does it
    for a test's own work. It is one for the whole process: run such tests one after the other.

    Args:
        seed: Of the waits that are drawn.
    """
    clock = VirtualClock()
    names = ("now", "now_ns", "wall", "sleep", "uniform", "is_virtual")
    before = {name: getattr(SYSTEM, name) for name in names}
    SYSTEM.now = lambda: clock.now
    SYSTEM.now_ns = lambda: round(clock.now * 1e9)
    SYSTEM.wall = lambda: _EPOCH_S + clock.now
    SYSTEM.sleep = clock.sleep
    SYSTEM.uniform = random.Random(seed).uniform  # noqa: S311 - it must repeat
    SYSTEM.is_virtual = True
    try:
        yield clock
    finally:
        for name, value in before.items():
            setattr(SYSTEM, name, value)


#: What happens in place of a call: an exception, or seconds that it takes longer.
Fault = BaseException | type[BaseException] | float


class Faults:
    """What a script has seen.

    Attributes:
        calls: How many calls have come through to the dependency, failed ones too.
    """

    def __init__(self, script: Mapping[int, Fault]) -> None:
        for number, fault in script.items():
            is_error = isinstance(fault, BaseException) or (
                isinstance(fault, type) and issubclass(fault, BaseException)
            )
            if not (isinstance(number, int) and number >= 1):
                raise ValueError(f"the first call is number 1, got {number!r}.")
            if not (is_error or isinstance(fault, int | float)):
                raise ValueError(f"a fault is an exception or seconds, got {fault!r}.")
        self._script = dict(script)
        self.calls = 0

    def _next(self) -> None:
        self.calls += 1
        fault = self._script.get(self.calls)
        if isinstance(fault, int | float):
            SYSTEM.sleep(fault)
        elif fault is not None:
            outcome = current_outcome.get()
            if outcome is not None:
                outcome.attempts += 1  # the function itself, which counts, is not called
            raise fault

    def _call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._next()
        return fn(*args, **kwargs)

    async def _async_call(
        self, fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._next()
        return await fn(*args, **kwargs)


@contextmanager
def faults(policy: Policy, script: Mapping[int, Fault]) -> Iterator[Faults]:
    """Let chosen calls of a policy fail or be slow.

    Args:
        policy: Whose calls they are.
        script: By number of the call, the first is 1 and each attempt counts: an exception, which
            is raised in place of the call, or seconds, which pass before it.

    Raises:
        ValueError: The script has something else.
    """
    seen = Faults(script)
    restore = policy.put_inside(seen._call, seen._async_call)
    try:
        yield seen
    finally:
        restore()


def __getattr__(name: str) -> Any:
    # Loaded when it is first used, because it needs the extra `cache`.
    if name != "CacheStoreSuite":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("flask_muset.cache_strategies.conformance").CacheStoreSuite
