"""A gevent worker for gunicorn that is fair to new connections.

gevent tries a read before it waits. A kept connection whose next request is in the socket's buffer
already therefore goes from one request to the next without ever giving the hub a turn, as long as
its client is quick; new connections and all others wait. Here every request waits in one line once
its head is read. The hub serves the line for a few milliseconds, or one request if that takes
longer, and then looks at all sockets, the listening one too, before it goes on. Requests are thus
served in the order in which they arrived, and what has come meanwhile is known between any two of
them: a request that is to be refused, or a health probe, need not wait behind those that compute.

    worker_class = "flask_muset.worker.FairGeventWorker"

Needs the extra `worker`.
"""

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from http import HTTPStatus
from types import FrameType
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import Waiter
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from flask_muset import context, load
from flask_muset.clock import SYSTEM
from flask_muset.redaction import redact_text
from flask_muset.translate import translate

__all__ = ["FairGeventWorker", "draining"]

#: How long the line is served between two looks at the sockets, in seconds.
_TURN_S = 0.005
#: How long a client may take over one piece of a request or of an answer, in seconds.
_STALL_S = 60.0
#: How long a stop still takes connections, and waits for the first request of each, in seconds.
_LAST_CALL_S = 1.0
#: Between two signs of life for the master, in seconds.
_BEAT_S = 1.0
#: How long a client that was refused may take to read why, in seconds, and what it may still send.
_LINGER_S = 1.0
_LINGER_BYTES = 1 << 20
#: Of what is wrong with a request that is so, in letters.
_LOGGED = 200
#: What tells a worker to end.
_ENDS = {signal.SIGTERM, signal.SIGQUIT}
#: What a client's connection is, on its greenlet.
_CONNECTION = "_flask_muset_connection"
_draining = False
# For the master, which keeps them back from the worker that it makes: see `init_signals`.
os.register_at_fork(
    after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, _ENDS),
)


def draining() -> bool:
    """Whether this process has been asked to stop and is finishing its last requests."""
    return _draining


class FairGeventWorker(GeventWorker):  # type: ignore[misc]
    """One hub turn per request; an end that loses no request and waits for no other client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: dict[_Waiting, gevent.Greenlet] = {}
        # gunicorn makes this object just before it forks.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)

    @cached_property
    def _line(self) -> "_Line":
        return _Line(gevent.get_hub())  # of the worker, not of the master that made this object

    @cached_property
    def _asked_to_stop(self) -> Event:
        return Event()

    def init_signals(self) -> None:
        """Heed what was sent since the fork; Ctrl-C is for the master alone.

        A worker that has only begun has the master's handlers, and would lose a signal to end.
        """
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)

    # --- One connection

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection, and count it while it is open."""
        setattr(gevent.getcurrent(), _CONNECTION, _Connection())
        load.connections.open += 1
        try:
            super().handle(listener, client, addr)
        finally:
            load.connections.open -= 1

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """Wait in line, then serve.

        What the app's gate refuses or lets through uncounted is answered at once. The former has
        nothing to wait for, and in the line it would keep its place from one that can be served.
        """
        connection: _Connection = getattr(gevent.getcurrent(), _CONNECTION)
        connection.is_of_proxy = any(name == "X-FORWARDED-FOR" for name, _ in req.headers)
        gate: load.Gate | None = self._part(load.GATE)
        # A client that takes or gives nothing for long is closed. Else those who do not read their
        # answers could hold all places of a worker for ever.
        sock.settimeout(_STALL_S)
        if gate is None:
            self._line.wait()
            try:
                return self._serve(listener_name, req, sock, addr)
            finally:
                sock.settimeout(None)  # the wait for the next request has its own
        verdict = gate.arrive(req.path)
        load.arrived.set(load.Arrival(gate, verdict, SYSTEM.now()))
        try:
            if verdict is load.Verdict.ADMITTED:
                self._line.wait()
            return self._serve(listener_name, req, sock, addr)
        finally:
            sock.settimeout(None)
            load.arrived.set(None)
            if verdict is load.Verdict.ADMITTED:
                gate.depart()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what cannot be read as the app answers its errors, if ErrorHandler is on it."""
        render = self._part(context.UNREADABLE)
        error = translate(exc, {})
        if render is None or error.status >= 500:
            super().handle_error(req, client, addr, exc)
            return
        status, headers, body = render(error)
        self.log.warning(
            "request %s from %s cannot be read: %s",
            headers["X-Request-ID"],
            addr[0] if addr else "a socket",
            redact_text(str(exc))[:_LOGGED],
        )
        headers |= {"Connection": "close", "Content-Length": str(len(body))}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{''.join(lines)}\r\n"
        with contextlib.suppress(OSError):  # it may have gone
            client.settimeout(_LINGER_S)
            client.sendall(head.encode() + body)
            _linger(client)

    def _serve(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        joined = _Joined(sock)
        try:
            return super().handle_request(listener_name, req, joined, addr)
        finally:
            # A closed connection has been dealt with by gunicorn.
            with contextlib.suppress(OSError):
                joined.flush()

    def _part(self, key: str) -> Any:
        """What an extension has left for servers in the app, None without."""
        return getattr(self.wsgi, "extensions", {}).get(key)

    def timeout_ctx(self) -> "_Waiting":
        """What a connection waits in for its next request."""
        connection: _Connection = getattr(gevent.getcurrent(), _CONNECTION)
        is_new, connection.is_new = connection.is_new, False
        kind = _Kind.NEW if is_new else _Kind.PROXY if connection.is_of_proxy else _Kind.DIRECT
        seconds = self.cfg.keepalive
        if _draining and kind is not _Kind.PROXY:
            seconds = _LAST_CALL_S if is_new else 0
        return _Waiting(seconds, self._idle, kind)

    # --- The end

    def notify(self) -> None:
        """Give a sign of life; without a master the worker is to end, though not in mid-request."""
        self.tmp.notify()
        if self._is_orphan() and not _draining:
            self.log.info("Parent changed, shutting down: %s", self)
            self.handle_exit(signal.SIGTERM, None)

    def _is_orphan(self) -> bool:
        return bool(self.ppid != os.getppid())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop: `draining` is true from here on."""
        global _draining
        _draining = True
        super().handle_exit(sig, frame)
        gevent.spawn(self._asked_to_stop.set)

    def run(self) -> None:
        """Serve until the end, which is a signal or that enough requests were served."""
        pool = Pool(self.worker_connections)
        servers = [self._listen(sock, pool) for sock in self.sockets]
        while self.alive:
            self._beat()
        if not _draining:
            self._retire()
        self._drain(servers, pool)

    def _listen(self, sock: Any, pool: Pool) -> "_Server":
        sock.setblocking(1)
        options = {"ssl_context": ssl_context(self.cfg)} if self.cfg.is_ssl else {}
        server = _Server(sock, self.handle, spawn=pool, **options)
        if self.cfg.workers > 1:
            server.max_accept = 1
        server.start()
        return server

    def _beat(self) -> None:
        self.notify()
        self._asked_to_stop.wait(_BEAT_S)

    def _retire(self) -> None:
        """Let kept connections go, each with its next answer, while new ones are taken as ever.

        The master starts another worker only when this one has ended, so that must be quick.
        """
        until = time.monotonic() + self.cfg.keepalive
        kept = _Kind.PROXY, _Kind.DIRECT
        while not _draining and time.monotonic() < until and self._idle_of(*kept):
            self._beat()
        self.handle_exit(signal.SIGTERM, None)

    def _drain(self, servers: "list[_Server]", pool: Pool) -> None:
        """Take no more connections, and let the running requests end.

        A connection that has had an answer is closed, but not that of a proxy: it may send a
        request in the same moment, which it must not send again if it is a POST. Those stay until
        the proxy ends them, or has had one more answer.
        """
        # The master kills who is still there at its end.
        until = time.monotonic() + max(0.0, self.cfg.graceful_timeout - _LAST_CALL_S)
        self._close(self._idle_of(_Kind.DIRECT))
        # Those that come from now on wait by themselves no longer than the last call.
        silent = self._idle_of(_Kind.NEW)
        if not self._is_orphan():  # else another master may wait for the port
            self.tmp.notify()
            gevent.sleep(_LAST_CALL_S)
        for server in servers:
            server.finish()
        self._close(silent)
        while not pool.join(timeout=_BEAT_S):
            self.notify()
            if time.monotonic() >= until:
                self.log.warning("Worker graceful timeout (pid:%s)", self.pid)
                pool.kill(timeout=_LAST_CALL_S)
                break

    def _idle_of(self, *kinds: "_Kind") -> "list[_Waiting]":
        return [waiting for waiting in self._idle if waiting.kind in kinds]

    def _close(self, those: "list[_Waiting]") -> None:
        for waiting in those:
            # In the hub, one after the other: it may have got its request meanwhile.
            gevent.get_hub().loop.run_callback(self._end, waiting)

    def _end(self, waiting: "_Waiting") -> None:
        greenlet = self._idle.get(waiting)
        if greenlet is not None:
            greenlet.throw(waiting)


def _linger(client: Any) -> None:
    """Let a client read its answer: to close on what it still sends would throw it away."""
    client.shutdown(socket.SHUT_WR)
    left = _LINGER_BYTES
    until = time.monotonic() + _LINGER_S
    while left > 0 and time.monotonic() < until and (data := client.recv(65_536)):
        left -= len(data)


class _Kind(Enum):
    """What is known of a connection that waits for a request."""

    NEW = "it has had no answer yet"
    DIRECT = "its client has had one"
    PROXY = "it is kept by a proxy, for requests of anybody"


@dataclass(slots=True)
class _Connection:
    """An open connection."""

    is_new: bool = True
    is_of_proxy: bool = False


class _Server(StreamServer):  # type: ignore[misc]
    """A listening socket.

    Args:
        sock: Of the master.
        handle: Called for each connection, with this server in the place of the socket, which may
            be closed by then.
        **options: Of gevent.
    """

    def __init__(self, sock: Any, handle: Callable[..., None], **options: Any) -> None:
        super().__init__(sock, handle=partial(handle, self), **options)

    def getsockname(self) -> Any:
        """The address of the socket."""
        return self.address

    def finish(self) -> None:
        """Take those who have connected, and nobody else."""
        while not self.full() and (accepted := self.do_read()):
            self.do_handle(*accepted)
        self.close()


class _Joined:
    """A socket for one answer, whose head goes out together with the first of its body.

    gunicorn sends them one after the other, which wakes whoever reads them twice. It sends the head
    when it has something to send behind it, or at the end, so nothing waits here.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._head: bytes | None = None
        self._is_begun = False

    def sendall(self, data: bytes) -> None:
        """Send, but for the head."""
        if not self._is_begun:
            self._is_begun, self._head = True, data
            return
        if self._head is not None:
            data, self._head = self._head + data, None
        self._sock.sendall(data)

    def flush(self) -> None:
        """Send the head of an answer that has no body."""
        if self._head is not None:
            head, self._head = self._head, None
            self._sock.sendall(head)

    def __getattr__(self, name: str) -> Any:
        """Anything else is the socket's own, such as sending a file."""
        self.flush()
        return getattr(self._sock, name)


class _Line:
    """Requests that wait for their turn, the oldest first.

    The hub runs callbacks in groups of 50 between two looks at the sockets, which is a second if
    each computes for 20 ms. A timer without a time runs once between two looks, so it is what
    serves the line.
    """

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._waiting: deque[Waiter] = deque()
        self._timer = hub.loop.timer(0.0)

    def wait(self) -> None:
        """Return when it is this greenlet's turn."""
        waiter = Waiter(self._hub)
        self._waiting.append(waiter)
        if not self._timer.active:
            self._timer.start(self._serve)
        try:
            waiter.get()
        except BaseException:  # cut off while it waits
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiter)
            raise

    def _serve(self) -> None:
        """Runs in the hub."""
        end = time.monotonic() + _TURN_S
        while self._waiting:
            self._waiting.popleft().switch(None)
            if time.monotonic() >= end:
                break
        # A timer is still active in its own callback, and must be stopped to be started anew.
        self._timer.stop()
        if self._waiting:
            self._timer.start(self._serve)


class _Waiting(gevent.Timeout):  # type: ignore[misc]
    """The keep-alive time-out, known to the worker while a connection waits in it."""

    def __init__(
        self, seconds: float, idle: "dict[_Waiting, gevent.Greenlet]", kind: _Kind
    ) -> None:
        super().__init__(seconds, False)
        self._idle = idle
        self.kind = kind

    def __enter__(self) -> "_Waiting":
        self._idle[self] = gevent.getcurrent()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> Any:
        self._idle.pop(self, None)
        return super().__exit__(*exc_info)
