"""Tracing: the caller's trace or a new one, outgoing calls, spans where OpenTelemetry records."""

import json
import subprocess
import sys

import pytest
from flask import Flask
from gunicorn_app import serve
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_muset import ErrorHandler, tracing
from flask_muset.context import current_exchange
from flask_muset.errors import NotFoundError

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01"


def make_app(name="traced"):
    app = Flask(name)
    tracing.init_app(app)

    @app.get("/ids/<int:number>")
    def ids(number):
        exchange = current_exchange.get()
        return {
            "trace_id": exchange.trace_id,
            "span_id": exchange.span_id,
            "headers": tracing.inject({"x": "y"}),
        }

    return app


def ask(app, path="/ids/1", **headers):
    return app.test_client().open(path, headers=headers, buffered=True)


def test_the_callers_trace():
    """It is gone on with, in a span of our own, and passed on with the caller's state."""
    found = ask(make_app(), traceparent=VALID, tracestate="a=1, b@c=2 ,,").json
    assert found["trace_id"] == TRACE
    assert found["span_id"] != SPAN
    assert found["headers"] == {
        "x": "y", "traceparent": f"00-{TRACE}-{found['span_id']}-01", "tracestate": "a=1,b@c=2",
    }  # fmt: skip


def test_a_new_trace():
    """Without a caller's trace each request begins its own."""
    app = make_app()
    found = [ask(app).json for _ in range(100)]
    assert len({each["trace_id"] for each in found}) == 100
    assert len({each["span_id"] for each in found}) == 100
    for each in found:
        parent = tracing.parse_traceparent(each["headers"]["traceparent"])
        assert parent == (each["trace_id"], each["span_id"], 1)
        assert "tracestate" not in each["headers"]


def test_not_sampled_stays_so():
    """Whether the caller records is passed on; flags that nobody knows are not."""
    assert (
        ask(make_app(), traceparent=VALID[:-2] + "00").json["headers"]["traceparent"][-2:] == "00"
    )
    assert (
        ask(make_app(), traceparent=VALID[:-2] + "ff").json["headers"]["traceparent"][-2:] == "01"
    )


@pytest.mark.parametrize(
    "bad",
    [
        "", "x", VALID[:-1], VALID + "-extra", VALID.upper(), VALID.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0g", f"00_{TRACE}-{SPAN}-01", VALID + "\n", f"{VALID},{VALID}",
        VALID.replace("0af7", "\u0660af7"), "00-" + "a" * 100_000,
    ],
)  # fmt: skip
def test_what_is_not_valid(bad):
    """It is ignored, with the state that came with it."""
    assert tracing.parse_traceparent(bad) is None
    if "\n" not in bad and bad.isascii():
        found = ask(make_app(), traceparent=bad, tracestate="a=1").json
        assert found["trace_id"] != TRACE
        assert "tracestate" not in found["headers"]


def test_later_versions():
    """Of a version that is not known yet what this one knows is read."""
    assert tracing.parse_traceparent(f"cc-{TRACE}-{SPAN}-01-more") == (TRACE, SPAN, 1)
    assert tracing.parse_traceparent(f"cc-{TRACE}-{SPAN}-01more") is None
    assert tracing.parse_traceparent(f" {VALID} ") == (TRACE, SPAN, 1)
    assert tracing.parse_traceparent(None) is None


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.text() | st.text(alphabet="0123456789abcdef-", max_size=60))
def test_any_header(text):
    """No text raises, and what is read is what was written."""
    found = tracing.parse_traceparent(text)
    if found is not None:
        written = f"{found.trace_id}-{found.span_id}-{found.flags:02x}"
        assert text.strip(" \t")[3:].startswith(written)


@pytest.mark.parametrize(
    "bad",
    ["a", "a=", "=1", "A=1", "a=1,a=2", "a=1;b", "a=\x00", "a=é", "a b=1", "a=" + "1" * 300,
     ",".join(f"k{n}=1" for n in range(33)), "x" * 600],
)  # fmt: skip
def test_states_that_are_not_valid(bad):
    """A state that may not be passed on is dropped; the trace goes on."""
    environ = {"HTTP_TRACESTATE": bad}
    app = make_app()
    found = app.test_client().get("/ids/1", headers={"traceparent": VALID}, environ_base=environ)
    if bad != "a=1;b":  # a semicolon may stand in a value
        assert "tracestate" not in found.json["headers"]
    assert found.json["trace_id"] == TRACE


def test_outside_of_a_request():
    """There is nothing to pass on, and nothing is changed."""
    ask(make_app())
    assert tracing.inject({"x": "y"}) == {"x": "y"}
    assert tracing.traceparent() is None
    assert tracing.tracestate() is None


def test_set_up_twice():
    """It is refused."""
    app = make_app()
    with pytest.raises(RuntimeError, match="already set up on app 'traced'"):
        tracing.init_app(app)


def test_nothing_of_opentelemetry_is_imported():
    """Neither by importing the package nor by a request, where the application has not done it."""
    code = (
        "import sys; from flask import Flask; from flask_muset import ErrorHandler, tracing;"
        "app = Flask('x'); tracing.init_app(app); ErrorHandler(app); app.test_client().get('/');"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- With OpenTelemetry ---------------------------------------------------------------------------


@pytest.fixture
def exporter(monkeypatch):
    """Spans that are kept in memory, of a provider that is there for one test."""
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def test_server_spans(exporter):
    """One for each request, named by method and route, in the caller's trace."""
    found = ask(make_app(), "/ids/7?token=hidden", traceparent=VALID, tracestate="a=1").json
    (span,) = exporter.get_finished_spans()
    context = span.get_span_context()
    assert span.name == "GET /ids/<int:number>"
    assert span.kind.name == "SERVER"
    assert f"{context.trace_id:032x}" == found["trace_id"] == TRACE
    assert f"{context.span_id:016x}" == found["span_id"]
    assert f"{span.parent.span_id:016x}" == SPAN
    assert span.parent.is_remote
    assert found["headers"]["traceparent"] == f"00-{TRACE}-{found['span_id']}-01"
    assert found["headers"]["tracestate"] == "a=1"
    expected = {
        "http.request.method": "GET", "http.route": "/ids/<int:number>", "url.path": "/ids/7",
        "http.response.status_code": 200, "url.scheme": "http",
    }  # fmt: skip
    assert span.attributes.items() >= expected.items()
    assert span.status.status_code.name == "UNSET"
    assert "hidden" not in span.to_json()


def test_not_sampled_is_not_recorded(exporter):
    """A caller that does not record is followed."""
    found = ask(make_app(), traceparent=VALID[:-2] + "00").json
    assert exporter.get_finished_spans() == ()
    assert found["trace_id"] == TRACE
    assert found["headers"]["traceparent"].endswith("-00")


def test_errors_in_spans(exporter):
    """A fault marks its span and names its fingerprint; a caller's mistake does not."""
    app = make_app()
    ErrorHandler(app)
    app.add_url_rule("/broken", view_func=lambda: 1 / 0)

    @app.get("/missing")
    def missing():
        raise NotFoundError("no such thing")

    ask(app, "/broken")
    ask(app, "/missing")
    ask(app, "/nowhere", traceparent=VALID)
    broken, not_found, nowhere = exporter.get_finished_spans()
    assert broken.status.status_code.name == "ERROR"
    assert broken.attributes["error.type"] == "InternalError"
    assert len(broken.attributes["muset.error.fingerprint"]) == 12
    assert not_found.status.status_code.name == "UNSET"
    assert not_found.attributes["http.response.status_code"] == 404
    assert nowhere.name == "GET"
    assert "http.route" not in nowhere.attributes


def test_a_stream_is_part_of_its_span(exporter):
    """The span ends with the body, and what fails in there marks it."""
    from opentelemetry import trace

    app = make_app()
    seen = []

    @app.get("/stream")
    def stream():
        def body():
            seen.append((trace.get_current_span().is_recording(), exporter.get_finished_spans()))
            yield b"x"
            raise OSError

        return app.response_class(body())

    with pytest.raises(OSError):  # noqa: PT011 - it is the one above
        ask(app, "/stream")
    assert seen == [(True, ())]
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code.name == "ERROR"
    assert not trace.get_current_span().is_recording()


def test_spans_within(exporter):
    """The application's spans are children of the request's, and are what is passed on."""
    from opentelemetry import trace

    app = make_app()

    @app.get("/inner")
    def inner():
        with trace.get_tracer_provider().get_tracer("app").start_as_current_span("work"):
            return tracing.inject({})

    headers = ask(app, "/inner").json
    work, server = exporter.get_finished_spans()
    assert work.parent.span_id == server.get_span_context().span_id
    assert headers["traceparent"][36:52] == f"{work.get_span_context().span_id:016x}"


def test_a_provider_that_fails(monkeypatch, capfd):
    """The request is served, in a trace of ours; it is said once."""
    trace = pytest.importorskip("opentelemetry.trace")

    class Broken:
        def get_tracer(self, *_):
            return self

        def start_span(self, *_, **__):
            raise RuntimeError("a secret")

    monkeypatch.setattr(trace, "get_tracer_provider", Broken)
    app = make_app()
    for _ in range(3):
        assert len(ask(app).json["trace_id"]) == 32
    said = capfd.readouterr().err
    assert said.count("OpenTelemetry failed") <= 1
    assert "a secret" not in said


SERVED = """
import logging
from flask import Flask
from flask_muset import tracing
from flask_muset.context import current_exchange

app = Flask("served")
tracing.init_app(app)

@app.get("/<int:number>")
def view(number):
    return {"headers": tracing.inject({}), "trace_id": current_exchange.get().trace_id}
"""

CONFIG = """
def post_worker_init(worker):
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
    import sys
    provider = TracerProvider()
    output = open("spans.txt", "a", buffering=1)
    form = lambda span: span.to_json(indent=None) + "\\n"
    exporter = ConsoleSpanExporter(out=output, formatter=form)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
"""


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["forked first", "preloaded"])
def test_a_provider_made_after_the_fork(tmp_path, options):
    """Each worker sets its own; requests of one connection are in traces of their own."""
    pytest.importorskip("opentelemetry.sdk")
    import http.client

    with serve(tmp_path, SERVED, "--keep-alive", "20", *options, config=CONFIG) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        found = []
        for number in range(20):
            headers = {"traceparent": VALID} if number == 7 else {}
            connection.request("GET", f"/{number}", headers=headers)
            found.append(json.loads(connection.getresponse().read()))
        connection.close()
    spans = [json.loads(line) for line in (tmp_path / "spans.txt").read_text().splitlines()]
    assert [span["name"] for span in spans] == ["GET /<int:number>"] * 20
    assert [span["context"]["trace_id"] for span in spans] == [
        "0x" + each["trace_id"] for each in found
    ]
    assert found[7]["trace_id"] == TRACE
    assert len({each["trace_id"] for each in found}) == 20
    assert [span["parent_id"] is None for span in spans] == [number != 7 for number in range(20)]
