"""Calls of one HTTP server over kept connections, which can be cut off at any moment.

http.client takes an answer apart. How long each step may take and what becomes of the connection is
decided here: one whose answer was not read to its end is closed, never drained and never used
again. Nothing is sent twice, no redirect is followed, no proxy used, and what a name stands for is
looked up once and checked before anything goes there.
"""

import re
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from http.client import (
    HTTP_PORT,
    HTTPS_PORT,
    HTTPConnection,
    HTTPException,
    HTTPMessage,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
)
from ipaddress import ip_address
from typing import Any, NoReturn
from urllib.parse import urlsplit

from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import ExternalServiceError, OperationTimeoutError, OverloadedError
from flask_muset.locks import give_lock, original
from muset.providers.addresses import refusal

__all__ = ["Call", "Server"]

#: Connections of one process to one server: more than any worker serves requests.
_MAX_CONNECTIONS = 4096
#: Seconds after which an unused connection is closed: many servers close theirs a little later, and
#: what is sent at that moment is lost.
_MAX_IDLE_S = 15.0
_READ_BYTES = 65_536
#: Seconds to wait for the last bytes behind an answer that is complete.
_TAIL_S = 0.05

#: ValueError is what gevent raises for a TLS connection that another greenlet has shut.
_BROKEN = (OSError, HTTPException, ValueError)


class Server:
    """Where calls go. It opens nothing before the first one; a forked child begins anew.

    Args:
        name: For people.
        base_url: `http://` or `https://`, a host, perhaps a port and a path.
        has_key: Whether what is sent there has a key in it.
        insecure_hosts: For these neither the address nor the key matters.

    Raises:
        ValueError: The URL is another one; the text says what is wrong, not what it is.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        has_key: bool = False,
        insecure_hosts: Collection[str] = (),
    ) -> None:
        self._idle: deque[tuple[float, HTTPConnection]] = deque()
        self.name = name
        self._is_tls, self._host, self._port, self.path = _parts_of(base_url)
        self._is_address = _is_address(self._host)
        self._is_checked = self._host not in insecure_hosts
        self._key_in_clear = has_key and not self._is_tls
        # What a name stands for is only known when it is used.
        reason = self._refusal(self._host) if self._is_address else None
        if reason is not None:
            raise ValueError(f"must be another one: {reason}")
        self._tls: ssl.SSLContext | None = None
        self._inherited: deque[tuple[float, HTTPConnection]] | None = None
        self._busy = 0
        give_lock(self)

    _lock: Any

    def __del__(self) -> None:
        for _, connection in self._idle:
            connection.close()

    def take(self) -> HTTPConnection:
        """A connection, kept or new; it has to be given back.

        Raises:
            OverloadedError: Too many are in use.
        """
        if self._is_tls and self._tls is None:
            self._tls = ssl.create_default_context()
        dropped, found = [], None
        with self._lock:
            if self._busy >= _MAX_CONNECTIONS:
                raise OverloadedError(f"{self.name}: {_MAX_CONNECTIONS} connections are in use")
            oldest = SYSTEM.now() - _MAX_IDLE_S
            while self._idle and self._idle[0][0] < oldest:
                dropped.append(self._idle.popleft()[1])
            if self._idle:
                found = self._idle.pop()[1]
            self._busy += 1
        if found is not None and not _is_quiet(found.sock):
            dropped.append(found)
            found = None
        for connection in dropped:
            connection.close()
        return self._make() if found is None else found

    def give(self, connection: HTTPConnection, *, is_clean: bool) -> None:
        """Keep a connection that was taken, or close it."""
        with self._lock:
            self._busy -= 1
            if is_clean:
                self._idle.append((SYSTEM.now(), connection))
        if not is_clean:
            connection.close()

    def _make(self) -> HTTPConnection:
        # Without a port http.client looks for one in the host, and IPv6 addresses have colons.
        if self._is_tls:
            port = self._port or HTTPS_PORT
            made: Any = HTTPSConnection(self._host, port, context=self._tls)
        else:
            made = HTTPConnection(self._host, self._port or HTTP_PORT)
        made._create_connection = self._connected
        connection: HTTPConnection = made
        return connection

    def _connected(self, address: tuple[str, int], timeout: float, *_: object) -> socket.socket:
        """Connect to the very addresses that were looked at, so that no name can change between."""
        host, port = address
        found = [host] if self._is_address else _addresses_of(host, port)
        for each in found:
            self._check(each)
        for each in found[:-1]:
            with suppress(OSError):  # the next one may answer
                return _connected_to(each, port, timeout)
        return _connected_to(found[-1], port, timeout)

    def _refusal(self, address: str) -> str | None:
        return refusal(address, key_in_clear=self._key_in_clear) if self._is_checked else None

    def _check(self, address: str) -> None:
        """Look at what the host's name stands for.

        Raises:
            ExternalServiceError: Nothing may be sent there.
        """
        reason = self._refusal(address)
        if reason is not None:
            raise ExternalServiceError(
                f"{self.name} is not asked because of the address of {self._host}: {reason}",
                unavailable=True,
                retryable=False,
            )

    def _forked(self) -> None:
        """In a child, which must not close what its parent uses, and can close nothing yet."""
        self._inherited, self._idle, self._busy = self._idle, deque(), 0


def _parts_of(base_url: str) -> tuple[bool, str, int | None, str]:
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as the look-up will do it
    except ValueError as error:
        raise ValueError(f"cannot be read as a URL ({error})") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("must begin with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must bear no credentials; put the key into api_key_env or api_key_file")
    if not re.fullmatch(r"[!-~]+", base_url) or "?" in base_url or "#" in base_url:
        raise ValueError("must be ASCII without spaces, ? and #")
    return parts.scheme == "https", host, port, parts.path.rstrip("/")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _addresses_of(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _connected_to(address: str, port: int, timeout: float) -> socket.socket:
    """What `socket.create_connection` does, which has addresses looked up as if they were names.

    gevent does that in native threads, where it waits for whatever else they have to do.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        sock.settimeout(timeout)
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _is_quiet(sock: Any) -> bool:
    """Whether a kept connection is open: all that can be read from one is its end."""
    # gevent's own poll goes through its event loop, which costs more than the rest of a call.
    poll = original("select", "poll")()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


class Call:
    """One request and its answer, for one greenlet or thread; `abort` is for any.

    Args:
        server: Where it goes.
        left_s: Seconds, above 0, that the next step may take; raises when there are none.
    """

    def __init__(self, server: Server, left_s: Callable[[], float]) -> None:
        self._server = server
        self._left_s = left_s
        self._connection: HTTPConnection | None = None
        self._response: HTTPResponse | None = None
        self._socket: Any = None
        self._is_whole = False
        self._is_aborted = False

    @property
    def status(self) -> int:
        """HTTP status of the answer."""
        return self._answer.status

    @property
    def headers(self) -> HTTPMessage:
        """Headers of the answer; names in any case."""
        return self._answer.headers

    @property
    def _answer(self) -> HTTPResponse:
        assert self._response is not None  # noqa: S101 - post comes first
        return self._response

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a request and read the head of its answer.

        Args:
            path: Behind the server's own.
            body: Sent with its length.
            headers: Beside those that HTTP needs.

        Raises:
            ExternalServiceError: There is no connection (`unavailable`), or it broke.
            OperationTimeoutError: It took too long.
            OverloadedError: Too many connections are in use.
        """
        self.end()
        connection = self._connection = self._server.take()
        if connection.sock is None:
            self._connect(connection)
        self._adopt(connection.sock)
        try:
            self._socket.settimeout(self._left_s())
            # It may have answered, and closed, before it had read all.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", self._server.path + path, body, dict(headers))
            self._socket.settimeout(self._left_s())
            self._response = connection.getresponse()
            self._check_coding(self._response)
        except _BROKEN as error:
            self._fail(error)

    def _check_coding(self, response: HTTPResponse) -> None:
        coding = response.getheader("Content-Encoding", "identity")
        if coding.lower() != "identity":
            raise ExternalServiceError(
                f"{self._server.name} sent the coding {coding!r}, which it was not asked for"
            )

    def _connect(self, connection: HTTPConnection) -> None:
        try:
            connection.timeout = self._left_s()
            connection.connect()
        except OSError as error:
            if isinstance(error, TimeoutError):
                self._fail(error)
            raise ExternalServiceError(
                f"{self._server.name} cannot be reached: {error}", unavailable=True
            ) from error

    def _adopt(self, sock: Any) -> None:
        """Let `abort` know the socket, which the connection forgets if it is the last answer's."""
        with self._server._lock:
            self._socket = sock
            if self._is_aborted:
                raise self.aborted()

    def read(self) -> bytes:
        """The next bytes of the answer, b"" at its end.

        Raises:
            ExternalServiceError: It was cut off.
            OperationTimeoutError: It took too long.
        """
        try:
            self._socket.settimeout(self._left_s())
            data = self._answer.read1(_READ_BYTES)
            if not data and self._answer.length:
                raise IncompleteRead(b"", self._answer.length)
        except _BROKEN as error:
            self._fail(error)
        self._is_whole = not data
        return data

    def read_all(self, max_bytes: int) -> bytes:
        """The rest of the answer, or as much of it as may come; what is longer is cut off.

        Raises:
            ExternalServiceError: It was cut off.
            OperationTimeoutError: It took too long.
        """
        found = bytearray()
        while len(found) <= max_bytes and (data := self.read()):
            found += data
        return bytes(found[:max_bytes])

    def finish(self) -> None:
        """Read the very end of an answer that is complete, so that the connection may be kept."""
        left_s = deadline.remaining()
        if self._is_whole or (left_s is not None and left_s < 2 * _TAIL_S):
            return
        # The answer is there: whatever happens here costs no more than the connection.
        with suppress(*_BROKEN):
            self._socket.settimeout(_TAIL_S)
            self._is_whole = not self._answer.read1(_READ_BYTES)

    def abort(self) -> None:
        """Break the connection off, now and for good; whoever waits for it gets an error."""
        with self._server._lock:
            self._is_aborted = True
            if self._socket is not None:
                with suppress(OSError):  # the server was faster
                    self._socket.shutdown(socket.SHUT_RDWR)

    def aborted(self) -> ExternalServiceError:
        """What whoever waits is told after `abort`."""
        return ExternalServiceError(f"the call of {self._server.name} was closed by its caller")

    def end(self) -> None:
        """Give the connection back if its answer was read to the end, else close it."""
        with self._server._lock:
            connection, self._connection = self._connection, None
            response, self._response = self._response, None
            self._socket = None
            is_clean = self._is_whole and not self._is_aborted
            self._is_whole = False
        if response is not None:
            response.close()
        if connection is not None:
            self._server.give(connection, is_clean=is_clean and connection.sock is not None)

    def _fail(self, error: Exception) -> NoReturn:
        name = self._server.name
        if self._is_aborted:
            raise self.aborted() from error
        if isinstance(error, TimeoutError):
            self._left_s()  # says whose time is up
            raise OperationTimeoutError(f"{name} did not answer in time") from error
        raise ExternalServiceError(
            f"{name} broke the connection ({type(error).__name__})"
        ) from error
