"""Which loads go on in this process, who waits for them, and who would wait for himself."""

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

from flask_muset.cache_strategies.entry import Entry
from flask_muset.clock import SYSTEM
from flask_muset.locks import give_lock, make_event

__all__ = ["Flight", "Flights", "Pauses", "is_nested", "wait_for"]

#: A load that was to begin beside its caller is given up when it has not begun by then: its
#: greenlet was killed before it ran.
_LATE_START_S = 1.0
_MAX_PAUSES = 1_000


class Flight:
    """One load of one key, and what it brings to those who wait for it.

    Attributes:
        key: What is loaded.
        flights: Among which it is.
        made_at: When it was asked for.
        is_beside: Whether it is loaded beside its caller.
        has_begun: Whether anybody loads.
        is_over: Whether nobody loads any more. If it brought neither an entry nor an error, whoever
            loaded was cut off, and somebody else has to.
        is_polling: Whether it waits for another process.
        entry: What it has brought.
        is_unkept: Whether the entry was loaded without putting it into the cache.
        error: With what it has failed; `traceback` is the error's as it came.
    """

    __slots__ = (
        "_event",
        "_is_awaited",
        "_outer",
        "_waits_for",
        "entry",
        "error",
        "flights",
        "has_begun",
        "is_beside",
        "is_over",
        "is_polling",
        "is_unkept",
        "key",
        "made_at",
        "traceback",
    )

    def __init__(self, key: str, flights: "Flights", *, is_beside: bool) -> None:
        self.key = key
        self.flights = flights
        self.made_at = SYSTEM.now()
        self.is_beside = is_beside
        self.has_begun = not is_beside
        self.is_over = self.is_polling = self.is_unkept = False
        self.entry: Entry | None = None
        self.error: Exception | None = None
        self.traceback: Any = None
        self._event = make_event()
        self._is_awaited = False
        self._outer: Flight | None = None
        self._waits_for: list[Flight] = []

    def fail(self, error: Exception) -> None:
        """Bring an error to those who wait."""
        self.error, self.traceback = error, error.__traceback__

    def enter(self) -> "Token[Flight | None]":
        """Load from now on in this context; `leave` has to be given what this returns."""
        if not self.is_beside:
            self._outer = next(iter(_chain()), None)
        return _current.set(self)

    def leave(self, token: "Token[Flight | None]") -> None:
        """Let go those who wait."""
        self.flights.end(self)
        _current.reset(token)


#: The load of which the current work is a part; work that `context.spawn` starts is part of it too.
_current: ContextVar[Flight | None] = ContextVar("flask_muset.cache_load", default=None)


def _chain() -> list[Flight]:
    """The loads of which the current work is a part, the innermost first."""
    chain, flight = [], _current.get()
    while flight is not None:
        # Work that has outlived its load is part of it no more.
        if not flight.is_over:
            chain.append(flight)
        flight = flight._outer
    return chain


def is_nested(flight: Flight | None = None) -> bool:
    """Whether the current work is part of a load, other than the given one."""
    return any(each is not flight for each in _chain())


def wait_for(flight: Flight, seconds: float | None) -> bool:
    """Wait until a load is over.

    Args:
        flight: Which one.
        seconds: How long at most; None for as long as it takes.

    Returns:
        False at once if the load, or one for which it waits, waits for the current work.
    """
    chain = _chain()
    flight._is_awaited = True
    # Marked before it is looked for: of several who close a circle the last one sees it.
    for each in chain:
        each._waits_for.append(flight)
    try:
        if chain and _leads_to(flight, chain):
            return False
        flight._event.wait(seconds)
    finally:
        for each in chain:
            each._waits_for.remove(flight)
    return True


def _leads_to(flight: Flight, goals: list[Flight]) -> bool:
    seen, ahead = set(), [flight]
    while ahead:
        flight = ahead.pop()
        if flight in goals:
            return True
        if flight not in seen:
            seen.add(flight)
            ahead.extend(flight._waits_for)
    return False


class Flights:
    """The loads of one cache in this process: at most one that can be joined for each key.

    Args:
        max_beside: Most loads at once beside their callers.
    """

    def __init__(self, max_beside: int) -> None:
        self._max_beside = max_beside
        self._by_key: dict[str, Flight] = {}
        self._beside: set[Flight] = set()
        give_lock(self)

    _lock: Any

    def __len__(self) -> int:
        return len(self._by_key)

    def join(self, key: str) -> tuple[Flight, bool]:
        """The load of a key, and whether it is the caller who has to load.

        One that was to begin beside somebody and has not begun is taken over.
        """
        flight = self._by_key.get(key)
        if flight is not None and flight.has_begun:
            return flight, False
        new = Flight(key, self, is_beside=False)
        with self._lock:
            old = self._by_key.get(key)
            if old is not None and old.has_begun:
                return old, False
            self._put(new, old)
        if old is not None:
            old._event.set()
        return new, True

    def join_beside(self, key: str) -> tuple[Flight | None, bool]:
        """The load of a key, and whether the caller has to start it beside himself.

        Returns:
            None where there is none and too many are going on.
        """
        flight = self._by_key.get(key)
        if flight is not None and not _is_lost(flight):
            return flight, False
        new = Flight(key, self, is_beside=True)
        with self._lock:
            old = self._by_key.get(key)
            if old is not None and not _is_lost(old):
                return old, False
            if not self._has_room():
                return None, False
            self._put(new, old)
            self._beside.add(new)
        if old is not None:
            old._event.set()
        return new, True

    def begin(self, flight: Flight) -> bool:
        """Begin one that was joined beside; False if somebody has taken it over."""
        with self._lock:
            flight.has_begun = not flight.is_over
        return flight.has_begun

    def end(self, flight: Flight) -> None:
        """Let go those who wait for one."""
        with self._lock:
            flight.is_over = True
            self._beside.discard(flight)
            if self._by_key.get(flight.key) is flight:
                del self._by_key[flight.key]
        if not flight._is_awaited:
            # Its frames know the flight: without this a circle would be left for each error.
            flight.error = flight.traceback = None
        flight._event.set()

    def is_loading(self, key: str) -> bool:
        """Whether the current work is part of the load of this key."""
        return _current.get() is not None and any(
            each.flights is self and each.key == key for each in _chain()
        )

    def detach(self, key: str) -> None:
        """Let nobody join any more."""
        if key in self._by_key:
            with self._lock:
                self._by_key.pop(key, None)

    def detach_matching(self, predicate: Callable[[str], bool]) -> None:
        """Let nobody join any more what a function of the key says."""
        for key in filter(predicate, list(self._by_key)):
            self.detach(key)

    def _put(self, new: Flight, old: Flight | None) -> None:
        """Put in a load in place of one that has not begun, under the lock."""
        self._by_key[new.key] = new
        if old is not None:
            old.is_over = True
            self._beside.discard(old)

    def _has_room(self) -> bool:
        if len(self._beside) >= self._max_beside:
            self._beside = {flight for flight in self._beside if not _is_lost(flight)}
        return len(self._beside) < self._max_beside

    def _forked(self) -> None:
        """The parent's loads are not a child's."""
        self._by_key = {}
        self._beside = set()


def _is_lost(flight: Flight) -> bool:
    return not flight.has_begun and SYSTEM.now() > flight.made_at + _LATE_START_S


class Pauses:
    """Until when this process does not try again to refresh a key."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def begin(self, key: str, seconds: float) -> None:
        """Try no more for a while."""
        if len(self._until) >= _MAX_PAUSES:
            now, known = SYSTEM.now(), self._until.copy()
            known = {key: until for key, until in known.items() if until > now}
            # Without a pause a refresh is tried once too often, which does no harm.
            self._until = known if len(known) < _MAX_PAUSES else {}
        self._until[key] = SYSTEM.now() + seconds

    def holds(self, key: str) -> bool:
        """Whether it is not to be tried."""
        until = self._until.get(key)
        return until is not None and SYSTEM.now() < until

    def end(self, key: str) -> None:
        """Try again."""
        self._until.pop(key, None)
