"""Breakers by name, and what can be done about an error."""

from collections.abc import Callable, Iterable
from typing import Any

from flask_muset.deadline import deadline
from flask_muset.locks import give_lock
from flask_muset.resilience.circuit_breaker import CircuitBreaker
from flask_muset.resilience.guards import check_number

__all__ = ["ErrorRecovery"]


class ErrorRecovery:
    """Circuit breakers by name, and recovery in steps.

    Args:
        action_timeout: Seconds that each recovery action may take, above 0.
    """

    def __init__(self, action_timeout: float = 30.0) -> None:
        check_number(
            "ErrorRecovery", "action_timeout", action_timeout, "seconds above 0", lambda v: v > 0
        )
        self._action_timeout = action_timeout
        self._breakers: dict[str, CircuitBreaker] = {}
        give_lock(self)

    _lock: Any

    def get_circuit_breaker(self, name: str, **options: Any) -> CircuitBreaker:
        """The breaker with this name, made at the first call.

        Args:
            name: Of the breaker.
            **options: As of `CircuitBreaker`, such as `failure_threshold` and `recovery_timeout`;
                what is not given is the configuration's.

        Raises:
            ValueError: It was made with other options; two places would each believe in their own.
        """
        with self._lock:
            found = self._breakers.get(name)
        if found is None:
            made = self._make(name, options)
            with self._lock:
                return self._breakers.setdefault(name, made)
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

    def breakers(self) -> dict[str, CircuitBreaker]:
        """All breakers by name."""
        with self._lock:
            return dict(self._breakers)

    def recover_from_error(
        self, error: BaseException, recovery_actions: Iterable[Callable[[], Any]]
    ) -> bool:
        """Run actions in order until one succeeds, which means: returns.

        Args:
            error: What happened. An action that fails has it as its context in the log of whoever
                looks at `recovery_failures`.
            recovery_actions: Functions without arguments, each bounded in time and by the deadline.

        Returns:
            Whether one succeeded.
        """
        failures: list[Exception] = []
        for action in recovery_actions:
            try:
                with deadline(self._action_timeout):
                    action()
            except Exception as failure:  # noqa: BLE001 - the next action is tried
                failures.append(failure)
            else:
                return True
        self._note(error, failures)
        return False

    def _note(self, error: BaseException, failures: list[Exception]) -> None:
        """Leave the failures where a person finds them: with the error."""
        for failure in failures:
            error.add_note(f"recovery failed: {type(failure).__name__}: {failure}")
