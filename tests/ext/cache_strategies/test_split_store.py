"""Two Redis: one for what is only cached, one for what waits and the entries that go with it."""

import random
import threading
import time

import pytest
from cache_worker import CacheWorker
from flask import Flask
from redis_server import keys_of, running
from waiting import until

from flask_muset import CacheStrategies
from flask_muset.errors import CacheUnavailable
from flask_muset.redis import GuardedRedis

_KEPT = ["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"]
_EVICTED = ["--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru"]
#: One that a busy machine keeps; who is frozen is waited for as long.
_BUDGETS_S = {"killed": 5.0, "frozen": 1.0}


@pytest.fixture
def journal_server(tmp_path_factory):
    """A Redis that loses nothing."""
    with running(tmp_path_factory.mktemp("journal"), *_KEPT) as server:
        yield server


@pytest.fixture
def cache_server(tmp_path_factory):
    """A Redis that evicts what it likes, and keeps nothing on disk."""
    with running(tmp_path_factory.mktemp("cache"), *_EVICTED) as server:
        yield server


def app_over(cache_server, journal_server, **config):
    app = Flask("shop")
    urls = {"REDIS_URL": cache_server.url, "JOURNAL_REDIS_URL": journal_server.url}
    settings = {"DRAIN": False, "WRITE_DELAY": 0, "REDIS_BUDGET": 2.0, **urls, **config}
    app.config.update({f"CACHE_STRATEGIES_{key}": value for key, value in settings.items()})
    return app


class Shop:
    """An app with a writer of `user:*` that writes into a dictionary; the rest is only cached."""

    def __init__(self, *servers, **config):
        self.source = {}
        self.cache = CacheStrategies()
        self.cache.writer("save", patterns=["user:*"])(self.save)
        app = app_over(*servers, **config)
        self.cache.init_app(app)
        self.state = app.extensions["cache_strategies"]

    def save(self, value, context):
        """Keep the last value of a key."""
        self.source[context.key] = value

    def put(self, key, value, expire=60):
        """Write behind."""
        return self.cache.write_behind(key, value, self.save, expire)

    def close(self):
        """Let go of both Redis."""
        self.state.store.close()
        for redis in (self.state.redis, self.state.cache.behind.journal._redis):
            redis.close()


@pytest.fixture
def make(cache_server, journal_server):
    """A function that makes a shop, closed afterwards."""
    made = []

    def make(**config):
        made.append(Shop(cache_server, journal_server, **config))
        return made[-1]

    yield make
    for shop in made:
        shop.close()


def entries(server):
    """The keys that a Redis has entries of."""
    prefix = "muset:default:c1:"
    return {key.removeprefix(prefix) for key in keys_of(server, f"{prefix}*")}


# --- Which key is where


def test_each_key_has_its_place(make, cache_server, journal_server):
    """Sets, loads, writes and deletes of one key or of many go where its pattern says."""
    cache = make().cache
    cache.set("user:1", 1)
    cache.set_many({"user:2": 2, "page:2": 2})
    cache.cache_aside("page:3", lambda: 3, 60)
    cache.cache_aside("user:3", lambda: 3, 60)
    cache.write_through("user:4", 4, lambda value: None, 60)
    cache.write_through("page:4", 4, lambda value: None, 60)
    assert entries(cache_server) == {"page:2", "page:3", "page:4"}
    assert entries(journal_server) == {"user:1", "user:2", "user:3", "user:4"}
    other = make().cache
    keys = ["user:1", "page:2", "user:3", "page:4", "none"]
    assert other.get_many(keys) == {"user:1": 1, "page:2": 2, "user:3": 3, "page:4": 4}
    other.delete("page:2")
    assert entries(cache_server) == {"page:3", "page:4"}
    assert other.explain("page:3")["level"] == other.explain("user:1")["level"] != "memory"


def test_what_no_writer_owns_is_not_written_behind(make):
    """Nobody could tell where its value is: the error names the cure."""
    shop = make()
    with pytest.raises(ValueError, match=r"'page:1' cannot be written behind.*patterns=\["):
        shop.put("page:1", 1)
    assert shop.cache.pending()["pending"] == 0
    off = make(ENABLED=False)
    with pytest.raises(ValueError, match="cannot be written behind"):
        off.put("page:1", 1)
    assert off.put("user:1", 1) is True
    assert off.cache.cache_aside("user:1", lambda: "old", 60) == 1


def test_patterns_and_tags_reach_both(make):
    """Counts are the sum of both; a tag makes entries of both invalid."""
    cache = make().cache
    for number in range(3):
        cache.set(f"user:{number}", 1, tags=["t"])
        cache.set(f"page:{number}", 1, tags=["t"])
    assert cache.delete_pattern("*:1") == 2
    assert cache.delete_pattern("user:*") == 2
    assert cache.delete_pattern("page:0") == 1
    assert cache.get("page:2") == 1
    cache.set("user:2", 1, tags=["t"])
    assert cache.delete_tag("t") is True
    assert cache.get_many(["user:2", "page:2"]) == {}
    assert cache.delete_pattern("*") == 2  # Redis keeps what is invalid until its time ends


@pytest.mark.parametrize("key", ["user:1", "page:1"])
@pytest.mark.parametrize("change", ["delete", "delete_pattern", "delete_tag", "write"])
def test_a_load_that_began_before_is_not_kept(make, key, change):
    """Whatever makes a key invalid in another process ends the loads of its store."""
    one, other = make(), make()
    begun, over = threading.Event(), threading.Event()

    def load():
        begun.set()
        assert over.wait(20)
        return "old"

    late = threading.Thread(
        target=one.cache.cache_aside, args=(key, load, 60), kwargs={"tags": ["t"]}
    )
    late.start()
    assert begun.wait(20)
    if change == "write":
        other.cache.write_through(key, "new", lambda value: None, 60)
    else:
        getattr(other.cache, change)("t" if change == "delete_tag" else key)
        other.cache.flush(10)
    over.set()
    late.join()
    expected = "new" if change == "write" else None
    assert [one.cache.get(key), other.cache.get(key)] == [expected, expected]


# --- Settings


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"JOURNAL_REDIS_URL": "redis://h/0"}, "set CACHE_STRATEGIES_REDIS_URL with"),
        ({"REDIS_URL": "redis://h/0", "JOURNAL_REDIS_URL": "h"}, "JOURNAL_REDIS_URL must be"),
        (
            {"REDIS_URL": "redis://h/0", "JOURNAL_REDIS_URL": "redis://:hunter2@h:port/0"},
            "CACHE_STRATEGIES_JOURNAL_REDIS_URL: the URL of Redis cannot",
        ),
    ],
)
def test_a_wrong_setting_stops_the_start(config, text):
    """The message names the setting and the cure, and shows no password."""
    app = Flask("app")
    app.config.update({f"CACHE_STRATEGIES_{key}": value for key, value in config.items()})
    with pytest.raises(ValueError, match=text) as caught:
        CacheStrategies(app)
    assert "hunter2" not in str(caught.value)


def test_clients_are_given_together():
    """One of the two alone would leave the other one's prefix to chance."""
    client = GuardedRedis("redis://127.0.0.1:1/0", prefix="one:")
    with pytest.raises(ValueError, match="give redis with journal_redis"):
        CacheStrategies(Flask("app"), journal_redis=client)
    app = Flask("app")
    app.config["CACHE_STRATEGIES_JOURNAL_REDIS_URL"] = "redis://127.0.0.1:1/0"
    with pytest.raises(ValueError, match="give redis with journal_redis"):
        CacheStrategies(app, redis=client)


def test_what_could_be_lost_depends_on_the_journals_redis_alone(make, cache_server, journal_server):
    """A cache that evicts and forgets is no risk; as the journal it refuses to start."""
    shop = make(REQUIRE_DURABLE=True)
    assert shop.cache.pending()["pending"] == 0
    assert shop.put("user:1", 1) is True
    with pytest.raises(RuntimeError, match="Redis may evict what waits"):
        Shop(journal_server, cache_server, REQUIRE_DURABLE=True)


# --- What can happen to one of them


@pytest.mark.claim("The cache's Redis is full and evicts: no write that waits is lost")
def test_eviction_takes_nothing_that_waits(make, cache_server, prove):
    """Under allkeys-lru with too little memory all that was accepted is read and written."""
    shop, count = make(L1_MAX_BYTES=0, REDIS_BUDGET=5.0), 2000 if prove.full else 200
    client = GuardedRedis(cache_server.url, budget_s=5)
    large, evicted = random.Random(1).randbytes(100_000), 0
    for number in range(count):
        assert shop.put(f"user:{number}", number) is True
        shop.cache.set(f"page:{number}", large)
    for line in client.execute("INFO", "stats").decode().splitlines():
        if line.startswith("evicted_keys:"):
            evicted = int(line.partition(":")[2])
    client.close()
    assert shop.cache.pending()["pending"] == count
    values = {f"user:{number}": number for number in range(count)}
    assert shop.cache.get_many(values) == values
    assert shop.cache.flush(60) is True
    prove.figure(f"{evicted} entries evicted, {count - len(shop.source)} of {count} writes lost")
    assert evicted > 0
    assert shop.source == values


@pytest.mark.claim("The cache's Redis is away: writes behind are accepted and read")
@pytest.mark.parametrize("way", ["killed", "frozen"])
def test_the_cache_is_away(make, cache_server, way):
    """What is only cached is loaded or served by the memory; what waits knows nothing of it."""
    shop = make(REDIS_BUDGET=_BUDGETS_S[way])
    shop.cache.set("page:1", 1)
    # The first link empties the memory.
    until(lambda: shop.cache.explain("page:1")["invalidations"] == "linked")
    if way == "killed":
        cache_server.kill()
    else:
        cache_server.freeze()
    assert shop.cache.set("page:2", 2) is False
    assert shop.cache.get("page:2") == 2
    assert shop.cache.cache_aside("page:3", lambda: 3, 60) == 3
    assert shop.put("user:1", 1) is True
    assert shop.cache.get_many(["user:1", "page:2"]) == {"user:1": 1, "page:2": 2}
    assert make().cache.get("user:1") == 1
    assert shop.cache.delete_pattern("user:*") == 1
    assert shop.cache.get("user:1") == 1  # it waits still
    with pytest.raises(CacheUnavailable):
        shop.cache.delete_pattern("*:1")
    assert shop.cache.delete_tag("t") is False
    assert shop.cache.flush(10) is True
    assert shop.source == {"user:1": 1}
    if way == "killed":
        cache_server.start()
    else:
        cache_server.thaw()
    until(lambda: shop.cache.set("page:2", 3))
    until(lambda: make().cache.get("page:2") == 3)


@pytest.mark.claim("The journal's Redis is away: False, and reads of the cache do not ask it")
@pytest.mark.parametrize("way", ["killed", "frozen"])
def test_the_journal_is_away(make, cache_server, journal_server, way):
    """Nothing is accepted and nothing changes; what is only cached goes on, and asks nothing."""
    shop = make(REDIS_BUDGET=_BUDGETS_S[way], L1_MAX_BYTES=0)
    assert shop.put("user:1", "kept") is True
    calls, journal = [], shop.state.store.owned._redis
    shop.cache.set("page:1", 1)
    if way == "killed":
        journal_server.kill()
    else:
        journal_server.freeze()
    journal.on_call = lambda *call: calls.append(call)
    assert shop.cache.get("page:1") == 1
    assert shop.cache.get_many(["page:1", "none"]) == {"page:1": 1}
    assert shop.cache.cache_aside("page:2", lambda: 2, 60) == 2
    assert shop.cache.delete("page:1") is True
    assert shop.cache.delete_pattern("page:*") == 1
    assert calls == []
    assert shop.put("user:1", "refused") is False
    assert shop.cache.delete("user:2") is False
    assert shop.cache.cache_aside("user:3", lambda: 3, 60) == 3
    with pytest.raises(CacheUnavailable):
        shop.cache.delete_pattern("user:*")
    assert shop.cache.set("page:3", 3) is True
    assert shop.cache.write_through("page:4", 4, lambda value: None, 60) is True
    assert shop.cache.get("page:4") == 4
    if way == "killed":
        journal_server.start()
    else:
        journal_server.thaw()
    until(lambda: shop.cache.get("user:1") == "kept")
    assert shop.cache.flush(10) is True
    assert shop.source["user:1"] == "kept"


def test_both_are_away_and_come_back(make, cache_server, journal_server):
    """An app starts without them, and what is made invalid meanwhile is made up for in both."""
    make().cache.set_many({"user:1": "old", "page:1": "old"})
    for server in (cache_server, journal_server):
        server.freeze()
    shop = make(REDIS_BUDGET=0.2)
    assert shop.cache.invalidate("user:1") is False
    assert shop.cache.invalidate("page:1") is False
    for server in (cache_server, journal_server):
        server.thaw()
    until(lambda: entries(cache_server) == entries(journal_server) == set())
    until(lambda: shop.put("user:1", "new"))
    until(lambda: shop.cache.set("page:1", "new"))


# --- Several processes

_WRITERS = """
source = {}
@cache.writer("save", patterns=["user:*"])
def save(value, context):
    source[context.key] = value
until(lambda: cache.get("user:0") is None and state.store.owned._feed.is_linked)
"""


@pytest.mark.claim("Two Redis, a change in worker A: no stale read in worker B after 100 ms")
def test_the_memories_of_all_processes_hear_of_changes(cache_server, journal_server, prove):
    """Of both Redis; and what one process has accepted another one reads and writes."""
    config = {"JOURNAL_REDIS_URL": journal_server.url, "DRAIN": False, "REDIS_BUDGET": 2.0}
    a, b = workers = [CacheWorker(cache_server.url, **config) for _ in range(2)]
    longest = 0.0
    try:
        for worker in workers:
            worker.run(_WRITERS)
        for number in range(100 if prove.full else 10):
            for key, change in (
                ("page:1", f"cache.set('page:1', {number})"),
                ("user:1", f"cache.write_behind('user:1', {number}, save, 60)"),
            ):
                assert a.run(f"result = {change}") is True
                changed_at = time.monotonic()
                until(lambda key=key, number=number: b.get(key) == number)
                longest = max(longest, time.monotonic() - changed_at)
                in_memory = f"cache.get({key!r}); result = bool(state.store.peek({key!r}))"
                until(lambda code=in_memory: b.run(code))
        prove.figure(f"the last old read {longest * 1e3:.1f} ms after a change")
        if prove.full:
            assert longest < 0.1
        assert b.run("result = cache.flush(10), source") == [True, {"user:1": number}]
    finally:
        for worker in workers:
            worker.kill()
