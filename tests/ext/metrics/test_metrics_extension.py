"""Metrics on Flask apps of one process."""

import gc
import random
import weakref

import pytest
from flask import Flask, Response, g
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_muset import ErrorHandler, Resilience, context, metrics
from flask_muset.errors import NotFoundError
from flask_muset.metrics import (
    Metrics,
    exporter,
    instrument_redis,
    track_ai_request,
    track_cache_operation,
    track_database_query,
    track_error,
    track_request,
)
from flask_muset.metrics.registry import METRICS
from flask_muset.redis import GuardedRedis
from flask_muset.resilience import CircuitBreaker, error_recovery
from flask_muset.signals import (
    BreakerEvent,
    BreakerState,
    Decision,
    LinkEvent,
    PolicyEvent,
    breaker_changed,
    policy_decided,
    redis_link_changed,
)
from flask_muset.testing import virtual_clock


def make(name="shop", *, authorize=None, **config):
    app = Flask(name)
    app.config.update({f"METRICS_{key}": value for key, value in config.items()})
    Metrics(app, authorize=authorize)

    @app.get("/users/<int:number>")
    def user(number):
        return str(number)

    return app


def ask(app, path, **options):
    """One request whose response is read and closed as a server does."""
    with app.test_client() as client, client.open(path, **options) as answer:
        return answer.status_code, answer.data


def shown(app, namespace="muset"):
    """The samples of an app's page: by name, then by the values of the labels."""
    status, body = ask(app, "/metrics")
    assert status == 200
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if sample.name.startswith(f"{namespace}_"):
                labels = tuple(sample.labels[name] for name in sorted(sample.labels))
                found.setdefault(sample.name.removeprefix(f"{namespace}_"), {})[labels] = (
                    sample.value
                )
    return found


def test_public_names():
    """The module has the names that it says."""
    assert metrics.__all__ == sorted(metrics.__all__)
    for name in metrics.__all__:
        assert name in dir(metrics)
        assert callable(getattr(metrics, name))
    with pytest.raises(AttributeError):
        _ = metrics.nothing


def test_requests_are_counted_by_route():
    """Method, route and status are the labels; the duration has a histogram."""
    app = make()
    for number in range(3):
        ask(app, f"/users/{number}")
    found = shown(app)
    assert found["http_requests_total"] == {("/users/<int:number>", "GET", "200"): 3}
    assert found["http_request_duration_seconds_count"][("/users/<int:number>", "GET")] == 3
    assert (
        found["http_request_duration_seconds_bucket"][("/users/<int:number>", "+Inf", "GET")] == 3
    )
    assert found["http_requests_active"] == {(): 1}  # the one that reads this


def test_unknown_routes_and_methods_share_a_label():
    """A path or a method that a client made up is never a label."""
    app = make()
    ask(app, "/nowhere")
    ask(app, "/users/1", method="BREW")
    found = shown(app)["http_requests_total"]
    assert found == {
        ("__unmatched__", "GET", "404"): 1,
        ("__unmatched__", "_OTHER", "405"): 1,
    }


@pytest.mark.claim(
    "A 0.7 s stream that fails midway counts as an error with a duration of 0.7 s; the active "
    "gauge is 0 afterwards; 10,000 random paths and methods add at most the cap"
)
def test_streams_and_bounds(prove):
    """What happens after the head is counted; what clients make up is not."""
    with virtual_clock() as clock:
        app = make(MAX_SERIES=10)

        @app.get("/stream")
        def stream():
            def chunks():
                yield b"one"
                clock.advance(0.7)
                raise KeyError("gone")

            return Response(chunks())

        with pytest.raises(KeyError):
            ask(app, "/stream")
        chance = random.Random(1)
        for _ in range(10_000 if prove.full else 500):
            ask(app, f"/{chance.random()}", method=f"M{chance.random()}")
        state = app.extensions["metrics"]
        active = state.families["http_requests_active"].get().value
        found = shown(app)
    taken = found["http_request_duration_seconds_sum"][("/stream", "GET")]
    series = len(found["http_requests_total"])
    prove.figure(f"status 500 after {taken:.3f} s; active {active:g}; {series} series of 10")
    assert found["http_requests_total"][("/stream", "GET", "500")] == 1
    assert taken == pytest.approx(0.7)
    assert active == 0
    assert series <= 10


def test_series_are_capped_with_a_count_of_what_is_beyond():
    """The eleventh series is the overflow's, and it is said how much went there."""
    app = make(MAX_SERIES=10)
    with app.app_context():
        for number in range(25):
            track_cache_operation("get", f"made up {number}")
            track_request("GET", f"/{number}", 200, 0.1)
    found = shown(app)
    operations = found["cache_operations_total"]
    assert len(operations) == 11
    assert operations[("__overflow__", "__overflow__")] == 15
    assert found["metrics_overflow_total"][("muset_cache_operations_total",)] == 15
    assert sum(operations.values()) == 25
    # The overflow is not remembered as the labels' own place.
    assert found["metrics_overflow_total"][("muset_http_requests_total",)] >= 15


def test_routes_beyond_the_cap_are_counted_together():
    """Requests of routes that came too late are counted as overflow, each time."""
    app = make(MAX_SERIES=10)
    for number in range(12):
        app.add_url_rule(f"/r{number}", f"r{number}", lambda: "x")
    for number in [*range(12), 11]:
        ask(app, f"/r{number}")
    found = shown(app)
    assert found["http_requests_total"][("__overflow__",) * 3] == 3
    assert found["metrics_overflow_total"][("muset_http_requests_total",)] == 3


def test_the_guides_functions():
    """All five, with the guide's arguments."""
    app = make()
    with app.app_context():
        track_request(method="GET", endpoint="/api/users", status_code=200, duration=0.5)
        track_ai_request(
            model="gpt-4", duration=2.5, status="success", input_tokens=100, output_tokens=200
        )
        track_database_query(operation="select", table="users", duration=0.01)
        track_cache_operation(operation="get", status="hit")
        track_error(category="authentication", severity="high")
    found = shown(app)
    assert found["http_requests_total"] == {("/api/users", "GET", "200"): 1}
    assert found["ai_requests_total"] == {("gpt-4", "success"): 1}
    assert found["ai_tokens_total"] == {("gpt-4", "input"): 100, ("gpt-4", "output"): 200}
    assert found["ai_request_duration_seconds_sum"] == {("gpt-4",): 2.5}
    seconds = found["database_query_duration_seconds_sum"][("select", "users")]
    assert seconds == pytest.approx(0.01, abs=1e-6)
    assert found["cache_operations_total"] == {("get", "hit"): 1}
    assert found["errors_total"] == {("authentication", "high"): 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_no_value_can_spoil_a_counter(bad):
    """An amount that a counter cannot take is left out; the request is counted."""
    app = make()
    with app.app_context():
        track_ai_request("m", bad, "success", bad, 3)
    found = shown(app)
    assert found["ai_requests_total"] == {("m", "success"): 1}
    assert found["ai_tokens_total"] == {("m", "output"): 3}
    assert "ai_request_duration_seconds_count" not in found


def test_labels_of_any_text():
    """Quotes, line ends and long texts come out as Prometheus wants them."""
    app = make()
    with app.app_context():
        track_cache_operation('a"b\\c\nd', "ü" * 500)
    ((labels, value),) = shown(app)["cache_operations_total"].items()
    assert value == 1
    assert labels == ('a"b\\c\nd', "ü" * 120)


def test_two_apps_do_not_mix():
    """One instance, two apps, two namespaces: each page shows its own."""
    both = Metrics()
    first, second = Flask("first"), Flask("second")
    second.config["METRICS_NAMESPACE"] = "billing"
    both.init_app(first)
    both.init_app(second)
    ask(first, "/nowhere")
    with second.app_context():
        track_error("internal", "critical")
    assert shown(first)["http_requests_total"] == {("__unmatched__", "GET", "404"): 1}
    assert "errors_total" not in shown(first)
    assert shown(second, "billing")["errors_total"] == {("internal", "critical"): 1}
    assert shown(second) == {}


def test_tracking_outside_of_a_context():
    """The only app is meant; of several, none, and the error says what to do."""
    gc.collect()
    only = make()
    track_error("internal", "critical")
    assert shown(only)["errors_total"] == {("internal", "critical"): 1}
    other = make("other")
    with pytest.raises(RuntimeError, match=r"with app\.app_context"):
        track_error("internal", "critical")
    del other


def test_an_app_can_be_forgotten():
    """Neither signals nor the list of apps keep one alive."""
    app = make()
    ask(app, "/users/1")
    gone = weakref.ref(app)
    del app
    gc.collect()
    assert gone() is None


def test_off():
    """No route, nothing counted, and the functions do nothing."""
    app = make(ENABLED=False)
    assert ask(app, "/metrics")[0] == 404
    with app.app_context():
        track_error("internal", "critical")
        track_request("GET", "/", 200, 0.1)
        track_ai_request("m", 1.0, "success")
        track_database_query("select", "t", 0.1)
        track_cache_operation("get", "hit")
        metrics.instrument_sqlalchemy(None)
        metrics.instrument_httpx(None)
        with pytest.raises(RuntimeError, match="METRICS_ENABLED"):
            exporter()
    assert "flask_muset.context" not in app.extensions


@pytest.mark.parametrize(
    ("key", "value", "cure"),
    [
        ("NAMESPACE", "1st", "letters, digits"),
        ("PORT", 70_000, "65535"),
        ("HOST", "", "an address"),
        ("ALLOW", ["10.0.0.0/33"], "addresses and networks"),
        ("ALLOW", "10.0.0.1", "a list"),
        ("MAX_SERIES", 0, "whole number"),
        ("PATHS", 1, "use one of"),
    ],
)
def test_a_bad_setting_stops_the_start(key, value, cure):
    """The text names the key, the value and what is allowed."""
    with pytest.raises(ValueError, match=f"METRICS_{key}.*{cure}"):
        make(**{key: value})


def test_set_up_twice():
    """A second time is refused."""
    app = make()
    with pytest.raises(RuntimeError, match="already set up"):
        Metrics(app)


# --- Access ---------------------------------------------------------------------------------------


def may_read(app, address, **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _ = ask(app, "/metrics", environ_base={"REMOTE_ADDR": address}, headers=headers)
    return status == 200


def test_who_may_read():
    """This machine and METRICS_ALLOW; a forwarded request is neither."""
    app = make(ALLOW=["10.1.0.0/16", "2001:db8::1"])
    assert may_read(app, "127.0.0.1")
    assert may_read(app, "::1")
    assert may_read(app, "::ffff:127.0.0.1")
    assert may_read(app, "10.1.2.3")
    assert may_read(app, "2001:db8::1")
    assert not may_read(app, "10.2.0.1")
    assert not may_read(app, "")
    assert not may_read(app, "127.0.0.1", X_Forwarded_For="10.1.2.3")
    assert not may_read(app, "127.0.0.1", Forwarded="for=127.0.0.1")
    assert not may_read(app, "10.1.2.3", X_Forwarded_For="127.0.0.1")


def test_who_may_read_behind_a_proxy_that_is_known():
    """The client's address counts; that of this machine does not, for anybody can be behind it."""
    app = make(ALLOW=["10.1.0.0/16"])
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1)
    assert may_read(app, "127.0.0.1", X_Forwarded_For="10.1.2.3")
    assert not may_read(app, "127.0.0.1", X_Forwarded_For="8.8.8.8")
    assert not may_read(app, "127.0.0.1", X_Forwarded_For="127.0.0.1")


def test_authorize_is_asked_last():
    """Where the address is not enough, the app decides."""
    app = make(authorize=lambda request: request.headers.get("X-Key") == "k")
    assert may_read(app, "8.8.8.8", X_Key="k")
    assert not may_read(app, "8.8.8.8", X_Key="other")
    assert may_read(app, "127.0.0.1")


def test_the_page_is_not_stored_and_speaks_openmetrics():
    """Cache-Control and both formats."""
    with make().test_client() as client:
        plain = client.get("/metrics")
        other = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert plain.headers["Cache-Control"] == "no-store"
    assert plain.content_type.startswith("text/plain")
    assert other.content_type.startswith("application/openmetrics-text")
    assert other.text.endswith("# EOF\n")


# --- What the others tell -------------------------------------------------------------------------


def test_handled_errors_are_counted():
    """By category and severity, once each."""
    app = make()
    ErrorHandler(app)

    @app.get("/missing")
    def missing():
        raise NotFoundError("no such thing")

    @app.get("/broken")
    def broken():
        raise KeyError("x")

    for path in ("/missing", "/broken", "/nowhere"):
        ask(app, path)
    assert shown(app)["errors_total"] == {("not_found", "low"): 2, ("internal", "critical"): 1}


def test_signals_of_other_apps_do_not_count():
    """A signal counts for its sender; one without a sender for the only app."""
    app, other = make(), make("other")
    event = PolicyEvent("openai", "retry", Decision.RETRIED)
    policy_decided.send(other, event=event)
    policy_decided.send(app, event=event)
    policy_decided.send(None, event=event)  # two apps: nobody's
    assert shown(app)["policy_decisions_total"] == {("retried", "retry", "openai"): 1}
    del other
    gc.collect()
    policy_decided.send(None, event=event)
    assert sum(shown(app)["policy_decisions_total"].values()) == 2


def test_breakers_and_links():
    """The state that holds is 1, all others are 0."""
    app = make()
    breaker_changed.send(app, event=BreakerEvent("openai", "closed", "open"))
    redis_link_changed.send(app, event=LinkEvent("cache", "down"))
    found = shown(app)
    assert found["circuit_breaker_state"] == {
        ("openai", state): float(state == "open") for state in BreakerState
    }
    assert found["redis_link_state"] == {
        ("cache", "down"): 1,
        ("cache", "up"): 0,
        ("cache", "doubt"): 0,
    }
    breaker_changed.send(app, event=BreakerEvent("openai", "open", "half_open"))
    assert shown(app)["circuit_breaker_state"][("openai", "open")] == 0


def test_what_has_never_changed_is_shown():
    """A breaker is closed and a link up before anything was told of them; time alone is seen."""
    app, resilience = make(), Resilience()
    resilience.init_app(app)
    policy = resilience.policy("openai", CircuitBreaker("openai", failure_threshold=1))
    client = GuardedRedis("redis://127.0.0.1:1")
    with app.app_context():
        error_recovery.get_circuit_breaker("mail")
        instrument_redis(client)
    with virtual_clock() as clock:
        found = shown(app)
        assert found["circuit_breaker_state"] == {
            (name, state): float(state == "closed")
            for name in ("openai", "mail")
            for state in BreakerState
        }
        assert found["redis_link_state"][("redis", "up")] == 1
        with pytest.raises(ConnectionError):
            policy.call(fail)
        assert shown(app)["circuit_breaker_state"][("openai", "open")] == 1
        clock.advance(60)
        found = shown(app)["circuit_breaker_state"]
        assert (found[("openai", "open")], found[("openai", "half_open")]) == (0, 1)


def fail():
    raise ConnectionError


def test_requests_in_flight_of_the_gate():
    """What Resilience counts is shown."""
    app = make()
    Resilience(app)
    assert shown(app)["requests_in_flight"] == {(): 1}


def test_refused_before_flask_counts_as_unmatched():
    """A request that the limit refuses has no route yet."""
    app = make()
    app.config["RESILIENCE_MAX_CONCURRENT_REQUESTS"] = 1
    Resilience(app)
    app.extensions["flask_muset.gate"].in_flight = 1
    assert ask(app, "/users/1")[0] == 503
    app.extensions["flask_muset.gate"].in_flight = 0
    assert shown(app)["http_requests_total"] == {("__unmatched__", "GET", "503"): 1}


def test_metrics_of_the_apps_own_stand_on_the_page():
    """The decorators of prometheus_flask_exporter count beside ours, for each app alone."""
    app, other = make(), make("other")
    for each in (app, other):
        with each.app_context():
            own = exporter()
            assert own is exporter()

        @each.get("/by/<what>")
        @own.counter("things", "Things.", labels={"what": lambda: g.what})
        def by(what):
            g.what = what
            return what

    ask(app, "/by/apple")
    assert b'things_total{what="apple"} 1.0' in ask(app, "/metrics")[1]
    assert b'things_total{what="apple"}' not in ask(other, "/metrics")[1]
    assert b"flask_http_request" not in ask(app, "/metrics")[1]


def test_runtime_gauges():
    """Memory, one worker, versions."""
    found = shown(make())
    assert found["worker_memory_bytes"][()] > 1e6
    assert found["workers"] == {(): 1}
    assert list(found["build_info"].values()) == [1]
    assert "hub_delay_seconds" not in found  # no gevent here


def test_every_metric_has_a_place_and_an_objective_a_bucket():
    """The table is well formed: sorted buckets, the guide's ten, the guide's thresholds."""
    names = [row.name for row in METRICS]
    assert len(set(names)) == len(names)
    by_name = {row.name: row for row in METRICS}
    for row in METRICS:
        assert list(row.buckets) == sorted(set(row.buckets))
        assert (row.kind == "histogram") == bool(row.buckets)
        assert (row.kind == "counter") == row.name.endswith("_total")
    assert 0.1 in by_name["http_request_duration_seconds"].buckets
    assert 5.0 in by_name["ai_request_duration_seconds"].buckets
    assert 0.05 in by_name["database_query_duration_seconds"].buckets
    assert 0.01 in by_name["cache_get_duration_seconds"].buckets


def test_context_alone_is_enough():
    """Metrics alone gives each request an id."""
    app = make()
    with app.test_client() as client, client.get("/users/1") as answer:
        assert answer.headers["X-Request-ID"]
        assert answer.data == b"1"
    assert context.current_exchange.get() is None
