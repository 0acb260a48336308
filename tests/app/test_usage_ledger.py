"""The ledger: one entry for each question, whatever has become of it."""

import datetime
import threading
import time

from scripted import Scripted, put_in_place
from sqlalchemy import select, text

from flask_muset.cache_strategies import cache_manager
from flask_muset.clock import SYSTEM
from flask_muset.errors import NetworkError
from flask_muset.testing import virtual_clock
from muset.models import Usage
from muset.ports import Asker, Tokens
from muset.services import usage as usage_module

ASK = {"question": "How many eggs does the queen lay a day?"}
BEES = {"title": "Bees", "text": "A bee colony has one queen. The queen lays 2,000 eggs a day."}


def ledger(app, *, flushed=True):
    """The rows, after all that was accepted is written."""
    if flushed:
        with app.app_context():
            assert cache_manager.flush(timeout=10)
    database = app.extensions["muset"].database

    def read(connection):
        place = "rowid" if connection.dialect.name == "sqlite" else "ctid"
        query = select(Usage.__table__).order_by(text(place))
        return [dict(row) for row in connection.execute(query).mappings()]

    return database.read(read)


def ask(client, who, **headers):
    return client.post("/api/v1/ask", json=ASK, headers=who | headers)


def test_each_question_has_an_entry(app, client, services, member, admin):
    """Who, with which request, of whom and what; a cached answer counts as a request too."""
    client.post("/api/v1/documents", json=BEES, headers=member)
    ids = ["first-request", "second-request"]
    for who, request_id in zip((member, admin), ids, strict=True):
        assert ask(client, who, **{"X-Request-ID": request_id}).status_code == 200
    found = {row["request_id"]: row for row in ledger(app)}
    assert list(found) == ids
    assert found[ids[0]] | {"id": ""} == {
        "id": "",
        "user_id": services.keys.user_id("member@example.org"),
        "request_id": ids[0],
        "model": "extractive",
        "provider": "extractive",
        "day": found[ids[0]]["day"],
        "status": "success",
        "requests": 1,
        "input_tokens": 0,
        "output_tokens": 0,
        "estimated": 0,
        "cost": 0,
    }
    assert found[ids[1]]["user_id"] == services.keys.user_id("admin@example.org")
    assert len({row["id"] for row in found.values()}) == 2


def test_the_tokens_are_those_of_the_answer_and_of_a_cached_one_none(app, client, member):
    """Each billed token stands in the ledger once."""
    client.post("/api/v1/documents", json=BEES, headers=member)
    put_in_place(app, Scripted(["She lays 2,000 eggs a day [1].", Tokens(7, 3)]))
    for _ in range(3):
        assert ask(client, member).status_code == 200
    tokens = [(row["input_tokens"], row["output_tokens"]) for row in ledger(app)]
    assert sorted(tokens) == [(0, 0), (0, 0), (7, 3)]


def test_a_failure_and_a_request_that_was_cut_off_have_entries(app, client, member):
    """Status error, although the time of the request is up; a refused question has none."""
    with virtual_clock():
        for step, status in ((NetworkError("the provider is away"), 503), (60, 504)):
            put_in_place(app, Scripted(step))
            late = {"X-Request-Timeout-Ms": "10000"}
            assert ask(client, member, **late).status_code == status
        assert client.post("/api/v1/ask", json={"question": " "}, headers=member).status_code == 422
        assert [row["status"] for row in ledger(app)] == ["error", "error"]


def test_the_day_is_that_of_the_request_in_utc(app, client, member):
    """What is written later is not of a later day."""
    with virtual_clock():
        ask(client, member)
        first = SYSTEM.wall() // 86_400
        SYSTEM.sleep(86_400)
        ask(client, member)
        days = sorted(row["day"] for row in ledger(app))
    epoch = datetime.date(1970, 1, 1)
    assert [(datetime.date.fromisoformat(day) - epoch).days for day in days] == [first, first + 1]


def test_many_entries_are_written_in_batches(app):
    """None is lost and none twice, in far fewer transactions than entries."""
    usage = app.extensions["muset"].ask._ledger
    sizes, all_there, real = [], threading.Event(), usage._store.add

    def add(entries):
        assert all_there.wait(20)
        sizes.append(len(entries))
        real(entries)

    usage._store.add = add
    for number in range(300):
        usage.record(Asker(1, f"r{number}"), provider="p", model="m", status="success")
    all_there.set()
    found = [row["request_id"] for row in ledger(app)]
    assert sorted(found) == sorted(f"r{number}" for number in range(300))
    assert (sum(sizes), max(sizes)) == (300, 100)
    assert len(sizes) < 60


def test_an_entry_that_comes_again_is_not_counted_again(app, services):
    """The same batch, and a part of it in another, are in the ledger once."""
    usage = app.extensions["muset"].ask._ledger
    kept, real = [], usage._store.add
    usage._store.add = lambda entries: (kept.extend(map(dict, entries)), real(entries))
    for number in range(3):
        usage.record(Asker(1, str(number)), provider="p", model="m", status="success")
    before = ledger(app)
    real(kept)
    real([*kept[1:], kept[0] | {"id": "another"}])
    assert [row["id"] for row in ledger(app)] == [*(row["id"] for row in before), "another"]


def test_without_a_journal_entries_are_written_at_once(app, client, settings, member):
    """The ledger loses nothing while the journal is away."""
    settings.journal_path.mkdir()
    assert ask(client, member).status_code == 200
    assert [row["status"] for row in ledger(app, flushed=False)] == ["success"]


def test_a_lost_entry_is_in_the_log_and_the_client_has_its_answer(
    app, client, settings, member, monkeypatch, caplog
):
    """With neither a journal nor a database to write, the answer comes all the same."""

    def away(_entries):
        raise ConnectionError("no database")

    settings.journal_path.mkdir()
    monkeypatch.setattr(app.extensions["muset"].ask._ledger._store, "add", away)
    answer = ask(client, member, **{"X-Request-ID": "the-lost-one"})
    assert answer.status_code == 200
    lost = [r.getMessage() for r in caplog.records if "ledger is lost" in r.getMessage()]
    assert len(lost) == 1
    assert "the-lost-one" in lost[0]


def test_a_failure_is_told_while_its_entry_waits_for_the_stores(app, settings, monkeypatch):
    """It is written when they are back; a success is told when it is written."""
    monkeypatch.setattr(usage_module, "_FAILED_S", 0.05)
    settings.journal_path.mkdir()
    usage, back = app.extensions["muset"].ask._ledger, threading.Event()
    real = usage._store.add
    monkeypatch.setattr(usage._store, "add", lambda entries: back.wait(20) and real(entries))

    def told(status):
        usage.record(Asker(1, status), provider="p", model="m", status=status)

    told("error")
    assert ledger(app, flushed=False) == []
    threading.Timer(0.2, back.set).start()
    told("success")
    assert back.is_set()
    until = time.monotonic() + 10
    while len(rows := ledger(app, flushed=False)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert {row["status"] for row in rows} == {"error", "success"}


def test_what_the_cache_forgets_stays_in_the_ledger(app):
    """A write that says that an entry is gone takes nothing out, and fails no batch."""
    usage = app.extensions["muset"].ask._ledger
    usage.record(Asker(1, "kept"), provider="p", model="m", status="success")
    (row,) = ledger(app)
    usage._write([(None, None), ({**row, "id": "other"}, None)])
    assert [entry["id"] for entry in ledger(app)] == [row["id"], "other"]
