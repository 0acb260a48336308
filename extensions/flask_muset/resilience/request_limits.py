"""What holds for a whole request: its deadline, and how many there are at once. Knows WSGI only."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from flask_muset.clock import SYSTEM
from flask_muset.deadline import Scope
from flask_muset.errors import (
    MusetError,
    OperationTimeoutError,
    OverloadedError,
    ValidationError,
)
from flask_muset.load import Gate, Paths, Verdict, arrived
from flask_muset.signals import Decision

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["RequestLimits"]

#: Retry-After of a shed request is drawn from 1 to so many whole seconds, so that not all come back
#: at once.
_MAX_RETRY_AFTER_S = 5
_HEADER = "X-Request-Timeout-Ms"
_MAX_HEADER_LENGTH = 12

#: Tells a decision: its part and what it was.
Tell = Callable[[str, Decision], None]


class RequestLimits:
    """WSGI layer that admits requests and gives each its deadline.

    Args:
        wsgi_app: The next layer.
        gate: Counts requests; None counts none.
        gate_mode: `enforce` or `observe`.
        timeout_s: The deadline, 0 for none.
        timeout_mode: `enforce` or `observe`.
        exempt: Paths that are passed on as they are.
        refuse: Answers a request with an error.
        tell: Tells decisions.
    """

    def __init__(
        self,
        wsgi_app: "WSGIApplication",
        *,
        gate: Gate | None,
        gate_mode: str,
        timeout_s: float,
        timeout_mode: str,
        exempt: Paths,
        refuse: "Callable[[MusetError, WSGIEnvironment, StartResponse], Iterable[bytes]]",
        tell: Tell,
    ) -> None:
        self._wsgi_app = wsgi_app
        self._gate = gate
        self._gate_mode = gate_mode
        self._timeout_s = timeout_s
        self._timeout_mode = timeout_mode
        self._exempt = exempt
        self._refuse = refuse
        self._tell = tell

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Serve one request."""
        if environ.get("PATH_INFO", "") in self._exempt:
            return self._wsgi_app(environ, start_response)
        gate = self._gate
        if gate is None:
            return self._bounded(environ, start_response, None)
        verdict = arrived.get()
        # Under a worker that counts, the place is given up when the worker is done.
        depart = gate.depart if verdict is None else None
        if verdict is None:
            verdict = gate.arrive(environ.get("PATH_INFO", ""))
        if verdict is Verdict.REFUSED:
            self._tell("concurrency", Decision.REJECTED)
            error = OverloadedError(
                f"{gate.limit} requests are under way in this process",
                retry_after=math.ceil(SYSTEM.uniform(0.0, _MAX_RETRY_AFTER_S)) or 1,
            )
            return self._refuse(error, environ, start_response)
        if self._gate_mode == "observe" and gate.in_flight > gate.limit:
            self._tell("concurrency", Decision.WOULD_REJECT)
        return self._bounded(environ, start_response, depart)

    def _bounded(
        self,
        environ: "WSGIEnvironment",
        start_response: "StartResponse",
        depart: Callable[[], None] | None,
    ) -> Iterable[bytes]:
        """Serve it within its deadline; `depart` is called when all of it is over."""
        try:
            if not self._timeout_s:
                body = self._wsgi_app(environ, start_response)
                return body if depart is None else _Body(body, None, depart)
            seconds, by_caller = self._seconds(environ)
            clock = _Time(seconds, self._timeout_mode, self._tell, counts=not by_caller)
            body = clock.run(lambda: self._wsgi_app(environ, start_response))
        except MusetError as error:
            if depart is not None:
                depart()
            return self._refuse(error, environ, start_response)
        except BaseException:
            if depart is not None:
                depart()
            raise
        wrapper = environ.get("wsgi.file_wrapper")
        is_file = wrapper is not None and isinstance(body, wrapper)
        if is_file and depart is None:  # servers send a file unread if it comes as it is
            return body  # type: ignore[no-any-return]
        return _Body(body, clock, depart)

    def _seconds(self, environ: "WSGIEnvironment") -> tuple[float, bool]:
        """The time that a request has, and whether its caller has lowered it."""
        text = environ.get("HTTP_X_REQUEST_TIMEOUT_MS")
        if text is None:
            return self._timeout_s, False
        well_formed = text.isascii() and text.isdigit() and len(text) <= _MAX_HEADER_LENGTH
        if self._timeout_mode == "observe" and not (well_formed and int(text)):
            self._tell("deadline", Decision.WOULD_REJECT)
            return self._timeout_s, False
        if not well_formed:
            raise ValidationError(
                f"{_HEADER} must be a whole number of milliseconds", field=_HEADER, malformed=True
            )
        asked = int(text) / 1_000
        if asked == 0:
            self._tell("deadline", Decision.TIMED_OUT)
            raise _too_late("the caller's time was up when the request came", by_caller=True)
        return min(asked, self._timeout_s), asked < self._timeout_s


def _too_late(text: str, *, by_caller: bool) -> OperationTimeoutError:
    """The error of a request whose time is up; a time that the caller chose is no fault of ours."""
    error = OperationTimeoutError(text)
    error.refusal = by_caller
    return error


class _Time:
    """The deadline of one request, from the application's call to its first bytes."""

    __slots__ = ("_at", "_counts", "_mode", "_seconds", "_tell", "_told")

    def __init__(self, seconds: float, mode: str, tell: Tell, *, counts: bool) -> None:
        self._seconds = seconds
        self._mode = mode
        self._tell = tell
        self._counts = counts
        self._told = False
        self._at = SYSTEM.now() + seconds

    def run(self, work: Callable[[], Any]) -> Any:
        """Do a part of the work within what is left.

        Raises:
            OperationTimeoutError: The time is up.
        """
        if self._mode != "enforce":
            result = work()
            self._tell_late(Decision.WOULD_REJECT)
            return result
        scope = Scope(max(0.0, self._at - SYSTEM.now()), counts=self._counts)
        scope.enter()
        try:
            result = work()
        except BaseException as error:
            scope.leave()
            if scope.cut(error):
                self._tell("deadline", Decision.TIMED_OUT)
                text = f"the request was not done within {self._seconds:g} s"
                raise _too_late(text, by_caller=not self._counts) from error
            raise
        if scope.leave():
            self._tell_late(Decision.OVERRUN)
        return result

    def _tell_late(self, decision: Decision) -> None:
        if SYSTEM.now() > self._at and not self._told:
            self._told = True
            self._tell("deadline", decision)


class _Body:
    """A response on its way to the server: its first bytes are within the deadline too."""

    __slots__ = ("_clock", "_depart", "_inner")

    def __init__(
        self, inner: Iterable[bytes], clock: _Time | None, depart: Callable[[], None] | None
    ) -> None:
        self._inner = inner
        self._clock = clock
        self._depart = depart

    def __iter__(self) -> Iterator[bytes]:
        chunks = iter(self._inner)
        if self._clock is not None:
            first = self._clock.run(lambda: next(chunks, None))
            if first is None:
                return
            yield first
        # Not `yield from`, which would close the body once more when a client leaves.
        for chunk in chunks:  # noqa: UP028
            yield chunk

    def close(self) -> None:
        """Close the body and give the request's place up."""
        try:
            close = getattr(self._inner, "close", None)
            if close is not None:
                close()
        finally:
            self._leave()

    def _leave(self) -> None:
        depart, self._depart = self._depart, None
        if depart is not None:
            depart()

    def __del__(self) -> None:
        # Test clients drop responses without closing them.
        self._leave()
