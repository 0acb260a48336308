"""Our logging, as `logging_rate.py` calls it.

Standard error is the file: it is where our lines always go, and one write is what is compared.
"""

import itertools
import os
from types import SimpleNamespace

CTX = {"request_id": "0af7651916cd43dd8448eb211c80319c", "user": "u-12345"}


def _open(path, file=None):
    """Write the logs to a file as standard error; returns what undoes it."""
    from flask_muset import logging

    kept = os.dup(2)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    os.close(fd)
    logging.configure("INFO", "json", file, slow_request_s=None)

    def close():
        logging.reset()
        os.dup2(kept, 2)
        os.close(kept)

    return close


def line_in_file(path):
    """A line on standard error, which goes nowhere, and in a file of many processes."""
    return line(os.devnull, path)


def line(path, file=None):
    """A line of a logger in a block with two fields."""
    from flask_muset.logging import LogContext, get_logger

    close, logger, block = _open(path, file), get_logger("bench"), LogContext(None, **CTX)
    block.__enter__()

    def end():
        block.__exit__(None, None, None)
        close()

    return logger.info, end


def new_text(path):
    """The same, each message another one, so that nothing is known of it; with marks to look at."""
    log, close = line(path)
    numbers = itertools.count()
    return lambda message: log(f"{message}: key {next(numbers)}"), close


def access(path):
    """An access line, for another request each time, of which all but the line is known."""
    from flask import Flask

    from flask_muset import context
    from flask_muset.logging.extension import init_app

    app = Flask("bench")
    init_app(app)
    (observer,) = context.install(app)._observers
    close, numbers = _open(path), itertools.count(10_000_000)

    def log(_message):
        exchange = _exchange(numbers)
        observer.begin(exchange)
        observer.close(exchange)

    return log, close


def request(_path):
    """What `access` needs beside the line: to take off its figure."""
    numbers = itertools.count(10_000_000)
    return lambda _message: _exchange(numbers), lambda: None


def _exchange(numbers):
    from flask_muset.context import Exchange

    environ = dict(ENVIRON)
    environ["flask_muset.request_id"] = f"4f1d0c5be2a9{next(numbers)}"
    environ["PATH_INFO"] = f"/api/v1/users/{next(numbers)}"
    exchange = Exchange(environ)
    exchange.status, exchange.request, exchange.user = 200, REQUEST, "u-12345"
    exchange.duration_s, exchange.sent = 0.0123, 512
    return exchange


#: What an exchange reads of Flask's request.
REQUEST = SimpleNamespace(url_rule=SimpleNamespace(rule="/api/v1/users/<int:id>"))


#: As gunicorn makes it of a usual request with a key.
ENVIRON = {
    "wsgi.errors": None, "wsgi.version": (1, 0), "wsgi.multithread": True,
    "wsgi.multiprocess": True, "wsgi.run_once": False, "wsgi.file_wrapper": None,
    "wsgi.input_terminated": True, "SERVER_SOFTWARE": "gunicorn/27.0.1", "wsgi.input": None,
    "gunicorn.socket": None, "REQUEST_METHOD": "GET", "QUERY_STRING": "", "RAW_URI": "/",
    "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "127.0.0.1:8000", "HTTP_ACCEPT": "*/*",
    "HTTP_USER_AGENT": "curl/8", "HTTP_AUTHORIZATION": "Bearer msk_0123456789abcdef0123",
    "wsgi.url_scheme": "http", "REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "50000",
    "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "PATH_INFO": "/", "SCRIPT_NAME": "",
}  # fmt: skip
