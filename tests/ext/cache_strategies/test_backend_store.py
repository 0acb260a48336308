"""Entries in the backends of Flask-Caching: in memory, in files, and in a real Redis."""

import json
import logging
import pickle
import threading
import time

import pytest
import redis
from flask_caching.backends import FileSystemCache, NullCache, RedisCache, SimpleCache
from patched import run_patched

from flask_muset.cache_strategies import backend_store
from flask_muset.cache_strategies.backend_store import BackendStore
from flask_muset.cache_strategies.conformance import CacheStoreSuite
from flask_muset.cache_strategies.entry import NEVER, Busy, Entry, Lease
from flask_muset.cache_strategies.envelope import pack
from flask_muset.clock import SYSTEM
from flask_muset.errors import CacheUnavailable


def entry(payload=b"value", *, lasts_s=600.0, tags=()):
    now = SYSTEM.now()
    return Entry(
        payload, created_at=now, fresh_until=now + lasts_s, gone_at=now + lasts_s, tags=tags
    )


def payload(store, key):
    found = store.read(key)
    return None if found is None else found.payload


# --- What every store must do ---------------------------------------------------------------------


class Suite(CacheStoreSuite):
    """Backends cannot list their keys, and leases end by the clock of the process."""

    matches_patterns = False
    lease_s = 10.0


class TestSimpleCache(Suite):
    """In the memory of the process."""

    @pytest.fixture
    def store(self, clock):
        return BackendStore(SimpleCache(threshold=10_000))


class TestFileSystemCache(Suite):
    """In files."""

    @pytest.fixture
    def store(self, clock, tmp_path):
        return BackendStore(FileSystemCache(str(tmp_path), threshold=0))


class TestRedisCache(Suite):
    """In a real Redis."""

    @pytest.fixture
    def store(self, clock, redis_server):
        with redis_cache(redis_server) as backend:
            yield BackendStore(backend)


class redis_cache:  # noqa: N801 - a context manager
    """A RedisCache that gives up soon."""

    def __init__(self, server):
        self._client = redis.Redis.from_url(server.url, socket_timeout=1, retry=None)

    def __enter__(self):
        return RedisCache(self._client, key_prefix="flask_cache_")

    def __exit__(self, *_error):
        self._client.close()


# --- Two processes --------------------------------------------------------------------------------


@pytest.fixture(params=["simple", "files", "redis"])
def two(request, clock, tmp_path):
    """Two stores over one backend, as two processes have them."""
    if request.param == "simple":
        backend = SimpleCache()
        yield BackendStore(backend), BackendStore(backend)
    elif request.param == "files":
        yield tuple(BackendStore(FileSystemCache(str(tmp_path), threshold=0)) for _ in range(2))
    else:
        server = request.getfixturevalue("redis_server")
        with redis_cache(server) as one, redis_cache(server) as other:
            yield BackendStore(one), BackendStore(other)


def test_processes_share_entries(two):
    """What one writes, loads or deletes the other finds so."""
    here, there = two
    here.write("written", entry(b"1", tags=("a",)))
    here.settle(here.lease("loaded", None), entry(b"2"))
    here.end_write(here.begin_write("source"), entry(b"3"))
    found = there.read_many(["written", "loaded", "source"])
    assert {key: one.payload for key, one in found.items()} == {
        "written": b"1", "loaded": b"2", "source": b"3"
    }  # fmt: skip
    assert found["written"].tags == ("a",)
    assert there.delete("written") is True
    assert here.read("written") is None
    write = there.begin_write("source")
    assert here.read("source") is None
    there.end_write(write, None)
    assert here.read("source") is None


@pytest.mark.parametrize("tag", ["a", "", "any tag at all: ü"])
@pytest.mark.parametrize("keep_stale", [False, True])
def test_processes_share_tags(two, clock, tag, keep_stale):
    """A tag that one makes invalid is so for the other, whoever has written, loads included."""
    here, there = two
    here.write("here", entry(tags=("a", "any tag at all: ü")))
    there.write("there", entry(tags=("any tag at all: ü", "a")))
    there.write("neither", entry(tags=("b",)))
    lease = there.lease("loading", None)
    clock.advance(0.001)
    assert here.invalidate_tag(tag, keep_stale=keep_stale) is True
    clock.advance(0.001)
    there.settle(lease, entry(tags=("a", "any tag at all: ü")))
    keys = ["here", "there", "loading"]
    if not tag:
        keys.append("neither")
    for store in two:
        found = store.read_many(keys)
        if keep_stale:
            assert [found[key].fresh_until <= SYSTEM.now() for key in keys] == [True] * len(keys)
        else:
            assert found == {}
        assert tag == "" or store.read("neither").fresh_until > SYSTEM.now()
    there.write("here", entry(b"new", tags=("a", "any tag at all: ü")))
    assert here.read("here").fresh_until > SYSTEM.now()


def test_a_clock_that_is_ahead(clock):
    """What another process wrote by a clock that is ahead is deleted and made invalid all the same.

    And what is written after a tag was made invalid by such a clock is served once that was read.
    """
    backend = SimpleCache()
    here, there = BackendStore(backend), BackendStore(backend)
    clock.advance(60)
    there.write("key", entry(tags=("a",)))
    there.write("other", entry(tags=("b",)))
    there.invalidate_tag("c", keep_stale=False)
    clock.now -= 60
    assert len(here.read_many(["key", "other"])) == 2
    here.invalidate_tag("a", keep_stale=False)
    assert here.read("key") is None
    late = BackendStore(backend)
    for is_known in (False, True):
        late.write("new", entry(tags=("c",)))
        assert (late.read("new") is not None) is is_known


def test_a_late_load_of_another_process(clock):
    """An old value that another process puts back after a delete is not served by this one."""
    backend = SimpleCache()
    here, there = BackendStore(backend), BackendStore(backend)
    lease = there.lease("key", None)
    here.delete("key")
    assert there.settle(lease, entry(b"old")) is True
    assert here.read("key") is None
    assert payload(there, "key") == b"old"


# --- What is in the backend -----------------------------------------------------------------------


def test_only_bytes_and_numbers_are_kept(clock):
    """The backend is given envelopes and moments, below one prefix, for a bounded time."""
    kept = {}

    class Noting(SimpleCache):
        def set(self, key, value, timeout=None):
            kept[key] = value, timeout
            return super().set(key, value, timeout)

    store = BackendStore(Noting())
    store.write("plain", entry(lasts_s=1.5))
    store.write("for ever", Entry(b"value", created_at=SYSTEM.now()))
    store.write("gone", entry(lasts_s=-5))
    store.invalidate_tag("tag", keep_stale=True)
    assert all(name.startswith("muset:") for name in kept)
    assert [type(value) for value, _ in kept.values()] == [bytes, bytes, bytes, int]
    year = 365 * 86_400
    assert [timeout for _, timeout in kept.values()] == [3, year + 1, 1, 2 * year]
    assert kept["muset:e:plain"][0].startswith(b"\xc1m")
    assert store.read_many(["plain", "for ever", "gone"]).keys() == {"plain", "for ever"}


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 201, "\ud800", "a\nb", "!", "\x7f"])
def test_names_that_every_backend_takes(clock, key):
    """Whatever the key, its name in the backend is one that memcached takes."""
    names = []

    class Noting(SimpleCache):
        def set(self, name, value, timeout=None):
            names.append(name)
            return super().set(name, value, timeout)

    store = BackendStore(Noting())
    store.write(key, entry())
    store.write(f"{key}2", entry(b"another"))
    assert payload(store, key) == b"value"
    assert all(len(name) <= 250 and name.isascii() and name.isprintable() for name in names)
    assert not any(set(name) & set(" !") for name in names)
    assert len(set(names)) == 2


@pytest.mark.parametrize(
    "value", [b"", b"no envelope", 7, "text", None, [1], b"\xc1m\x01" + bytes(80), True]
)
def test_foreign_values_are_misses(clock, value):
    """What is in the backend and is none of ours is not there, is counted, and is replaced."""
    backend, told = SimpleCache(), []
    store = BackendStore(backend, tell=lambda *what: told.append(what))
    backend.set("muset:e:key", value)
    assert store.read("key") is None
    assert told == ([] if value is None else [("get", "unreadable", None)])
    assert isinstance(store.lease("key", None), Lease)
    assert store.write("key", entry()) is True
    assert payload(store, "key") == b"value"


@pytest.mark.parametrize("value", ["text", -1, 2**70, 1.5, b"7"])
def test_foreign_moments(clock, value):
    """A moment that cannot be read makes all that is there invalid, and what comes after is not."""
    backend = SimpleCache()
    store = BackendStore(backend)
    store.write("key", entry(tags=("a",)))
    store.write("other", entry(tags=("b",)))
    backend.set("muset:d:a", value)
    assert store.read_many(["key", "other"]).keys() == {"other"}
    store.write("key", entry(tags=("a",)))
    assert store.read_many(["key", "other"]).keys() == {"key", "other"}


def test_entries_outlive_neither_clock(clock):
    """An entry is gone by this process's clock, whatever the backend thinks."""
    store = BackendStore(SimpleCache())
    store.write("key", entry(lasts_s=10))
    clock.advance(9.999)
    assert payload(store, "key") == b"value"
    clock.advance(0.001)
    assert store.read("key") is None


def test_expiry_in_the_backend(tmp_path):
    """Files of entries that are gone expire there too, never before the entry does."""
    backend = FileSystemCache(str(tmp_path), threshold=0)
    store = BackendStore(backend)
    store.write("key", entry(lasts_s=0.2))
    while store.read("key") is not None:
        assert backend.has("muset:e:key")
        time.sleep(0.01)
    left_s = 3.0
    while backend.has("muset:e:key") and left_s > 0:
        time.sleep(0.05)
        left_s -= 0.05
    assert not backend.has("muset:e:key")


def test_null_cache(clock):
    """A backend that keeps nothing is a store of misses, in which one loads at a time."""
    store = BackendStore(NullCache())
    assert store.write("key", entry()) is True
    lease = store.lease("key", None)
    assert isinstance(store.lease("key", None), Busy)
    store.settle(lease, entry())
    assert store.read("key") is None
    assert store.delete("key") is True


def test_patterns_are_refused(clock):
    """The message names the backend and what to do."""
    with pytest.raises(CacheUnavailable, match=r"SimpleCache cannot list its keys; give .* a tag"):
        BackendStore(SimpleCache()).forget("user:*")


def test_bad_arguments():
    """A lease that lasts no time is refused."""
    with pytest.raises(ValueError, match="lease_s must be above 0"):
        BackendStore(SimpleCache(), lease_s=0)


def test_explaining(clock):
    """It says where the entry is, who is at the key and what is still to be told, as JSON."""
    backend = Failing()
    store = BackendStore(backend)
    assert store.explain("key") == {
        "level": None, "lease": "none", "backend": "Failing", "is_away": False, "repairs": 0
    }  # fmt: skip
    store.write("key", entry(tags=("a",)))
    clock.advance(5)
    store.lease("key", store.read("key"))
    said = store.explain("key")
    assert (said["level"], said["lease"]) == ("backend", "load")
    assert (said["age_s"], said["fresh_for_s"], said["gone_in_s"]) == (5, 595, 595)
    assert (said["bytes"], said["tags"], said["is_negative"]) == (5, ["a"], False)
    backend.is_away = True
    store.delete("key")
    said = store.explain("key")
    assert (said["level"], said["is_away"], said["repairs"]) == (None, True, 1)
    json.dumps(said)
    assert repr(store) == "<BackendStore over Failing>"


# --- A backend that fails -------------------------------------------------------------------------


class Failing(SimpleCache):
    """Fails as it is told: raises, or says False."""

    def __init__(self):
        super().__init__(threshold=100_000)
        self.is_away = self.refuses = False
        self.calls = []

    def _fail(self, name):
        self.calls.append(name)
        if self.is_away:
            raise ConnectionError("nobody there")
        return self.refuses

    def get(self, key):
        self._fail("get")
        return super().get(key)

    def set(self, key, value, timeout=None):
        return False if self._fail("set") else super().set(key, value, timeout)

    def delete(self, key):
        return False if self._fail("delete") else super().delete(key)


def test_a_backend_that_is_away(clock, caplog):
    """Reads are misses, changes are False, each is counted, and both turns are logged once."""
    backend, told = Failing(), []
    store = BackendStore(backend, tell=lambda *what: told.append(what))
    store.write("key", entry())
    backend.is_away = True
    with caplog.at_level(logging.INFO, backend_store.__name__):
        for _ in range(3):
            assert store.read("key") is None
            assert store.read_many(["key", "other"]) == {}
        assert store.write("key", entry()) is False
        assert store.write_many({"a": entry(), "b": entry()}) is False
        assert store.delete("key") is False
        assert store.invalidate_tag("tag", keep_stale=False) is False
        lease = store.lease("other", None)
        assert isinstance(lease, Lease)
        assert isinstance(store.lease("other", None), Busy)
        assert store.settle(lease, entry()) is False
        assert store.end_write(store.begin_write("key"), entry()) is False
        backend.is_away = False
        for _ in range(3):
            store.read("key")
    assert {status for _, status, _ in told} == {"unavailable"}
    assert {operation for operation, _, _ in told} >= {"get", "set", "delete"}
    assert [(record.levelname, "Failing" in record.message) for record in caplog.records] == [
        ("WARNING", True), ("INFO", True)
    ]  # fmt: skip
    assert "nobody there" in caplog.records[0].message


def test_a_backend_that_refuses(clock, caplog):
    """Changes are False and counted, reads go on, and it is logged once a minute at most."""
    backend, told = Failing(), []
    store = BackendStore(backend, tell=lambda *what: told.append(what))
    store.write("key", entry())
    backend.refuses = True
    for _ in range(10):
        assert store.write("other", entry()) is False
        assert store.delete("third") is True
        assert payload(store, "key") == b"value"
        clock.advance(12)
    assert set(told) == {("set", "unavailable", None)}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "Failing has refused to set" in caplog.text


@pytest.mark.parametrize("how", ["is_away", "refuses"])
def test_a_delete_that_failed_is_made_up_for(clock, how):
    """The old value is served no more, and is deleted for all before the next read."""
    backend = Failing()
    store, other = BackendStore(backend), BackendStore(backend)
    for key in ("deleted", "written", "source", "loaded"):
        store.write(key, entry(b"old"))
    lease = store.lease("loaded", store.read("loaded"))
    write = store.begin_write("source")
    setattr(backend, how, True)
    assert store.delete("deleted") is False
    assert store.write("written", entry(b"new")) is False
    assert store.end_write(write, entry(b"new")) is False
    assert store.settle(lease, entry(b"new")) is False
    keys = ["deleted", "written", "source"]
    assert store.read_many(keys) == {}
    # One that refuses has taken the value away when the write began.
    assert store.explain("key")["repairs"] == (3 if how == "is_away" else 2)
    setattr(backend, how, False)
    assert payload(other, "deleted") == b"old"
    store.read("any")
    assert other.read_many(keys) == {}
    assert store.explain("key")["repairs"] == 0


def test_a_later_write_makes_up_for_a_delete(clock):
    """What was written after the backend is back is there, though a delete had failed."""
    backend = Failing()
    store = BackendStore(backend)
    store.write("key", entry(b"old"))
    backend.is_away = True
    store.delete("key")
    store.delete("loaded")
    lease = store.lease("loaded", None)
    backend.is_away = False
    assert store.write("key", entry(b"new")) is True
    assert store.settle(lease, entry(b"new")) is True
    assert [payload(store, key) for key in ("key", "loaded")] == [b"new", b"new"]


@pytest.mark.parametrize("keep_stale", [False, True])
def test_a_tag_that_failed_is_made_up_for(clock, keep_stale):
    """This process serves it as invalid at once, the others after its next use of the backend."""
    backend = Failing()
    store, other = BackendStore(backend), BackendStore(backend)
    for key in ("key", "key2"):
        store.write(key, entry(tags=("a",)))
    backend.is_away = True
    assert store.invalidate_tag("a", keep_stale=keep_stale) is False
    backend.is_away = False
    assert other.read("key").fresh_until > SYSTEM.now()
    for reader in (store, other):
        found = reader.read("key")
        assert found.fresh_until <= SYSTEM.now() if keep_stale else found is None


class Stuck(Failing):
    """Refuses to delete some names."""

    def __init__(self, *keys):
        super().__init__()
        self.names = [f"muset:e:{key}" for key in keys]

    def delete(self, key):
        return False if key in self.names else super().delete(key)


def test_one_key_that_cannot_be_deleted_stops_no_other(clock, monkeypatch):
    """It is tried again and again, never served, and all others are served and made up for."""
    monkeypatch.setattr(backend_store, "_MANY", 20)
    backend = Stuck("a", "b")
    store = BackendStore(backend)
    store.write_many({key: entry() for key in ("a", "b", "c")})
    assert store.delete_many(["a", "b"]) is False
    backend.names.pop()
    for _ in range(2):
        assert store.read_many(["a", "b", "c"]).keys() == {"c"}
    assert store.explain("c")["repairs"] == 1
    backend.calls.clear()
    store.read("c")
    assert len(backend.calls) < 10
    assert backend.get("muset:e:b") is None
    store.write_many({str(number): entry() for number in range(100)})
    assert store.read("a") is None


def test_a_new_value_of_a_key_that_cannot_be_deleted(clock):
    """What was written or loaded since the delete is served, and not deleted later."""
    backend = Stuck("written", "loaded")
    store = BackendStore(backend)
    store.write_many({key: entry(b"old") for key in ("written", "loaded")})
    assert store.delete_many(["written", "loaded"]) is False
    assert store.write("written", entry(b"new")) is True
    assert store.settle(store.lease("loaded", None), entry(b"new")) is True
    backend.names.clear()
    for _ in range(2):
        assert [payload(store, key) for key in ("written", "loaded")] == [b"new", b"new"]
    assert store.explain("written")["repairs"] == 0


def test_what_is_owed_is_bounded(clock, monkeypatch):
    """With too much to make up for, nothing older is served by anybody, and what is new is."""
    monkeypatch.setattr(backend_store, "_MANY", 100)
    backend = Failing()
    store, other = BackendStore(backend), BackendStore(backend)
    store.write_many({str(number): entry() for number in range(150)})
    store.write("untouched", entry())
    for number in range(150):
        if number == 75:
            clock.advance(1)
            backend.is_away = False
            other.write("late", entry())
        backend.is_away = True
        assert store.delete("late" if number == 75 else str(number)) is False
    assert store.explain("key")["repairs"] <= 100
    backend.is_away = False
    keys = ["late", "untouched", *map(str, range(150))]
    assert store.read_many(keys) == {}
    assert other.read_many(keys) == {}
    assert store.write("new", entry()) is True
    assert payload(other, "new") == b"value"
    assert len(store._since) <= 101


def test_real_redis_away(clock, redis_server):
    """A Redis that is killed is a miss, and the deletes it has not heard of are made up for."""
    client = redis.Redis.from_url(redis_server.url, socket_timeout=1, retry=None)
    store = BackendStore(RedisCache(client))
    store.write("key", entry(b"old"))
    redis_server.freeze()
    assert store.delete("key") is False
    assert store.read("key") is None
    redis_server.thaw()
    assert store.read("key") is None
    assert client.exists("muset:e:key") == 0
    store.write("key", entry(b"new"))
    redis_server.kill()
    assert store.read("key") is None
    assert store.write("key", entry()) is False
    redis_server.start()
    assert store.read("key") is None
    assert store.write("key", entry()) is True
    client.close()


def test_bytes_are_all_that_redis_is_given(clock, redis_server):
    """cachelib pickles our bytes and nothing else: no class is named in what Redis has."""
    with redis_cache(redis_server) as backend:
        BackendStore(backend).write("key", entry())
        raw = backend._read_client.get("flask_cache_muset:e:key")
    assert raw[:1] == b"!"
    assert isinstance(pickle.loads(raw[1:]), bytes)
    assert b"flask_muset" not in raw


# --- At the same time -----------------------------------------------------------------------------


class Halting(SimpleCache):
    """Stops the next `set` until it is let go, as a slow server does."""

    def __init__(self):
        super().__init__()
        self.halts = False
        self.has_come, self.may_go = threading.Event(), threading.Event()

    def set(self, key, value, timeout=None):
        if self.halts:
            self.halts = False
            self.has_come.set()
            assert self.may_go.wait(10)
        return super().set(key, value, timeout)


CHANGES = {
    "delete": (lambda store: store.delete("key"), None),
    "write": (lambda store: store.write("key", entry(b"new")), b"new"),
    "begin_write": (lambda store: store.begin_write("key"), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_while_a_load_is_put_in(name):
    """What comes into the backend after a change that overtook it is never served, and is gone."""
    change, _ = CHANGES[name]
    backend = Halting()
    store, other = BackendStore(backend), BackendStore(backend)
    lease = store.lease("key", None)
    backend.halts = True
    results = []
    loader = threading.Thread(target=lambda: results.append(store.settle(lease, entry(b"old"))))
    loader.start()
    assert backend.has_come.wait(10)
    change(store)
    seen = [payload(store, "key")]
    backend.may_go.set()
    while loader.is_alive():
        seen.append(payload(store, "key"))
    loader.join()
    assert results == [False]
    assert b"old" not in seen
    assert payload(store, "key") is None
    assert other.read("key") is None


def test_a_write_that_overlaps_another():
    """While one write of the source is put in another one begins: neither value is left."""
    backend = Halting()
    store, other = BackendStore(backend), BackendStore(backend)
    first = store.begin_write("key")
    backend.halts = True
    ended = []
    writer = threading.Thread(target=lambda: ended.append(store.end_write(first, entry(b"1"))))
    writer.start()
    assert backend.has_come.wait(10)
    second = store.begin_write("key")
    backend.may_go.set()
    writer.join()
    assert ended == [True]
    assert (store.read("key"), other.read("key")) == (None, None)
    assert store.end_write(second, entry(b"2")) is True
    assert store.read("key") is None


def test_of_writes_at_once_none_is_shown(clock):
    """Who knows already that his write is not alone puts nothing in, not even for a moment."""
    backend = Failing()
    store = BackendStore(backend)
    writes = [store.begin_write("key"), store.begin_write("key")]
    assert [store.end_write(write, entry()) for write in writes] == [True, True]
    assert "set" not in backend.calls


def test_all_that_is_loaded_may_be_loaded_anew(clock):
    """When everything is made invalid nobody waits for a load that has begun before."""
    store = BackendStore(SimpleCache())
    lease = store.lease("key", None)
    store.invalidate_tag("", keep_stale=False)
    assert isinstance(store.lease("key", None), Lease)
    assert store.settle(lease, entry()) is False


class CutOff(BaseException):
    """As a deadline cuts off who waits."""


def test_being_cut_off(clock):
    """Whoever is cut off within the backend leaves nothing behind that is served or that waits."""
    backend = Failing()
    store, other = BackendStore(backend), BackendStore(backend)
    store.write_many({key: entry(b"old") for key in ("deleted", "written", "loaded")})
    lease = store.lease("loaded", store.read("loaded"))

    def cut(_name):
        raise CutOff

    normal, backend._fail = backend._fail, cut
    for attempt in (
        lambda: store.delete("deleted"),
        lambda: store.write("written", entry(b"new")),
        lambda: store.settle(lease, entry(b"new")),
        lambda: store.lease("asked", None),
    ):
        with pytest.raises(CutOff):
            attempt()
    backend._fail = normal
    assert store.read_many(["deleted", "written"]) == {}
    assert other.read_many(["deleted", "written"]) == {}
    assert isinstance(store.lease("asked", None), Lease)
    # The caller ends its lease again, as it cannot know.
    assert store.settle(lease, entry(b"new")) is True
    assert payload(store, "loaded") == b"new"


def test_being_cut_off_too_late(clock):
    """What has come into the backend although its load was cut off is deleted for all."""

    class Late(SimpleCache):
        def set(self, key, value, timeout=None):
            super().set(key, value, timeout)
            raise CutOff

    backend = Late()
    store, other = BackendStore(backend), BackendStore(backend)
    lease = store.lease("key", None)
    with pytest.raises(CutOff):
        store.settle(lease, entry())
    assert payload(other, "key") == b"value"
    assert store.read("key") is None
    assert other.read("key") is None


def test_under_gevent(redis_server):
    """Greenlets load once, and of many changes at once nothing old is left."""
    result = run_patched(
        """
        import sys
        import redis
        from flask_caching.backends import RedisCache
        from flask_muset.cache_strategies.backend_store import BackendStore
        from flask_muset.cache_strategies.entry import Entry, Lease
        from flask_muset.clock import SYSTEM

        store = BackendStore(RedisCache(redis.Redis.from_url(sys.argv[1])))
        got = [gevent.spawn(store.lease, "key", None) for _ in range(50)]
        gevent.joinall(got)
        leases = [one.value for one in got if isinstance(one.value, Lease)]

        source = [0]

        def load():
            lease = store.lease("number", store.read("number"))
            if isinstance(lease, Lease):
                number = source[0]
                gevent.sleep(0.001)
                store.settle(lease, Entry(b"%d" % number, created_at=SYSTEM.now()))

        def change():
            source[0] += 1
            gevent.sleep(0.001)
            store.delete("number")

        wrong = 0
        for _ in range(30):
            gevent.joinall([gevent.spawn(one) for one in [load, load, change, load, change, load]])
            found = store.read("number")
            wrong += found is not None and found.payload != b"%d" % source[0]
        result = [len(leases), wrong]
        """,
        redis_server.url,
    )
    assert result == [1, 0]


def test_an_entry_that_is_too_large(clock):
    """It is refused by name before anything changes."""
    store = BackendStore(SimpleCache())
    store.write("key", entry(b"old"))
    with pytest.raises(ValueError, match="an entry takes"):
        store.write_many({"key": entry(b"new"), "large": entry(bytes((64 << 20) + 1))})
    assert payload(store, "key") == b"old"


def test_entries_of_an_older_process(clock):
    """What a process before this one has written is served, its moments by this one's clock."""
    backend = SimpleCache()
    now = SYSTEM.now()
    old = Entry(
        b"value", created_at=now, fresh_until=now + 5, gone_at=NEVER, began_us=int(SYSTEM.wall())
    )
    backend.set("muset:e:key", pack(old, round((SYSTEM.wall() - now) * 1e6)))
    store = BackendStore(backend)
    found = store.read("key")
    assert found.payload == b"value"
    assert found.fresh_until == pytest.approx(now + 5, abs=1e-5)
