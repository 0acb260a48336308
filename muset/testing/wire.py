"""HTTP by the byte: faults need what no WSGI server lets an app do."""

import json
import socket
import struct
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

import gevent
from gevent.hub import Waiter

__all__ = ["ERRORS", "ClientLeftError", "EndedError", "Wire", "error_body"]

_MAX_BODY_BYTES, _MAX_HEAD_BYTES = 2 * 1024 * 1024, 64 * 1024
#: Status, type, code and text of the errors that OpenAI's API answers.
ERRORS: Mapping[str, tuple[int, str, str | None, str]] = {
    "rate_limited": (429, "requests", "rate_limit_exceeded", "Too many requests for this key."),
    "server_error": (500, "server_error", None, "The model has failed on this request."),
    "unavailable": (503, "server_error", None, "The model is overloaded at the moment."),
    "unauthorized": (401, "invalid_request_error", "invalid_api_key", "This key is not known."),
    "forbidden": (403, "invalid_request_error", None, "This key may not use the model."),
    "context_length": (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "This model's maximum context length is 8192 tokens, and the messages have more.",
    ),
}


class ClientLeftError(ConnectionError):
    """The other side has closed the connection."""


class EndedError(Exception):
    """The connection ends here, because a fault says so."""


def error_body(kind: str, code: str | None, text: str) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


class Wire(BaseHTTPRequestHandler):
    """One connection; its requests come one after the other."""

    protocol_version = "HTTP/1.1"
    server_version = "muset-upstream"
    timeout = 120
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Begin."""
        super().setup()
        self._fd: int = self.connection.fileno()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Nothing: what was asked is in the record."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server finds wrong like any other error, and end the connection."""
        self.close_connection = True
        self.error(code, "invalid_request_error", None, message or HTTPStatus(code).phrase)

    def parse_request(self) -> bool:
        """Read the head; http.server bounds its lines and their number, this their sum."""
        if not super().parse_request():
            return False
        if sum(len(name) + len(value) for name, value in self.headers.items()) > _MAX_HEAD_BYTES:
            self.send_error(431)
            return False
        return True

    def read_json(self) -> dict[str, Any] | None:
        """The object in the body; None where the error has been answered already.

        Raises:
            ClientLeftError: It ends before its length.
        """
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self.send_error(411)
            return None
        if not 0 <= length <= _MAX_BODY_BYTES:
            self.send_error(413, f"A body has at most {_MAX_BODY_BYTES} bytes.")
            return None
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ClientLeftError
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self.send_error(400, "The body cannot be read: it is no JSON object.")
            return None
        return value

    def error(
        self, status: int, kind: str, code: str | None, text: str, retry_after: str | None = None
    ) -> None:
        """Answer an error."""
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        self.send_json(status, error_body(kind, code, text), headers)

    def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answer a value."""
        body = json.dumps(value).encode()
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def head(
        self, status: int, headers: Mapping[str, str], media_type: str = "application/json"
    ) -> None:
        """Write the head of an answer."""
        self.send_response(status)
        for name, value in {"Content-Type": media_type, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def wait_until(self, moment: float) -> None:
        """Wait until the monotonic clock shows this.

        Raises:
            OSError: The client has left.
        """
        while (left := moment - time.monotonic()) > 0:
            if not self._is_readable_within(left):
                return
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ClientLeftError
            # It has sent its next request already.
            gevent.sleep(min(left, 0.05))

    def _is_readable_within(self, seconds: float) -> bool:
        # A time-out of gevent's for each token would cost more than the token.
        waiter = Waiter()
        timer, readable = waiter.hub.loop.timer(seconds), waiter.hub.loop.io(self._fd, 1)
        with timer, readable:
            timer.start(waiter.switch, False)
            readable.start(waiter.switch, True)
            is_readable: bool = waiter.get()
        return is_readable

    def reset_connection(self) -> None:
        """End the connection so that the other side reads a reset."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise EndedError
