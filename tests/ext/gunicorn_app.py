"""A Flask app as another team has it, served by gunicorn with our worker."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from redis_server import free_port

_PATCHED = "from gevent import monkey; monkey.patch_all()\n"
#: gunicorn tells each worker once to stop, and one that has only begun may not hear it; such a one
#: is waited for no longer than this, in seconds.
_STOP = "graceful_timeout = 10\n"
_STOPS_WELL = "def on_starting(server): server.handle_int = server.handle_term\n"


@contextlib.contextmanager
def serve(
    folder,
    source,
    *options,
    worker="flask_muset.worker.FairGeventWorker",
    config="",
    stops_well=True,
):
    """Serve the `app` of a source text; yields the process and its port, and ends it by its id."""
    (folder / "served_app.py").write_text(source)
    gevent = "gevent" in worker.lower()
    stops = _STOPS_WELL if stops_well else ""
    (folder / "conf.py").write_text((_PATCHED if gevent else "") + _STOP + stops + config)
    port = free_port()
    log = open(folder / "gunicorn.log", "wb")  # noqa: SIM115 - closed below
    process = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "-c", "conf.py", "-b", f"127.0.0.1:{port}",
         "-k", worker, "--no-control-socket", *options, "served_app:app"],
        cwd=folder, start_new_session=True, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while True:
            assert process.poll() is None, (folder / "gunicorn.log").read_text()
            assert time.monotonic() < end, (folder / "gunicorn.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield process, port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
