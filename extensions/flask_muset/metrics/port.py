"""The port of its own on which Prometheus reads: bound in the background if it is in use."""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from flask_muset.locks import is_patched, original

__all__ = ["keep_open", "open_port"]

_logger = logging.getLogger(__name__)
_RETRY_S = 5.0


def open_port(host: str, port: int, registry: CollectorRegistry) -> None:
    """Serve a registry beside the work, in this process and in none that it forks.

    Raises:
        OSError: The port cannot be had.
    """
    if is_patched():
        _open_in_native_thread(host, port, registry)
        return
    server, _ = start_http_server(port, host, registry=registry)
    # No thread outlives a fork, what it listens on does.
    os.register_at_fork(after_in_child=server.socket.close)


def _open_in_native_thread(host: str, port: int, registry: CollectorRegistry) -> None:
    """Serve from a thread that gevent knows nothing of, in a hub of its own.

    A greenlet outlives a fork: those of the server, and of the requests that it is answering, would
    go on in each worker with the master's connections, and end them in the midst of an answer.
    """
    started = original("_thread", "allocate_lock")()
    started.acquire()
    failed: list[OSError] = []

    def serve() -> None:
        try:
            start_http_server(port, host, registry=registry)
        except OSError as error:
            failed.append(error)
            return
        finally:
            started.release()
        while True:
            time.sleep(3_600)  # this thread's hub runs the server

    original("_thread", "start_new_thread")(serve, ())
    started.acquire()
    if failed:
        raise failed[0]


def keep_open(
    host: str,
    port: int,
    registry: CollectorRegistry,
    log: Any = _logger,
    retry_s: float = _RETRY_S,
) -> None:
    """Serve a registry; if the port is in use say so once, and go on trying beside the work.

    A new master of gunicorn starts while the one before still has the port, and it must start.

    Args:
        host: To listen on.
        port: To listen on.
        registry: What is served.
        log: Where to say so.
        retry_s: Seconds between two trials.
    """
    start = partial(open_port, host, port, registry)
    try:
        start()
    except OSError as error:
        log.warning(
            "METRICS_PORT: cannot listen on %s:%d (%s); trying again every %g s, or set another.",
            host, port, error.strerror or error, retry_s,
        )  # fmt: skip
        threading.Thread(target=_go_on, args=(os.getpid(), start, retry_s), daemon=True).start()


def _go_on(pid: int, start: Callable[[], None], retry_s: float) -> None:
    wait = threading.Event()
    while not wait.wait(retry_s) and os.getpid() == pid:
        try:
            start()
        except OSError:
            continue
        return
