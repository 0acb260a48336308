"""A model server that sends exactly the bytes that a test says, over real sockets."""

import contextlib
import json
import socket
import threading
import time

EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
DONE = b"data: [DONE]\n\n"


def chunk(text=None, finish=None, **members):
    """An event of a stream, as bytes."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}}
    body = {"choices": [{**choice, "finish_reason": finish}], **members}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(sent, received):
    """The last event, which has no choice."""
    body = {"choices": [], "usage": {"prompt_tokens": sent, "completion_tokens": received}}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class Peer:
    """The server's side of one connection, while it serves one request."""

    def __init__(self, sock, head, body):
        self._sock = sock
        self.head = head
        self.body = body

    @property
    def headers(self):
        """Names in lower case."""
        lines = self.head.split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (li.partition(": ") for li in lines)}

    def send(self, data):
        """Send bytes as they are."""
        self._sock.sendall(data)

    def send_chunked(self, *pieces, end=True):
        """Send a stream that is framed in chunks; without its end it is a broken one."""
        self.send(EVENT_STREAM + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            self.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        if end:
            self.send(b"0\r\n\r\n")

    def answer(self, status, body, **headers):
        """Send a whole answer; `body` is bytes, or becomes JSON."""
        is_raw = isinstance(body, bytes)
        data = body if is_raw else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}"]
        lines.append(f"Content-Type: {'text/html' if is_raw else 'application/json'}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode() + data)

    def seconds_until_left(self, at_most=20.0):
        """Wait until the client closes the connection; the seconds, None if it did not."""
        began = time.monotonic()
        self._sock.settimeout(at_most)
        try:
            while self._sock.recv(65_536):
                pass
        except TimeoutError:
            return None
        except OSError:
            pass  # a reset is an end too
        return time.monotonic() - began


class Wire:
    """Serves each request by the next handler, the last one again and again.

    A handler is called with the `Peer`; the connection is kept if it returns True.

    Attributes:
        requests: What has come, in order.
        connections: How many were made.
    """

    def __init__(self, *handlers, tls=None):
        self._handlers = list(handlers)
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._socks = []
        self.requests = []
        self.connections = 0
        scheme = "http" if tls is None else "https"
        self.port = self._listener.getsockname()[1]
        self.base_url = f"{scheme}://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        for sock in (self._listener, *self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._socks.append(sock)
                self.connections += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError):
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with sock, sock.makefile("rb") as file:
                while self._serve_one(sock, file):
                    pass

    def _serve_one(self, sock, file):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = file.readline()
            if not line:
                return False
            head += line
        text = head.decode().rstrip()
        lengths = [li for li in text.lower().split("\r\n") if li.startswith("content-length:")]
        body = json.loads(file.read(int(lengths[0].partition(":")[2])))
        peer = Peer(sock, text, body)
        self.requests.append(peer)
        handler = self._handlers[min(len(self.requests), len(self._handlers)) - 1]
        return handler(peer)


def says(*pieces, framed=True):
    """A handler that streams these bytes and keeps the connection; or closes it at their end."""

    def handler(peer):
        if framed:
            peer.send_chunked(*pieces)
        else:
            peer.send(EVENT_STREAM + b"Connection: close\r\n\r\n" + b"".join(pieces))
        return framed

    return handler


def cut_after(*pieces):
    """A handler that streams these bytes, then breaks the connection off."""

    def handler(peer):
        peer.send_chunked(*pieces, end=False)

    return handler


def stalls_after(*pieces, left=None):
    """A handler that streams these bytes, then waits for the client to leave; notes the seconds."""

    def handler(peer):
        if pieces:
            peer.send_chunked(*pieces, end=False)
        seconds = peer.seconds_until_left()
        if left is not None:
            left.append(seconds)

    return handler


def answers(status, body, **headers):
    """A handler that sends a whole answer and keeps the connection."""

    def handler(peer):
        peer.answer(status, body, **headers)
        return True

    return handler
