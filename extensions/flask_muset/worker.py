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
import signal
import time
from collections import deque
from functools import cached_property
from types import FrameType
from typing import Any

import gevent
from gevent.hub import Waiter
from gunicorn.workers.ggevent import GeventWorker

from flask_muset import load
from flask_muset.clock import SYSTEM

__all__ = ["FairGeventWorker", "draining"]

#: How long the line is served between two looks at the sockets, in seconds.
_TURN_S = 0.005
#: How long a client may take over one piece of a request or of an answer, in seconds.
_STALL_S = 60.0
#: How long a stop waits for the first request of a connection, in seconds.
_LAST_CALL_S = 1.0
#: Set on a connection's greenlet when it waits for its first request.
_HAS_ASKED = "_flask_muset_has_asked"
_draining = False


def draining() -> bool:
    """Whether this process has been asked to stop and is finishing its last requests."""
    return _draining


class FairGeventWorker(GeventWorker):  # type: ignore[misc]
    """One hub turn per request; a stop waits for running requests and for nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: dict[Any, gevent.Greenlet] = {}

    @cached_property
    def _line(self) -> "_Line":
        return _Line(gevent.get_hub())  # of the worker, not of the master that made this object

    def init_signals(self) -> None:
        """Ctrl-C reaches the whole process group; what it means is for the master to say."""
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection, and count it while it is open."""
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
        gate: load.Gate | None = getattr(self.wsgi, "extensions", {}).get(load.GATE)
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

    def _serve(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        joined = _Joined(sock)
        try:
            return super().handle_request(listener_name, req, joined, addr)
        finally:
            # A closed connection has been dealt with by gunicorn.
            with contextlib.suppress(OSError):
                joined.flush()

    def timeout_ctx(self) -> "_Waiting":
        """What a connection waits in for its next request.

        Once this is a stop, a connection that has had an answer is not waited for; a new one, whose
        client has no way to know that nobody will listen, is for a moment.
        """
        greenlet = gevent.getcurrent()
        is_new = not getattr(greenlet, _HAS_ASKED, False)
        setattr(greenlet, _HAS_ASKED, True)
        if self.alive:
            return _Waiting(self.cfg.keepalive, self._idle, is_new)
        return _Waiting(_LAST_CALL_S if is_new else 0, self._idle, is_new)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop: close the connections that wait, let the running requests end."""
        global _draining
        _draining = True
        super().handle_exit(sig, frame)
        gevent.spawn(self._close_idle)

    def _close_idle(self) -> None:
        """Close the connections that have had an answer at once, new ones a moment later."""
        for are_new in (False, True):
            for waiting in list(self._idle):
                if waiting.is_new == are_new:
                    # In the hub, one after the other: it may have got its request meanwhile.
                    gevent.get_hub().loop.run_callback(self._end, waiting)
            if not are_new:
                gevent.sleep(_LAST_CALL_S)

    def _end(self, waiting: "_Waiting") -> None:
        greenlet = self._idle.get(waiting)
        if greenlet is not None:
            greenlet.throw(waiting)


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

    def __init__(self, seconds: float, idle: dict[Any, gevent.Greenlet], is_new: bool) -> None:
        super().__init__(seconds, False)
        self._idle = idle
        self.is_new = is_new

    def __enter__(self) -> "_Waiting":
        self._idle[self] = gevent.getcurrent()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> Any:
        self._idle.pop(self, None)
        return super().__exit__(*exc_info)
