"""How many requests are in this process, counted from the moment that each has arrived.

An app that limits them has a `Gate`. The fair worker passes each request through it as soon as its
head is read, before the request waits for its turn: a view that only computes never runs twice at
once, so whoever counts running views alone never refuses anything while the line grows without end.
Under other workers the request is counted when the app gets it.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from enum import Enum
from typing import NamedTuple

from flask_muset.locks import give_lock

__all__ = ["GATE", "Arrival", "Connections", "Gate", "Paths", "Verdict", "arrived", "connections"]

#: The key of an app's gate in `app.extensions`.
GATE = "flask_muset.gate"


class Verdict(Enum):
    """What a gate says of a request."""

    EXEMPT = "exempt"
    ADMITTED = "admitted"
    REFUSED = "refused"


#: Looking them up in their class costs as much as a call.
_ADMITTED, _REFUSED = Verdict.ADMITTED, Verdict.REFUSED


class Arrival(NamedTuple):
    """A request that the worker has passed through a gate.

    Attributes:
        gate: Whose verdict it is.
        verdict: What it said.
        at: `SYSTEM.now()` when the head of the request was read.
    """

    gate: "Gate"
    verdict: Verdict
    at: float


#: The current request's arrival, None where no worker notes it.
arrived: ContextVar[Arrival | None] = ContextVar("flask_muset.arrived", default=None)


class Connections:
    """Connections of clients.

    Attributes:
        open: How many this process has now, counted by the fair worker.
    """

    open = 0


#: Of this process.
connections = Connections()


class Paths:
    """Paths and all that is below them.

    Args:
        paths: Such as `/health`, which holds for `/health/live` and not for `/healthy`.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._whole = frozenset(paths)
        self._below = tuple(path.rstrip("/") + "/" for path in self._whole)

    def __contains__(self, path: str) -> bool:
        return path in self._whole or path.startswith(self._below)


class Gate:
    """Admits at most `limit` requests at once.

    Args:
        limit: At least 1.
        exempt: What is always admitted and not counted.
        refuses: False admits all and counts them.
    """

    def __init__(self, limit: int, exempt: Paths, *, refuses: bool) -> None:
        self.limit = limit
        self.in_flight = 0
        self._exempt = exempt
        self._refuses = refuses
        give_lock(self)

    _lock: object

    def arrive(self, path: str) -> Verdict:
        """A request has come; one that is admitted must depart."""
        return Verdict.EXEMPT if path in self._exempt else self.admit()

    def admit(self) -> Verdict:
        """The same for a request that is not exempt."""
        with self._lock:  # type: ignore[attr-defined]
            if self._refuses and self.in_flight >= self.limit:
                return _REFUSED
            self.in_flight += 1
        return _ADMITTED

    def depart(self) -> None:
        """An admitted request has ended, its response sent."""
        with self._lock:  # type: ignore[attr-defined]
            self.in_flight -= 1
