"""The process itself: how late gevent's hub is and what holds it up, memory, running requests.

Under gevent one greenlet sleeps and looks how late it wakes. A native thread looks at what it last
wrote, and when that is too old takes the stack of the thread that the hub runs in; the greenlet
logs it once it wakes, because a native thread must not wait for locks that belong to gevent.
"""

import _thread  # noqa: F401 - `original` looks it up
import logging
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable

from flask_muset.locks import is_patched, original

__all__ = ["HubWatch", "Sampled", "resident_bytes", "watch_hub"]

_logger = logging.getLogger(__name__)
_INTERVAL_S = 0.05
_WINDOW_S = 30.0
_LOG_ABOVE_S = 0.25
_LOG_EVERY_S = 10.0
_SAMPLE_EVERY_S = 1.0
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4_096


def resident_bytes() -> int:
    """Memory of this process, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


class Sampled:
    """What samples are taken for; each app has one.

    Args:
        sample: Takes one; called with the hub's longest delay, None where there is no hub.
    """

    def __init__(self, sample: Callable[[float | None], None]) -> None:
        self.sample = sample

    def take(self) -> None:
        """Take a sample; the first one in a process starts what watches the hub."""
        self.sample(watch_hub(self))


class HubWatch:
    """Watches the hub of this process.

    Args:
        interval_s: Between two looks.
        log: Told the delay and the stack of what caused it.
    """

    def __init__(
        self, interval_s: float = _INTERVAL_S, log: Callable[[float, str], None] | None = None
    ) -> None:
        self.pid = os.getpid()
        self._interval_s = interval_s
        self._log = log or _log_delay
        self._sampled: weakref.WeakSet[Sampled] = weakref.WeakSet()
        self._longest = [0.0, 0.0]
        self._window_ends = time.monotonic() + _WINDOW_S
        self._due = time.monotonic() + interval_s
        self._seen = ""
        self._log_from = 0.0
        self._thread = 0

    def start(self) -> None:
        """Start the greenlet and the native thread."""
        import gevent

        self._thread = original("_thread", "get_ident")()
        self._native_sleep = original("time", "sleep")
        gevent.spawn(self._measure)
        original("_thread", "start_new_thread")(self._look_on, ())

    def add(self, sampled: Sampled) -> None:
        """Take samples for one more, also while no request comes."""
        self._sampled.add(sampled)

    @property
    def longest_s(self) -> float:
        """The longest delay in the last 30 to 60 seconds."""
        return max(self._longest)

    def _measure(self) -> None:
        """Runs in a greenlet, by real time, whatever a test has made of the clock."""
        sample_at = 0.0
        while True:
            self._due = time.monotonic() + self._interval_s
            time.sleep(self._interval_s)
            now = time.monotonic()
            self.note(max(0.0, now - self._due), now)
            if now >= sample_at:
                sample_at = now + _SAMPLE_EVERY_S
                for sampled in list(self._sampled):
                    sampled.sample(self.longest_s)

    def note(self, late_s: float, now: float) -> None:
        """Take down one delay."""
        if now >= self._window_ends:
            self._longest = [self._longest[1], 0.0]
            self._window_ends = now + _WINDOW_S
        self._longest[1] = max(self._longest[1], late_s)
        stack, self._seen = self._seen, ""
        if stack and now >= self._log_from:
            self._log_from = now + _LOG_EVERY_S
            self._log(late_s, stack)

    def _look_on(self) -> None:
        """Runs in a native thread and must touch nothing that belongs to gevent."""
        while self.pid == os.getpid():
            self._native_sleep(self._interval_s)
            if not self._seen and time.monotonic() - self._due > _LOG_ABOVE_S:
                frame = sys._current_frames().get(self._thread)
                self._seen = "".join(traceback.format_stack(frame)[-12:]) if frame else ""
                del frame


def _log_delay(late_s: float, stack: str) -> None:
    _logger.warning("the hub was held up for %.2f s; it was running:\n%s", late_s, stack)


_watch: HubWatch | None = None


def watch_hub(sampled: Sampled) -> float | None:
    """The hub's longest delay; the watch starts with the first call in a process.

    Nothing starts before a fork, because no greenlet and no thread outlives one.
    """
    global _watch
    if not is_patched():
        return None
    if _watch is None or _watch.pid != os.getpid():
        _watch = HubWatch()
        _watch.start()
    _watch.add(sampled)
    return _watch.longest_s
