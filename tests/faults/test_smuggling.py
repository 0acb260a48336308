"""Requests that two servers may read differently: gunicorn takes each for one, or for none."""

import re
import socket

#: Stands behind each request: whoever answers it has taken the one before for shorter than it is.
HIDDEN = "GET /health/live?smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
TWO_ENDS = (
    f"Content-Length: {len(HIDDEN)}\r\nTransfer-Encoding: chunked",
    "Content-Length: 0\r\nContent-Length: 5",
    "Content-Length: 0, 5",
    "Content-Length: +5",
    "Content-Length: 0x5",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding:\r\n chunked",
    " Content-Length: 5",
    "X: a\r\n\tContent-Length: 5",
    "X: a\rContent-Length: 5",
    "X: a\x00b",
    "X y: a",
)


def exchange(service, text):
    """All that is answered until the server closes."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as sock:
        sock.sendall(text.encode("latin-1"))
        answered = b""
        while data := sock.recv(65_536):
            answered += data
    return answered.decode("latin-1")


def statuses(answered):
    return re.findall(r"^HTTP/1\.1 (\d{3})", answered, re.MULTILINE)


def test_what_has_two_ends_is_refused(service):
    """Lengths and encodings that contradict each other: 4xx or 501, and nothing behind is read."""
    service.start()
    for headers in TWO_ENDS:
        text = f"POST /api/v1/ask HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n"
        answered = exchange(service, text + HIDDEN)
        found = statuses(answered)
        assert len(found) == 1, (headers, answered)
        assert found[0] in ("400", "501"), (headers, answered)
    # A chunk whose length is none ends the connection as well.
    for chunk in ("x\r\n", "-1\r\n", "0x0\r\n\r\n", "1\r\naa\r\n0\r\n\r\n"):
        head = "POST /api/v1/ask HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert "200" not in statuses(exchange(service, head + chunk + HIDDEN)), chunk
    # No header takes the place of another, nor of the request line: underscores are dropped.
    for name in ("PATH_INFO", "SCRIPT_NAME", "Content_Length", "X_Forwarded_For", "REMOTE_ADDR"):
        text = f"GET /health/live HTTP/1.1\r\nHost: x\r\n{name}: /nowhere\r\nConnection: close\r\n"
        assert statuses(exchange(service, f"{text}\r\n")) == ["200"], name
    assert service.stop() == 0
