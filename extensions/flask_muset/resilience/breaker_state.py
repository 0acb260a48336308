"""What the circuit breakers of several processes have in common."""

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from flask_muset.signals import BreakerEvent, BreakerState

if TYPE_CHECKING:
    from flask_muset.resilience.circuit_breaker import CircuitBreaker

__all__ = ["Busy", "Common", "Debt", "Lease", "Sharing"]


class Common(NamedTuple):
    """The state that breakers of several processes have in common.

    Half-open is no state of its own: it is open with no time left. Times are told as seconds from
    now, so that clocks need not agree.

    Attributes:
        version: Grows with each change; 0 if nothing is known.
        state: Any but half-open.
        left_s: Seconds until it ends, infinite for no end.
        trips: How often it has opened since it was last closed.
        age_s: Seconds since it has opened, None if it is closed.
    """

    version: int
    state: BreakerState
    left_s: float = math.inf
    trips: int = 0
    age_s: float | None = None


class Debt(NamedTuple):
    """A change that other processes have not been told.

    Attributes:
        number: Of the change in this process.
        common: The state now; `version` is the one that the change is based on.
        insists: Whether it holds whatever the others have: an operator's.
    """

    number: int
    common: Common
    insists: bool


class Lease(NamedTuple):
    """The right to probe.

    Attributes:
        token: Whose it is.
        version: Of the state that is probed; None where nobody could be asked, and the process
            decides by itself.
    """

    token: str
    version: int | None


class Busy(NamedTuple):
    """Others probe.

    Attributes:
        wait_s: Seconds after which to ask again.
    """

    wait_s: float


class Sharing(Protocol):
    """What a breaker needs to have its state in common with others. Only the first two may wait."""

    def synchronise(self) -> None:
        """Give the breakers the state that others have, within the budget of a call."""
        ...

    def ask(self, breaker: "CircuitBreaker") -> Lease | Busy | None:
        """Ask for the right to probe; None if the breaker has been given another state."""
        ...

    def settle(self, breaker: "CircuitBreaker", lease: Lease, *, succeeded: bool | None) -> None:
        """A probe has ended.

        Args:
            breaker: Whose probe it was.
            lease: Its right.
            succeeded: Whether it has; False lets another one take its place; None where the state
                has changed: what follows from that, others learn from the change alone.
        """
        ...

    def wake(self) -> None:
        """A breaker owes something."""
        ...

    def tell(self, change: BreakerEvent) -> None:
        """Tell this process of a change."""
        ...
