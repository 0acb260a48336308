"""What holds for a whole request: its deadline, and how many there are at once. Knows WSGI only."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from flask_muset.clock import SYSTEM
from flask_muset.context import is_whole
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

_REFUSED = Verdict.REFUSED

#: Tells a decision: its part and what it was.
Tell = Callable[[str, Decision], None]
#: The first bytes of a body, if it has any, and the rest of them.
_Begun = tuple[Sequence[bytes], Iterator[bytes]]


class RequestLimits:
    """WSGI layer that admits requests and gives each its deadline.

    Args:
        wsgi_app: The next layer.
        gate: Counts requests; None counts none.
        gate_mode: `enforce` or `observe`.
        timeout_s: The deadline, 0 for none.
        timeout_mode: `enforce` or `observe`.
        exempt: Paths that are passed on as they are.
        begin: Is called with the first request that has a deadline.
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
        begin: Callable[[], None],
        refuse: "Callable[[MusetError, WSGIEnvironment, StartResponse], Iterable[bytes]]",
        tell: Tell,
    ) -> None:
        self._wsgi_app = wsgi_app
        self._gate = gate
        self._gate_mode = gate_mode
        self._timeout_s = timeout_s
        self._timeout_mode = timeout_mode
        self._exempt = exempt
        self._begin: Callable[[], None] | None = begin
        self._refuse = refuse
        self._tell = tell

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Serve one request."""
        if environ.get("PATH_INFO", "") in self._exempt:
            return self._wsgi_app(environ, start_response)
        arrival, gate = arrived.get(), self._gate
        began = SYSTEM.now() if arrival is None else arrival.at
        if gate is None:
            return self._bounded(environ, start_response, began, None)
        if arrival is not None and arrival.gate is gate:
            # The worker counts, and gives the place up when it is done.
            verdict, depart = arrival.verdict, None
        else:
            verdict, depart = gate.admit(), gate.depart
        if verdict is _REFUSED:
            return self._shed(gate, environ, start_response)
        try:
            if self._gate_mode == "observe" and gate.in_flight > gate.limit:
                self._tell("concurrency", Decision.WOULD_REJECT)
            return self._bounded(environ, start_response, began, depart)
        except BaseException:
            if depart is not None:
                depart()
            raise

    def _shed(
        self, gate: Gate, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        self._tell("concurrency", Decision.REJECTED)
        error = OverloadedError(
            f"{gate.limit} requests are under way in this process",
            retry_after=math.ceil(SYSTEM.uniform(0.0, _MAX_RETRY_AFTER_S)) or 1,
        )
        return self._refuse(error, environ, start_response)

    def _bounded(
        self,
        environ: "WSGIEnvironment",
        start_response: "StartResponse",
        began: float,
        depart: Callable[[], None] | None,
    ) -> Iterable[bytes]:
        """Serve it within its deadline; `depart` is called when all of it is over."""
        if not self._timeout_s:
            body = self._wsgi_app(environ, start_response)
            return body if depart is None else _Body(body, None, depart)
        if self._begin is not None:
            begin, self._begin = self._begin, None
            begin()
        held = _Held(start_response)
        try:
            body, begun = self._timed(environ, held, began)
        except _OwnError as own:
            answer = self._refuse(own.error, environ, start_response)
            if depart is not None:
                depart()
            return answer
        held.release()
        return body if begun is None and depart is None else _Body(body, begun, depart)

    def _timed(
        self, environ: "WSGIEnvironment", held: "_Held", began: float
    ) -> tuple[Iterable[bytes], _Begun | None]:
        """Make the answer up to its first bytes within the request's time.

        Raises:
            _OwnError: The time is up, or what the caller says of it cannot be read.
        """
        asked = environ.get("HTTP_X_REQUEST_TIMEOUT_MS")
        seconds, by_caller = (self._timeout_s, False) if asked is None else self._asked(asked)
        at = began + seconds
        if self._timeout_mode == "observe":
            answer = self._first(environ, held)
            if SYSTEM.now() > at:
                self._tell("deadline", Decision.WOULD_REJECT)
            return answer
        left_s = at - SYSTEM.now()
        if left_s <= 0:
            raise self._too_late(seconds, by_caller=by_caller)
        # A time that the caller chose is no fault of ours.
        scope = Scope(left_s, counts=not by_caller)
        scope.enter()
        try:
            answer = self._first(environ, held)
        except BaseException as error:
            if scope.leave(error)[0] is not None:
                raise self._too_late(seconds, by_caller=by_caller) from error
            raise
        if scope.leave()[1]:
            self._tell("deadline", Decision.OVERRUN)
        return answer

    def _too_late(self, seconds: float, *, by_caller: bool) -> "_OwnError":
        self._tell("deadline", Decision.TIMED_OUT)
        error = OperationTimeoutError(f"the request was not done within {seconds:g} s")
        error.refusal = by_caller
        return _OwnError(error)

    def _first(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> tuple[Iterable[bytes], _Begun | None]:
        """The body, and its first bytes with the rest of them if it is one that has to be begun."""
        body = self._wsgi_app(environ, start_response)
        if is_whole(body, environ):
            return body, None
        chunks = iter(body)
        try:
            first = next(chunks, None)
        except BaseException:
            _close(body)
            raise
        return body, (() if first is None else (first,), chunks)

    def _asked(self, text: str) -> tuple[float, bool]:
        """The time that a request has by its header, and whether its caller has lowered it."""
        well_formed = text.isascii() and text.isdigit() and len(text) <= _MAX_HEADER_LENGTH
        if self._timeout_mode == "observe" and not (well_formed and int(text)):
            self._tell("deadline", Decision.WOULD_REJECT)
            return self._timeout_s, False
        if not well_formed:
            raise _OwnError(
                ValidationError(
                    f"{_HEADER} must be a whole number of milliseconds",
                    field=_HEADER,
                    malformed=True,
                )
            )
        asked = int(text) / 1_000
        return min(asked, self._timeout_s), asked < self._timeout_s


class _OwnError(Exception):
    """An error of this layer, not of the application: what leaves that is the application's."""

    def __init__(self, error: MusetError) -> None:
        super().__init__(error.message)
        self.error = error


class _Held:
    """`start_response` that waits for the first bytes: till then the answer may be another one."""

    __slots__ = ("_call", "_start")

    def __init__(self, start_response: "StartResponse") -> None:
        self._start = start_response
        self._call: tuple[Any, ...] | None = None

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        self._call = status, headers, exc_info
        return lambda data: self.release()(data)

    def release(self) -> Callable[[bytes], object]:
        """Begin the response."""
        if self._call is None:
            return lambda _data: None
        return self._start(*self._call)


class _Body:
    """A response on its way to the server."""

    __slots__ = ("_chunks", "_depart", "_inner")

    def __init__(
        self,
        inner: Iterable[bytes],
        begun: _Begun | None,
        depart: Callable[[], None] | None,
    ) -> None:
        self._inner = inner
        self._chunks = inner if begun is None else chain(*begun)
        self._depart = depart

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    def close(self) -> None:
        """Close the body and give the request's place up."""
        try:
            _close(self._inner)
        finally:
            self._leave()

    def _leave(self) -> None:
        depart, self._depart = self._depart, None
        if depart is not None:
            depart()

    def __del__(self) -> None:
        # Test clients drop responses without closing them.
        if self._depart is not None:
            self._leave()


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()
