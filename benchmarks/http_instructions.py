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
import gevent
import http_apps

PEERS = [
    "wsgi", "hooks", "floor_four", "exporter", "exporter_mp", "limiter_mem", "limiter_redis",
    "caching_simple", "caching_redis", "otel", "trio_local", "trio", "falcon_app", "apiflask_app",
    "smorest_app",
]  # fmt: skip
OURS = ["error_handler", "muset_four", "muset_four_redis"]
FAILING = ["bare", "apiflask_app", "smorest_app", "error_handler"]
NEED_A_FOLDER = ["exporter_mp", "trio", "floor_four", "muset_four", "muset_four_redis"]
#: Their import fixes for good whether metrics go to files.
NOT_BEFORE_FORK = [*NEED_A_FOLDER, "exporter", "trio_local"]


def client(name, path, want):
    """Return a set-up that returns one request to the app of this name."""

    def setup():
        if name in NEED_A_FOLDER:
            folder = tempfile.mkdtemp(dir=os.environ["MEASURE_TMP"])
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        app = getattr(http_apps, name)()
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

        numbers, calls = itertools.count(10_000), itertools.count(1)

        def call():
            # As often as a worker does, the hub gets its turn: feeds and watches go on in it.
            if not next(calls) % 10 and time.sleep is gevent.sleep:
                gevent.sleep(0)
            sent = dict(environ)
            if "{" in path:
                sent["PATH_INFO"] = path.format(next(numbers))
            body = app(sent, start_response)
            b"".join(body)
            if hasattr(body, "close"):
                body.close()

        for _ in range(50):
            call()
            time.sleep(0.01)  # what goes on beside requests has begun
        # Else a look through all that was imported falls into one measurement or the other.
        gc.collect()
        gc.freeze()
        return call

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
    print(json.dumps(c.instructions(cases, 100, 300)))


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
        base = found["bare" + name[name.index(",") :] if "," in name else "bare"]
        rows.append(
            {
                "app": name,
                "k instructions/request": count and count / 1000,
                "x bare": count and count / base,
                "added (k)": count and (count - base) / 1000,
            }
        )
    c.table(rows)
    return c.finish("http_instructions", rows, c.environment("flask", "werkzeug"))


if __name__ == "__main__":
    main()
