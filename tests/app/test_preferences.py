"""Preferences: what is accepted, by whom, and what becomes of it."""

import json

import pytest
from sqlalchemy import text

from flask_muset.cache_strategies import cache_manager
from muset.app import create_app
from muset.ports import Role
from muset.settings import load_settings

LIKES = {"theme": "dark", "Größe": 1.0, "tags": ["a", None, True], "n": 2**70, "nul": "\0", "o": {}}


@pytest.fixture
def me(services, member):
    """The address of the member's preferences."""
    return url(services.keys.user_id("member@example.org"))


def url(user_id):
    return f"/api/v1/users/{user_id}/preferences"


def rows(services):
    """The table, by user."""
    query = text("SELECT user_id, data FROM preferences")
    found = services.database.read(lambda c: c.execute(query).all())
    return {user_id: data and json.loads(data) for user_id, data in found}


def flush(app):
    with app.app_context():
        assert cache_manager.flush(timeout=10)


def test_what_was_put_is_read_at_once_and_written_later(app, client, services, member, me):
    """{} before, the object as sent after, from the cache; the database has it after the flush."""
    assert client.get(me, headers=member).json == {}
    put = client.put(me, json=LIKES, headers=member)
    read = client.get(me, headers=member)
    assert (put.status_code, read.status_code) == (200, 200)
    for answer in (put, read):
        assert list(json.loads(answer.data).items()) == list(LIKES.items())
        assert isinstance(answer.json["Größe"], float)
    flush(app)
    assert list(rows(services).values()) == [LIKES]
    assert client.put(me, json={}, headers=member).json == {}
    flush(app)
    assert (client.get(me, headers=member).json, list(rows(services).values())) == ({}, [{}])


def test_many_writes_of_a_user_become_few(app, client, services, member, me):
    """The last of a burst is what the database gets, in far fewer writes."""
    store, seen = app.extensions["muset"].preferences._store, []
    real = store.put
    store.put = lambda *args: (seen.append(args), real(*args))
    for number in range(50):
        assert client.put(me, json={"n": number}, headers=member).status_code == 200
        assert client.get(me, headers=member).json == {"n": number}
    flush(app)
    assert list(rows(services).values()) == [{"n": 49}]
    assert len(seen) < 50


def test_an_unchanged_one_is_not_sent_again(client, member, me):
    """A conditional read is 304 until something else is put."""
    client.put(me, json=LIKES, headers=member)
    etag = {"If-None-Match": client.get(me, headers=member).headers["ETag"]}
    again = client.get(me, headers=member | etag)
    assert (again.status_code, again.data) == (304, b"")
    client.put(me, json={}, headers=member)
    assert client.get(me, headers=member | etag).status_code == 200


def test_only_the_user_and_admins(app, client, services, member, admin, me):
    """Others get 403 whoever it is; admins read and change all, and get 404 for nobody's."""
    other = services.keys.create("other@example.org", Role.MEMBER)
    other = {"Authorization": f"Bearer {other}"}
    for where in (me, url(10_000), url(1 << 70)):
        assert client.get(where, headers=other).status_code == 403
        assert client.put(where, json={"a": 1}, headers=other).status_code == 403
    for user_id in (10_000, 1 << 70):
        for answer in (
            client.get(url(user_id), headers=admin),
            client.put(url(user_id), json={"a": 1}, headers=admin),
        ):
            assert (answer.status_code, answer.json["category"]) == (404, "not_found")
    assert client.get(me).status_code == 401
    assert client.put(me, json={"by": "admin"}, headers=admin).status_code == 200
    assert client.get(me, headers=member).json == client.get(me, headers=admin).json
    flush(app)
    assert list(rows(services).values()) == [{"by": "admin"}]


def nested(levels):
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ("{", 400),
        ("", 400),
        ('{"a": NaN}', 400),
        ('{"a": -Infinity}', 400),
        ('{"a": 1e400}', 400),
        (nested(5_000), 400),
        ("[]", 422),
        ("null", 422),
        ("0", 422),
        ('"text"', 422),
        ('[{"a": 1}]', 422),
        ('{"a": "\\ud800"}', 422),
        ('{"\\udfff": 1}', 422),
        (nested(65), 422),
        (json.dumps({"a": "x" * (16_384 - 7)}), 413),
        (json.dumps({"a": "é" * 8_189}), 413),
        (" " * 200_000 + "{}", 413),
    ],
)
def test_what_cannot_be_kept_changes_nothing(client, member, me, data, status):
    """Each has its status, and what was there stays."""
    client.put(me, json={"kept": True}, headers=member)
    answer = client.put(me, data=data, content_type="application/json", headers=member)
    assert (answer.status_code, answer.json["category"]) == (status, "validation")
    assert client.get(me, headers=member).json == {"kept": True}


def test_another_type_is_415(client, member, me):
    """A form or plain text is not taken for an object."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        answer = client.put(me, data="{}", content_type=content_type, headers=member)
        assert answer.status_code == 415


@pytest.mark.parametrize(
    "data", [json.dumps({"a": "x" * (16_384 - 8)}), json.dumps({"a": "é" * 8_188}), nested(64)]
)
def test_the_largest_is_taken(app, client, services, member, me, data):
    """16,384 bytes as compact JSON, however it is escaped, and 64 levels come back whole."""
    put = client.put(me, data=data, content_type="application/json", headers=member)
    assert put.status_code == 200
    assert client.get(me, headers=member).json == json.loads(data)
    flush(app)
    assert list(rows(services).values()) == [json.loads(data)]


def test_older_writes_do_not_undo_newer_ones(services, member):
    """Whatever order they come in, and however often, the greatest sequence wins."""
    store, user_id = services.preferences._store, services.keys.user_id("member@example.org")
    store.put(user_id, {"n": 5}, 5)
    for seq in (4, 5, 1):
        store.put(user_id, {"n": "old"}, seq)
        store.delete(user_id, seq)
    assert store.get(user_id) == {"n": 5}
    store.put(user_id, {"n": 6}, 6)
    assert store.get(user_id) == {"n": 6}
    for seq in (8, 7, 8):
        store.delete(user_id, seq)
    store.put(user_id, {"n": "old"}, 7)
    assert (store.get(user_id), rows(services)) == ({}, {user_id: None})
    store.put(user_id, {"n": 9}, 9)
    assert store.get(user_id) == {"n": 9}


def test_without_a_journal_nothing_is_accepted(app, client, services, settings, member, me):
    """503 with Retry-After while the journal is away, and what was there stays."""
    settings.journal_path.mkdir()
    answer = client.put(me, json=LIKES, headers=member)
    assert (answer.status_code, answer.json["error"]) == (503, "CacheUnavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert rows(services) == {}
    assert client.get(me, headers=member).status_code in (200, 503)


def test_it_is_read_while_the_database_cannot_be_written(
    app, client, services, member, me, write_lock
):
    """What is accepted is read although the cache has lost it and the database is locked."""
    with write_lock():
        assert client.put(me, json=LIKES, headers=member).status_code == 200
        assert client.get(me, headers=member).json == LIKES
        assert rows(services) == {}
    flush(app)
    assert list(rows(services).values()) == [LIKES]


def test_nothing_is_opened_before_the_first_request(app, settings, client, member, me):
    """The app of a master process that forks has no journal yet; a request makes it."""
    assert not settings.journal_path.exists()
    client.put(me, json=LIKES, headers=member)
    assert settings.journal_path.exists()


def test_several_workers_without_redis_read_their_writes(services, environ, member, me, end):
    """Nothing is cached there, so what waits is read from the journal, in each of them."""
    apps = [create_app(load_settings(environ | {"WEB_CONCURRENCY": "2"})) for _ in range(2)]
    clients = [app.test_client() for app in apps]
    for number in range(20):
        writer, reader = clients[number % 2], clients[(number + 1) % 2]
        assert writer.put(me, json={"n": number}, headers=member).status_code == 200
        for client in (reader, writer):
            assert client.get(me, headers=member).json == {"n": number}
    flush(apps[0])
    assert list(rows(services).values()) == [{"n": 19}]
    for app in apps:
        end(app)
