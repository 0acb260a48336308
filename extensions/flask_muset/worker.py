"""A gevent worker for gunicorn that is fair to new connections.

gevent tries a read before it waits. A kept connection whose next request is in the socket's buffer
already therefore goes from one request to the next without ever giving the hub a turn, as long as
its client is quick; new connections and all others wait. One turn of the hub for each request cures
that: the greenlet queues behind every other that is ready, and the hub polls the sockets, the
listening one too, between two rounds. Requests are then served in the order in which they arrived.
The turn is taken after the head of the request is read and before the application runs.

    worker_class = "flask_muset.worker.FairGeventWorker"

Needs the extra `worker`.
"""

import signal
from types import FrameType
from typing import Any

import gevent
from gunicorn.workers.ggevent import GeventWorker

from flask_muset import load

__all__ = ["FairGeventWorker", "draining"]

_draining = False


def draining() -> bool:
    """Whether this process has been asked to stop and is finishing its last requests."""
    return _draining


class FairGeventWorker(GeventWorker):  # type: ignore[misc]
    """One hub turn per request; a stop waits for running requests and for nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: dict[Any, gevent.Greenlet] = {}

    def init_signals(self) -> None:
        """Ctrl-C reaches the whole process group; what it means is for the master to say."""
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """Give every other ready greenlet its turn, then serve.

        A request that the app's gate refuses is answered at once: it has nothing to wait for, and
        in the line it would keep its place from one that can be served.
        """
        gate: load.Gate | None = getattr(self.wsgi, "extensions", {}).get(load.GATE)
        if gate is None:
            gevent.sleep(0)
            return super().handle_request(listener_name, req, sock, addr)
        verdict = gate.arrive(req.path)
        load.arrived.set(verdict)
        try:
            if verdict is not load.Verdict.REFUSED:
                gevent.sleep(0)
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            load.arrived.set(None)
            if verdict is load.Verdict.ADMITTED:
                gate.depart()

    def timeout_ctx(self) -> "_Waiting":
        """What a connection waits in for its next request; not at all once this is a stop."""
        return _Waiting(self.cfg.keepalive if self.alive else 0, self._idle)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop: close the connections that wait, let the running requests end."""
        global _draining
        _draining = True
        super().handle_exit(sig, frame)
        gevent.spawn(self._close_idle)

    def _close_idle(self) -> None:
        for waiting in list(self._idle):
            # In the hub, one after the other: it may have got its request meanwhile.
            gevent.get_hub().loop.run_callback(self._end, waiting)

    def _end(self, waiting: "_Waiting") -> None:
        greenlet = self._idle.get(waiting)
        if greenlet is not None:
            greenlet.throw(waiting)


class _Waiting(gevent.Timeout):  # type: ignore[misc]
    """The keep-alive time-out, known to the worker while a connection waits in it."""

    def __init__(self, seconds: float, idle: dict[Any, gevent.Greenlet]) -> None:
        super().__init__(seconds, False)
        self._idle = idle

    def __enter__(self) -> "_Waiting":
        self._idle[self] = gevent.getcurrent()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> Any:
        self._idle.pop(self, None)
        return super().__exit__(*exc_info)
