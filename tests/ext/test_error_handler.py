"""ErrorHandler alone in a Flask app of somebody else's kind."""

import gc
import json
import logging
import re
import weakref
from urllib.parse import quote

import pytest
from flask import (
    Flask,
    Response,
    abort,
    got_request_exception,
    jsonify,
    request,
    stream_with_context,
)
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException

import flask_muset.error_handler.extension as extension_module
from flask_muset import ErrorHandler
from flask_muset.error_handler import error_body, openapi_components, recent_errors
from flask_muset.errors import (
    TABLE,
    AuthenticationError,
    CircuitOpenError,
    ConflictError,
    DatabaseError,
    ErrorCategory,
    MusetError,
    NotFoundError,
    OverloadedError,
    RateLimitError,
    Severity,
    ValidationError,
)
from flask_muset.signals import error_handled

GUIDE = {
    "error": "NotFoundError",
    "message": "The requested user was not found.",
    "category": "not_found",
    "severity": "low",
    "retryable": False,
    "details": {"user_id": "123"},
    "path": "/api/v1/users/123",
}


@pytest.fixture
def app():
    app = Flask("somebody")
    app.config["ERROR_HANDLER_REPEAT_WINDOW"] = 3600
    ErrorHandler(app)
    return app


def raising(app, error, path="/fail"):
    def view():
        raise error

    app.add_url_rule(path, path, view)
    return app.test_client()


@pytest.mark.claim(
    "The guide's NotFoundError answers exactly the guide's JSON plus request_id; "
    "four kinds of Accept get the four right bodies"
)
def test_guide_example_and_accept(app, prove):
    """The guide's example, and JSON, problem+json, a page and again JSON by Accept."""
    error = NotFoundError(
        message="User not found", resource_type="user", details={"user_id": "123"}
    )
    client = raising(app, error, "/api/v1/users/123")
    answer = client.get("/api/v1/users/123")
    body = answer.get_json()
    assert answer.status_code == 404
    assert answer.headers["X-Request-ID"] == body.pop("request_id")
    assert body == GUIDE

    problem = client.get("/api/v1/users/123", headers={"Accept": "application/problem+json"})
    assert problem.content_type == "application/problem+json"
    assert problem.json["status"] == 404
    assert problem.json["title"] == "Not Found"
    assert problem.json["detail"] == GUIDE["message"]
    assert GUIDE.items() <= problem.json.items()
    assert client.get(problem.json["type"]).status_code == 200

    browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    page = client.get("/api/v1/users/123", headers={"Accept": browser})
    assert page.content_type == "text/html; charset=utf-8"
    assert GUIDE["message"] in page.text

    for accept in ("%%%;;;q=x,,", "*/*", "image/png", "", "application/json, text/html"):
        plain = client.get("/api/v1/users/123", headers={"Accept": accept})
        assert plain.content_type == "application/json", accept
    head = client.head("/api/v1/users/123")
    assert (head.status_code, head.data) == (404, b"")
    prove.figure("exact; 4 of 4")


@pytest.mark.parametrize("category", list(ErrorCategory))
def test_every_category_answers_by_its_row(app, category):
    """Status, category, severity, retryable and details follow the table for each class."""
    cls = extension_module.translate(ValueError(), {ValueError: category}).__class__
    row = TABLE[category]
    answer = raising(app, cls("inner words", details={"shown": 1})).get("/fail")
    body = answer.get_json()
    assert answer.status_code == row.status
    assert body["error"] == row.error
    assert body["severity"] == row.severity
    assert body["retryable"] == row.retryable
    assert body["details"] == ({"shown": 1} if row.shows_details else {})
    assert "inner words" not in answer.text
    assert ("Retry-After" in answer.headers) == (row.retryable and row.status in (429, 503))


def test_one_row_changes_everything(app, monkeypatch, caplog):
    """Changing a row changes body, headers, log level, labels, OpenAPI and catalogue at once."""
    import dataclasses

    row = dataclasses.replace(
        TABLE[ErrorCategory.CONFLICT],
        error="Clash",
        status=429,
        severity=Severity.CRITICAL,
        retryable=True,
        log_level=logging.ERROR,
        meaning="It clashed.",
        shows_details=False,
    )
    monkeypatch.setitem(TABLE, ErrorCategory.CONFLICT, row)
    seen = []
    with error_handled.connected_to(lambda _, event: seen.append(event), sender=app):
        answer = raising(app, ConflictError("x", details={"a": 1})).get("/fail")
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    assert answer.json["retryable"] is True
    assert answer.json["details"] == {}
    assert caplog.records[-1].levelno == logging.ERROR
    assert (seen[0].severity, seen[0].retryable) == ("critical", True)
    assert openapi_components()["responses"]["Clash"]["description"] == "It clashed."
    assert app.test_client().get("/errors/conflict").json["meaning"] == "It clashed."


def test_werkzeug_errors_keep_status_and_headers(app):
    """404, 405 with Allow, 401 with a challenge, 429 and 503 with Retry-After, 413, 418, 501."""
    from werkzeug.datastructures import WWWAuthenticate
    from werkzeug.exceptions import ServiceUnavailable, TooManyRequests, Unauthorized

    client = app.test_client()
    app.add_url_rule("/only-post", "only_post", lambda: "", methods=["POST"])
    for name, error in {
        "a": Unauthorized(www_authenticate=WWWAuthenticate("digest", {"realm": "x"})),
        "b": TooManyRequests(retry_after=7),
        "c": ServiceUnavailable(retry_after=9),
    }.items():
        raising(app, error, f"/{name}")
    for status in (400, 410, 412, 413, 418, 501, 504):
        app.add_url_rule(f"/{status}", str(status), lambda status=status: abort(status))
    assert client.get("/nowhere").json["error"] == "NotFoundError"
    not_allowed = client.get("/only-post")
    assert (not_allowed.status_code, not_allowed.json["error"]) == (405, "ValidationError")
    assert "POST" in not_allowed.headers["Allow"]
    assert client.get("/a").headers["WWW-Authenticate"].startswith("Digest")
    assert client.get("/b").headers["Retry-After"] == "7"
    assert client.get("/c").json["retry_after"] == 9
    categories = {s: client.get(f"/{s}").json["category"] for s in (410, 412, 413, 418, 501, 504)}
    assert categories == {
        410: "not_found",
        412: "conflict",
        413: "validation",
        418: "validation",
        501: "internal",
        504: "timeout",
    }
    assert all(client.get(f"/{s}").status_code == s for s in (400, *categories))


def test_401_without_a_challenge_gets_one(app):
    """RFC 9110 demands WWW-Authenticate on every 401."""
    answer = raising(app, AuthenticationError("no key")).get("/fail")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_finished_responses_pass_unchanged(app):
    """abort(response) is a decision of the app and stays what it is."""
    app.add_url_rule("/mine", "mine", lambda: abort(Response("mine", 409)))
    answer = app.test_client().get("/mine")
    assert (answer.status_code, answer.text) == (409, "mine")


def test_spectree_refusal_passes_through(app):
    """spectree's own 422 gets our body with field paths and without the refused values."""
    from pydantic import BaseModel
    from spectree import SpecTree

    class User(BaseModel):
        email: str
        age: int

    spec = SpecTree("flask")

    @app.post("/users")
    @spec.validate(json=User)
    def create():
        return jsonify({})

    answer = app.test_client().post("/users", json={"age": "sk-abcdefghijklmnopqrst"})
    assert answer.status_code == 422
    assert answer.json["error"] == "ValidationError"
    assert {entry["field"] for entry in answer.json["errors"]} == {"email", "age"}
    assert "sk-abcdef" not in answer.text


def test_validation_error_names_field_code_and_message(app):
    """A field error has its path, its code and the text that its author wrote."""
    error = ValidationError("Invalid email format", field="email", details={"provided": "x"})
    answer = raising(app, error).get("/fail")
    assert answer.json["errors"] == [
        {"field": "email", "code": "invalid", "message": "Invalid email format"}
    ]
    assert answer.json["details"] == {"provided": "x"}


def test_flask_signal_once_for_5xx_never_for_4xx_or_refusals(app):
    """Error trackers that listen to got_request_exception see each 5xx exactly once."""
    sent = []
    with got_request_exception.connected_to(lambda _, exception: sent.append(exception), app):
        client = raising(app, ValueError("bad"), "/500")
        raising(app, NotFoundError("x"), "/404")
        raising(app, OverloadedError("full"), "/503")
        raising(app, CircuitOpenError("open"), "/open")
        raising(app, DatabaseError("gone", unavailable=True), "/db")
        for path in ("/500", "/404", "/503", "/open", "/db", "/none"):
            client.get(path)
    assert [type(e) for e in sent] == [ValueError, DatabaseError]


def test_a_handler_of_the_app_that_raises_still_ends_in_json(app):
    """An app's own 404 handler that raises: JSON 500, one signal, one log line."""
    sent = []

    @app.errorhandler(404)
    def broken(_):
        raise KeyError("in the handler")

    with got_request_exception.connected_to(lambda _, exception: sent.append(exception), app):
        answer = app.test_client().get("/nowhere")
    assert (answer.status_code, answer.json["error"]) == (500, "InternalError")
    assert [type(e) for e in sent] == [KeyError]
    assert [e["type"] for e in recent_errors(app)] == ["KeyError"]


@pytest.mark.claim(
    "An encoder, translator or logger that raises still ends in a constant valid JSON 500"
)
def test_unbreakable(app, prove, monkeypatch, capsys):
    """Each part of error handling raises in turn; the client always gets the constant body."""
    client = raising(app, ValueError("first"))

    def explode(*_, **__):
        raise RuntimeError("broken part, password=hunter2")

    def encoder():
        monkeypatch.setattr(app.json, "dumps", explode)

    def translator():
        handler = ErrorHandler()
        handler.map(ValueError, explode)
        other = Flask("translator")
        handler.init_app(other)
        return raising(other, ValueError("first"))

    def logger():
        monkeypatch.setattr(app.logger, "log", explode)

    def after_request():
        app.after_request(explode)

    for part in (encoder, translator, logger):
        with monkeypatch.context() as patch:
            monkeypatch_, monkeypatch = monkeypatch, patch
            used = part() or client
            monkeypatch = monkeypatch_
            app.extensions["error_handler"].repeats.flush()
            answer = used.get("/fail")
            body = json.loads(answer.data)
            assert answer.status_code == 500, part
            assert answer.content_type == "application/json"
            assert answer.headers["X-Request-ID"] == body["request_id"]
            assert body["error"] == "InternalError"
            assert "hunter2" not in answer.text
    prove.figure("3 of 3")
    assert "ErrorHandler failed: RuntimeError" in capsys.readouterr().err


def test_after_request_that_raises_ends_in_json():
    """A hook of the app that raises escapes Flask's handlers twice; the boundary answers."""
    app = Flask("hooks")
    app.testing = True
    ErrorHandler(app)

    @app.after_request
    def broken(_):
        raise RuntimeError("in after_request")

    app.add_url_rule("/", "index", lambda: "fine")
    answer = app.test_client().get("/")
    assert (answer.status_code, answer.json["category"]) == (500, "internal")
    assert answer.headers["X-Request-ID"] == answer.json["request_id"]


def test_an_error_that_a_stream_tells_itself(app):
    """The same JSON as of a response, whatever the client accepts; recorded once, as streaming."""
    events = []
    receiver = error_handled.connect_via(app)(lambda _sender, event: events.append(event))

    def chunks(environ):
        yield "begun\n"
        yield error_body(app, OverloadedError("too much", retry_after=3.2), environ)

    app.add_url_rule("/stream", "stream", lambda: Response(chunks(request.environ)))
    client = raising(app, OverloadedError("too much", retry_after=3.2))
    headers = {"X-Request-ID": "one-and-the-same"}
    whole = client.get("/fail", headers=headers).json
    begun, body = client.get("/stream", headers=headers | {"Accept": "text/html"}).text.split("\n")
    assert begun == "begun"
    assert json.loads(body) == whole | {"path": "/stream"}
    assert [event.streaming for event in events] == [False, True]
    assert receiver is not None


def test_an_error_that_cannot_be_told(app, monkeypatch):
    """A broken encoder: constant JSON all the same."""
    answer = raising(app, ConflictError("x")).get("/fail")
    monkeypatch.setattr(app.json, "dumps", lambda *_args, **_kwargs: 1 / 0)
    body = json.loads(error_body(app, NotFoundError("y"), answer.request.environ))
    assert (body["error"], body["path"]) == ("InternalError", "/fail")


def test_broken_stream_ends_visibly_and_once(app):
    """After streaming began: the rest is cut, one record, one signal, one event with streaming."""
    events, sent = [], []

    def chunks():
        yield b"first"
        raise ValueError("midway")

    app.add_url_rule("/stream", "stream", lambda: Response(chunks()))
    app.add_url_rule("/stream-ctx", "stream_ctx", lambda: Response(stream_with_context(chunks())))
    for path in ("/stream", "/stream-ctx"):
        with (
            error_handled.connected_to(lambda _, event: events.append(event), sender=app),
            got_request_exception.connected_to(lambda _, exception: sent.append(exception), app),
        ):
            answer = app.test_client().get(path, buffered=False)
            body = iter(answer.response)
            assert next(body) == b"first"
            with pytest.raises(ConnectionResetError):
                next(body)
            answer.close()
    assert [(e.streaming, e.category) for e in events] == [(True, "internal")] * 2
    assert [type(e) for e in sent] == [ValueError] * 2


def test_gevent_timeout_becomes_504(app):
    """gevent's Timeout is no Exception, so only the boundary can answer it."""
    gevent = pytest.importorskip("gevent")
    answer = raising(app, gevent.Timeout(1)).get("/fail")
    assert (answer.status_code, answer.json["error"]) == (504, "OperationTimeoutError")


def test_foreign_base_exceptions_pass(app):
    """KeyboardInterrupt and SystemExit are not errors of a request."""
    with pytest.raises(SystemExit):
        raising(app, SystemExit(3)).get("/fail")


def test_map_nearest_class_wins(app):
    """Own translations: by category, by function, the nearer class first, over the built-in."""

    class Base(OSError): ...

    class Near(Base): ...

    handler = ErrorHandler()
    handler.map(Base, ErrorCategory.CONFLICT)
    handler.map(Near, lambda e: RateLimitError(str(e), retry_after=2.1))
    other = Flask("mapped")
    handler.init_app(other)
    client = raising(other, Base("b"), "/base")
    raising(other, Near("n"), "/near")
    assert client.get("/base").status_code == 409
    near = client.get("/near")
    assert (near.status_code, near.headers["Retry-After"]) == (429, "3")
    with pytest.raises(TypeError, match="exception class"):
        handler.map("x", ErrorCategory.CONFLICT)
    with pytest.raises(TypeError, match="ErrorCategory or a function"):
        handler.map(ValueError, "conflict")


def test_repeats_are_one_line_and_refusals_a_sum(app, caplog):
    """Ten equal faults: one full line, one sum; ten refusals: one sum; all counted and kept."""
    client = raising(app, ValueError("id 1"), "/a")
    raising(app, OverloadedError("full"), "/b")
    counted = []
    with error_handled.connected_to(lambda _, event: counted.append(event), sender=app):
        for _ in range(10):
            client.get("/a")
            client.get("/b")
    app.extensions["error_handler"].repeats.flush()
    texts = [record.getMessage() for record in caplog.records]
    assert sum("ValueError: id 1" in text for text in texts) == 1
    assert sum("9 more in the last" in text for text in texts) == 1
    assert sum(text.startswith("OverloadedError: 10 more") for text in texts) == 1
    assert len(counted) == 20
    kept = {entry["type"]: entry for entry in recent_errors(app)}
    assert kept["ValueError"]["count"] == 10
    assert len(kept["ValueError"]["newest"]) == 5


def test_fingerprint_same_fault_on_different_ids(app):
    """One fault on two ids has one fingerprint, two faults in one function have two."""

    @app.get("/items/<int:item>")
    def item(item):
        if item > 100:
            raise ValueError(f"too big {item}")
        raise ValueError(f"no {item}")

    client = app.test_client()
    for number in (1, 2, 101):
        client.get(f"/items/{number}")
    assert [(e["count"]) for e in recent_errors(app)] == [1, 2]
    assert len({e["fingerprint"] for e in recent_errors(app)}) == 2


@pytest.mark.parametrize("accept", ["application/json", "application/problem+json", "text/html"])
def test_equal_answers_bear_their_own_ids(app, accept):
    raising(app, NotFoundError("gone", resource_type="user"))
    client = app.test_client()
    ids = [f"request-{n:08}" for n in range(3)]
    answers = [
        client.get("/fail", headers={"X-Request-ID": rid, "Accept": accept}).text for rid in ids
    ]
    assert all(answer.count(rid) == 1 for rid, answer in zip(ids, answers, strict=True))
    assert len({answer.replace(rid, "") for rid, answer in zip(ids, answers, strict=True)}) == 1


def test_an_encoder_may_write_ids_in_its_own_way(app):
    class Shouting(DefaultJSONProvider):
        def dumps(self, obj, **kwargs):
            return super().dumps(obj, **kwargs).upper()

    app.json = Shouting(app)
    raising(app, NotFoundError("gone"))
    for rid in ("abcdefgh-1", "abcdefgh-2"):
        answer = app.test_client().get("/fail", headers={"X-Request-ID": rid}).text
        assert rid.upper() in answer


def test_an_error_is_freed_with_its_request(app):
    class Big:
        pass

    seen = []

    @app.get("/big")
    def big():
        local = Big()
        seen.append(weakref.ref(local))
        raise ValueError("no")

    gc.disable()
    try:
        app.test_client().get("/big")
        assert seen[0]() is None, "a cycle keeps the frames of the request"
    finally:
        gc.enable()


def test_sums_have_the_level_of_what_they_sum_up(caplog):
    # A name of its own: sums of other tests' apps may arrive from their timers meanwhile.
    app = Flask("quiet")
    ErrorHandler(app)
    raising(app, NotFoundError("gone"))
    with caplog.at_level(logging.WARNING, "quiet"):
        for _ in range(5):
            app.test_client().get("/fail")
        app.extensions["error_handler"].repeats.flush()
    assert [record for record in caplog.records if record.name == "quiet"] == []
    with caplog.at_level(logging.INFO, "quiet"):
        for _ in range(5):
            app.test_client().get("/fail")
        app.extensions["error_handler"].repeats.flush()
    levels = [record.levelno for record in caplog.records if record.name == "quiet"]
    assert levels == [logging.INFO, logging.INFO], "one line, one sum"


def test_request_id_in_and_out(app):
    """A well-formed id is kept, any other is replaced, and two requests never share one."""
    app.add_url_rule("/", "index", lambda: "")
    client = app.test_client()
    given = client.get("/", headers={"X-Request-ID": "abc-DEF_123.x"})
    assert given.headers["X-Request-ID"] == "abc-DEF_123.x"
    for bad in ("short", "x" * 65, "with space1", "inject\u00e9d-id"):
        answer = client.get("/", headers={"X-Request-ID": bad})
        assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["X-Request-ID"])
    ids = {client.get("/").headers["X-Request-ID"] for _ in range(50)}
    assert len(ids) == 50


def test_two_apps_with_one_instance():
    """One instance on two apps: each keeps its own settings and its own errors."""
    handler, one, two = ErrorHandler(), Flask("one"), Flask("two")
    two.config["ERROR_HANDLER_CATALOGUE"] = None
    handler.init_app(one)
    handler.init_app(two)
    raising(one, ValueError("x")).get("/fail")
    assert len(recent_errors(one)) == 1
    assert recent_errors(two) == []
    assert one.test_client().get("/errors").status_code == 200
    assert two.test_client().get("/errors").status_code == 404


def test_setup_errors_name_thing_and_cure():
    """A second init_app, an unknown key and bad values stop the start with a clear text."""
    app = Flask("twice")
    handler = ErrorHandler(app)
    with pytest.raises(RuntimeError, match="already set up on app 'twice'"):
        handler.init_app(app)
    with pytest.raises(RuntimeError, match="call init_app first"):
        recent_errors(Flask("bare"))
    for key, value in {
        "ERROR_HANDLER_KEEP": -1,
        "ERROR_HANDLER_CATALOGUE": "errors/",
        "ERROR_HANDLER_REPEAT_WINDOW": 0,
        "ERROR_HANDLER_ENABLED": "yes",
        "ERROR_HANDLER_REDACT_KEYS": "pin",
        "ERROR_HANDLER_WWW_AUTHENTICATE": "a\r\nb",
        "ERROR_HANDLER_KEPP": 1,
    }.items():
        bad = Flask("bad")
        bad.config[key] = value
        with pytest.raises(ValueError, match=key):
            ErrorHandler(bad)


def test_off_switch_leaves_the_app_alone():
    """Switched off: Flask's own answer, no hook, no header."""
    app = Flask("off")
    app.config["ERROR_HANDLER_ENABLED"] = False
    wsgi_app = app.wsgi_app
    ErrorHandler(app)
    answer = app.test_client().get("/nowhere")
    assert app.wsgi_app == wsgi_app
    assert answer.content_type.startswith("text/html")
    assert "X-Request-ID" not in answer.headers


def test_catalogue_lists_the_table(app):
    """Both pages in JSON and HTML; an unknown category is a 404 that lists the known ones."""
    client = app.test_client()
    items = client.get("/errors").json["items"]
    assert [item["category"] for item in items] == [category.value for category in TABLE]
    html = client.get("/errors/timeout", headers={"Accept": "text/html"})
    assert html.content_type == "text/html; charset=utf-8"
    assert TABLE[ErrorCategory.TIMEOUT].meaning in html.text
    missing = client.get("/errors/nothing")
    assert missing.status_code == 404
    assert "timeout" in missing.json["details"]["known"]


@pytest.mark.claim(
    "A secret planted in message, details, header, query and chained cause "
    "is found in no body and no log"
)
def test_planted_secrets_are_nowhere(app, prove, caplog, capsys):
    """Fourteen secrets in six places, all kinds of Accept: none in a body, log or kept error."""
    caplog.set_level(logging.DEBUG)
    planted = {
        "message": "hunter2-in-message",
        "details": "hunter2-in-details",
        "deep": "hunter2-in-depth",
        "bearer": "hunter2.in.bearer",
        "cookie": "hunter2-in-cookie",
        "query": "hunter2-in-query",
        "cause": "hunter2-in-cause",
        "url": "hunter2-in-url",
        "header": "hunter2-in-header",
        "copied": "hunter2-in-header",
        "key": "msk_hunter2hunter2hunter2",
        "openai": "sk-hunter2hunter2hunter2",
        "json": "hunter2-in-json",
        "spoken": "hunter2-spoken",
    }

    def fail(cls):
        details = {
            "password": planted["details"],
            "list": [{"nested": {"apiKey": planted["deep"]}}],
            "note": f"token={planted['message']}",
            "copied": f"the value was {request.headers['X-Api-Key']}",
        }
        try:
            raise OSError(f'cannot connect: {{"secret": "{planted["cause"]}"}}')
        except OSError as cause:
            raise cls(
                f"password={planted['message']} redis://u:{planted['url']}@host/0 "
                f"{planted['key']} {planted['openai']} Bearer {planted['bearer']} "
                f"{request.args['token']} {request.cookies['sid']} "
                f"{{'client_secret': '{planted['json']}'}} the password is '{planted['spoken']}'",
                details=details,
            ) from cause

    for cls in (MusetError, NotFoundError, DatabaseError, ValidationError, AuthenticationError):
        app.add_url_rule(f"/{cls.__name__}", cls.__name__, lambda cls=cls: fail(cls))
    client = app.test_client()
    client.set_cookie("sid", planted["cookie"])
    bodies = []
    for cls in (MusetError, NotFoundError, DatabaseError, ValidationError, AuthenticationError):
        for accept in ("*/*", "application/problem+json", "text/html"):
            bodies.append(  # noqa: PERF401 - reads better as a loop
                client.get(
                    f"/{cls.__name__}?token={planted['query']}",
                    headers={
                        "Accept": accept,
                        "Authorization": f"Bearer {planted['bearer']}",
                        "X-Api-Key": planted["header"],
                    },
                ).text
            )
    app.extensions["error_handler"].repeats.flush()
    output = capsys.readouterr()
    everything = "\n".join(
        [*bodies, json.dumps(recent_errors(app)), caplog.text, output.out, output.err]
    )
    assert len(caplog.records) >= 5
    found = [name for name, secret in planted.items() if secret in everything]
    prove.figure(f"{len(found)} of {len(planted)} found")
    assert found == []
    assert "hunter2" not in everything.replace("hunter2-not-planted", "")


def test_details_are_copied_not_changed(app):
    """Redaction works on copies: the caller's objects stay as they are."""
    details = {"password": "x1y2z3", "deep": [{"token": "abc123"}]}
    raising(app, NotFoundError("x", details=details)).get("/fail")
    assert details == {"password": "x1y2z3", "deep": [{"token": "abc123"}]}


def test_propagate_exceptions_is_honoured():
    """Where the app asks Flask to propagate, what escapes Flask's handlers is not hidden."""
    app = Flask("propagating")
    app.config["PROPAGATE_EXCEPTIONS"] = True
    ErrorHandler(app)

    @app.after_request
    def broken(_):
        raise RuntimeError("in after_request")

    app.add_url_rule("/", "index", lambda: "fine")
    with pytest.raises(RuntimeError):
        app.test_client().get("/")


def test_http_exception_subclass_without_description(app):
    """A subclass of somebody else's with an unusual status is answered with that status."""

    class Odd(HTTPException):
        code = 499
        description = None

    answer = raising(app, Odd()).get("/fail")
    assert (answer.status_code, answer.json["category"]) == (499, "validation")


@pytest.mark.parametrize("accept", ["*/*", "application/problem+json", "text/html"])
def test_every_path_is_answered_as_itself(accept):
    """Answers are kept and used again for other paths and ids, whatever characters those have."""
    app = Flask(__name__)
    ErrorHandler(app)
    client = app.test_client()
    for path in ("/a", "/b.c/~d_e-f", '/"x"', "/a b", "/\\n", "/\u00fc", "/<b>", "/a", "/%25"):
        for request_id in ("first-request", "second-request"):
            answer = client.get(quote(path), headers={"Accept": accept, "X-Request-ID": request_id})
            assert answer.status_code == 404
            if accept == "text/html":
                assert f"Request {request_id}<" in answer.text
                continue
            body = answer.get_json(force=True)
            assert (body["path"], body["request_id"]) == (path, request_id)
            assert body.get("instance", path) == path


def test_an_encoder_of_the_apps_own_sees_every_answer():
    """Nothing is put into text that an encoder has made into something else."""

    class Hexadecimal(DefaultJSONProvider):
        def dumps(self, obj, **kwargs):
            return super().dumps(obj, **kwargs).encode().hex()

    app = Flask(__name__)
    app.json = Hexadecimal(app)
    ErrorHandler(app)
    for path in ("/one", "/two"):
        data = bytes.fromhex(app.test_client().get(path).text)
        assert json.loads(data)["path"] == path
