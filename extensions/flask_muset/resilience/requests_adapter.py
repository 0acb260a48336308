"""An adapter that puts a policy round each exchange of a requests session.

    session = requests.Session()
    session.mount("https://", PolicyAdapter(policy))

The policy guards until the headers of the answer have come; the body is read later and what fails
then is never repeated. What may be sent again is in `flask_muset.resilience.http_calls`.
"""

from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
from urllib3.util import Timeout

from flask_muset.errors import ErrorCategory, MusetError
from flask_muset.resilience.guards import Guard
from flask_muset.resilience.http_calls import (
    Exchange,
    PolicyEndedError,
    check_policy,
    is_small,
    run,
)

__all__ = ["PolicyAdapter", "RequestRefusedError", "RequestTimeoutError"]


class RequestRefusedError(PolicyEndedError, requests.ConnectionError):
    """The policy did not let the request through: an open circuit, a full bulkhead, a limit.

    Its cause says which, as an error of `flask_muset.errors`.
    """


class RequestTimeoutError(PolicyEndedError, requests.Timeout):
    """The time of the policy, or of the deadline, has passed.

    Its cause is the `OperationTimeoutError`.
    """


class PolicyAdapter(HTTPAdapter):
    """Guard each exchange of a `requests.Session`.

    Failures are the client's exceptions, 429, and statuses of 500 and above; of the answers 429,
    502, 503 and 504 may be tried again. When the policy gives up, the caller gets the real answer
    or the client's own exception. Sent again is only what may be: see
    `docs/how-to/http-clients.md`. Each attempt takes at most what is left of the deadline until it
    is answered.

    Args:
        policy: A `Policy` or one of its parts. What a `Fallback` gives must be a
            `requests.Response`.
        **options: As of `requests.adapters.HTTPAdapter`, without `max_retries`.

    Raises:
        ValueError: `policy` is something else, or `max_retries` is given.
    """

    __attrs__ = [*HTTPAdapter.__attrs__, "_policy"]  # noqa: RUF012 - as requests has it

    def __init__(self, policy: Guard, **options: Any) -> None:
        if "max_retries" in options:
            raise ValueError(
                f"PolicyAdapter: max_retries is the policy's, got {options['max_retries']!r}; give "
                "it to a RetryStrategy there, because two layers that repeat multiply."
            )
        self._policy = check_policy("PolicyAdapter", policy)
        super().__init__(max_retries=0, **options)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Make a request under the policy; the arguments are those of requests.

        Raises:
            RequestRefusedError: The policy refused it.
            RequestTimeoutError: Its time has passed.
            TypeError: A Fallback gave something that is no response.
        """
        exchange = _Exchange(request)
        send_once = super().send

        def send(left_s: float | None) -> requests.Response:
            response = send_once(request, stream, _bounded(timeout, left_s), verify, cert, proxies)
            if not stream and exchange.is_worth_reading(response):
                _read(response)
            return response

        return _checked(run(self._policy, exchange, send, _drop))


class _Exchange(Exchange[requests.Response]):
    def __init__(self, request: requests.PreparedRequest) -> None:
        super().__init__(request.method, request.headers or {})
        self._request = request
        self._body: Any = request.body
        self._start = _position(self._body)

    def is_unsent(self, error: Exception) -> bool:
        if isinstance(error, requests.ConnectTimeout):
            return True
        is_connection = isinstance(error, requests.ConnectionError) and error.args
        cause: Any = error.args[0] if is_connection else None
        while cause is not None and not isinstance(cause, NewConnectionError | ConnectTimeoutError):
            # urllib3 packs the reason into MaxRetryError, that of a proxy into ProxyError
            cause = getattr(cause, "reason", None) or getattr(cause, "original_error", None)
        return cause is not None

    def rewind(self) -> bool:
        if self._body is None or isinstance(self._body, str | bytes | bytearray):
            return True
        if self._start is None:
            return False
        try:
            self._body.seek(self._start)
        except (OSError, ValueError):  # no regular file, or closed
            return False
        return True

    def ended(self, error: MusetError) -> PolicyEndedError:
        is_timeout = error.category is ErrorCategory.TIMEOUT
        cls = RequestTimeoutError if is_timeout else RequestRefusedError
        return cls(str(error), request=self._request)


def _position(body: Any) -> int | None:
    """Where a file stands before it is sent; None for what is no file, or a pipe."""
    if not (hasattr(body, "tell") and hasattr(body, "seek")):
        return None
    try:
        return int(body.tell())
    except (OSError, ValueError):
        return None


def _bounded(timeout: Any, left_s: float | None) -> Any:
    """A time-out of requests that ends, connecting and waiting together, within what is left."""
    if left_s is None:
        return timeout
    if isinstance(timeout, Timeout):
        bounded = timeout.clone()
        if isinstance(bounded.total, int | float):
            left_s = min(left_s, bounded.total)
        bounded.total = left_s
        return bounded
    if not isinstance(timeout, tuple):
        return Timeout(total=left_s, connect=timeout, read=timeout)
    if len(timeout) != 2:
        return timeout  # requests says what is wrong with it
    connect, read = timeout
    return Timeout(total=left_s, connect=connect, read=read)


def _read(response: requests.Response) -> None:
    """Read a body that the session would read anyway; its connection is free again."""
    try:
        response.content  # noqa: B018 - it is kept by the response
    except BaseException:
        response.close()
        raise


def _drop(response: requests.Response) -> None:
    if response.raw is not None and is_small(response.headers):
        response.raw.drain_conn()
    response.close()


def _checked(given: Any) -> requests.Response:
    if not isinstance(given, requests.Response):
        raise TypeError(
            f"the Fallback of a PolicyAdapter must give a requests.Response, got {given!r}."
        )
    return given
