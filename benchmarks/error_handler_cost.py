"""What ErrorHandler costs inside the WSGI callable, in instructions, beside bare Flask.

Bare Flask has a catch-all JSON handler by hand. Each case runs in two processes with 100 and 300
requests; the difference leaves imports and set-up out, so the figures repeat within about 2 %.
Needs valgrind.
"""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_FEW, _MANY = 100, 300


def bare():
    """Flask with an error handler by hand."""
    from flask import Flask, jsonify

    app = Flask("bench")

    @app.errorhandler(Exception)
    def on_error(_):
        return jsonify({"status": "error", "code": "internal", "message": "internal error"}), 500

    return _routes(app)


def ours():
    """Flask with ErrorHandler and nothing else."""
    from flask import Flask

    from flask_muset import ErrorHandler

    app = Flask("bench")
    ErrorHandler(app)
    return _routes(app)


def _routes(app):
    from flask import jsonify

    @app.get("/api/ping")
    def ping():
        return jsonify({"status": "ok", "n": 1})

    @app.get("/api/fail")
    def fail():
        raise ValueError("no")

    return app


def _call(app, path: str) -> Callable[[], None]:
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

    def start_response(_status, _headers, _exc_info=None):
        return None

    def call():
        body = app(dict(environ), start_response)
        b"".join(body)
        if hasattr(body, "close"):
            body.close()

    return call


def _child(case: str, path: str, count: int) -> None:
    logging.disable(logging.CRITICAL)  # the log line is discarded by its level
    call = _call({"bare": bare, "ours": ours}[case](), path)
    for _ in range(count):
        call()


def _instructions(case: str, path: str, count: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        subprocess.run(
            ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null",
             f"--log-file={log}", sys.executable, __file__, "--child", case, path, str(count)],
            check=True, timeout=300, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )  # fmt: skip
        found = re.search(r"I\s+refs:\s+([\d,]+)", log.read_text())
        return int(found[1].replace(",", "")) if found else 0


def measure() -> dict[str, float] | None:
    """Thousands of instructions per request and the two ratios; None without valgrind."""
    if shutil.which("valgrind") is None:
        return None
    out = {}
    for name, path in (("success", "/api/ping"), ("error", "/api/fail")):
        for case in ("bare", "ours"):
            few, many = (_instructions(case, path, count) for count in (_FEW, _MANY))
            out[f"{case} {name} k"] = (many - few) / (_MANY - _FEW) / 1000
        out[f"{name} ratio"] = out[f"ours {name} k"] / out[f"bare {name} k"]
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        print(json.dumps(measure() or "not measured: valgrind is missing", indent=1))
