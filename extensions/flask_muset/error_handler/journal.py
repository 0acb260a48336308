"""What operators learn: a log line for a fault, a sum for its repeats, the newest kept."""

import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from flask_muset.locks import give_lock
from flask_muset.redaction import redact_text

__all__ = [
    "KEPT_OF_EACH",
    "KeptErrors",
    "Noted",
    "Occurrence",
    "RecentErrors",
    "Repeats",
    "formatted_traceback",
    "iso",
]

#: The newest occurrences that are kept of each fault.
KEPT_OF_EACH = 5
#: Faults that are told apart in one window; beyond it the oldest window ends early.
_MAX_WINDOWS = 1_000

#: The level of a log line and what it says has happened.
Key = tuple[int, str]
Schedule = Callable[[float, Callable[[], None]], object]


def start_timer(delay_s: float, call: Callable[[], None]) -> None:
    """Run `call` later; in a greenlet under gevent, else in a daemon thread."""
    timer = threading.Timer(delay_s, call)
    timer.daemon = True
    timer.start()


@dataclass(slots=True)
class _Window:
    end: float
    repeats: int


class Repeats:
    """Says which occurrence is worth a log line of its own, and sums up the others.

    Args:
        emit: Called with a key, the number of repeats and the window in seconds.
        clock: Seconds that never go back.
        schedule: Runs a call after some seconds.
    """

    def __init__(
        self,
        emit: Callable[[Key, int, float], None],
        *,
        clock: Callable[[], float],
        schedule: Schedule = start_timer,
    ) -> None:
        self._emit = emit
        self._clock = clock
        self._schedule = schedule
        self._windows: OrderedDict[Key, _Window] = OrderedDict()
        self._lock = threading.Lock()

    def is_first(self, key: Key, window_s: float, *, only_sums: bool = False) -> bool:
        """Count one occurrence; True if it is the first of a new window.

        Args:
            key: What happened; the sum is told with it.
            window_s: How long the repeats are summed up, in seconds.
            only_sums: Count the first one as a repeat too, and never answer True.
        """
        due: list[tuple[Key, _Window]] = []
        with self._lock:
            now = self._clock()
            window = self._windows.get(key)
            if window is not None and now < window.end:
                window.repeats += 1
                first, starts = False, window.repeats == 1
            else:
                due = self._replace(key, window)
                window = self._windows[key] = _Window(now + window_s, 1 if only_sums else 0)
                first, starts = not only_sums, only_sums
        for old_key, old in due:
            self._flush(old_key, old, window_s)
        if starts:
            self._schedule(max(0.0, window.end - now), lambda: self._flush(key, window, window_s))
        return first

    def _replace(self, key: Key, window: _Window | None) -> list[tuple[Key, _Window]]:
        due = [] if window is None else [(key, window)]
        self._windows.pop(key, None)
        while len(self._windows) >= _MAX_WINDOWS:
            due.append(self._windows.popitem(last=False))
        return due

    def _flush(self, key: Key, window: _Window, window_s: float) -> None:
        with self._lock:
            repeats, window.repeats = window.repeats, 0
            if self._windows.get(key) is window and self._clock() >= window.end:
                del self._windows[key]
        if repeats:
            self._emit(key, repeats, window_s)

    def flush(self) -> None:
        """Sum up at once, for the end of the process."""
        with self._lock:
            windows, self._windows = self._windows, OrderedDict()
        for key, window in windows.items():
            self._flush(key, window, window.end - self._clock())


class Occurrence(NamedTuple):
    """One error of one request, as it was; only `shown` may leave the process.

    Attributes:
        details: Redacted already.
        secrets: Values of the request that are hidden wherever they occur.
    """

    request_id: str
    method: str
    path: str
    message: str
    details: dict[str, Any]
    secrets: tuple[str, ...]

    def shown(self) -> dict[str, Any]:
        """A redacted copy."""
        return {
            "request_id": self.request_id,
            "method": redact_text(self.method, self.secrets),
            "path": redact_text(self.path, self.secrets),
            "message": redact_text(self.message, self.secrets),
            "details": self.details,
        }


@dataclass(slots=True)
class _Kept:
    """One fault.

    Attributes:
        taken: How many of `count` were given to whoever shares them.
    """

    fault: dict[str, Any]
    count: int = 0
    taken: int = 0
    last: deque[tuple[float, Occurrence]] = field(
        default_factory=lambda: deque(maxlen=KEPT_OF_EACH)
    )


@dataclass(frozen=True, slots=True)
class Noted:
    """What is new of one fault.

    Attributes:
        fault: Its description.
        count: How often it has happened, at least 1.
        last: The newest of these occurrences with their moments, the newest last.
    """

    fault: dict[str, Any]
    count: int
    last: list[tuple[float, Occurrence]]


class KeptErrors(list[dict[str, Any]]):
    """The newest errors, the one that happened last first.

    Attributes:
        is_shared: Whether they are those of all processes; else of this one alone.
    """

    def __init__(self, errors: Iterable[dict[str, Any]], *, is_shared: bool) -> None:
        super().__init__(errors)
        self.is_shared = is_shared


class RecentErrors:
    """The newest occurrences of the newest faults in this process, bounded.

    A forked child begins with none: what its parent has is the parent's to tell.

    Args:
        keep: How many faults, at least 1.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        give_lock(self)

    _lock: Any

    def _forked(self) -> None:
        self._kept = OrderedDict()

    def again(self, fingerprint: str, occurrence: Occurrence) -> bool:
        """Keep one more occurrence of a fault that is known; False, and nothing, if it is not."""
        with self._lock:
            kept = self._kept.get(fingerprint)
            if kept is None:
                return False
            self._kept.move_to_end(fingerprint)
            kept.count += 1
            kept.last.append((time.time(), occurrence))
        return True

    def first(self, fingerprint: str, fault: dict[str, Any], occurrence: Occurrence) -> None:
        """Keep a new fault, its description and its first occurrence."""
        with self._lock:
            if fingerprint not in self._kept:
                kept = self._kept[fingerprint] = _Kept(fault, count=1)
                kept.last.append((time.time(), occurrence))
                while len(self._kept) > self._keep:
                    self._kept.popitem(last=False)
                return
        self.again(fingerprint, occurrence)  # another request has been here first

    def newest(self) -> list[dict[str, Any]]:
        """Plain redacted copies, what happened last first."""
        with self._lock:
            kept = [(k.fault, k.count, list(k.last)) for k in reversed(self._kept.values())]
        return [
            fault
            | {
                "count": count,
                "last_seen": iso(last[-1][0]),
                "newest": [o.shown() | {"at": iso(at)} for at, o in last[::-1]],
            }
            for fault, count, last in kept
        ]

    def untaken(self) -> list[str]:
        """The fingerprints of which something is new, what happened first first."""
        with self._lock:
            return [name for name, kept in self._kept.items() if kept.count > kept.taken]

    def take(self, fingerprint: str) -> Noted | None:
        """What is new of a fault since it was taken last; None if nothing is."""
        with self._lock:
            kept = self._kept.get(fingerprint)
            if kept is None or kept.count == kept.taken:
                return None
            count, kept.taken = kept.count - kept.taken, kept.count
            return Noted(kept.fault, count, list(kept.last)[-count:])

    def give_back(self) -> None:
        """Let all that is kept be new."""
        with self._lock:
            for kept in self._kept.values():
                kept.taken = 0


def iso(moment: float) -> str:
    """A moment for people and programs, in UTC."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def formatted_traceback(exception: BaseException, secrets: tuple[str, ...]) -> str:
    """The traceback with its chained causes, redacted."""
    return redact_text("".join(traceback.format_exception(exception)).rstrip(), secrets)
