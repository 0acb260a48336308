"""The port of its own on which Prometheus reads: bound in the background if it is in use."""

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from flask_muset.locks import is_patched

__all__ = ["keep_open", "open_port"]

_logger = logging.getLogger(__name__)
_RETRY_S = 5.0


def open_port(host: str, port: int, registry: CollectorRegistry) -> None:
    """Serve a registry beside the work, in this process and in none that it forks.

    Raises:
        OSError: The port cannot be had.
    """
    server, _ = start_http_server(port, host, registry=registry)
    pid = os.getpid()

    def close_in_child() -> None:
        if not is_patched():  # no thread outlives a fork, what it listens on does
            server.socket.close()

    def end_in_child() -> None:
        if os.getpid() != pid:  # a greenlet outlives a fork
            server.server_close()
            threading.Event().wait()  # for good; threading has forgotten it and cannot end it

    server.service_actions = end_in_child  # type: ignore[method-assign]
    os.register_at_fork(after_in_child=close_in_child)


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
