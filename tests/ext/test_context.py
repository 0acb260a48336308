"""What observers are told of an exchange."""

import pytest
from flask import Flask, Response

from flask_muset import ErrorHandler, context
from flask_muset.testing import virtual_clock


class Log:
    def __init__(self):
        self.seen = []

    def begin(self, exchange):
        self.seen.append(("begin", exchange.environ["PATH_INFO"]))

    def end(self, exchange):
        self.seen.append(
            ("end", exchange.status, exchange.failed, exchange.route, exchange.duration_s)
        )

    def close(self, exchange):
        self.seen.append(("close", exchange.sent))


@pytest.fixture
def clock():
    with virtual_clock() as clock:
        yield clock


def make(clock, *, handler=True):
    app = Flask("x")
    if handler:
        ErrorHandler(app)
    log = Log()
    context.install(app).observe(log)

    @app.get("/users/<int:number>")
    def user(number):
        clock.advance(0.5)
        assert context.current_exchange.get().route == "/users/<int:number>"
        return "12345"

    @app.get("/fail")
    def fail():
        raise KeyError

    @app.get("/stream/<end>")
    def stream(end):
        def chunks():
            yield "ab"
            clock.advance(0.75)
            if end == "fail":
                raise KeyError
            yield "cd"

        return Response(chunks())

    return app, log


def test_a_whole_response(clock):
    """Status, route, duration and length of an answer; the end is told before the last bytes."""
    app, log = make(clock)
    answer = app.test_client().get("/users/7")
    assert answer.text == "12345"
    answer.close()
    assert log.seen == [
        ("begin", "/users/7"),
        ("end", 200, False, "/users/<int:number>", 0.5),
        ("close", 5),
    ]
    assert context.current_exchange.get() is None


def test_end_is_told_before_the_last_bytes(clock):
    """Whoever has read the last byte is counted already."""
    app, log = make(clock)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/users/1", "SERVER_NAME": "x",
               "SERVER_PORT": "80", "wsgi.url_scheme": "http"}  # fmt: skip
    body = app.wsgi_app(environ, lambda *_: None)
    next(iter(body))
    assert log.seen[-1][0] == "end"
    body.close()
    body.close()
    assert [entry[0] for entry in log.seen] == ["begin", "end", "close"]


@pytest.mark.parametrize("handler", [True, False])
def test_a_stream_that_fails(clock, handler):
    """It counts as failed, with the time until it failed."""
    app, log = make(clock, handler=handler)
    with pytest.raises((ConnectionResetError, KeyError)):
        assert app.test_client().get("/stream/fail").text
    assert ("end", 200, True, "/stream/<end>", 0.75) in log.seen


def test_a_stream_to_its_end_and_one_that_is_left(clock):
    """A stream ends when its last chunk was given, or when its client leaves."""
    app, log = make(clock)
    with app.test_client().get("/stream/well") as answer:
        assert answer.text == "abcd"
    assert log.seen[-2:] == [("end", 200, False, "/stream/<end>", 0.75), ("close", 4)]
    app.test_client().get("/stream/well", buffered=False).close()
    assert log.seen[-2:] == [("end", 200, False, "/stream/<end>", 0.0), ("close", 2)]


def test_errors_and_unknown_paths(clock):
    """A handled error is no failure of the exchange; an unknown path has no route."""
    app, log = make(clock)
    app.test_client().get("/fail").close()
    assert log.seen[1] == ("end", 500, False, "/fail", 0.0)
    app.test_client().get("/nowhere").close()
    assert log.seen[4] == ("end", 404, False, None, 0.0)
    app, log = make(clock, handler=False)
    app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(KeyError):
        app.test_client().get("/fail")
    assert log.seen[1:] == [("end", 0, True, "/fail", 0.0), ("close", 0)]
