"""Hooks for gunicorn, so that its workers' metrics are one: `from flask_muset.metrics.gunicorn import *`.

Importing this decides where the workers' files are, which must happen before prometheus_client is
imported; a gunicorn configuration is early enough. Each master has a folder of its own, so that a
new one beside an old one (USR2) begins at zero and disturbs nothing. A configuration that has one
of these hooks itself calls the one from here in it.
"""  # noqa: E501

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from typing import Any

__all__ = ["child_exit", "on_exit", "on_starting", "post_worker_init", "when_ready"]

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
#: Kept for a master that this one starts (USR2): it needs the folder above ours.
_BASE_VARIABLE = "FLASK_MUSET_METRICS_BASE"
_PREFIX = "master-"
_HELD = ".held"


def _base() -> str:
    """The folder in which each master has one."""
    given = os.environ.get(_BASE_VARIABLE) or os.environ.get(_VARIABLE)
    if given:
        return given
    memory = "/dev/shm"  # noqa: S108 - the folder below is this user's alone
    above = memory if os.access(memory, os.W_OK) else tempfile.gettempdir()
    base = os.path.join(above, f"flask-muset-metrics-{os.geteuid()}")
    os.makedirs(base, mode=0o711, exist_ok=True)
    found = os.lstat(base)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return base
    # Somebody else was here first, and could put their own files in the place of ours.
    return tempfile.mkdtemp(prefix="flask-muset-metrics-", dir=above)


def _claim() -> str:
    """Make this master's folder and hold it, for as long as it or a worker of it lives."""
    base = _base()
    os.makedirs(base, mode=0o711, exist_ok=True)
    own = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
    os.environ[_BASE_VARIABLE], os.environ[_VARIABLE] = base, own
    # Open until the process ends, and in its workers; not in what it executes.
    handle = os.open(os.path.join(own, _HELD), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_SH)
    os.close(os.open(os.path.join(own, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
    return own


_folder = _claim()
_pid = os.getpid()
_port = 0


def _drop() -> None:
    if os.getpid() == _pid:
        shutil.rmtree(_folder, ignore_errors=True)


atexit.register(_drop)


def _is_left_over(folder: str) -> bool:
    """Whether nobody holds a folder."""
    with contextlib.suppress(OSError), open(os.path.join(folder, _HELD), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def on_starting(server: Any) -> None:
    """Remove what masters that were killed have left, and let the workers write."""
    global _pid
    _pid = os.getpid()  # another one than at import if gunicorn runs as a daemon
    base = os.path.dirname(_folder)
    for name in os.listdir(base):
        path = os.path.join(base, name)
        if name.startswith(_PREFIX) and path != _folder and _is_left_over(path):
            shutil.rmtree(path, ignore_errors=True)
    if os.geteuid() == 0 and server.cfg.uid != 0:
        for path in (_folder, *(os.path.join(_folder, name) for name in os.listdir(_folder))):
            os.chown(path, server.cfg.uid, server.cfg.gid)


def _address() -> tuple[str, int]:
    """Where Prometheus reads: what a preloaded app is set to, else the environment."""
    from flask_muset.metrics.extension import states

    for state in states:
        if state.config.port:
            return state.config.host, state.config.port
    port = os.environ.get("METRICS_PORT") or "0"
    if not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"METRICS_PORT must be a whole number from 0 to 65535, got {port!r}.")
    return os.environ.get("METRICS_HOST") or "127.0.0.1", int(port)


def when_ready(server: Any) -> None:
    """Serve METRICS_PORT, once for all workers."""
    from prometheus_client import CollectorRegistry

    from flask_muset.metrics.exposition import FolderCollector
    from flask_muset.metrics.port import keep_open

    global _port
    host, _port = _address()
    if _port:
        registry = CollectorRegistry()
        registry.register(FolderCollector(_folder))
        keep_open(host, _port, registry, server.log)


def post_worker_init(worker: Any) -> None:
    """Show the worker's gauges from its start."""
    from flask_muset.metrics.extension import states

    for state in states:
        state.touch()
        if state.config.port and not _port:
            worker.log.warning(
                "METRICS_PORT is only in the app's configuration, which the master does not read: "
                "set it in the environment, or preload_app = True."
            )


def child_exit(server: Any, worker: Any) -> None:
    """Take what a worker has counted into the archive; a fault of this must not end the server."""
    from prometheus_client.multiprocess import mark_process_dead

    from flask_muset.metrics.files import fold

    try:
        mark_process_dead(worker.pid, _folder)  # type: ignore[no-untyped-call]
        fold(_folder, worker.pid)
    except OSError as error:
        server.log.warning("metrics: cannot fold the files of worker %s: %s", worker.pid, error)


def on_exit(server: Any) -> None:
    """Remove the folder."""
    _drop()
