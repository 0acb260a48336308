"""The tests that every store must pass, on our stores; and that they find what stores do wrong."""

import copy
import threading
import time

import pytest

from flask_muset.cache_strategies.entry import NEVER, Busy, Entry, Lease, Write
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.cache_strategies.patterns import compile_pattern
from flask_muset.cache_strategies.split_store import SplitStore
from flask_muset.cache_strategies.tiered_store import TieredStore
from flask_muset.cache_strategies.writers import Declarations, Writers
from flask_muset.clock import SYSTEM
from flask_muset.redis import GuardedRedis
from flask_muset.testing import CacheStoreSuite, virtual_clock

# --- Our stores -----------------------------------------------------------------------------------


class TestLocalStore(CacheStoreSuite):
    """The store of one process."""

    lease_s = 10.0

    @pytest.fixture
    def store(self, clock):
        return LocalStore(64 * 2**20)


class TestSmallLocalStore(CacheStoreSuite):
    """The same, where not all that is written has room."""

    capacity_bytes = 4 * 2**20
    lease_s = 10.0

    @pytest.fixture
    def store(self, clock):
        return LocalStore(4 * 2**20)

    def test_payloads_of_any_size_and_bytes(self, store):
        """What takes more than a quarter of the room is not kept, and takes nothing away."""
        store.write("small", Entry(b"small", created_at=SYSTEM.now()))
        assert store.write("large", Entry(bytes(2**20), created_at=SYSTEM.now())) is True
        assert store.read("large") is None
        assert store.read("small").payload == b"small"


class TestTieredStore(CacheStoreSuite):
    """A memory over a real Redis, in use before it has begun to listen."""

    max_bytes = 64 * 2**20

    @pytest.fixture
    def store(self, redis_server):
        # A budget that a busy machine keeps: what is late is another test's concern.
        client = GuardedRedis(redis_server.url, budget_s=2.0)
        store = TieredStore(client, max_bytes=self.max_bytes)
        yield store
        store.close()
        client.close()


class TestRedisAlone(TestTieredStore):
    """The same without a memory."""

    max_bytes = 0


class TestLinkedTieredStore(TestTieredStore):
    """A memory that hears of other processes' changes."""

    @pytest.fixture
    def store(self, redis_server):
        client = GuardedRedis(redis_server.url, budget_s=2.0)
        store = TieredStore(client, max_bytes=self.max_bytes)
        store.read("anything")
        for _ in range(500):
            if store._feed.is_linked:
                break
            time.sleep(0.01)
        assert store._feed.is_linked
        yield store
        store.close()
        client.close()


def split(url, other_url, patterns, **options):
    """A store over two Redis, of which a writer owns what matches; and its clients."""
    writers = Declarations()
    writers.declare("owner", patterns=patterns)(print)
    clients = [GuardedRedis(one, **options) for one in (url, other_url)]
    stores = [TieredStore(client, max_bytes=64 * 2**20) for client in clients]
    return SplitStore(*stores, Writers([writers])), clients


class TestSplitStore(CacheStoreSuite):
    """Two real Redis; of the keys that the suite uses each has some."""

    patterns = ("k*", "*1", "é*", "a:*", "*\\*", "x*")

    @pytest.fixture
    def store(self, redis_server, other_redis_server):
        store, clients = split(
            redis_server.url, other_redis_server.url, self.patterns, budget_s=2.0
        )
        yield store
        store.close()
        for client in clients:
            client.close()


# --- A store that is right, and many that are not -------------------------------------------------


class PlainStore:
    """The protocol in the plainest way: dictionaries, one lock, and a clock that counts events."""

    def __init__(self):
        self._lock = threading.RLock()
        self._events = 0
        self._entries = {}
        self._leases = {}
        self._backoffs = {}
        self._writes = {}
        self._invalid = {"gone": {}, "stale": {}}

    def __getattribute__(self, name):
        """All public methods run one after the other."""
        found = object.__getattribute__(self, name)
        if name.startswith("_"):
            return found

        def locked(*args, **kwargs):
            with self._lock:
                return found(*args, **kwargs)

        return locked

    def _now_us(self):
        self._events += 1
        return self._events

    def _latest(self, how, entry):
        return max(self._invalid[how].get(tag, (0, 0)) for tag in ("", *entry.tags))

    def read(self, key):
        entry = self._entries.get(key)
        if entry is None or SYSTEM.now() >= entry.gone_at:
            return None
        if entry.began_us <= self._latest("gone", entry)[0]:
            return None
        began_us, at = self._latest("stale", entry)
        if entry.began_us <= began_us:
            entry = copy.copy(entry)
            entry.fresh_until = min(entry.fresh_until, at)
        return entry

    def read_many(self, keys):
        found = {key: self.read(key) for key in keys}
        return {key: entry for key, entry in found.items() if entry is not None}

    def write(self, key, entry):
        self._change(key)
        self._put(key, entry, self._now_us())
        return True

    def write_many(self, entries):
        return all(self.write(key, entry) for key, entry in entries.items())

    def delete(self, key):
        self._change(key)
        self._entries.pop(key, None)
        return True

    def delete_many(self, keys):
        return all(self.delete(key) for key in keys)

    def _put(self, key, entry, began_us):
        entry.began_us = began_us
        self._entries[key] = entry

    def _change(self, key):
        self._end_load(key)
        self._backoffs.pop(key, None)
        if key in self._writes:
            self._writes[key][1] = None

    def _end_load(self, key):
        self._leases.pop(key, None)

    def lease(self, key, known, *, anyway=False):
        entry = self.read(key)
        if entry is not None and (known is None or entry.began_us != known.began_us):
            return entry
        if key in self._writes:
            return Busy(is_write=True)
        if self._is_held(key):
            return Busy()
        if SYSTEM.now() < self._backoffs.get(key, 0) and not anyway:
            return Busy(is_backoff=True)
        lease = Lease(key, b"", self._now_us())
        self._leases[key] = lease, SYSTEM.now()
        return lease

    def _is_held(self, key):
        return key in self._leases and SYSTEM.now() < self._leases[key][1] + 3

    def settle(self, lease, entry, *, backoff_s=0.0):
        if self._leases.get(lease.key, [None])[0] is not lease:
            return False
        del self._leases[lease.key]
        self._backoffs[lease.key] = SYSTEM.now() + backoff_s
        if entry is not None:
            self._put(lease.key, entry, lease.began_us)
        return entry is not None

    def begin_write(self, key):
        self._change(key)
        self._entries.pop(key, None)
        write = Write(key, b"", self._now_us())
        count = self._writes[key][0] if key in self._writes else 0
        self._writes[key] = [count + 1, None if count else write]
        return write

    def end_write(self, write, entry):
        count, only = self._writes.pop(write.key)
        if count > 1:
            self._writes[write.key] = [count - 1, None]
        self._entries.pop(write.key, None)
        if only is write and entry is not None:
            self._put(write.key, entry, self._now_us())
        return True

    def forget(self, pattern):
        matches = compile_pattern(pattern)
        found = [key for key in self._entries if matches(key)]
        count = len(self.read_many(found))
        for key in {*found, *filter(matches, self._leases), *filter(matches, self._backoffs)}:
            self.delete(key)
        return count

    def invalidate_tag(self, tag, *, keep_stale):
        how = "stale" if keep_stale else "gone"
        self._invalid[how][tag] = self._now_us(), SYSTEM.now()
        return True

    def explain(self, key):
        entry = self.read(key)
        return {"bytes": None if entry is None else len(entry.payload)}

    def close(self):
        pass


class TestPlainStore(CacheStoreSuite):
    """What the protocol says can be done, in a few lines."""

    lease_s = 3.0

    @pytest.fixture
    def store(self, clock):
        return PlainStore()


class LosesEntries(PlainStore):
    def write_many(self, entries):
        return super().write_many(dict(list(entries.items())[:1000]))


class ServesWhatIsGone(PlainStore):
    def write(self, key, entry):
        entry.gone_at = NEVER
        return super().write(key, entry)


class HidesWhatIsStale(PlainStore):
    def read(self, key):
        entry = super().read(key)
        return None if entry is None or entry.fresh_until <= SYSTEM.now() else entry


class StripsKeys(PlainStore):
    def _put(self, key, entry, began_us):
        super()._put(key.strip(), entry, began_us)


class CutsKeys(PlainStore):
    def read(self, key):
        return super().read(key[:250])

    def _put(self, key, entry, began_us):
        super()._put(key[:250], entry, began_us)


class TakesTextForBytes(PlainStore):
    def _put(self, key, entry, began_us):
        entry.payload = entry.payload.decode("latin-1").strip("\0").encode("latin-1")
        super()._put(key, entry, began_us)


class ForgetsTags(PlainStore):
    def _put(self, key, entry, began_us):
        entry.tags = entry.tags[:1]
        super()._put(key, entry, began_us)


class GivesManyLeases(PlainStore):
    def _is_held(self, key):
        return False


class AsksBeforeItLocks(PlainStore):
    def lease(self, key, known, *, anyway=False):
        if self._is_held(key):
            return Busy()
        self._lock.release()
        threading.Event().wait(0.001)
        self._lock.acquire()
        self._leases.pop(key, None)
        return super().lease(key, known, anyway=anyway)


class KeepsLeasesForEver(PlainStore):
    def _is_held(self, key):
        return key in self._leases


class KeepsLoads(PlainStore):
    def _end_load(self, key):
        pass

    def _is_held(self, key):
        return False

    def settle(self, lease, entry, *, backoff_s=0.0):
        self._leases[lease.key] = lease, 0
        return super().settle(lease, entry, backoff_s=backoff_s)


class SettlesTwice(PlainStore):
    def settle(self, lease, entry, *, backoff_s=0.0):
        self._leases.setdefault(lease.key, (lease, 0))
        return super().settle(lease, entry, backoff_s=backoff_s)


class ComparesPayloads(PlainStore):
    def lease(self, key, known, *, anyway=False):
        entry = self.read(key)
        if entry is not None and known is not None and entry.payload == known.payload:
            known = entry
        return super().lease(key, known, anyway=anyway)


class NeverLooksAgain(PlainStore):
    def lease(self, key, known, *, anyway=False):
        return super().lease(key, known or self.read(key), anyway=anyway)


class KnowsNoBackoff(PlainStore):
    def settle(self, lease, entry, *, backoff_s=0.0):
        return super().settle(lease, entry)


class BacksOffForEver(PlainStore):
    def settle(self, lease, entry, *, backoff_s=0.0):
        return super().settle(lease, entry, backoff_s=backoff_s and NEVER)


class BacksOffAnyway(PlainStore):
    def lease(self, key, known, *, anyway=False):
        return super().lease(key, known)


class LastWriteWins(PlainStore):
    def end_write(self, write, entry):
        self._writes[write.key][1] = write
        return super().end_write(write, entry)


class LastEndWins(PlainStore):
    def end_write(self, write, entry):
        if self._writes[write.key][0] == 1:
            self._writes[write.key][1] = write
        return super().end_write(write, entry)


class LoadsDuringWrites(PlainStore):
    def lease(self, key, known, *, anyway=False):
        got = super().lease(key, known, anyway=anyway)
        return self._lease(key) if getattr(got, "is_write", False) else got

    def _lease(self, key):
        lease = Lease(key, b"", self._now_us())
        self._leases[key] = lease, SYSTEM.now()
        return lease


class CountsWhatIsGone(PlainStore):
    def forget(self, pattern):
        matches = compile_pattern(pattern)
        count = sum(map(matches, self._entries))
        super().forget(pattern)
        return count


class ForgetsEntriesOnly(PlainStore):
    def forget(self, pattern):
        leases = dict(self._leases)
        count = super().forget(pattern)
        self._leases = leases
        return count


class ForgetsWrites(PlainStore):
    def forget(self, pattern):
        self._writes = {key: None for key in self._writes if not compile_pattern(pattern)(key)}
        return super().forget(pattern)


class MatchesLikeAShell(PlainStore):
    def forget(self, pattern):
        return super().forget(pattern.replace("\\*", "*"))


class InvalidatesByTime(PlainStore):
    def _now_us(self):
        return round(SYSTEM.now() * 1e6)


class InvalidatesWhatIsThere(PlainStore):
    def invalidate_tag(self, tag, *, keep_stale):
        for key, entry in list(self._entries.items()):
            if tag in ("", *entry.tags) and not keep_stale:
                del self._entries[key]
            elif tag in ("", *entry.tags):
                entry.fresh_until = SYSTEM.now()
        return True


class BelievesEntries(PlainStore):
    def _put(self, key, entry, began_us):
        super()._put(key, entry, entry.began_us or began_us)


class KnowsNoEmptyTag(PlainStore):
    def invalidate_tag(self, tag, *, keep_stale):
        return super().invalidate_tag(tag or "all", keep_stale=keep_stale)


class RevivesWhatIsGone(PlainStore):
    def read(self, key):
        entry = super().read(key)
        if entry is None and key in self._entries:
            stale = self._latest("stale", self._entries[key])
            gone = self._latest("gone", self._entries[key])
            return self._entries[key] if stale > gone else None
        return entry


class ExplainsTheValue(PlainStore):
    def explain(self, key):
        return {"value": str(self.read(key) and self.read(key).payload)}


class ExplainsInBytes(PlainStore):
    def explain(self, key):
        return {"value": b"", "is_there": self.read(key) is not None}


class StaysClosed(PlainStore):
    def close(self):
        self._change = None


class DecidesBeforeItLocks(PlainStore):
    def end_write(self, write, entry):
        is_only = self._writes[write.key][1] is write
        self._lock.release()
        threading.Event().wait(0.003)
        self._lock.acquire()
        if is_only:
            self._writes[write.key][1] = write
        return super().end_write(write, entry)


def outcome(name, store, **what_it_says):
    """How a test of the suite ends with a store: passed, failed or left out."""
    suite = type("Suite", (CacheStoreSuite,), what_it_says)()
    test = getattr(suite, name)
    if test is None:
        return "left out"
    with virtual_clock():
        try:
            test(store)
        except Exception:
            return "failed"
    return "passed"


BROKEN = {
    LosesEntries: "test_many_at_once",
    ServesWhatIsGone: "test_an_entry_goes",
    HidesWhatIsStale: "test_a_stale_entry_is_read",
    StripsKeys: "test_keys_of_any_text",
    CutsKeys: "test_keys_of_any_text",
    TakesTextForBytes: "test_payloads_of_any_size_and_bytes",
    ForgetsTags: "test_a_tag_makes_its_entries_invalid",
    GivesManyLeases: "test_one_gets_the_lease",
    AsksBeforeItLocks: "test_of_many_threads_one_loads",
    KeepsLeasesForEver: "test_a_lease_ends_by_itself",
    KeepsLoads: "test_a_delete_ends_a_load",
    SettlesTwice: "test_a_lease_ends_once",
    ComparesPayloads: "test_who_comes_late_gets_the_entry",
    NeverLooksAgain: "test_who_comes_late_gets_the_entry",
    KnowsNoBackoff: "test_a_backoff",
    BacksOffForEver: "test_a_backoff_ends",
    BacksOffAnyway: "test_a_backoff",
    LastWriteWins: "test_of_writes_at_once_none_is_kept",
    LastEndWins: "test_a_write_within_another",
    LoadsDuringWrites: "test_nobody_loads_while_the_source_is_written",
    CountsWhatIsGone: "test_forgetting_counts_what_there_is",
    ForgetsEntriesOnly: "test_forgetting_ends_loads",
    ForgetsWrites: "test_forgetting_does_not_let_loads_into_a_write",
    MatchesLikeAShell: "test_patterns_are_literal_but_for_the_asterisk",
    InvalidatesByTime: "test_what_comes_after_is_valid",
    InvalidatesWhatIsThere: "test_loads_from_before_an_invalidation",
    BelievesEntries: "test_an_old_entry_that_is_written_is_new",
    KnowsNoEmptyTag: "test_no_tag_is_all_entries",
    RevivesWhatIsGone: "test_what_is_gone_does_not_become_stale",
    ExplainsTheValue: "test_explaining",
    ExplainsInBytes: "test_explaining",
    StaysClosed: "test_closing",
    DecidesBeforeItLocks: "test_loads_and_writes_by_many_threads",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_the_suite_finds_what_is_wrong(broken):
    """A store with one fault fails the test of that."""
    name = BROKEN[broken]
    assert outcome(name, broken(), lease_s=3.0) == "failed"
    assert outcome(name, PlainStore(), lease_s=3.0) == "passed"


class PlainestStore(PlainStore):
    forget = None
    invalidate_tag = None


def test_a_store_may_say_what_it_cannot_do():
    """What a store does not claim is not tested; all else is asked of it."""
    names = [name for name in dir(CacheStoreSuite) if name.startswith("test_")]
    says = {"matches_patterns": False, "has_tags": False}
    ends = {name: outcome(name, PlainestStore(), **says) for name in names}
    assert set(ends.values()) == {"passed", "left out"}
    for name in ("test_forgetting_counts_exactly", "test_a_full_store_forgets"):
        assert ends[name] == "left out"
    assert "failed" in {outcome(name, PlainestStore()) for name in names}
