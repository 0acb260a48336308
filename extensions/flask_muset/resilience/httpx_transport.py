"""Transports that put a policy round each exchange of an httpx client.

    client = httpx.Client(transport=PolicyTransport(policy))

The policy guards until the headers of the answer have come; the body is read later and what fails
then is never repeated. What may be sent again is in `flask_muset.resilience.http_calls`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, cast

import httpx

from flask_muset.errors import ErrorCategory, MusetError
from flask_muset.resilience.guards import Guard
from flask_muset.resilience.http_calls import Exchange, PolicyEndedError, check_policy, give, run

__all__ = [
    "AsyncPolicyTransport",
    "PolicyTransport",
    "RequestRefusedError",
    "RequestTimeoutError",
]

_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_TIMEOUTS = ("connect", "read", "write", "pool")


class RequestRefusedError(PolicyEndedError, httpx.TransportError):
    """The policy did not let the request through: an open circuit, a full bulkhead, a limit.

    Its cause says which, as an error of `flask_muset.errors`.
    """


class RequestTimeoutError(PolicyEndedError, httpx.TimeoutException):
    """The time of the policy, or of the deadline, has passed.

    Its cause is the `OperationTimeoutError`.
    """


class PolicyTransport(httpx.BaseTransport):
    """Guard each exchange of an `httpx.Client`.

    Failures are the client's transport errors, 429, and statuses of 500 and above; of the answers
    429, 502, 503 and 504 may be tried again. When the policy gives up, the caller gets the real
    answer or the client's own exception. Sent again is only what may be: see
    `docs/how-to/http-clients.md`. The time-outs of each attempt are at most what is left of the
    deadline.

    Args:
        policy: A `Policy` or one of its parts. What a `Fallback` gives must be an `httpx.Response`.
        wrapped: The transport that sends, closed with this one; None makes an
            `httpx.HTTPTransport()`. httpx's options for connections, such as `verify`, `http2` and
            `limits`, are options of this one. Leave its `retries` at 0: a policy does not see them.

    Raises:
        ValueError: `policy` is something else.
    """

    def __init__(self, policy: Guard, wrapped: httpx.BaseTransport | None = None) -> None:
        self._policy = check_policy("PolicyTransport", policy)
        self._wrapped = httpx.HTTPTransport() if wrapped is None else wrapped

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Make a request under the policy.

        Raises:
            RequestRefusedError: The policy refused it.
            RequestTimeoutError: Its time has passed.
            TypeError: A Fallback gave something that is no response.
        """
        exchange = _Exchange(request)

        def send(left_s: float | None) -> httpx.Response:
            with _bounded(request, left_s):
                response = self._wrapped.handle_request(request)
                if exchange.is_worth_reading(response):
                    response.stream = _read(cast(httpx.SyncByteStream, response.stream))
                return response

        return _checked(run(self._policy, exchange, send, httpx.Response.close))

    def __enter__(self) -> Self:
        self._wrapped.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._wrapped.__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        """Close the wrapped transport."""
        self._wrapped.close()


class AsyncPolicyTransport(httpx.AsyncBaseTransport):
    """Guard each exchange of an `httpx.AsyncClient`, as `PolicyTransport` does.

    Args:
        policy: A `Policy` or one of its parts.
        wrapped: The transport that sends; None makes an `httpx.AsyncHTTPTransport()`.

    Raises:
        ValueError: `policy` is something else.
    """

    def __init__(self, policy: Guard, wrapped: httpx.AsyncBaseTransport | None = None) -> None:
        self._policy = check_policy("AsyncPolicyTransport", policy)
        self._wrapped = httpx.AsyncHTTPTransport() if wrapped is None else wrapped

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Make a request under the policy.

        Raises:
            RequestRefusedError: The policy refused it.
            RequestTimeoutError: Its time has passed.
            RuntimeError: gevent has patched this process; asyncio does not work there.
            TypeError: A Fallback gave something that is no response.
        """
        exchange = _Exchange(request)

        async def attempt() -> httpx.Response:
            last = exchange.begin()
            if last is not None:
                await last.aclose()
            left_s = exchange.left_s()
            try:
                response = await self._send(exchange, request, left_s)
            except Exception as error:
                exchange.failed(error)
                raise
            exchange.answered(response)
            return response

        given: Any = None
        try:
            given = await self._policy.call(attempt)
        except Exception as error:
            given = exchange.ending(error)
            if given is error:
                given = None
                raise
        finally:
            unused = exchange.close(given)
            if unused is not None:
                await unused.aclose()
        try:
            return _checked(give(given))
        finally:
            del given

    async def _send(
        self, exchange: "_Exchange", request: httpx.Request, left_s: float | None
    ) -> httpx.Response:
        with _bounded(request, left_s):
            response = await self._wrapped.handle_async_request(request)
            if exchange.is_worth_reading(response):
                response.stream = await _aread(cast(httpx.AsyncByteStream, response.stream))
            return response

    async def __aenter__(self) -> Self:
        await self._wrapped.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._wrapped.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self._wrapped.aclose()


class _Exchange(Exchange[httpx.Response]):
    def __init__(self, request: httpx.Request) -> None:
        super().__init__(request.method, request.headers)
        self._request = request

    def is_unsent(self, error: Exception) -> bool:
        return isinstance(error, _UNSENT)

    def rewind(self) -> bool:
        # Only bytes in memory: an iterator is used up, and httpx does not say whether the stream of
        # an upload can be read twice.
        return isinstance(self._request.stream, httpx.ByteStream)

    def ended(self, error: MusetError) -> PolicyEndedError:
        is_timeout = error.category is ErrorCategory.TIMEOUT
        return (RequestTimeoutError if is_timeout else RequestRefusedError)(str(error))


@contextmanager
def _bounded(request: httpx.Request, left_s: float | None) -> Iterator[None]:
    """Let no time-out of a request be longer than what is left."""
    if left_s is None:
        yield
        return
    before = request.extensions
    own = before.get("timeout", {})
    bounded = {name: min(left_s, _or_infinite(own.get(name))) for name in _TIMEOUTS}
    request.extensions = {**before, "timeout": bounded}
    try:
        yield
    finally:
        # A redirect takes the extensions over, and has a time of its own.
        request.extensions = before


def _or_infinite(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


def _read(stream: httpx.SyncByteStream) -> httpx.ByteStream:
    """A body in memory, undecoded; its connection is free again."""
    try:
        return httpx.ByteStream(b"".join(stream))
    finally:
        stream.close()


async def _aread(stream: httpx.AsyncByteStream) -> httpx.ByteStream:
    try:
        return httpx.ByteStream(b"".join([part async for part in stream]))
    finally:
        await stream.aclose()


def _checked(given: Any) -> httpx.Response:
    if not isinstance(given, httpx.Response):
        raise TypeError(
            f"the Fallback of an httpx transport must give an httpx.Response, got {given!r}."
        )
    return given
