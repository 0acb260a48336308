"""An answer on its way to a client that reads it while it is made.

Whoever makes it runs beside the request and puts its events into a channel; the request takes them
out, and speaks up now and then when there are none.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from flask_muset.deadline import Expired, deadline
from flask_muset.errors import OverloadedError
from flask_muset.locks import make_event, original
from muset.ports import AnswerStatus, Citation, Delta, Tokens

__all__ = [
    "AbandonedError",
    "AnswerStream",
    "Channel",
    "Done",
    "Event",
    "Meta",
    "Sink",
    "Times",
    "Unsent",
    "live",
]

#: So many events wait for a client that reads slowly; then its provider waits too.
_MAX_WAITING = 64
#: Before a request's time is up, what is held back is sent.
_SLACK_S = 0.05


@dataclass(frozen=True, slots=True)
class Meta:
    """Which model answers."""

    model: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete."""

    status: AnswerStatus


#: What a client is told, in the order meta, deltas, citations, tokens, done.
Event = Meta | Delta | Citation | Tokens | Done


@dataclass(frozen=True, slots=True)
class Times:
    """Of streams, in seconds.

    Attributes:
        hold_back_s: The first text waits for so long: a provider that breaks down meanwhile can
            still be replaced by another one.
        keep_alive_s: After so much silence a stream says that it lives.
        draining_s: For so long a stream goes on in a process that is to stop.
    """

    hold_back_s: float = 0.2
    keep_alive_s: float = 9.0
    draining_s: float = 10.0


class AbandonedError(BaseException):
    """Nobody waits for the answer any more. It is no Exception: nothing may go on because of it."""


class Sink(Protocol):
    """Where the events of an answer go.

    Attributes:
        is_live: Whether a client reads them while the answer is made.
    """

    is_live: bool

    def put(self, event: Event) -> None:
        """Pass one on; waits where too many wait already."""
        ...

    def void(self) -> bool:
        """Take back what was put; False if a part of it is with the client."""
        ...


class Unsent:
    """A sink for an answer that is sent as a whole."""

    is_live = False

    def put(self, event: Event) -> None:
        """The answer itself has it all."""

    def void(self) -> bool:
        """Nothing is with the client."""
        return True


class Channel:
    """A sink whose events somebody else takes out: one puts, one takes.

    Args:
        hold_back_s: Seconds from the first text to the moment when anything is given out.
    """

    is_live = True

    def __init__(self, hold_back_s: float) -> None:
        self._hold_back_s = hold_back_s
        # The patched one would cost more than what it protects, which never waits.
        self._lock = original("_thread", "allocate_lock")()
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._is_closed = False
        self._release_at = math.inf
        self._filled, self._emptied = make_event(), make_event()
        #: Whether some of it is with the client.
        self.is_sent = False

    def put(self, event: Event) -> None:
        """Pass an event on; wait while too many wait already.

        Raises:
            AbandonedError: Nobody takes it.
        """
        while not self._has_put(event):
            self._emptied.wait()
        self._filled.set()

    def _has_put(self, event: Event) -> bool:
        self._emptied.clear()
        with self._lock:
            self._check()
            if len(self._events) >= _MAX_WAITING:
                return False
            self._events.append(event)
            if isinstance(event, Done):
                self._release_at = -math.inf
            elif isinstance(event, Delta) and self._release_at == math.inf:
                self._release_at = time.monotonic() + self._hold_back_s
        return True

    def void(self) -> bool:
        """Take back what was put.

        Returns:
            False if a part of it is with the client, who must not get another text behind it.

        Raises:
            AbandonedError: Nobody waits for anything.
        """
        with self._lock:
            self._check()
            if self.is_sent:
                return False
            self._events.clear()
            self._release_at = math.inf
        self._emptied.set()
        return True

    def _check(self) -> None:
        if self._is_closed:
            raise AbandonedError

    def fail(self, error: BaseException) -> None:
        """No more will come, because of this."""
        with self._lock:
            self._error = error
        self._filled.set()

    def close(self) -> None:
        """Take no more: whoever puts is told."""
        with self._lock:
            self._is_closed = True
        self._emptied.set()

    def take(self, seconds: float) -> Sequence[Event]:
        """What there is, none if nothing comes within some seconds.

        Raises:
            BaseException: What was given to `fail`, once all that was sent before is taken.
        """
        end = time.monotonic() + seconds
        while True:
            self._filled.clear()
            events, release_at = self._given_out()
            if events:
                self._emptied.set()
                return events
            left_s = min(end, release_at) - time.monotonic()
            if left_s > 0:
                self._filled.wait(left_s)
            elif time.monotonic() >= end:
                return events

    def _given_out(self) -> tuple[Sequence[Event], float]:
        """The events that may go, and when those may that may not yet."""
        if not self._events and self._error is None:
            return (), math.inf
        now, left_s = time.monotonic(), None if self.is_sent else deadline.remaining()
        with self._lock:
            release_at = self._release_at
            if left_s is not None and release_at < math.inf:
                release_at = min(release_at, now + left_s - _SLACK_S)
            if self._events and now >= release_at:
                events, self._events = self._events, []
                self.is_sent = True
                return events, now
            if self._error is not None:
                raise _raisable(self._error)
            return (), release_at if self._events else math.inf


def _raisable(error: BaseException) -> BaseException:
    """A deadline of the one who put the events is none of the one who takes them."""
    return error.scope.error() if isinstance(error, Expired) else error


class AnswerStream:
    """What a client is told of one answer; closing it ends the work on it.

    Args:
        batches: Events in order; an empty one where it is time to say that something still comes.
        record: Writes down how it ended: `success`, `partial`, `error` or `client_closed`. Called
            once, before the last event is given out.
        is_cached: Whether it was made before.
    """

    def __init__(
        self,
        batches: Generator[Sequence[Event], None, None],
        record: Callable[[str], None],
        *,
        is_cached: bool,
    ) -> None:
        self._batches = batches
        self._record: Callable[[str], None] | None = record
        self.is_cached = is_cached

    def __iter__(self) -> Generator[Sequence[Event], None, None]:
        is_sent = False
        try:
            with closing(self._batches) as batches:
                for batch in batches:
                    if batch and isinstance(batch[-1], Done):
                        self._end("success")
                    yield batch
                    is_sent = is_sent or bool(batch)
        except GeneratorExit:
            self._end("client_closed")
            raise
        except BaseException:
            self._end("partial" if is_sent else "error")
            raise

    def _end(self, status: str) -> None:
        record, self._record = self._record, None
        if record is not None:
            record(status)


def live(
    produce: Callable[[Sink], None],
    cancel: Callable[[], None],
    *,
    spawn: Callable[[Callable[[], None]], Any],
    times: Times,
    is_draining: Callable[[], bool],
) -> Generator[Sequence[Event], None, None]:
    """The events of an answer that is made beside the one who reads them.

    Args:
        produce: Makes the answer; puts `Done` last, or raises.
        cancel: Breaks off what it waits for.
        spawn: Runs a function beside, with the caller's context and deadline.
        times: How long what takes.
        is_draining: Whether this process is to stop.

    Raises:
        OverloadedError: It is to stop, and the answer takes too long for that.
        BaseException: What `produce` has raised.
    """
    channel = Channel(times.hold_back_s)

    def run() -> None:
        try:
            produce(channel)
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits for it
            channel.fail(error)

    running = spawn(run)
    try:
        yield from _taken(channel, times, is_draining)
    finally:
        channel.close()
        _stop(running, cancel)


def _taken(
    channel: Channel, times: Times, is_draining: Callable[[], bool]
) -> Iterator[Sequence[Event]]:
    until = math.inf
    while True:
        now = time.monotonic()
        if is_draining():
            until = min(until, now + times.draining_s)
        if now >= until:
            raise OverloadedError("the process is stopping", code="draining", retry_after=1.0)
        batch = channel.take(min(times.keep_alive_s, until - now))
        yield batch
        if batch and isinstance(batch[-1], Done):
            return


def _stop(running: Any, cancel: Callable[[], None]) -> None:
    """End the work and wait for that: a greenlet is cut off, of a thread its connection is."""
    kill = getattr(running, "kill", None)
    if kill is not None:
        kill()
        return
    cancel()
    running.join()
