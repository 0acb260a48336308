"""Write-behind through an app, over each journal."""

import contextlib
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from flask import Flask
from patched import run_patched
from redis_server import RedisServer
from waiting import until

from flask_muset import CacheStrategies, ErrorHandler, Metrics, aio
from flask_muset.cache_strategies import WriteContext, cache_manager
from flask_muset.cache_strategies.writers import Declarations
from flask_muset.deadline import deadline
from flask_muset.errors import (
    CacheUnavailable,
    ConflictError,
    NetworkError,
    OperationTimeoutError,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One Redis for all tests of this file; each has a namespace of its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--appendonly", "yes").start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def cache_server(tmp_path_factory):
    """A second one, for what is only cached."""
    server = RedisServer(tmp_path_factory.mktemp("cache"), "--maxmemory-policy", "allkeys-lru")
    yield server.start()
    server.kill()


@pytest.fixture(params=["sqlite", "redis", "two redis"])
def place(request, tmp_path):
    """Configuration of a place for writes to wait in."""
    if request.param == "sqlite":
        return {"JOURNAL_PATH": str(tmp_path / "journal.db")}
    url = request.getfixturevalue("server").url
    namespace = f"t{abs(hash(request.node.nodeid)) % 10**12}"
    place = {"REDIS_URL": url, "NAMESPACE": namespace, "REDIS_BUDGET": 1.0}
    if request.param == "two redis":
        cache_url = request.getfixturevalue("cache_server").url
        place |= {"REDIS_URL": cache_url, "JOURNAL_REDIS_URL": url}
    return place


#: For what a key needs that no writer owns: where there are two Redis, such keys never wait.
unowned = pytest.mark.parametrize("place", ["sqlite", "redis"], indirect=True)


class Shop:
    """An app whose writers write into dictionaries."""

    def __init__(self, place, **config):
        self.app = Flask("shop")
        settings = {"DRAIN": False, "WRITE_DELAY": 0, **place, **config}
        self.app.config.update({f"CACHE_STRATEGIES_{k}": v for k, v in settings.items()})
        self.cache = CacheStrategies()
        self.calls = []
        self.source = {}
        self.ledger = []
        self.errors = {}
        self.cache.writer("save", patterns=("user:*",))(self.save)
        self.cache.writer("add", coalesce=False)(self.add)
        if "JOURNAL_REDIS_URL" in place:
            self.cache.writer("other", patterns=("*",))(self.save)
        self.cache.init_app(self.app)
        self.behind = self.app.extensions["cache_strategies"].cache.behind

    def save(self, value, context):
        """Keep the last value of a key."""
        self.calls.append((context.key, value))
        if self.errors.get(context.key, 0) > 0:
            self.errors[context.key] -= 1
            raise RuntimeError(f"{context.key} is not written")
        if context.deleted:
            self.source.pop(context.key, None)
        else:
            self.source[context.key] = value

    def add(self, value, context):
        """Keep all."""
        if self.errors.get(context.key, 0) > 0:
            self.errors[context.key] -= 1
            raise RuntimeError("the ledger is not written")
        self.ledger.append((value, context.token))

    def put(self, key, value, expire=60):
        """Write behind."""
        return self.cache.write_behind(key, value, self.save, expire)

    def attempt(self):
        """Let what waits be tried once, and that come to its end; whether nothing waits."""
        is_done = self.cache.flush(0)
        while self.behind.drain._busy:
            time.sleep(0.001)
        return is_done or self.cache.pending()["pending"] == 0

    def evict(self, key):
        """Lose an entry as a cache that is full does."""
        store = self.app.extensions["cache_strategies"].store
        store = getattr(store, "of", lambda _key: store)(key)
        store.memory.drop(key)
        redis = getattr(store, "_redis", None)
        if redis is not None:
            redis.execute("DEL", redis.key(f"c1:{key}"))

    def not_asked(self):
        """A source that is not to be asked."""
        raise AssertionError("the source was asked")


@pytest.fixture
def shop(place):
    return Shop(place)


# --- Reading what was written


def test_a_write_is_accepted_now_and_written_later(shop):
    """The cache has the value at once, the source after a flush, and then nothing waits."""
    assert shop.put("user:1", {"name": "Ann"}) is True
    assert shop.cache.get("user:1") == {"name": "Ann"}
    assert shop.source == {}
    assert shop.cache.pending()["pending"] == 1
    assert shop.cache.flush(10) is True
    assert shop.source == {"user:1": {"name": "Ann"}}
    assert shop.cache.pending() == {
        "pending": 0, "pending_bytes": 0, "oldest_s": 0, "dead_letters": 0
    }  # fmt: skip


@pytest.mark.claim(
    "An entry evicted while dirty still reads as written, cache_aside asks no source"
)
def test_what_the_cache_has_lost_reads_as_written(shop):
    """An entry that was evicted is still there for everybody, until its source has it."""
    shop.put("user:1", "new")
    shop.evict("user:1")
    assert shop.cache.get("user:1") == "new"
    assert shop.cache.get_many(["user:1", "user:2"]) == {"user:1": "new"}
    assert shop.cache.cache_aside("user:1", shop.not_asked, 60) == "new"
    shop.cache.flush(10)
    shop.evict("user:1")
    assert shop.cache.cache_aside("user:1", lambda: "of the source", 60) == "of the source"


@pytest.mark.claim(
    "An entry expired while dirty still reads as written, cache_aside asks no source"
)
def test_what_has_expired_reads_as_written(shop):
    """The time of an entry does not run out before its source has it."""
    shop.put("user:1", "new", expire=0.02)
    time.sleep(0.05)
    assert shop.cache.get("user:1") == "new"
    assert shop.cache.cache_aside("user:1", shop.not_asked, 60) == "new"
    shop.cache.flush(10)
    assert shop.cache.get("user:1") is None


@pytest.mark.claim("A delete that waits reads as absent, cache_aside asks no source")
def test_a_delete_that_waits_reads_as_absent(shop):
    """Nobody asks the source, which still has it; then the writer is told of the delete."""
    shop.source["user:1"] = "old"
    assert shop.cache.delete("user:1") is True
    assert shop.cache.get("user:1", "nothing") == "nothing"
    assert shop.cache.get_many(["user:1"]) == {}
    assert shop.cache.cache_aside("user:1", shop.not_asked, 60) is None
    assert shop.cache.pending()["pending"] == 1
    assert shop.cache.flush(10)
    assert (shop.source, shop.calls) == ({}, [("user:1", None)])


@unowned
def test_a_delete_of_a_key_without_an_owner_is_the_caches_own(shop):
    """No writer is told, unless a write of it waits: then it is that writer's."""
    shop.cache.set("page", 1)
    assert shop.cache.delete("page") is True
    assert shop.cache.pending()["pending"] == 0
    shop.cache.write_behind("page", 2, shop.save, 60)
    assert shop.cache.delete("page") is True
    assert shop.cache.get("page") is None
    shop.cache.flush(10)
    assert (shop.source, shop.calls) == ({}, [("page", None)])


@unowned
def test_a_journal_that_goes_away_during_a_delete(shop, monkeypatch):
    """The key is forgotten by the cache, its caller is told that nobody knows more."""

    def away(_key):
        raise CacheUnavailable("Redis has gone")

    shop.put("other", 1)
    shop.cache.set("page", 1)
    monkeypatch.setattr(shop.behind.journal, "newest", away)
    assert shop.cache.delete("page") is False
    assert shop.cache.get("page") is None


def test_invalidate_tells_no_source(shop):
    """The method of a decorated function forgets in the cache alone."""
    load = shop.cache.cached("user", 60)(lambda number: number)
    with shop.app.app_context():
        load(1)
        load.invalidate(1)
        shop.cache.invalidate("user:1")
    assert shop.cache.pending()["pending"] == 0


def test_another_process_reads_what_waits(place):
    """What one has accepted another reads, although its own cache knows nothing of it."""
    first, second = Shop(place), Shop(place)
    first.put("user:1", "new")
    first.evict("user:1")
    assert second.cache.get("user:1") == "new"
    assert second.cache.flush(10)
    assert second.source == {"user:1": "new"}


# --- Order


def test_only_the_last_of_several_is_written(shop):
    """Writes of a key that wait become one."""
    for number in range(10):
        shop.put("user:1", number)
    assert shop.cache.pending()["pending"] == 1
    shop.cache.flush(10)
    assert shop.calls == [("user:1", 9)]


def test_a_ledger_gets_every_entry_in_order(shop):
    """Writes that do not coalesce are written one by one, each with a token of its own."""
    for number in range(10):
        assert shop.cache.write_behind("usage:1", number, shop.add, 60)
    shop.cache.flush(10)
    assert [value for value, _ in shop.ledger] == list(range(10))
    assert len({token for _, token in shop.ledger}) == 10


def test_write_through_takes_the_place_of_what_waits(shop):
    """What was accepted before is not written after it."""
    shop.put("user:1", "older")
    assert shop.cache.write_through("user:1", "newer", lambda v: shop.source.update(a=v), 60)
    assert shop.cache.flush(10)
    assert (shop.source, shop.calls) == ({"a": "newer"}, [])
    assert shop.cache.get("user:1") == "newer"


def test_write_through_that_fails_gives_nothing_up(shop):
    """What waits still waits, and reads as before."""

    def fail(_value):
        raise OSError("the source is away")

    shop.put("user:1", "older")
    with pytest.raises(OSError, match="away"):
        shop.cache.write_through("user:1", "newer", fail, 60)
    assert shop.cache.get("user:1") == "older"
    assert shop.cache.flush(10)
    assert shop.source == {"user:1": "older"}


def test_write_through_writes_a_ledgers_entries_first(shop):
    """What does not coalesce is not given up for something newer."""
    shop.cache.write_behind("usage:1", "a", shop.add, 60)
    shop.cache.write_through("usage:1", "b", lambda v: shop.ledger.append((v, "")), 60)
    assert [value for value, _ in shop.ledger] == ["a", "b"]
    assert shop.cache.pending()["pending"] == 0


def test_write_through_waits_for_what_is_being_written(place):
    """Nothing older lands after it: a write that has begun is waited for."""
    shop, order, begun = Shop(place), [], threading.Event()

    @shop.cache.writer("slow")
    def slow(value):
        begun.set()
        time.sleep(0.1)
        order.append(value)

    shop.cache.write_behind("k", "older", slow, 60)
    thread = threading.Thread(target=shop.cache.flush, args=(10,))
    thread.start()
    assert begun.wait(5)
    shop.cache.write_through("k", "newer", order.append, 60)
    thread.join()
    assert order == ["older", "newer"]


_VIRTUAL = """
import sys, time
from flask import Flask
from flask_muset import CacheStrategies
from flask_muset.testing import virtual_clock
app, written = Flask("x"), []
app.config.update(json.loads(sys.argv[1]))
cache = CacheStrategies(app)
@cache.writer("slow")
def slow(value):
    written.append(("begun", value))
    time.sleep(0.2)
    written.append(("ended", value))
with virtual_clock() as clock:
    cache.write_behind("k", "older", slow, 60)
    clock.advance(1)
    cache.write_behind("other", "wakes", written.append, 60)
    while ("begun", "older") not in written:
        time.sleep(0.01)
    cache.write_through("k", "newer", slow, 60)
    result = {"now": clock.now, "k": [each for each in written if "wakes" not in each]}
"""


def test_under_a_virtual_clock_write_through_waits_as_well(tmp_path):
    """The writer that it waits for works in real time; without that its claim would end early."""
    config = {"CACHE_STRATEGIES_JOURNAL_PATH": str(tmp_path / "journal.db")}
    result = run_patched(_VIRTUAL, json.dumps(config), timeout=30)
    assert result["k"] == [[when, k] for k in ("older", "newer") for when in ("begun", "ended")]
    assert result["now"] == 1_001


def test_write_through_does_not_go_out_of_turn(place):
    """Where somebody else has the key for too long it says so and writes nothing."""
    shop, written = Shop(place, WRITE_TIMEOUT=0.05), []
    shop.behind.journal.hold("k")
    with pytest.raises(OperationTimeoutError, match="somebody else"):
        shop.cache.write_through("k", 1, written.append, 60)
    assert written == []


@pytest.mark.claim(
    "10,000 interleaved puts and deletes, 20 % errors: all end right, poison is a dead letter"
)
def test_interleaved_puts_and_deletes_end_right(place, prove):
    """With 20 % errors each key ends at its last value; one that always fails is a dead letter."""
    check_interleaved(place, prove, 10_000 if prove.full else 120)


def check_interleaved(place, prove, count):
    import random

    dice, last = random.Random(7), {}
    shop = Shop(place, DRAIN=True, WRITES_AT_ONCE=4)
    failing = random.Random(8)

    @shop.cache.writer("flaky", max_attempts=12, patterns=("item:*",))
    def flaky(value, context):
        if context.key == "item:poison" and shop.errors.get("poison", 1):
            raise ValueError("never")
        if failing.random() < 0.2:
            raise RuntimeError("now and then")
        shop.source[context.key] = None if context.deleted else value

    shop.cache.write_behind("item:poison", "bitter", flaky, 60)
    for number in range(count):
        key = f"item:{dice.randrange(50)}"
        if dice.random() < 0.3:
            assert shop.cache.delete(key)
            last[key] = None
        else:
            assert shop.cache.write_behind(key, number, flaky, 60)
            last[key] = number
    end = time.monotonic() + 90
    while {key: shop.source.get(key) for key in last} != last:
        assert time.monotonic() < end, shop.cache.pending()
        time.sleep(0.02)
    letters = []
    while not letters and time.monotonic() < end:
        shop.behind.drain.flush(0.2)
        letters = shop.cache.dead_letters()
    assert [letter["key"] for letter in letters] == ["item:poison"]
    shop.errors["poison"] = 0
    assert shop.cache.requeue(letters[0]["id"])
    assert shop.cache.flush(10)
    assert shop.source["item:poison"] == "bitter"
    prove.figure(f"{count} writes and deletes of 50 keys, all right; 1 dead letter, then written")


# --- Failure


def test_a_failed_write_is_tried_again(shop):
    """With its attempts counted, and the others of its batch written meanwhile."""
    shop.errors["user:1"] = 2
    shop.put("user:1", "a")
    shop.put("user:2", "b")
    assert shop.attempt() is False
    assert shop.source == {"user:2": "b"}
    assert shop.cache.explain("user:1")["write_behind"]["attempts"] == 1
    assert shop.cache.flush(20) is True
    assert shop.source == {"user:1": "a", "user:2": "b"}


def kill(shop, key):
    """Use up the attempts of a key."""
    while not shop.cache.dead_letters():
        shop.attempt()


def test_a_write_that_never_succeeds_is_kept_for_people(shop, caplog):
    """It becomes a dead letter after its attempts, and is written once somebody requeues it."""
    shop.errors["user:1"] = 5
    shop.put("user:1", "bitter")
    with caplog.at_level(logging.ERROR):
        kill(shop, "user:1")
    (letter,) = shop.cache.dead_letters()
    assert letter.pop("first_failed") <= letter.pop("last_failed") <= time.time() + 1
    assert letter == {
        "id": letter["id"], "key": "user:1", "writer": "save", "attempts": 5,
        "error": "RuntimeError: user:1 is not written", "superseded": False,
    }  # fmt: skip
    assert "dead letter" in caplog.text
    assert shop.cache.pending()["pending"] == 0
    assert shop.cache.requeue(letter["id"]) is True
    assert shop.cache.requeue(letter["id"]) is False
    assert shop.cache.flush(10)
    assert shop.source == {"user:1": "bitter"}


def test_an_old_value_is_not_brought_back(shop):
    """A dead letter of a key that has got a newer value cannot be requeued; it can be dropped."""
    shop.errors["user:1"] = 5
    shop.put("user:1", "old")
    kill(shop, "user:1")
    shop.put("user:1", "new")
    (letter,) = shop.cache.dead_letters()
    assert letter["superseded"] is True
    with pytest.raises(ConflictError):
        shop.cache.requeue(letter["id"])
    assert shop.cache.drop(letter["id"]) is True
    assert shop.cache.drop(letter["id"]) is False
    assert shop.cache.dead_letters() == []


def test_errors_say_no_secrets(shop):
    """What stands in a dead letter and in logs is redacted."""

    @shop.cache.writer("leaky", max_attempts=1)
    def leaky(value):
        raise RuntimeError("password=hunter2 is wrong")

    shop.cache.write_behind("k", 1, leaky, 60)
    shop.attempt()
    (letter,) = shop.cache.dead_letters()
    assert "hunter2" not in json.dumps(letter)


def test_a_source_that_is_away_uses_up_no_attempts(place):
    """While it refuses everybody nothing dies; once it is back everything is written."""
    shop, away = Shop(place), [True]

    @shop.cache.writer("remote", max_attempts=2, patterns=("r:*",))
    def remote(value, context):
        if away[0]:
            raise NetworkError("the database refuses")
        shop.source[context.key] = value

    for number in range(12):
        shop.cache.write_behind(f"r:{number}", number, remote, 60)
    for _ in range(6):
        assert shop.attempt() is False
    assert shop.cache.pending()["pending"] == 12
    assert shop.cache.dead_letters() == []
    away[0] = False
    assert shop.cache.flush(20)
    assert shop.source == {f"r:{number}": number for number in range(12)}


def test_a_batch_that_fails_is_written_one_by_one(place):
    """One poison record holds up nobody: the others of its batch are written at once."""
    shop, batches = Shop(place), []

    @shop.cache.writer("many", batch=4, coalesce=False)
    def many(writes):
        batches.append([value for value, _ in writes])
        assert all(isinstance(context, WriteContext) for _, context in writes)
        if any(value == 5 for value, _ in writes):
            raise ValueError("5 is bad")

    for number in range(8):
        shop.cache.write_behind(f"k{number}", number, many, 60)
    assert shop.attempt() is False
    assert max(map(len, batches)) == 4
    written = {value for batch in batches if 5 not in batch for value in batch}
    assert written == set(range(8)) - {5}
    assert shop.cache.pending()["pending"] == 1


def test_functions_without_a_name_take_each_others_place_only_where_they_are_the_same(place):
    """Two lines that write the same key both write; one line that writes it again, once."""
    shop = Shop(place, WRITE_DELAY=600)
    for number in range(3):
        shop.cache.write_behind("k", number, lambda value: shop.calls.append(("a", value)), 60)
    shop.cache.write_behind("k", 3, lambda value: shop.calls.append(("b", value)), 60)
    shop.cache.flush(10)
    assert shop.calls == [("a", 2), ("b", 3)]


def test_a_cache_that_is_off_still_reads_what_waits(place):
    """Without any entry the journal answers, for all kinds of reads."""
    shop = Shop(place, ENABLED=False)
    shop.put("user:1", "new")
    assert shop.cache.get("user:1") == "new"
    assert shop.cache.cache_aside("user:1", shop.not_asked, 60) == "new"
    shop.cache.delete("user:1")
    assert shop.cache.cache_aside("user:1", shop.not_asked, 60) is None
    assert shop.cache.flush(10)
    assert shop.cache.cache_aside("user:1", lambda: "of the source", 60) == "of the source"


def test_write_through_has_a_place_in_the_order(place):
    """Its function is told a sequence between those of the writes around it, if it asks."""
    shop, told = Shop(place, WRITE_DELAY=600), []
    shop.cache.write_behind("usage:1", 1, lambda value, context: told.append(context.seq), 60)
    shop.cache.write_through("usage:1", 2, lambda value, context: told.append(context.seq), 60)
    shop.cache.write_behind("usage:1", 3, lambda value, context: told.append(context.seq), 60)
    shop.cache.flush(10)
    assert len(told) == 2  # the first was given up for the second
    assert told[0] < told[1]


# --- No room


@pytest.mark.claim(
    "Limit of 100, call 101 writes itself in place of what its key has waiting, none refused"
)
def test_without_room_the_caller_writes(place):
    """Nothing is refused: call 101 writes itself, in place of what its key has waiting."""
    shop = Shop(place, MAX_PENDING=100)
    for number in range(100):
        assert shop.put(f"user:{number}", number)
    assert shop.put("user:100", 100) is True
    assert shop.source == {"user:100": 100}
    assert shop.cache.get("user:100") == 100
    assert shop.put("user:7", "newer") is True  # takes the place of the older one
    assert shop.cache.pending()["pending"] == 100
    assert shop.cache.delete("user:200") is True
    assert shop.calls[-1] == ("user:200", None)
    assert shop.cache.flush(20)
    assert shop.source["user:7"] == "newer"
    assert len(shop.source) == 101


@pytest.mark.claim("Limit of 100, call 101 of a ledger writes what is older first")
def test_without_room_older_entries_of_a_ledger_go_first(place):
    """Call 101 of a key that does not coalesce writes the hundred before it, then its own."""
    shop = Shop(place, MAX_PENDING=100)
    for number in range(101):
        assert shop.cache.write_behind("usage", number, shop.add, 60)
    assert [value for value, _ in shop.ledger] == list(range(101))
    assert shop.cache.pending()["pending"] == 0


def test_without_room_the_writers_error_is_the_callers(place):
    """The caller hears of it, the cache has no value that the source has not."""
    shop = Shop(place, MAX_PENDING=1)
    shop.put("user:1", 1)
    shop.errors["user:2"] = 1
    with pytest.raises(RuntimeError, match="user:2"):
        shop.put("user:2", 2)
    assert shop.cache.get("user:2") is None
    assert shop.cache.pending()["pending"] == 1
    assert shop.put("user:2", 3) is True
    assert shop.source == {"user:2": 3}


_HANGING = """
import sys, time
from flask import Flask
from flask_muset import CacheStrategies
from flask_muset.deadline import deadline
from flask_muset.errors import OperationTimeoutError

app = Flask("hanging")
app.config.update(json.loads(sys.argv[1]))
cache = CacheStrategies(app)
hangs = True

@cache.writer("hang", patterns=["*"])
def hang(value):
    if hangs:
        gevent.sleep(60)

assert cache.write_behind("a", 1, hang, 60)
began = time.monotonic()
outcomes = []
for key in ("a", "b"):
    try:
        with deadline(0.2):
            # The second one needs room; the first one takes the place of what waits.
            outcomes.append(cache.write_behind(key, 2, hang, 60))
    except OperationTimeoutError as error:
        outcomes.append(error.status)
took_s = time.monotonic() - began
result = {"outcomes": outcomes, "took_s": took_s, "b": cache.get("b"), "a": cache.get("a"),
          "pending": cache.pending()["pending"]}
hangs = False
result["flushed"] = cache.flush(5)
result["again"] = cache.write_behind("b", 3, hang, 60)
"""


@pytest.mark.claim("Limit reached and the writer hangs: 504 at the deadline, nothing half done")
def test_without_room_a_hanging_writer_ends_at_the_deadline(place):
    """With 504, nothing half done: what waits still waits and nobody holds the key."""
    place = {f"CACHE_STRATEGIES_{k}": v for k, v in place.items()}
    config = {**place, "CACHE_STRATEGIES_MAX_PENDING": 1, "CACHE_STRATEGIES_DRAIN": False}
    result = run_patched(_HANGING, json.dumps(config))
    assert result.pop("took_s") < 5
    assert result == {
        "outcomes": [True, 504], "a": 2, "b": None, "pending": 1, "flushed": True, "again": True
    }  # fmt: skip


# --- Who writes


@unowned
@pytest.mark.claim("A lambda after a restart: the writer of its pattern, else a dead letter")
def test_a_function_without_a_name_works_while_its_process_lives(place, caplog):
    """It writes; what it leaves goes to the writer of the key's pattern, else to the dead."""
    shop = Shop(place, WRITE_DELAY=600)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert shop.cache.write_behind("k", 1, lambda value: shop.source.update(k=value), 60)
    assert caplog.text.count("has no name that a journal could refer to") == 1
    assert shop.cache.flush(10)
    assert shop.source == {"k": 1}
    shop.cache.write_behind("user:1", "left", lambda value: None, 60)
    shop.cache.write_behind("other", "left", lambda value: None, 60)
    shop.behind.attempts.begin_anew()  # the functions are gone
    shop.attempt()
    assert shop.source == {"k": 1, "user:1": "left"}
    (letter,) = shop.cache.dead_letters()
    assert letter["key"] == "other"
    assert letter["writer"].startswith(f"~{__name__}:test_a_function_without_a_name")


def plant(shop, key, writer):
    """A record that somebody has put into the journal."""
    entry = shop.app.extensions["cache_strategies"].cache._entry("value", 60, ())
    shop.behind.journal.append(key, entry, writer=writer)


@pytest.mark.claim("A planted reference is never imported, it is a dead letter")
def test_a_planted_reference_is_never_imported(shop):
    """What the configuration does not allow is a dead letter, whatever it is."""
    for key, writer in {"a": "os:system", "b": "antigravity:fly", "c": "subprocess:run"}.items():
        plant(shop, key, writer)
    shop.attempt()
    assert {letter["writer"] for letter in shop.cache.dead_letters()} == {
        "os:system", "antigravity:fly", "subprocess:run"
    }  # fmt: skip
    assert all("CACHE_STRATEGIES_WRITERS" in one["error"] for one in shop.cache.dead_letters())
    assert "antigravity" not in sys.modules


SAVED = []


def save_for_good(value):
    """A function of a module, which a journal may name where the configuration says so."""
    SAVED.append(value)


def test_a_function_on_the_list_is_found_by_another_process(place):
    """The reference is `module:qualname`."""
    reference = f"{__name__}:save_for_good"
    first, second = (Shop(place, WRITERS=[reference]) for _ in range(2))
    first.cache.write_behind("k", "kept", save_for_good, 60)
    assert second.cache.flush(10)
    assert SAVED.pop() == "kept"


def test_an_unknown_writer_is_waited_for(shop):
    """A newer version of the app may know it: it does not die while that may come."""
    plant(shop, "k", "of.tomorrow")
    for _ in range(7):
        shop.attempt()
    assert shop.cache.dead_letters() == []
    seen = []
    shop.cache.writer("of.tomorrow")(seen.append)
    assert shop.cache.flush(10)
    assert seen == ["value"]


def test_writers_of_the_manager_are_for_all_apps(place, monkeypatch):
    """A declaration where no app is known yet."""
    seen = []
    # Else every app of a later test had a writer.
    monkeypatch.setattr(cache_manager, "_declared", Declarations())

    @cache_manager.writer("everywhere")
    def everywhere(value):
        seen.append(value)

    shop = Shop(place)
    with shop.app.app_context():
        assert cache_manager.write_behind("k", 1, everywhere, 60)
        assert cache_manager.flush(10)
    assert seen == [1]


def test_declarations_are_checked(shop):
    """A wrong one is refused where it is made, with the cure."""
    writer = shop.cache.writer
    with pytest.raises(TypeError, match="needs a name"):
        writer(shop.save)
    with pytest.raises(ValueError, match="letters"):
        writer("a name")
    with pytest.raises(ValueError, match="max_attempts"):
        writer("x", max_attempts=0)
    with pytest.raises(ValueError, match="batch"):
        writer("x", batch=0)
    with pytest.raises(TypeError, match="several"):
        writer("x", patterns="user:*")
    with pytest.raises(ValueError, match="already"):
        writer("save")(lambda value: None)
    with pytest.raises(TypeError, match="function"):
        shop.cache.write_behind("k", 1, "save", 60)


def test_what_a_writer_is_called_with(place):
    """The value, and the context for whoever asks for one."""
    shop, seen = Shop(place), []

    @shop.cache.writer("value")
    def of_value(value):
        seen.append(value)

    @shop.cache.writer("default")
    def with_default(value, retries=3):
        seen.append((value, retries))

    @shop.cache.writer("named")
    def named(value, context=None):
        seen.append((value, context.attempt))

    @shop.cache.writer("annotated")
    def annotated(value, told: WriteContext = None):
        seen.append((value, told.key))

    for number, fn in enumerate([of_value, with_default, named, annotated]):
        shop.cache.write_behind(f"k{number}", number, fn, 60)
        shop.cache.flush(10)
    assert seen == [0, (1, 3), (2, 1), (3, "k3")]


# --- Beside


def test_a_journal_that_is_away_accepts_nothing(server, tmp_path):
    """False at once, and nothing has changed; what was there reads on."""
    away = RedisServer(tmp_path)
    shop = Shop({"REDIS_URL": away.url})
    assert shop.put("user:1", 1) is False
    assert shop.cache.get("user:1") is None
    assert shop.cache.delete("user:1") is False


def test_what_was_written_without_the_journal_is_not_overtaken(tmp_path):
    """A write-through while Redis is away wins over what waits there."""
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    try:
        shop = Shop({"REDIS_URL": server.url, "REDIS_BUDGET": 0.5})
        assert shop.put("user:1", "older")
        server.kill()
        assert shop.cache.write_through("user:1", "newer", lambda v: None, 60) is False
        server.start()

        def is_flushed():
            with contextlib.suppress(CacheUnavailable):
                return shop.cache.flush(1)

        until(is_flushed)
        assert shop.calls == []
    finally:
        server.kill()


def test_what_was_read_while_the_journal_was_away_does_not_stay(tmp_path):
    """The source lacks what waits: as soon as Redis is back the accepted write is read again."""
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    try:
        shop = Shop({"REDIS_URL": server.url, "REDIS_BUDGET": 0.5})
        assert shop.put("user:1", "accepted")
        shop.evict("user:1")
        server.kill()
        read, found, came_back = [], None, time.monotonic() + 1
        while found != "accepted" and time.monotonic() < came_back + 15:
            found = shop.cache.cache_aside("user:1", lambda: "of the source", 60)
            read.append(found)
            if time.monotonic() > came_back and server._process.poll() is not None:
                server.start()
            time.sleep(0.02)
        assert read[0] == "of the source"
        assert found == "accepted"
    finally:
        server.kill()


def test_a_process_drains_what_another_has_left(place):
    """The first request of an app with named writers begins it; nobody has to write for that."""
    Shop(place).put("user:1", "left")
    shop = Shop(place, DRAIN=True)
    shop.app.route("/")(lambda: "")
    shop.app.test_client().get("/")
    end = time.monotonic() + 10
    while shop.source != {"user:1": "left"}:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_commands(shop):
    """List, requeue, drop and flush, with what went wrong in a line."""
    run = shop.app.test_cli_runner().invoke
    for key in ("user:1", "user:2"):
        shop.errors[key] = 5
        shop.put(key, key)
    while len(shop.cache.dead_letters()) < 2:
        shop.attempt()
    listed = run(args=["cache-strategies", "dead-letters", "list", "--json"]).output.splitlines()
    first, second = map(json.loads, listed)
    assert {first["key"], second["key"]} == {"user:1", "user:2"}
    plain = run(args=["cache-strategies", "dead-letters", "list"]).output
    assert "RuntimeError" in plain
    assert "5 attempts" in plain
    assert run(args=["cache-strategies", "dead-letters", "requeue", first["id"]]).exit_code == 0
    assert run(args=["cache-strategies", "dead-letters", "drop", second["id"]]).exit_code == 0
    again = run(args=["cache-strategies", "dead-letters", "drop", second["id"]])
    assert (again.exit_code, "no dead letter" in again.output) == (1, True)
    shop.errors[first["key"]] = 1
    left = run(args=["cache-strategies", "flush", "--timeout", "0"])
    assert (left.exit_code, "1 writes still wait" in left.output) == (1, True)
    assert run(args=["cache-strategies", "flush"]).exit_code == 0
    assert shop.source == {first["key"]: first["key"]}


def test_how_much_waits_is_told(place):
    """A signal about once a second, which Metrics shows."""
    shop = Shop(place, DRAIN=True)
    Metrics(shop.app)
    client, text = shop.app.test_client(), ""
    shop.errors["user:1"] = 4
    shop.put("user:1", 1)
    end = time.monotonic() + 10
    while "muset_write_behind_pending 1.0" not in text:
        assert time.monotonic() < end
        time.sleep(0.05)
        with client.get("/metrics") as response:
            text = response.text
    assert 'muset_cache_operations_total{operation="write_behind",status="ok"} 1.0' in text


def test_awaited(place):
    """The awaited form, with a coroutine function that has no name and one that has."""
    import asyncio

    shop = Shop(place)

    @shop.cache.writer("awaited")
    async def awaited(value):
        await asyncio.sleep(0)
        shop.source["named"] = value

    async def save(value):
        await asyncio.sleep(0)
        shop.source["own"] = value

    async def work():
        assert await aio.CacheStrategy.write_behind("k1", 1, lambda data: save(data), 60)
        assert await aio.CacheStrategy.write_behind("k2", 2, awaited, 60)
        assert await aio.cache_manager.get("k1") == 1
        return await aio.cache_manager.flush(10)

    with shop.app.app_context():
        assert asyncio.run(work()) is True
    assert shop.source == {"own": 1, "named": 2}


def test_risks_are_said_once_and_refused_where_they_are_not_wanted(tmp_path, caplog):
    """A Redis that keeps nothing on disk: a warning, or a refusal to start."""
    server = RedisServer(tmp_path).start()
    try:
        shop = Shop({"REDIS_URL": server.url, "REDIS_BUDGET": 2.0})
        with caplog.at_level(logging.WARNING):
            assert shop.put("user:1", 1)
            assert shop.put("user:1", 2)
        assert caplog.text.count("A restart of Redis loses") == 1
        with pytest.raises(RuntimeError, match="CACHE_STRATEGIES_REQUIRE_DURABLE"):
            Shop({"REDIS_URL": server.url, "REQUIRE_DURABLE": True})
    finally:
        server.kill()


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    """False, and the log names it."""
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE mine (a)")
        other.commit()
    before = path.read_bytes()
    shop = Shop({"JOURNAL_PATH": str(path)})
    assert shop.put("user:1", 1) is False
    assert path.read_bytes() == before


def test_a_deadline_of_the_caller_is_his_own(shop):
    """Time that is up is said so, not taken for a journal that is away."""
    with pytest.raises(OperationTimeoutError), deadline(0):
        shop.put("user:1", 1)


# --- What a writer may do to the drain


def test_without_room_another_writers_write_of_the_key_goes_first(place):
    """A call takes the place of its own writer's writes, not of those of others."""
    shop = Shop(place, MAX_PENDING=1)
    shop.cache.writer("first")(lambda value: shop.calls.append(("first", value)))

    @shop.cache.writer("second")
    def second(value):
        shop.calls.append(("second", value))

    first = next(writer.fn for writer in shop.behind.writers if writer.name == "first")
    assert shop.cache.write_behind("k", 1, first, 60)
    assert shop.cache.write_behind("k", 2, second, 60)
    assert shop.calls == [("first", 1), ("second", 2)]


def test_a_turn_ends_although_the_callers_time_is_up(place):
    """What was given up for a write that took too long is not written after it."""
    shop = Shop(place)
    shop.put("user:1", "older")

    def slow(value):
        time.sleep(0.1)
        shop.source["user:1"] = value

    with contextlib.suppress(OperationTimeoutError), deadline(0.05):
        shop.cache.write_through("user:1", "newer", slow, 60)
    assert shop.cache.flush(5)
    assert (shop.source, shop.calls) == ({"user:1": "newer"}, [])


@unowned
def test_a_delete_after_a_function_without_a_name_is_that_functions(place):
    """It takes the writer of what waits, and finds it."""
    shop = Shop(place, WRITE_DELAY=600)
    shop.cache.write_behind("k", 1, lambda value: shop.calls.append(value), 60)
    assert shop.cache.delete("k")
    assert shop.cache.flush(5)
    assert shop.calls == [None]
    assert shop.cache.dead_letters() == []


class Saver:
    """A writer with a state of its own."""

    def __init__(self):
        self.saved = []

    def save(self, value):
        """Keep it."""
        self.saved.append(value)


def test_methods_of_two_objects_are_two_writers(place):
    """Also where no journal has a name for them."""
    shop, first, second = Shop(place, WRITE_DELAY=600), Saver(), Saver()
    shop.cache.write_behind("k", 1, first.save, 60)
    shop.cache.write_behind("k", 2, second.save, 60)
    assert shop.cache.flush(5)
    assert (first.saved, second.saved) == ([1], [2])


def test_what_a_function_was_given_is_not_shown(place, caplog):
    """Neither the log nor the journal has the arguments of a partial function."""
    import functools

    def save(value, *, password):
        raise RuntimeError("no")

    shop = Shop(place, WRITE_DELAY=600)
    with caplog.at_level(logging.DEBUG):
        shop.cache.write_behind("k", 1, functools.partial(save, password="hunter2"), 60)
    assert "hunter2" not in caplog.text
    assert "hunter2" not in str(shop.behind.journal.newest("k"))


class MuteError(RuntimeError):
    """An error that has no text."""

    def __str__(self):
        raise ValueError("no text")


def test_an_error_without_a_text_is_one_all_the_same(shop):
    """It uses up attempts as any other does."""

    @shop.cache.writer("mute", max_attempts=2)
    def mute(value):
        raise MuteError

    shop.cache.write_behind("k", 1, mute, 60)
    for _ in range(3):
        shop.attempt()
    (letter,) = shop.cache.dead_letters()
    assert (letter["error"], letter["attempts"]) == ("MuteError", 2)


def test_a_module_that_cannot_be_imported_holds_up_nobody(place, tmp_path, monkeypatch):
    """Its records wait; the others of the same claim are written."""
    (tmp_path / "broken_writers.py").write_text("raise KeyError('at import')\n")
    monkeypatch.syspath_prepend(tmp_path)
    shop = Shop(place, WRITERS=["broken_writers:save"])
    plant(shop, "a", "broken_writers:save")
    shop.put("user:1", 1)
    assert shop.attempt() is False
    assert shop.source == {"user:1": 1}
    assert "KeyError" in shop.cache.explain("a")["write_behind"]["error"]


def test_a_writer_that_hangs_leaves_places_to_the_others(place):
    """Other writers are called although it has more to write than there are places."""
    shop, goes_on = Shop(place, WRITES_AT_ONCE=2), threading.Event()

    @shop.cache.writer("hangs")
    def hangs(value):
        goes_on.wait(20)

    for number in range(6):
        shop.cache.write_behind(f"h{number}", number, hangs, 60)
    shop.cache.flush(0.05)
    shop.put("user:1", 1)
    end = time.monotonic() + 10
    while shop.source != {"user:1": 1}:
        assert time.monotonic() < end
        shop.cache.flush(0.05)
    goes_on.set()
    assert shop.cache.flush(10)


def test_no_more_keys_are_claimed_than_can_be_written(place):
    """A writer of batches beside them does not make a slow process take what others could write."""
    shop, goes_on = Shop(place, WRITES_AT_ONCE=1), threading.Event()
    shop.cache.writer("many", batch=50)(lambda writes: None)

    @shop.cache.writer("slow")
    def slow(value):
        goes_on.wait(20)

    for number in range(20):
        shop.cache.write_behind(f"s{number}", number, slow, 60)
    shop.cache.flush(0)
    others, _ = shop.behind.journal.claim(50, home="other", early=True)
    assert len(others) == 19
    goes_on.set()


def test_an_error_of_the_apps_own_is_understood(place):
    """What the app has mapped to an outage kills nothing within a minute."""
    shop = Shop(place)
    handler = ErrorHandler(shop.app)

    class DownError(Exception):
        pass

    handler.map(DownError, NetworkError)

    @shop.cache.writer("down", max_attempts=1)
    def down(value):
        raise DownError

    shop.cache.write_behind("k", 1, down, 60)
    for _ in range(3):
        shop.attempt()
    assert shop.cache.dead_letters() == []


def test_coroutines_have_the_time_of_an_attempt(place):
    """One that hangs is cut off, and fails."""
    import asyncio

    shop = Shop(place, WRITE_TIMEOUT=0.05)

    @shop.cache.writer("hangs")
    async def hangs(value):
        await asyncio.sleep(20)

    shop.cache.write_behind("k", 1, hangs, 60)
    assert shop.attempt() is False
    assert shop.cache.explain("k")["write_behind"]["attempts"] == 1


def test_a_plain_key_can_be_deleted_although_nothing_is_durable(tmp_path):
    """Refusing to write behind is no reason not to forget."""
    server = RedisServer(tmp_path)
    shop = Shop({"REDIS_URL": server.url, "REQUIRE_DURABLE": True, "REDIS_BUDGET": 1.0})
    server.start()
    try:
        until(lambda: shop.cache.set("page", 1))
        assert shop.cache.delete("page") is True
        with pytest.raises(CacheUnavailable, match="nothing is written behind"):
            shop.put("user:1", 1)
    finally:
        server.kill()


_TIMEOUTS = """
import sys
from flask import Flask
from flask_muset import CacheStrategies

app = Flask("timeouts")
app.config.update(json.loads(sys.argv[1]))
cache = CacheStrategies(app)

@cache.writer("slow", patterns=["*"])
def slow(value):
    with gevent.Timeout(0.01):
        gevent.sleep(1)

cache.write_behind("k", 1, slow, 60)
for _ in range(3):
    cache.flush(0.1)
told = cache.explain("k")["write_behind"]
result = told["attempts"], told["error"].split(":")[0]
"""


def test_a_timeout_of_gevents_is_a_failure(place):
    """Although it is no Exception: it uses up an attempt, and the next one comes later."""
    config = {f"CACHE_STRATEGIES_{name}": value for name, value in place.items()}
    config["CACHE_STRATEGIES_DRAIN"] = False
    assert run_patched(_TIMEOUTS, json.dumps(config)) == [3, "Timeout"]


_ENDING = """
import sys, json, time
from flask import Flask
from flask_muset import CacheStrategies

app = Flask("ending")
app.config.update(json.loads(sys.argv[1]))
cache = CacheStrategies(app)

@cache.writer("save")
def save(value):
    if value == "hang":
        time.sleep(600)
    with open(sys.argv[2], "a") as file:
        file.write(f"{value}\\n")

for value in sys.argv[3:]:
    assert cache.write_behind(value, value, save, 60)
"""


@pytest.mark.parametrize("first", ["", "from gevent import monkey; monkey.patch_all()\n"])
def test_the_end_of_a_process(tmp_path, first):
    """It writes what it can in its time; one that hangs does not keep it, and nothing is lost."""
    place = {"JOURNAL_PATH": str(tmp_path / "journal.db"), "WRITE_DELAY": 60, "DRAIN_AT_EXIT": 1}
    config = json.dumps({f"CACHE_STRATEGIES_{name}": value for name, value in place.items()})
    values = [*map(str, range(20)), "hang"]
    run = partial(subprocess.run, check=True, timeout=60)
    written = tmp_path / "written"
    run([sys.executable, "-W", "error", "-c", first + _ENDING, config, written, *values])
    shop, seen = Shop({**place, "WRITE_DELAY": 0}), set(written.read_text().split())
    assert seen == set(values[:-1])
    assert shop.behind.journal.newest("hang") is not None
    assert shop.cache.pending()["pending"] == 1


def test_forked_children_drain_for_themselves(tmp_path):
    """An app that was used before a fork drains in each child."""
    shop = Shop({"JOURNAL_PATH": str(tmp_path / "journal.db")}, DRAIN=True, WRITE_DELAY=600)
    shop.put("user:1", "of the parent")
    child = os.fork()
    if not child:
        is_done = shop.cache.flush(10) and shop.put("user:2", "of the child")
        shop.behind.drain.close(10)
        os._exit(0 if is_done and set(shop.source) == {"user:1", "user:2"} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert shop.cache.flush(10)
    assert shop.source == {}


def test_what_could_not_be_settled_is_settled_later(place, monkeypatch):
    """A journal that is away for a moment does not bring back what a write-through has replaced."""
    shop = Shop(place)
    shop.put("user:1", "older")
    journal, settle, calls = shop.behind.journal, shop.behind.journal.settle, []

    def fails_once(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise NetworkError("away for a moment")
        return settle(*args, **options)

    monkeypatch.setattr(journal, "settle", fails_once)
    shop.cache.write_through("user:1", "newer", lambda value: shop.source.update(k=value), 60)
    assert shop.cache.flush(10)
    assert (shop.source, shop.calls) == ({"k": "newer"}, [])


def test_a_dead_letter_is_superseded_by_what_its_caller_has_written(place):
    """Neither a write-through nor a write for want of room is undone by a requeue."""
    shop = Shop(place, MAX_PENDING=1)
    shop.errors["user:1"] = 5
    shop.put("user:1", "old")
    kill(shop, "user:1")
    (letter,) = shop.cache.dead_letters()
    assert letter["superseded"] is False
    shop.cache.write_through("user:1", "new", lambda value: None, 60)
    (letter,) = shop.cache.dead_letters()
    assert letter["superseded"] is True
    with pytest.raises(ConflictError):
        shop.cache.requeue(letter["id"])


def test_an_ended_drain_writes_nothing_any_more(place):
    """What it had claimed and not begun is given back, and left alone by a writer that ends."""
    shop, goes_on, begun = Shop(place, WRITES_AT_ONCE=1, DRAIN=True), threading.Event(), []

    @shop.cache.writer("slow", batch=2)
    def slow(writes):
        begun.append(writes)
        goes_on.wait(20)

    for number in range(6):
        shop.cache.write_behind(f"k{number}", number, slow, 60)
    end = time.monotonic() + 10
    while not begun:
        assert time.monotonic() < end
        time.sleep(0.01)
    shop.behind.drain.close(0.01)
    goes_on.set()
    while shop.behind.drain._busy:
        time.sleep(0.001)
    assert len(begun) == 1
    left, _ = shop.behind.journal.claim(10, home="other", early=True)
    assert len(left) >= 4


def test_a_crowd_does_not_keep_the_journal_busy(place, monkeypatch):
    """While all that is due is for a writer without a free place, the loop looks now and then."""
    shop, goes_on, claims = Shop(place, WRITES_AT_ONCE=2), threading.Event(), []

    @shop.cache.writer("hangs")
    def hangs(value):
        goes_on.wait(20)

    for number in range(100):
        shop.cache.write_behind(f"h{number}", number, hangs, 60)
    claim = shop.behind.journal.claim
    monkeypatch.setattr(
        shop.behind.journal, "claim", lambda *a, **k: claims.append(1) or claim(*a, **k)
    )
    shop.behind.drain.start()
    time.sleep(1)
    goes_on.set()
    assert len(claims) < 60
    shop.behind.drain.close(10)


def test_a_process_says_that_it_lives_although_nothing_can_be_claimed(place, monkeypatch):
    """Else others would give up what only it can write."""
    shop, beats = Shop(place, WRITE_DELAY=600), []
    shop.cache.write_behind("k", 1, lambda value: None, 60)
    drain, journal = shop.behind.drain, shop.behind.journal
    drain.close(0)

    def fail(*_args, **_options):
        raise NetworkError("claims fail")

    monkeypatch.setattr(journal, "claim", fail)
    monkeypatch.setattr(journal, "beat", beats.append)
    drain._closes_at, drain._next_beat = None, 0.0
    drain.turn()
    assert beats == [drain.home]


_NATIVE = """
import sys
from flask import Flask
from flask_muset import CacheStrategies

app = Flask("native")
app.config.update(json.loads(sys.argv[1]))
cache = CacheStrategies(app)
written = []
save = cache.writer("save", coalesce=False)(written.append)

def from_a_thread(number):
    gevent.sleep(0)  # gives the thread a hub of its own
    return cache.write_behind(f"n{number}", number, save, 60)

def from_a_greenlet(number):
    return cache.write_behind(f"g{number}", number, save, 60)

pool = gevent.get_hub().threadpool
accepted = []
for turn in range(30):
    native = [pool.spawn(from_a_thread, 10 * turn + n) for n in range(2)]
    greenlets = [gevent.spawn(from_a_greenlet, 10 * turn + n) for n in range(5)]
    gevent.joinall(greenlets, raise_error=True)
    accepted += [one.get() for one in native + greenlets]
result = [accepted.count(True), cache.flush(30), len(written)]
"""


def test_native_threads_beside_greenlets(tmp_path):
    """A thread whose hub lasts for one call leaves nothing to that hub."""
    place = {"JOURNAL_PATH": str(tmp_path / "journal.db"), "WRITE_DELAY": 0}
    config = {f"CACHE_STRATEGIES_{name}": value for name, value in place.items()}
    assert run_patched(_NATIVE, json.dumps(config)) == [210, True, 210]
