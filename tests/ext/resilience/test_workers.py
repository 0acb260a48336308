"""Resilience under real gunicorn workers."""

import contextlib
import http.client
import json
import time

import pytest
from gunicorn_app import serve
from waiting import until

APP = """
import itertools, os, time
from flask import Flask, Response
from flask_muset import ErrorHandler, Resilience
from flask_muset.deadline import deadline
from flask_muset.errors import MusetError, NetworkError
from flask_muset.resilience import Bulkhead, CircuitBreaker, Timeout

app = Flask("shop")
app.config.update(RESILIENCE_REQUEST_TIMEOUT=0.6, RESILIENCE_MAX_CONCURRENT_REQUESTS=4)
resilience = Resilience()
policy = resilience.policy("x", CircuitBreaker("x", failure_threshold=3), Bulkhead(2), Timeout(0.3))
resilience.init_app(app)
ErrorHandler(app)
# Used before the workers are forked.
assert policy.call(lambda: 1) == 1

@app.get("/sleep/<float:seconds>")
def sleep(seconds):
    time.sleep(seconds)
    return {"left": deadline.remaining()}

@app.get("/policy/<float:seconds>")
def guarded(seconds):
    policy.call(time.sleep, seconds)
    return "ok"

@app.get("/state")
def state():
    return {"pid": os.getpid(), "state": policy.breaker.state, "left": deadline.remaining(),
            "in_flight": app.extensions["flask_muset.gate"].in_flight}

@app.get("/stream")
def stream():
    def items():
        for n in itertools.count():
            yield f"{n}\\n"
            time.sleep(0.1)
            if n > 200 or n > 10 and os.path.exists("stop"):
                return
    return Response(items(), mimetype="text/plain")
"""


def ask(port, path, connection=None):
    """Status, body and seconds of one request."""
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    began = time.monotonic()
    own.request("GET", path)
    answer = own.getresponse()
    body = answer.read().decode()
    took = time.monotonic() - began
    if connection is None:
        own.close()
    return answer.status, body, took


@contextlib.contextmanager
def begun(port, path):
    """An answer whose head has come."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as own:
        own.request("GET", path)
        yield own.getresponse()


def test_the_extension_owns_the_deadline(tmp_path):
    """Under gevent a request is answered 504 when its time is up, whatever gunicorn's --timeout."""
    with serve(tmp_path, APP) as (_, port):
        status, body, took = ask(port, "/sleep/5.0")
        assert (status, json.loads(body)["category"]) == (504, "timeout")
        assert 0.5 < took < 4.5
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for _ in range(3):  # one connection, one greenlet: no request has another's deadline
            assert ask(port, "/sleep/5.0", connection)[0] == 504
            left = json.loads(ask(port, "/state", connection)[1])["left"]
            assert 0 < left <= 0.6
        connection.close()


def test_a_stream_goes_on_after_the_deadline(tmp_path):
    """The deadline of a stream ends with its first bytes, and it holds a place until its end."""
    with serve(tmp_path, APP) as (_, port), contextlib.ExitStack() as stack:
        streams = [stack.enter_context(begun(port, "/stream")) for _ in range(4)]
        assert ask(port, "/state")[0] == 503
        (tmp_path / "stop").touch()
        for stream in streams:
            numbers = [int(line) for line in stream.read().split()]
            assert numbers == list(range(max(len(numbers), 12)))
        until(lambda: json.loads(ask(port, "/state")[1]).get("in_flight") == 1)


@pytest.mark.parametrize("preload", [True, False])
def test_each_worker_counts_for_itself(tmp_path, preload):
    """A policy used before the fork opens in the worker that sees failures, preloaded or not."""
    options = ["-w", "2", *(["--preload"] if preload else [])]
    with serve(tmp_path, APP, *options) as (_, port):
        first = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        pid = json.loads(ask(port, "/state", first)[1])["pid"]
        assert [ask(port, "/policy/5.0", first)[0] for _ in range(3)] == [504] * 3
        assert ask(port, "/policy/0.0", first)[0] == 503
        assert json.loads(ask(port, "/state", first)[1])["state"] == "open"
        end = time.monotonic() + 20
        while True:  # until the other worker answers
            assert time.monotonic() < end
            state = json.loads(ask(port, "/state")[1])
            if state["pid"] != pid:
                break
        assert state["state"] == "closed"
        first.close()


@pytest.mark.parametrize("worker", ["gthread", "sync"])
def test_other_workers(tmp_path, worker):
    """Under threads late work is answered late; what waits cooperatively still ends in time."""
    with serve(tmp_path, APP, worker=worker) as (_, port):
        status, body, took = ask(port, "/sleep/0.8")
        assert (status, json.loads(body)["left"]) == (200, 0.0)
        assert took >= 0.8
        assert ask(port, "/policy/0.0")[0] == 200
        assert json.loads(ask(port, "/state")[1])["in_flight"] == 1
