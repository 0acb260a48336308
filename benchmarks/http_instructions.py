"""Instructions per request inside the application (valgrind), gunicorn and kernel left out.

The WSGI callable is called in its own process, so that the figures depend neither on load nor on
clock speed: they repeat within about 1 %. Of apps that use Redis it is the client's share only.
The log lines of errors are discarded by their level. Takes some 75 s with all peers.
"""

import argparse
import gc
import io
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time

import common as c
import http_apps

PEERS = [
    "wsgi", "hooks", "floor_four", "exporter", "exporter_mp", "limiter_mem", "limiter_redis",
    "caching_simple", "caching_redis", "otel", "trio_local", "trio", "falcon_app", "apiflask_app",
    "smorest_app",
]  # fmt: skip
FOUR = ["muset_four", "muset_four_redis"]
OFF = ["errors_off", "resilience_off", "cache_off", "cached_view_off", "metrics_off"]
OURS = ["error_handler", *FOUR, *OFF]
FAILING = ["bare", "apiflask_app", "smorest_app", "error_handler"]
NEED_A_FOLDER = ["exporter_mp", "trio", "floor_four", *FOUR]
#: The import of the first fixes for good whether metrics go to files; Redis stays with one process.
NOT_BEFORE_FORK = [
    "exporter", "exporter_mp", "trio", "trio_local", "floor_four", "limiter_redis",
    "caching_redis", "muset_four_redis",
]  # fmt: skip


def make(name):
    """Make the app of this name."""
    if name in NEED_A_FOLDER:
        folder = tempfile.mkdtemp(dir=os.environ["MEASURE_TMP"])
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    return getattr(http_apps, name)()


def keep_pace():
    """Let our time pass as at some 1,000 requests a second: valgrind serves a twentieth of that.

    Else what is done once a second weighs twenty times as much, and the watch of the hub sees
    nothing but a hub that is held up; `idle` measures the watch.
    """
    from flask_muset.clock import SYSTEM
    from flask_muset.metrics import runtime

    runtime.watch_hub = lambda _sampled: 0.0
    SYSTEM.now = itertools.count(SYSTEM.now(), 0.000_07).__next__  # some 14 looks a request
    SYSTEM.now_ns = itertools.count(SYSTEM.now_ns(), 1_000_000).__next__


def client(name, path, want):
    """Return a set-up that returns one request to the app of this name."""

    def setup():
        if name in FOUR:
            keep_pace()
        app = make(name)
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "x",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": "x",
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": sys.stderr,
            "wsgi.version": (1, 0),
            "wsgi.multithread": False,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
        }

        def start_response(status, _headers, _exc_info=None):
            if status[0] not in want:
                raise RuntimeError(f"{name} answered {status}")

        numbers = itertools.count(10_000)

        def call():
            sent = dict(environ)
            if "{" in path:
                sent["PATH_INFO"] = path.format(next(numbers))
            body = app(sent, start_response)
            b"".join(body)
            if hasattr(body, "close"):
                body.close()

        warm_up(call)
        return call

    return setup


def warm_up(call):
    """Serve some requests, give what goes on beside them time to begin, and collect garbage."""
    for _ in range(50):
        call()
        time.sleep(0.01)
    # Else a look through all that was imported falls into one measurement or the other.
    gc.collect()
    gc.freeze()


def idle(name):
    """Return a set-up that returns a tenth of a second without a request to our app."""

    def setup():
        # The pace is the real one here.
        with make(name).test_client() as client:
            client.get("/api/ping").close()
        return lambda: time.sleep(0.1)

    return setup


def child(names):
    """Count, in a process that runs under valgrind."""
    from gevent import monkey

    monkey.patch_all()  # as under gunicorn's gevent worker, where deadlines have timers
    logging.disable(logging.CRITICAL)
    for name in names:
        if name not in NOT_BEFORE_FORK:
            getattr(http_apps, name)()  # imports once what all forked processes need
    cases = {name: client(name, "/api/ping", "2") for name in names}
    cases |= {
        f"{name}, error path": client(name, "/api/fail", "45") for name in FAILING if name in names
    }
    # Equal answers are rendered once; here no two are equal.
    cases |= {
        f"{name}, new error path": client(name, "/api/fail/{}", "5")
        for name in ("bare", "error_handler")
        if name in names
    }
    found = c.instructions(cases, 100, 300)
    tenths = {f"{name}, a second without": idle(name) for name in FOUR if name in names}
    found |= {name: n and 10 * n for name, n in c.instructions(tenths, 5, 35).items()}
    print(json.dumps(found))


def measure(names):
    """Instructions per request by name, error paths too; None without valgrind."""
    if shutil.which("valgrind") is None:
        return None
    env = {}
    if any("redis" in name or name == "trio" for name in names):
        env["REDIS_PORT"] = str(c.start_redis()[0])
    with tempfile.TemporaryDirectory() as folder:
        argv = [__file__, "--child", "--only", *names]
        return json.loads(c.under_valgrind(argv, MEASURE_TMP=folder, **env))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["bare", *OURS, *PEERS])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.only)
    print("## Instructions per request, in the application\n")
    found = measure(options.only)
    if found is None:
        return print("not measured: valgrind is missing")
    rows = []
    for name, count in found.items():
        base = found.get("bare" + name[name.index(",") :] if "," in name else "bare")
        rows.append(
            {
                "app": name,
                "k instructions/request": count and count / 1000,
                "x bare": count and base and count / base,
                "added (k)": count and base and (count - base) / 1000,
            }
        )
    c.table(rows)
    return c.finish("http_instructions", rows, c.environment("flask", "werkzeug"))


if __name__ == "__main__":
    main()
