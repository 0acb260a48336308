"""Lines of requests: the access log, slow requests, streams that fail, no field of another."""

import base64
import json
import logging
import socket
import threading
import time

import pytest
from flask import Flask, request
from gunicorn_app import serve
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_muset import ErrorHandler, tracing
from flask_muset.clock import SYSTEM
from flask_muset.context import current_exchange
from flask_muset.errors import DatabaseError
from flask_muset.logging import LogContext, configured, get_logger, init_app
from flask_muset.logging.values import may_hold_secret
from flask_muset.redaction import redact_text

logger = get_logger("shop")
ACCESS = "flask_muset.access"
KEYS = ("request_id", "trace_id", "span_id", "user", "method", "route")


def make_app(*, errors=False):
    app = Flask("shop")
    if errors:
        ErrorHandler(app)
    tracing.init_app(app)
    init_app(app)

    @app.get("/users/<int:number>")
    def user(number):
        current_exchange.get().user = f"u{number}"
        logger.info("in the view")
        logging.getLogger("std").info("theirs")
        return {"id": number}

    @app.get("/stream")
    def stream():
        fails = "fail" in request.args

        def body():
            logger.info("in the stream")
            yield b"one"
            if fails:
                raise RuntimeError("cut")

        return app.response_class(body())

    return app


def ask(app, path, **options):
    """The answer, read and closed as a server does."""
    return app.test_client(use_cookies=False).open(path, buffered=True, **options)


def test_one_line_for_each_request(log):
    """All that is known of it, in a fixed order."""
    answer = ask(make_app(), "/users/7?q=1&token=abcd", headers={"X-Request-ID": "a" * 8})
    (line,) = log.of(ACCESS)
    assert list(line) == [
        "timestamp", "level", "logger", "message", "request_id", "trace_id", "span_id", "user",
        "method", "route", "status", "duration_ms", "path", "bytes", "client",
    ]  # fmt: skip
    expected = {
        "level": "INFO", "request_id": "a" * 8, "user": "u7", "method": "GET", "status": 200,
        "route": "/users/<int:number>", "path": "/users/7?q=1&token=[redacted]",
        "bytes": len(answer.data), "client": "127.0.0.1",
    }  # fmt: skip
    assert line.items() >= expected.items()
    assert 0 < line["duration_ms"] < 5_000


def test_every_line_names_its_request(log):
    """Ours and the standard library's, in a view and in a stream."""
    app = make_app()
    answer = ask(app, "/users/7")
    request_id = answer.headers["X-Request-ID"]
    access = log.of(ACCESS)[0]
    for name in ("shop", "std"):
        (line,) = log.of(name)
        assert [line[key] for key in KEYS] == [access[key] for key in KEYS]
        assert line["request_id"] == request_id
    ask(app, "/stream")
    assert log.of("shop")[-1]["route"] == "/stream"
    logger.info("after")
    assert not log.last.keys() & set(KEYS)


def test_unknown_routes_and_methods(log):
    """A route that is none is left out; a method is text like any other."""
    ask(make_app(), "/nowhere", method="BREW\n")
    (line,) = log.of(ACCESS)
    assert "route" not in line
    assert (line["method"], line["status"]) == ("BREW\n", 404)


def test_a_stream_that_fails(log):
    """It is marked, and it is one line; its status is the one that was sent."""
    app = make_app()
    with pytest.raises(RuntimeError):
        ask(app, "/stream?fail=1")
    ask(app, "/stream")
    failed, fine = log.of(ACCESS)
    assert (failed["failed"], failed["status"], failed["bytes"]) == (True, 200, 3)
    assert "failed" not in fine


def test_slow_requests(tmp_path, monkeypatch):
    """Above the threshold a warning with route and duration; below none."""
    path = tmp_path / "x.log"
    app = make_app()
    times, real, here = iter([0.0, 0.5, 10.0, 12.0]), SYSTEM.now, threading.get_ident()
    # The threads of other tests may still look at the clock.
    monkeypatch.setattr(
        SYSTEM, "now", lambda: next(times) if threading.get_ident() == here else real()
    )
    with configured(file=path, slow_request_s=1.0):
        for _ in range(2):
            ask(app, "/users/7")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (slow,) = [line for line in lines if line["level"] == "WARNING"]
    assert slow["route"] == "/users/<int:number>"
    assert slow["duration_ms"] == 2_000
    assert slow["message"] == "slow request: /users/<int:number> took 2.000 s"


def test_without_access_log_or_below_the_level(tmp_path):
    """Neither writes a line for a request."""
    path = tmp_path / "x.log"
    for arguments in ({"access_log": False}, {"level": "WARNING"}):
        with configured(file=path, **arguments):
            ask(make_app(), "/users/7")
    assert ACCESS not in path.read_text()


def test_access_lines_as_text(tmp_path):
    """The same fields, for people."""
    with configured(format="text", file=tmp_path / "x.log"):
        ask(make_app(), "/users/7")
    text = (tmp_path / "x.log").read_text()
    assert "flask_muset.access: request request_id=" in text
    assert " user=u7 method=GET route=/users/<int:number> status=200 " in text


def test_a_block_that_is_never_left(log):
    """Its fields end with the request all the same."""
    app = make_app()
    app.before_request(lambda: LogContext(logger, leaked=1).__enter__() and None)
    with LogContext(logger, outside=1):
        ask(app, "/users/7")
        logger.info("after")
    assert log.of("shop")[0]["leaked"] == 1
    assert log.last.items() >= {"message": "after", "outside": 1}.items()
    assert "leaked" not in log.last


def test_keys_that_a_sender_knows(log):
    """A sender may name fields that are the line's own keys; others cannot."""
    said = {"fingerprint": "0123456789ab", "status": 503, "route": "/mine"}
    logging.getLogger("std").error("x", extra={**said, "flask_muset": ("fingerprint", "status")})
    assert list(log.last)[4:] == ["status", "fingerprint", "route_"]


def test_nothing_in_the_way_breaks_a_request(log, monkeypatch):
    """Where making the access line fails the answer is complete."""
    monkeypatch.setattr("flask_muset.logging.extension.timestamp", lambda: 1 / 0)
    assert ask(make_app(), "/users/7").json == {"id": 7}


# --- Errors and secrets ---------------------------------------------------------------------------


def test_an_error_has_its_fingerprint(log):
    """ErrorHandler's line bears the keys that it knows, not marked names."""
    app = make_app(errors=True)
    app.add_url_rule("/broken", view_func=lambda: 1 / 0)
    ask(app, "/broken")
    (line,) = [line for line in log.of("shop") if line["level"] == "CRITICAL"]
    assert len(line["fingerprint"]) == 12
    assert line["status"] == 500
    assert line["category"] == "internal"
    assert not [key for key in line if key.endswith("_")]


SECRETS = {
    "message": "sk-message0123456789abcdef", "details": "details-5Ecr3t-value",
    "header": "header-5Ecr3t-value", "query": "query-5Ecr3t-value", "cookie": "cookie-5Ecr3t-value",
    "local": "local-5Ecr3t-value", "cause": "ghp_cause0123456789abcdef",
    "basic": "basic-5Ecr3t-value", "field": "field-5Ecr3t-value",
}  # fmt: skip


def plant(app):
    """A view that puts each secret wherever a careless program would."""

    @app.get("/planted/<path:rest>")
    def planted(rest):
        secret_local = SECRETS["local"]
        current_exchange.get().user = request.headers["X-API-Key"]
        try:
            try:
                raise ValueError(f"key {SECRETS['cause']} at {request.headers['X-API-Key']}")
            except ValueError as cause:
                raise KeyError({"password": SECRETS["field"]}) from cause
        except KeyError as failure:
            logger.exception("failed with %s", SECRETS["message"], extra={
                "token": SECRETS["field"], "nested": [{"api_key": SECRETS["field"]}],
                "seen": request.args["token"], "header": dict(request.headers),
                request.headers["X-API-Key"]: 1,
            })  # fmt: skip
            with LogContext(logger, session=SECRETS["field"], copied=request.cookies["sid"]):
                text = f"{request.url} {request.headers}"
                logging.getLogger("std").exception(text)
            raise DatabaseError(
                f"cannot log in with {SECRETS['message']} and {request.args['token']}",
                details={"password": SECRETS["details"], "length": len(secret_local)},
            ) from failure


@pytest.mark.claim(
    "A secret planted in message, details, header, query, local variable and chained cause is "
    "found nowhere in log or trace"
)
def test_planted_secrets(prove, tmp_path):
    """In both forms, and in the spans of OpenTelemetry."""
    spans = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), spans.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    basic = base64.b64encode(f"me:{SECRETS['basic']}".encode()).decode()
    headers = {
        "X-API-Key": SECRETS["header"], "Authorization": f"Basic {basic}",
        "Cookie": f"sid={SECRETS['cookie']}", "traceparent": SECRETS["header"],
        "tracestate": f"a={SECRETS['header']}",
    }  # fmt: skip
    secrets = {*SECRETS.values(), basic}
    found, size = [], 0
    for form in ("json", "text"):
        path = tmp_path / form
        app = make_app(errors=True)
        plant(app)
        with configured("DEBUG", form, path), _provider(provider):
            for place in (SECRETS["header"], SECRETS["cookie"], SECRETS["basic"], f"x{basic}x"):
                url = f"/planted/{place}?token={SECRETS['query']}&n=1"
                assert ask(app, url, headers=headers).status_code == 500
                ask(app, f"/nowhere/a{place}b", headers=headers)
        text = path.read_text()
        size += len(text)
        found += [(form, secret) for secret in secrets if secret in text]
    shown = "".join(span.to_json() for span in exporter.get_finished_spans())
    found += [("span", secret) for secret in secrets if secret in shown]
    prove.figure(
        f"{len(secrets)} secrets, {size} characters of log, {len(shown)} of spans, "
        f"{len(found)} found"
    )
    assert len(exporter.get_finished_spans()) == 16
    assert size > 20_000
    assert found == []


class _provider:  # noqa: N801 - used like a function
    """OpenTelemetry's global provider, which may be set once, replaced for a block."""

    def __init__(self, provider):
        self.provider = provider

    def __enter__(self):
        from opentelemetry import trace

        self.module, self.before = trace, trace.get_tracer_provider
        trace.get_tracer_provider = lambda: self.provider

    def __exit__(self, *_):
        self.module.get_tracer_provider = self.before


PIECES = st.sampled_from(
    ["password", "Token", " ", "=", ":", '"', "'", "is ", "abc", "x" * 20, "eyJ",
     "eyJhbGciOiJ.abcd", "Bearer ", "Basic ", "dXNlcjpwYXNz", "sk-", "msk_", "AKIA",
     "ABCDEFGH12345678", "AIza", "SG.",
     "https://", "user:pw", "@", "/", "-----BEGIN PRIVATE KEY-----", "ghp_", "xoxb-", "npm_",
     "hf_", "api_key", "api key ", "pypi-", "ya29.", "Cookie", "session", "glpat-", "sk_live_",
     "PIN", "\n"]
)  # fmt: skip


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join))
def test_texts_that_are_not_looked_at(text):
    """Where a line is not searched for secrets the search would have found none."""
    if not may_hold_secret(text):
        assert redact_text(text) == text


# --- Real connections -----------------------------------------------------------------------------

SERVED = """
import logging
from flask import Flask, request
from flask_muset import ErrorHandler, tracing
from flask_muset.context import current_exchange
from flask_muset.logging import LogContext, configure, get_logger, init_app

configure("INFO", file="app.log")
logger, app = get_logger("served"), Flask("served")
ErrorHandler(app)
tracing.init_app(app)
init_app(app)

@app.get("/<int:number>")
def view(number):
    if number % 3:
        current_exchange.get().user = f"user{number}"
    LogContext(logger, **{f"left{number}": number}).__enter__()  # never left
    with LogContext(logger, number=number):
        logger.info("first %d", number, extra={f"own{number}": number})
        if number % 5 == 0:
            raise ValueError(f"error {number}")
        logging.getLogger("std").info("second %d", number)
    def body():
        logger.info("third %d", number)
        yield b"done"
    return app.response_class(body()) if number % 2 else "done"
"""


def ask_all(port, count):
    """Ask for /1 to /count over one connection; returns the ids of the answers."""
    ids = []
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        stream = connection.makefile("rb")
        for number in range(1, count + 1):
            connection.sendall(f"GET /{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            headers = {}
            stream.readline()
            while (line := stream.readline().strip()) != b"":
                name, _, value = line.decode().partition(": ")
                headers[name.lower()] = value
            if "content-length" in headers:
                stream.read(int(headers["content-length"]))
            else:
                while (size := int(stream.readline(), 16)) >= 0:
                    stream.read(size + 2)
                    if not size:
                        break
            ids.append(headers["x-request-id"])
    return ids


def wait_for(path, *parts):
    """Until a line has all parts: the access line is written after the answer."""
    end = time.monotonic() + 20
    while not any(all(part in line for part in parts) for line in path.read_text().splitlines()):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.claim(
    "1,000 requests over one keep-alive connection: no field of one in another's log"
)
@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["forked first", "preloaded"])
def test_one_connection(prove, tmp_path, options):
    """The fair gevent worker serves all of a connection in one greenlet."""
    count = 1_000
    with serve(tmp_path, SERVED, "--keep-alive", "20", *options) as (_, port):
        ids = ask_all(port, count)
        wait_for(tmp_path / "app.log", ids[-1], ACCESS)
    lines = [json.loads(line) for line in (tmp_path / "app.log").read_text().splitlines()]
    of = {request_id: number for number, request_id in enumerate(ids, 1)}
    mine = [line for line in lines if line["logger"] != "gunicorn.error"]
    foreign = []
    for line in mine:
        number = of[line["request_id"]]
        allowed = {f"left{number}", f"own{number}"}
        named = {key for key in line if key.startswith(("left", "own"))}
        user = f"user{number}" if number % 3 else None
        if not named <= allowed or line.get("user") != user or line.get("number", number) != number:
            foreign.append(line)
    prove.figure(f"{count} requests, {len(mine)} lines, {len(foreign)} with another's field")
    assert foreign == []
    assert len(of) == count
    assert len({line["trace_id"] for line in mine}) == count
    access = [of[line["request_id"]] for line in mine if line["logger"] == ACCESS]
    assert access == list(range(1, count + 1))
    assert len(mine) >= 3 * count


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["forked first", "preloaded"])
def test_gunicorns_own_lines(tmp_path, options):
    """They are ours too, each once, from the start of a worker to the end of the master."""
    config = 'logger_class = "flask_muset.logging.gunicorn.Logger"\n'
    config = f'from flask_muset.logging import configure\nconfigure(file="app.log")\n{config}'
    with serve(tmp_path, SERVED, "--workers", "2", *options, config=config) as (process, port):
        ask_all(port, 1)
        process.terminate()
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in (tmp_path / "app.log").read_text().splitlines()]
    messages = [line["message"] for line in lines if line["logger"] == "gunicorn.error"]
    assert sum("Booting worker" in message for message in messages) == 2
    assert sum("Listening at" in message for message in messages) == 1
    shown = (tmp_path / "gunicorn.log").read_text()
    assert shown.count("Listening at") == 1
    assert all(line.startswith("{") for line in shown.splitlines())
