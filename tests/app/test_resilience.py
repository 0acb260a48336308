"""What the settings of resilience do to the service, and what an operator can change."""

import logging

import pytest
from scripted import Scripted, put_in_place

from flask_muset import Resilience
from flask_muset.errors import NetworkError
from flask_muset.resilience import policies_of
from flask_muset.testing import virtual_clock
from muset import migrations
from muset.app import create_app, make_services
from muset.ports import Model, Role
from muset.settings import SettingsError, load_settings

ASK = {"question": "What is it?"}


@pytest.fixture
def clock():
    with virtual_clock() as clock:
        yield clock


@pytest.fixture
def make(environ, end):
    """Make the service with some variables; gives the app, a client and a member's headers."""
    apps = []

    def make(**variables):
        settings = load_settings(environ | variables)
        services = make_services(settings, Resilience())
        services.database.write(migrations.upgrade)
        key = services.keys.create("a@example.org", Role.ADMIN)
        services.database.close()
        app = create_app(settings)
        apps.append(app)
        return app, app.test_client(), {"Authorization": f"Bearer {key}"}

    yield make
    for app in apps:
        end(app)


AWAY = NetworkError("the provider is away")


def provider_of(app, *scripts):
    return put_in_place(app, Scripted(*scripts, models=(Model("extractive"),)))


def test_request_timeout(make, clock):
    """A request that takes longer than REQUEST_TIMEOUT is answered 504 at that moment."""
    app, client, who = make(REQUEST_TIMEOUT="2")
    provider_of(app, 5)
    answer = client.post("/api/v1/ask", json=ASK, headers=who)
    assert (answer.status_code, answer.json["category"]) == (504, "timeout")
    assert clock.now == 1_002


def test_max_concurrent_requests(make):
    """The request above the limit is answered 503 with Retry-After; health never is."""
    app, client, who = make(MAX_CONCURRENT_REQUESTS="1", MAX_RETRIES="0")
    inside = []

    def nested(_question):
        inside.append(app.test_client().post("/api/v1/ask", json=ASK, headers=who))
        inside.append(app.test_client().get("/health/live"))

    provider_of(app, [nested, AWAY])
    client.post("/api/v1/ask", json=ASK, headers=who)
    assert (inside[0].status_code, inside[0].json["error"]) == (503, "OverloadedError")
    assert 1 <= int(inside[0].headers["Retry-After"]) <= 5
    assert inside[1].status_code == 200


def test_rate_limit(make, clock):
    """Each key has its own limit, also when it is wrong: that counts against the address."""
    app, client, who = make(RATE_LIMIT_REQUESTS_PER_MINUTE="2")
    url = "/api/v1/documents"
    answers = [client.get(url, headers=who) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["Retry-After"] == "30"
    assert answers[0].headers["RateLimit-Policy"] == '"default";q=2;w=60'
    other = app.extensions["muset"].keys.create("b@example.org", Role.MEMBER)
    assert client.get(url, headers={"Authorization": f"Bearer {other}"}).status_code == 200
    guesses = [
        client.get(url, headers={"Authorization": f"Bearer msk_{'x' * 40}{n}"}).status_code
        for n in range(4)
    ]
    assert guesses == [401, 401, 429, 429]
    for _ in range(5):
        with client.get("/docs/index.css") as asset:
            assert asset.status_code == 200
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize("retries", [0, 2])
def test_max_retries_and_delays(make, clock, retries):
    """MAX_RETRIES, RETRY_INITIAL_DELAY and RETRY_MAX_DELAY are those of a provider's policy."""
    app, client, who = make(
        MAX_RETRIES=str(retries), RETRY_INITIAL_DELAY="4", RETRY_MAX_DELAY="5", REQUEST_TIMEOUT="60"
    )
    provider = provider_of(app, AWAY)
    assert client.post("/api/v1/ask", json=ASK, headers=who).status_code == 503
    assert provider.calls == 1 + retries
    assert clock.now <= 1_000 + 4 + 5
    assert (clock.now > 1_000) == bool(retries)
    strategy = policies_of(app)["extractive"][0]
    assert (strategy.initial_delay, strategy.max_delay) == (4, 5)


def test_attempts_are_in_the_answer(make, clock):
    """Each attempt is listed with its outcome, its time and the wait before it."""
    app, client, who = make(RETRY_INITIAL_DELAY="2", RETRY_MAX_DELAY="2")
    provider_of(app, [0.5, AWAY], [0.5, AWAY], [0.5, "It is [1]."])
    attempts = client.post("/api/v1/ask", json=ASK, headers=who).json["attempts"]
    assert [a["outcome"] for a in attempts] == ["unavailable", "unavailable", "success"]
    assert [attempt["duration_s"] for attempt in attempts] == [0.5] * 3
    waits = [attempt["wait_s"] for attempt in attempts]
    assert waits[0] == 0
    assert 0 < min(waits[1:]) <= max(waits[1:]) <= 2
    assert sum(waits) + 1.5 == pytest.approx(clock.now - 1_000)


def test_circuit_breaker(make, clock):
    """After CIRCUIT_BREAKER_THRESHOLD failures the provider is left alone for its time-out."""
    app, client, who = make(
        CIRCUIT_BREAKER_THRESHOLD="3", CIRCUIT_BREAKER_TIMEOUT="20", MAX_RETRIES="0"
    )
    provider = provider_of(app, AWAY)
    answers = [client.post("/api/v1/ask", json=ASK, headers=who) for _ in range(5)]
    assert [answer.json["error"] for answer in answers] == [
        *["NetworkError"] * 3,
        *["CircuitOpenError"] * 2,
    ]
    assert provider.calls == 3
    assert answers[4].headers["Retry-After"] == "20"
    clock.advance(20)
    client.post("/api/v1/ask", json=ASK, headers=who)
    assert provider.calls == 4


def test_enable_circuit_breaker(make):
    """Switched off, no number of failures keeps a call from the provider."""
    app, client, who = make(
        ENABLE_CIRCUIT_BREAKER="false", CIRCUIT_BREAKER_THRESHOLD="1", MAX_RETRIES="0"
    )
    provider = provider_of(app, AWAY)
    for _ in range(4):
        assert client.post("/api/v1/ask", json=ASK, headers=who).json["error"] == "NetworkError"
    assert provider.calls == 4


def test_delays_that_contradict_each_other_are_refused():
    """The text names both and the values."""
    with pytest.raises(SettingsError, match=r"RETRY_MAX_DELAY must be .*DELAY \(10\), got 5"):
        load_settings({"RETRY_INITIAL_DELAY": "10", "RETRY_MAX_DELAY": "5"})


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_database_lock_is_waited_for(make, tmp_path):
    """A write that meets another process's lock is tried again and succeeds when it is gone."""
    import sqlite3
    import threading

    _, client, who = make()
    other = sqlite3.connect(tmp_path / "muset.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.7, lambda: other.execute("COMMIT"))
    timer.start()
    body = {"title": "Bees", "text": "A colony has one queen."}
    assert client.post("/api/v1/documents", json=body, headers=who).status_code == 201
    timer.join()
    other.execute("BEGIN IMMEDIATE")
    late = who | {"X-Request-Timeout-Ms": "2000"}
    answer = client.post("/api/v1/documents", json=body | {"text": "Other."}, headers=late)
    assert (answer.status_code, answer.json["retryable"]) == (503, True)
    other.close()


def test_a_fault_in_a_statement_is_no_outage(make):
    """However often a statement is refused, the database's breaker stays closed."""
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    app, client, who = make()
    database = app.extensions["muset"].database
    for _ in range(60):
        with pytest.raises(DBAPIError):
            database.read(lambda c: c.execute(text("SELECT * FROM nowhere")))
    assert client.get("/api/v1/documents", headers=who).status_code == 200


def test_policies_are_listed_and_changed(make, clock, caplog):
    """An operator reads the states, forces one open for a while, and each change is logged."""
    _, client, who = make()
    url = "/api/v1/admin/policies"
    listed = client.get(url, headers=who).json["items"]
    assert [item["name"] for item in listed] == ["database", "extraction", "extractive"]
    assert listed[2] == {
        "name": "extractive",
        "shared": False,
        "state": "closed",
        "parts": ["retry", "circuit_breaker"],
        "breaker": listed[2]["breaker"],
    }
    with caplog.at_level(logging.CRITICAL):
        logging.getLogger("muset.audit").setLevel(logging.INFO)
        caplog.handler.setLevel(logging.NOTSET)
        body = {"mode": "open", "expires_s": 30}
        changed = client.post(f"{url}/extractive", json=body, headers=who)
    assert changed.json["state"] == "forced_open"
    assert "audit: policy extractive set to open for 30 s by user 1 with key 1" in caplog.text
    refused = client.post("/api/v1/ask", json=ASK, headers=who)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "30")
    clock.advance(30)
    assert client.post("/api/v1/ask", json=ASK, headers=who).status_code == 200
    assert client.post(f"{url}/extractive", json={"mode": "closed"}, headers=who).json["state"] == (
        "forced_closed"
    )
    assert client.post(f"{url}/extractive", json={"mode": "auto"}, headers=who).json["state"] == (
        "closed"
    )


def test_policies_are_for_admins(make):
    """Members may neither read nor change them; bad bodies and unknown names are refused."""
    app, client, who = make()
    url = "/api/v1/admin/policies"
    key = app.extensions["muset"].keys.create("b@example.org", Role.MEMBER)
    member = {"Authorization": f"Bearer {key}"}
    assert client.get(url, headers=member).status_code == 403
    body = {"mode": "open"}
    assert client.post(f"{url}/database", json=body, headers=member).status_code == 403
    assert client.post(f"{url}/nobody", json=body, headers=who).status_code == 404
    assert client.post(f"{url}/database", json={"mode": "ajar"}, headers=who).status_code == 422
    for bad in ({"mode": "open", "expires_s": -1}, {"mode": "auto", "expires_s": 3}):
        assert client.post(f"{url}/database", json=bad, headers=who).status_code == 422


def test_an_operator_can_undo_what_he_did(make):
    """With the database's breaker forced open, keys are still known and it can be closed again."""
    _, client, who = make()
    url = "/api/v1/admin/policies/database"
    assert client.post(url, json={"mode": "open"}, headers=who).status_code == 200
    assert client.get("/api/v1/documents", headers=who).status_code == 503
    assert client.get("/health/ready").status_code == 200
    assert client.post(url, json={"mode": "auto"}, headers=who).status_code == 200
    assert client.get("/api/v1/documents", headers=who).status_code == 200


def test_a_principal_is_of_its_own_request(make):
    """With an app context open around them, the next request is not the one before."""
    app, client, who = make()
    with app.app_context():
        assert client.get("/api/v1/admin/policies", headers=who).status_code == 200
        assert client.get("/api/v1/admin/policies").status_code == 401


def test_redis_is_not_needed(make, tmp_path):
    """REDIS_URL set and not answering is degraded, and ready again by itself when it answers."""
    import time

    from redis_server import RedisServer

    server = RedisServer(tmp_path)
    _, client, _ = make(REDIS_URL=server.url)
    end = time.monotonic() + 10
    while (answer := client.get("/health/ready")).json["checks"]["state"] == "doubt":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (answer.status_code, answer.json["status"]) == (200, "degraded")
    assert answer.json["reasons"] == [
        "the redis does not answer",
        "the state of circuit breakers and limits is local to each worker",
        "the journal does not answer",
    ]
    assert answer.json["checks"] == {
        "database": "ok",
        "redis": "failed",
        "journal": "failed",
        "state": "local",
    }
    server.start()
    try:
        end = time.monotonic() + 10
        while client.get("/health/ready").json["status"] != "ready":
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        server.kill()
    text = client.get("/metrics").text
    assert 'muset_redis_calls_total{client="redis",outcome="ok"}' in text
    assert 'outcome="NetworkError"' in text
    assert "muset_database_connections_used 0.0" in text
    expected = {"database": "ok", "journal": "ok", "state": "local"}
    assert make()[1].get("/health/ready").json["checks"] == expected
