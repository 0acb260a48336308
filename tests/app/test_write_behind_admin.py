"""What an operator sees and does about writes that wait, or were given up."""

import json

import pytest
from click.testing import CliRunner
from sqlalchemy import text

from flask_muset.cache_strategies import cache_manager
from flask_muset.clock import SYSTEM
from flask_muset.testing import virtual_clock
from muset import cli
from muset.app import create_app
from muset.cli import main

LETTERS = "/api/v1/admin/cache/dead-letters"


@pytest.fixture
def store(app):
    """Where preferences get to; `store.refuses` says whether it does not take them."""
    store = app.extensions["muset"].preferences._store
    real, store.refuses = store.put, False

    def put(*args):
        if store.refuses:
            raise ValueError("not a theme\n  of ours")
        real(*args)

    store.put = put
    return store


@pytest.fixture
def give_up(app, client, services, admin, store):
    """Put preferences of new users that are given up; gives the addresses and the dead letters."""

    def give_up(*names):
        store.refuses = True
        urls = []
        for name in names:
            user_id = services.keys.user_id(f"{name}@example.org")
            urls.append(f"/api/v1/users/{user_id}/preferences")
            assert client.put(urls[-1], json={"of": name}, headers=admin).status_code == 200
        with app.app_context():
            # Each call tries what is not due yet, too.
            while cache_manager.pending()["dead_letters"] < len(names):
                assert not cache_manager.flush(timeout=0.01) or cache_manager.dead_letters()
        store.refuses = False
        return urls, client.get(LETTERS, headers=admin).json["items"]

    return give_up


@pytest.fixture
def run(environ, end, monkeypatch):
    """Runs a command in this process, and ends the apps that it has made when the test is over."""
    made = []

    def make(settings):
        made.append(create_app(settings))
        return made[-1]

    def run(*args):
        return CliRunner().invoke(main, args, env=environ)

    monkeypatch.setattr(cli, "create_app", make)
    yield run
    for app in made:
        end(app)


def flush(app):
    with app.app_context():
        return cache_manager.flush(timeout=20)


def settle(client, who, letter_id, **body):
    return client.post(f"{LETTERS}/{letter_id}", json=body, headers=who)


def kept(services):
    query = text("SELECT data FROM preferences ORDER BY user_id")
    rows = services.database.read(lambda c: c.execute(query).scalars().all())
    return [json.loads(row) for row in rows]


def test_a_dead_letter_is_listed_and_written_again(
    app, client, services, admin, give_up, store, caplog
):
    """It says what, whose and why; requeued it gets where it belongs, and the audit log tells."""
    (url,), (letter,) = give_up("a")
    assert letter.keys() == {
        "id", "key", "writer", "error", "attempts", "first_failed", "last_failed", "superseded",
    }  # fmt: skip
    assert letter["writer"] == "users.preferences"
    assert letter["key"] == f"preferences:{url.split('/')[4]}"
    assert "not a theme" in letter["error"]
    assert letter["first_failed"] <= letter["last_failed"]
    assert (letter["superseded"], kept(services)) == (False, [])
    done = settle(client, admin, letter["id"], action="requeue")
    assert (done.status_code, done.json) == (200, {"id": letter["id"], "action": "requeue"})
    assert f"audit: dead letter {letter['id']} requeued by user" in caplog.text
    assert flush(app)
    assert kept(services) == [{"of": "a"}]
    assert client.get(LETTERS, headers=admin).json == {"items": [], "next_cursor": None}


def test_no_value_is_in_the_error_of_a_dead_letter(app, client, services, admin):
    """What the database refuses is named without what a user has sent."""
    user_id = services.keys.user_id("a@example.org")
    with services.database._open().connect() as connection:
        connection.exec_driver_sql("ALTER TABLE preferences RENAME COLUMN seq TO other")
    url, text = f"/api/v1/users/{user_id}/preferences", "what-only-the-user-knows"
    assert client.put(url, json={"text": text}, headers=admin).status_code == 200
    with app.app_context():
        while not cache_manager.pending()["dead_letters"]:
            cache_manager.flush(timeout=0.01)
    (letter,) = client.get(LETTERS, headers=admin).json["items"]
    assert "seq" in letter["error"]
    assert text not in letter["error"]


def test_a_superseded_one_can_only_be_dropped(app, client, services, admin, give_up, caplog):
    """Written again it would bring an old value back: 409."""
    (url,), (letter,) = give_up("a")
    assert client.put(url, json={"new": True}, headers=admin).status_code == 200
    assert flush(app)
    (letter,) = client.get(LETTERS, headers=admin).json["items"]
    assert letter["superseded"] is True
    refused = settle(client, admin, letter["id"], action="requeue")
    assert (refused.status_code, refused.json["category"]) == (409, "conflict")
    assert settle(client, admin, letter["id"], action="drop").json["action"] == "drop"
    assert [line for line in caplog.messages if line.startswith("audit: dead letter")] == [
        line for line in caplog.messages if f"letter {letter['id']} dropped by user" in line
    ]
    assert client.get(LETTERS, headers=admin).json["items"] == []
    assert kept(services) == [{"new": True}]


def test_pages_of_dead_letters(client, admin, give_up):
    """They follow each other without a gap or a repeat, and end with null."""
    _, letters = give_up(*"abcde")
    seen, cursor = [], ""
    for _ in range(3):
        page = client.get(f"{LETTERS}?limit=2{cursor}", headers=admin).json
        seen += page["items"]
        cursor = f"&cursor={page['next_cursor']}"
    assert (seen, page["next_cursor"]) == (letters, None)
    assert len(letters) == 5


@pytest.mark.parametrize(("action", "read"), [("requeue", {"of": "a"}), ("drop", {"by": "source"})])
def test_what_was_settled_is_read_at_once(
    app, client, services, admin, give_up, store, action, read
):
    """Whatever the cache has kept meanwhile: the source's old value, or one that is dropped."""
    (url,), (letter,) = give_up("a")
    user_id = int(url.split("/")[4])
    if action == "requeue":
        with app.app_context():
            cache_manager.invalidate(f"preferences:{user_id}")
        assert client.get(url, headers=admin).json == {}
    else:
        store.put(user_id, {"by": "source"}, 1)
        assert client.get(url, headers=admin).json == {"of": "a"}
    assert settle(client, admin, letter["id"], action=action).status_code == 200
    for _ in range(2):
        assert client.get(url, headers=admin).json == read
        assert flush(app)
    assert kept(services) == [read]


def test_who_may_and_what_is_refused(client, admin, member):
    """Members get 403; an unknown id is 404, an unknown action and a wrong page are 422."""
    assert client.get(LETTERS, headers=member).status_code == 403
    assert settle(client, member, "1", action="drop").status_code == 403
    for letter_id in ("0", "no-such", "%00", "é", "x" * 3000):
        for action in ("drop", "requeue"):
            assert settle(client, admin, letter_id, action=action).status_code == 404, letter_id
    for body in ({}, {"action": "keep"}, {"action": "drop", "more": 1}):
        assert settle(client, admin, "1", **body).status_code == 422
    for query in ("limit=0", "limit=101", "cursor=*", "cursor=no-id", "page=2"):
        assert client.get(f"{LETTERS}?{query}", headers=admin).status_code == 422


def test_the_commands(client, services, run, admin, give_up):
    """The same by hand, beside the service: listed, as JSON, requeued, dropped, and what is not."""
    urls, letters = give_up("a", "b")
    listed = run("cache", "dead-letters", "list")
    assert listed.exit_code == 0
    lines = [line.split("\t") for line in listed.stdout.splitlines()]
    assert [line[:3] for line in lines] == [[x["id"], x["writer"], x["key"]] for x in letters]
    assert all("not a theme of ours" in line[-1] for line in lines)
    assert json.loads(run("cache", "dead-letters", "list", "--json").stdout) == letters
    first, second = (letter["id"] for letter in letters)
    assert run("cache", "dead-letters", "requeue", first).exit_code == 0
    assert run("cache", "flush").stdout == "All is written.\n"
    user_ids = [int(url.split("/")[4]) for url in urls]
    name = "ab"[user_ids.index(int(letters[0]["key"].removeprefix("preferences:")))]
    assert kept(services) == [{"of": name}]
    assert run("cache", "dead-letters", "drop", second).exit_code == 0
    for action in ("drop", "requeue"):
        again = run("cache", "dead-letters", action, second)
        assert again.exit_code == 1
        assert f"no dead letter has the id {second!r}" in again.output
    assert run("cache", "dead-letters", "list").stdout == ""
    assert client.get(LETTERS, headers=admin).json["items"] == []


def test_the_command_refuses_a_superseded_one(app, client, admin, run, give_up):
    """Exit code 1, and the reason in one line."""
    (url,), (letter,) = give_up("a")
    client.put(url, json={"new": True}, headers=admin)
    assert flush(app)
    refused = run("cache", "dead-letters", "requeue", letter["id"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "superseded" in refused.stderr or "newer" in refused.stderr


def test_flush_says_what_is_left(app, client, services, admin, run, write_lock):
    """Exit code 1 while the database is locked, with how much is left; then 0."""
    user_id = services.keys.user_id("a@example.org")
    url = f"/api/v1/users/{user_id}/preferences"
    with write_lock():
        assert client.put(url, json={"a": 1}, headers=admin).status_code == 200
        left = run("cache", "flush", "--timeout", "0.05")
        assert left.exit_code == 1
        assert left.stderr.startswith("Error: not all is written: 1 left, the oldest has waited")
    assert run("cache", "flush").exit_code == 0
    assert kept(services) == [{"a": 1}]
    for bad in ("-1", "nan", "inf", "x"):
        assert run("cache", "flush", "--timeout", bad).exit_code == 2


def test_ready_is_degraded_while_a_write_waits_for_long(app, client, services, admin, store):
    """After a minute it says so, still 200; when it is written it is ready again."""
    user_id = services.keys.user_id("a@example.org")
    url = f"/api/v1/users/{user_id}/preferences"

    def away(*_args):
        raise ConnectionError("no database")

    real, store.put = store.put, away
    with virtual_clock() as clock:
        assert client.put(url, json={"a": 1}, headers=admin).status_code == 200
        for passed_s, status in ((50, "ready"), (20, "degraded")):
            clock.advance(passed_s)
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json["status"]) == (200, status)
        assert ready.json["checks"] == {"database": "ok", "journal": "failed", "state": "local"}
        assert ready.json["reasons"] == ["a write that was accepted has waited for more than 60 s"]
        store.put = real
        SYSTEM.sleep(120)
        assert flush(app)
        assert client.get("/health/ready").json == {
            "status": "ready",
            "reasons": [],
            "checks": {"database": "ok", "journal": "ok", "state": "local"},
        }
    assert kept(services) == [{"a": 1}]


def test_invalidating_the_cache_loses_no_write(app, client, services, admin):
    """Whatever pattern is invalidated, what was accepted is read, and written."""
    user_id = services.keys.user_id("a@example.org")
    url = f"/api/v1/users/{user_id}/preferences"
    for pattern in ("*", "preferences:*"):
        for _ in range(2):
            client.put(url, json={"by": pattern}, headers=admin)
            body = {"pattern": pattern}
            done = client.post("/api/v1/admin/cache/invalidate", json=body, headers=admin)
            assert done.status_code == 200
            assert client.get(url, headers=admin).json == {"by": pattern}
        assert flush(app)
        assert client.get(url, headers=admin).json == {"by": pattern}
        assert kept(services) == [{"by": pattern}]
