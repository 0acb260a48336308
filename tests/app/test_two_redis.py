"""The service over two Redis: what is only cached may be lost, what was accepted is not."""

import pytest
from click.testing import CliRunner
from redis_server import keys_of, running
from sqlalchemy import text
from waiting import until

from flask_muset.cache_strategies import cache_manager
from muset.app import create_app
from muset.cli import main
from muset.settings import SettingsError, load_settings

pytestmark = [
    pytest.mark.parametrize("database", ["sqlite"], indirect=True),
    pytest.mark.usefixtures("patient_redis"),
]

BEES = {"title": "Bees", "text": "A bee colony has one queen. The queen lays 2,000 eggs a day."}
ASK = {"question": "How many eggs does the queen lay a day?"}


@pytest.fixture
def kept_server(tmp_path_factory):
    """A Redis that keeps what it has said it has."""
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with running(tmp_path_factory.mktemp("kept"), *options) as server:
        yield server


@pytest.fixture
def cache_server(tmp_path_factory):
    """A Redis that evicts."""
    options = ("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru")
    with running(tmp_path_factory.mktemp("cache"), *options) as server:
        yield server


@pytest.fixture
def settings(environ, kept_server, cache_server):
    return load_settings(
        environ | {"REDIS_URL": kept_server.url, "CACHE_REDIS_URL": cache_server.url}
    )


def kinds(server):
    """What a Redis has keys of, without its probe's."""
    return {name.split(":")[2] for name in keys_of(server, "muset:default:*")}


def checks(client):
    return client.get("/health/ready").json["checks"]


def in_time(call):
    """The answer of a call that may be refused while a Redis comes back."""
    answers = []
    until(lambda: answers.append(call()) or answers[-1].status_code < 500)
    return answers[-1]


def test_what_was_accepted_outlives_both(
    app, services, end, settings, member, cache_server, kept_server
):
    """Preferences and usage survive kill -9 of the cache's Redis, then of both, and new workers."""
    wired = app.extensions["muset"]
    wired.preferences._store.put = wired.ask._ledger._store.add = refuse
    client = app.test_client()
    me = f"/api/v1/users/{services.keys.user_id('member@example.org')}/preferences"
    assert client.post("/api/v1/documents", json=BEES, headers=member).status_code == 201
    assert client.put(me, json={"n": 1}, headers=member).status_code == 200
    assert client.post("/api/v1/ask", json=ASK, headers=member).status_code == 200
    until(lambda: set(checks(client).values()) == {"ok", "shared"})
    assert "w1" in kinds(kept_server)
    assert kinds(cache_server) <= {"c1", "l1", "t1"}
    assert "c1" in kinds(cache_server)

    cache_server.kill()
    until(lambda: checks(client)["cache_redis"] == "failed")
    assert (checks(client)["redis"], checks(client)["state"]) == ("ok", "shared")
    assert client.get("/health/ready").json["status"] == "degraded"
    assert client.get(me, headers=member).json == {"n": 1}
    assert client.put(me, json={"n": 2}, headers=member).status_code == 200
    assert client.post("/api/v1/ask", json=ASK, headers=member).status_code == 200

    kept_server.kill()
    assert in_time(lambda: client.get("/health/ready")).json["status"] == "degraded"
    assert client.put(me, json={"n": 3}, headers=member).status_code == 503
    end(app)
    kept_server.start()
    cache_server.start()
    again = create_app(settings)
    client = again.test_client()
    assert in_time(lambda: client.get(me, headers=member)).json == {"n": 2}
    with again.app_context():
        until(lambda: cache_manager.flush(timeout=10))
        assert cache_manager.dead_letters() == []
    assert rows(services, "SELECT data FROM preferences") == [('{"n": 2}',)]
    assert rows(services, "SELECT status FROM usage") == [("success",), ("success",)]
    end(again)


def rows(services, query):
    return [tuple(row) for row in services.database.read(lambda c: c.execute(text(query)).all())]


def refuse(*_args):
    raise ConnectionError("no database")


def test_a_cache_is_beside_something(environ):
    """CACHE_REDIS_URL alone would leave what waits to chance: refused, with the cure."""
    with pytest.raises(SettingsError, match=r"CACHE_REDIS_URL is beside REDIS_URL.*set both"):
        load_settings(environ | {"CACHE_REDIS_URL": "redis://:hunter2@h/0"})


def test_the_settings_are_printed_without_passwords(environ):
    """Of both Redis the place is shown, and nothing that lets anybody in."""
    urls = dict.fromkeys(("REDIS_URL", "CACHE_REDIS_URL"), "redis://u:hunter2@h/0")
    output = CliRunner().invoke(main, ["settings"], env=environ | urls).output
    assert "hunter2" not in output
    assert "\nCACHE_REDIS_URL=redis://********@h/0\n" in output
