"""Breakers by name, and what can be done about an error."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from flask_muset.configuration import ABOVE_ZERO, check
from flask_muset.resilience.circuit_breaker import CircuitBreaker
from flask_muset.resilience.timeout import Timeout

__all__ = ["ErrorRecovery"]


class ErrorRecovery:
    """Circuit breakers by name, and recovery in steps.

    Args:
        action_timeout: Seconds that each recovery action may take, above 0.
    """

    def __init__(self, action_timeout: float = 30.0) -> None:
        check("ErrorRecovery", {"action_timeout": action_timeout}, {"action_timeout": ABOVE_ZERO})
        self.action_timeout = action_timeout
        self._breakers: dict[str, CircuitBreaker] = {}

    def get_circuit_breaker(self, name: str, **options: Any) -> CircuitBreaker:
        """The breaker with this name, made at the first call.

        Args:
            name: Of the breaker.
            **options: As of `CircuitBreaker`, such as `failure_threshold` and `recovery_timeout`;
                what is not given is the configuration's.

        Raises:
            ValueError: It was made with other options; two places would each believe in their own.
        """
        found = self._breakers.get(name)
        if found is None:
            made = self._make(name, options)
            found = self._breakers.setdefault(name, made)
            if found is made:
                try:
                    self._added(made)
                except ValueError:
                    del self._breakers[name]
                    raise
                return made
        differing = [k for k, v in options.items() if found.options.get(k) != v]
        if differing:
            key = differing[0]
            raise ValueError(
                f"circuit breaker {name!r} has {key}={found.options.get(key)!r}, "
                f"not {options[key]!r}; use one value in all places."
            )
        return found

    def _make(self, name: str, options: dict[str, Any]) -> CircuitBreaker:
        return CircuitBreaker(name, **options)

    def _added(self, breaker: CircuitBreaker) -> None:
        """A breaker is in use from now on, unless this raises a ValueError."""

    def share_breakers(self, other: "ErrorRecovery") -> None:
        """Have the breakers of another one."""
        self._breakers = other._breakers
        self._make = other._make  # type: ignore[method-assign]
        self._added = other._added  # type: ignore[method-assign]

    def breakers(self) -> dict[str, CircuitBreaker]:
        """All breakers by name."""
        return dict(self._breakers)

    def recover_from_error(
        self, error: BaseException, recovery_actions: Iterable[Callable[[], Any]]
    ) -> bool:
        """Run actions in order until one succeeds, which means: returns.

        Args:
            error: What happened; the failures of actions are added to it as notes.
            recovery_actions: Functions without arguments, each bounded in time.

        Returns:
            Whether one succeeded.

        Raises:
            TypeError: An action is a coroutine function.
        """
        bounded = Timeout(self.action_timeout)
        for action in recovery_actions:
            if inspect.iscoroutinefunction(action):
                raise TypeError(
                    f"{action!r} is a coroutine function; await the recover_from_error of "
                    "flask_muset.aio, or give a plain function."
                )
            try:
                bounded.call(action)
            except Exception as failure:  # noqa: BLE001 - the next action is tried
                self.note(error, failure)
            else:
                return True
        return False

    @staticmethod
    def note(error: BaseException, failure: Exception) -> None:
        """Leave the failure of an action where a person finds it: with the error."""
        error.add_note(f"recovery failed: {type(failure).__name__}: {failure}")
