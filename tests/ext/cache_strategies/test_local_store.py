"""The store of one process: leases, writes of the source, what they leave behind, and forks.

What every store must do is in test_conformance.py.
"""

import json
import subprocess
import sys
import textwrap

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from patched import run_patched

from flask_muset.cache_strategies.entry import NEVER, Busy, Entry, Lease
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.clock import SYSTEM
from flask_muset.testing import virtual_clock

MIB = 2**20


@pytest.fixture
def store(clock):
    """One whose leases last 10 s."""
    return LocalStore(MIB)


def entry(payload=b"value", *, tags=(), fresh_s=NEVER, is_negative=False):
    now = SYSTEM.now()
    return Entry(
        payload, created_at=now, fresh_until=now + fresh_s, tags=tags, is_negative=is_negative
    )


def leased(store, key, known=None):
    lease = store.lease(key, known)
    assert isinstance(lease, Lease)
    return lease


def assert_nothing_left(store):
    """No lease, write or backoff is remembered."""
    assert (store._loads, store._writes, store._backoffs) == ({}, {}, {})


def kept(store):
    """How many leases, writes and backoffs are remembered."""
    return len(store._loads) + len(store._writes) + len(store._backoffs)


# --- Leases ---------------------------------------------------------------------------------------


def test_a_lease_lasts_as_long_as_it_says(clock):
    """Nobody else loads before `lease_s` is over, somebody does at that moment."""
    store = LocalStore(MIB, lease_s=2.0)
    leased(store, "key")
    clock.advance(1.99)
    busy = store.lease("key", None, anyway=True)
    assert isinstance(busy, Busy)
    assert (busy.is_backoff, busy.is_write) == (False, False)
    clock.advance(0.01)
    leased(store, "key")


def test_a_load_that_takes_long_is_put_in_if_nobody_else_has_begun(store, clock):
    """A slow holder is not a dead one: his value is good, unless the key has changed."""
    lease = leased(store, "key")
    clock.advance(60)
    assert store.settle(lease, entry(b"slow")) is True
    assert store.read("key").payload == b"slow"

    lease = leased(store, "changed")
    clock.advance(60)
    store.delete("changed")
    assert store.settle(lease, entry(b"slow")) is False
    assert_nothing_left(store)


@pytest.mark.parametrize("lease_s", [0, -1.0, float("nan")])
def test_a_lease_of_no_time_is_refused(lease_s):
    """The error names the argument and its value."""
    with pytest.raises(ValueError, match=r"lease_s must be above 0 seconds, got"):
        LocalStore(MIB, lease_s=lease_s)


def test_moments_are_told_apart_where_time_stands_still(store):
    """Each lease and each entry that was written has a moment of its own, later than the last."""
    moments = []
    for number in range(5):
        lease = leased(store, f"{number}")
        moments.append(lease.began_us)
        store.settle(lease, entry())
        assert store.read(f"{number}").began_us == lease.began_us
        store.write("written", entry())
        moments.append(store.read("written").began_us)
        write = store.begin_write("source")
        moments.append(write.began_us)
        store.end_write(write, entry())
        moments.append(store.read("source").began_us)
    assert moments == sorted(set(moments))


def test_a_heavy_value_is_loaded_again_and_again(store):
    """What has no room is not put in, which says so, and the lease ends all the same."""
    assert store.settle(leased(store, "key"), entry(bytes(MIB))) is False
    assert_nothing_left(store)
    store.write("key", entry(b"small"))
    assert store.write("key", entry(bytes(MIB))) is True
    assert store.read("key") is None


def test_without_room_there_is_still_one_load_at_a_time(clock):
    """A store of 0 bytes keeps nothing and gives leases."""
    store = LocalStore(0)
    lease = leased(store, "key")
    assert isinstance(store.lease("key", None), Busy)
    assert store.settle(lease, entry()) is False
    assert store.read("key") is None
    leased(store, "key")


def test_other_keys_and_patterns_do_not_end_a_load(store):
    """Only what concerns the key does: of a thousand loads beside changes all are put in."""
    for number in range(1000):
        lease = leased(store, f"key:{number}")
        store.delete(f"other:{number}")
        store.forget("other:*")
        assert store.settle(lease, entry()) is True
    write = store.begin_write("written")
    store.forget("other:*")
    store.end_write(write, entry(b"written"))
    assert store.read("written").payload == b"written"


# --- What ends by itself --------------------------------------------------------------------------


def test_what_has_ended_leaves_nothing_behind(store, clock):
    """Neither loads that were settled or voided, nor writes, nor backoffs that were passed over."""
    store.settle(leased(store, "a"), entry())
    store.settle(leased(store, "b"), None)
    leased(store, "c")
    store.delete("c")
    leased(store, "d:1")
    store.forget("d:*")
    leased(store, "e")
    store.invalidate_tag("", keep_stale=False)
    writes = [store.begin_write("f"), store.begin_write("f")]
    for write in writes:
        store.end_write(write, entry())
    store.settle(leased(store, "g"), None, backoff_s=9)
    store.settle(store.lease("g", None, anyway=True), entry())
    store.settle(leased(store, "h"), None, backoff_s=9)
    store.write("h", entry())
    assert_nothing_left(store)


def test_holders_that_are_gone_do_not_pile_up(store, clock):
    """Of leases and writes whose holders never came back, only a bounded number is remembered."""
    for number in range(40_000):
        store.lease(f"load:{number}", None)
        if number % 4 == 0:
            store.begin_write(f"write:{number}")
        clock.advance(0.01)
    assert kept(store) <= 10_000


def test_loads_that_go_on_are_all_remembered(store):
    """However many there are, none is given away."""
    leases = [leased(store, f"{number}") for number in range(12_000)]
    assert all(isinstance(store.lease(lease.key, None), Busy) for lease in leases)
    assert all(store.settle(lease, entry()) for lease in leases)
    assert_nothing_left(store)


def test_backoffs_end_and_do_not_pile_up(store, clock):
    """A source that fails for any number of keys: those of the newest failures are spared."""
    for number in range(30_000):
        store.settle(leased(store, f"{number}"), None, backoff_s=60)
    assert kept(store) <= 10_000
    assert store.lease("29999", None).is_backoff
    clock.advance(60)
    leased(store, "29999")
    for number in range(30_000, 50_000):
        store.settle(leased(store, f"{number}"), None, backoff_s=0.001)
        clock.advance(0.001)
    assert kept(store) <= 10_000


# --- Writes of the source -------------------------------------------------------------------------


def test_nothing_is_served_while_the_source_is_written(store):
    """Who asks meanwhile asks the source: nobody knows when it changes."""
    store.write("key", entry(b"old"))
    write = store.begin_write("key")
    assert store.read("key") is None
    store.end_write(write, entry(b"new"))
    assert store.read("key").payload == b"new"


def test_a_writer_that_is_gone_does_not_block_the_key(store, clock):
    """After `lease_s` others load; should he end after all, nothing is left that may be older."""
    lost = store.begin_write("key")
    clock.advance(9.9)
    assert store.lease("key", None).is_write
    clock.advance(0.1)
    lease = leased(store, "key")
    store.end_write(lost, entry(b"lost"))
    assert store.settle(lease, entry(b"loaded")) is False
    assert store.read("key") is None

    lost = store.begin_write("key")
    clock.advance(10)
    assert store.settle(leased(store, "key"), entry(b"loaded")) is True
    store.end_write(lost, entry(b"lost"))
    assert store.read("key") is None
    assert_nothing_left(store)


def test_a_write_beside_one_that_is_gone_leaves_nothing(store, clock):
    """Nobody knows whether the lost one still comes; the one after that is alone again."""
    store.begin_write("key")
    clock.advance(11)
    store.end_write(store.begin_write("key"), entry(b"beside"))
    assert store.read("key") is None
    store.end_write(store.begin_write("key"), entry(b"alone"))
    assert store.read("key").payload == b"alone"


def test_a_lost_write_that_ends_beside_another_leaves_nothing(store, clock):
    """Neither of the two knows whether it was the last, though they did not begin beside it."""
    lost = store.begin_write("key")
    clock.advance(10)
    store.settle(leased(store, "key"), None)
    write = store.begin_write("key")
    store.end_write(lost, entry(b"lost"))
    assert store.read("key") is None
    assert store.lease("key", None).is_write
    store.end_write(write, entry(b"beside"))
    assert store.read("key") is None
    assert_nothing_left(store)


def test_a_slow_write_is_put_in_if_nothing_else_has_happened(store, clock):
    """As with loads: slow is not dead."""
    write = store.begin_write("key")
    clock.advance(60)
    store.end_write(write, entry(b"slow"))
    assert store.read("key").payload == b"slow"


def test_what_is_invalid_by_a_tag_ends_a_write(store, clock):
    """The source has changed while it was written: the value is not put in, or is stale."""
    for number, tag in enumerate(["t", "", "t", ""]):
        keep_stale = number >= 2
        write = store.begin_write("key")
        at = SYSTEM.now()
        store.invalidate_tag(tag, keep_stale=keep_stale)
        clock.advance(1)
        assert store.end_write(write, entry(tags=("t",), fresh_s=100)) is True
        found = store.read("key")
        assert (None if found is None else found.fresh_until) == (at if keep_stale else None)


def test_a_pattern_ends_a_write(store):
    """Forgetting a key whose source is being written leaves it without an entry."""
    write = store.begin_write("user:1")
    assert store.forget("user:*") == 0
    store.end_write(write, entry())
    assert store.read("user:1") is None


# --- Beside ---------------------------------------------------------------------------------------


def test_explaining(store, clock):
    """What there is about a key in numbers, and who is at it."""
    assert store.explain("key") == {"level": None, "lease": "none"}
    store.write("key", entry(b"value", tags=("a", "b"), fresh_s=5, is_negative=True))
    clock.advance(2)
    assert store.explain("key") == {
        "level": "memory",
        "age_s": 2.0,
        "fresh_for_s": 3.0,
        "gone_in_s": NEVER,
        "bytes": 5,
        "tags": ["a", "b"],
        "is_negative": True,
        "lease": "none",
    }
    leased(store, "key", store.read("key"))
    assert store.explain("key")["lease"] == "load"
    store.settle(leased(store, "other"), None, backoff_s=1)
    assert store.explain("other") == {"level": None, "lease": "backoff"}
    store.begin_write("key")
    assert store.explain("key") == {"level": None, "lease": "write"}
    clock.advance(10)
    assert store.explain("key") == {"level": None, "lease": "none"}


def test_closing_keeps_the_entries(store):
    """There is nothing to let go of."""
    store.write("key", entry())
    store.close()
    assert store.read("key") is not None


def test_a_forked_child_waits_for_nobody():
    """Loads and writes of the parent are none of the child's; its entries are."""
    script = """
    import json, os
    from flask_muset.cache_strategies.entry import Entry, Lease
    from flask_muset.cache_strategies.local_store import LocalStore

    store = LocalStore(2**20)
    entry = lambda: Entry(b"value", created_at=0.0)
    store.write("key", entry())
    loads = store.lease("load", None)
    writes = store.begin_write("write")
    pid = os.fork()
    if not pid:
        ok = store.read("key") is not None
        ok = ok and all(isinstance(store.lease(key, None), Lease) for key in ("load", "write"))
        ok = ok and store.settle(loads, entry()) is False
        store.end_write(writes, entry())
        os._exit(0 if ok and store.read("write") is None else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    store.end_write(writes, entry())
    print(json.dumps([code, store.settle(loads, entry()), store.read("write") is not None]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == [0, True, True]


def test_greenlets_and_native_threads_at_once():
    """The lock keeps gevent's own threads apart, and never stops the hub: one lease a round."""
    result = run_patched("""
        from flask_muset.cache_strategies.entry import Entry, Lease
        from flask_muset.cache_strategies.local_store import LocalStore
        store = LocalStore(2**20)
        pool = gevent.get_hub().threadpool
        counts = []
        for number in range(100):
            ask = lambda: store.lease(f"{number}", None)
            asked = [pool.spawn(ask) for _ in range(5)] + [gevent.spawn(ask) for _ in range(5)]
            got = [one.get(timeout=10) for one in asked]
            leases = [one for one in got if isinstance(one, Lease)]
            counts.append(len(leases))
            store.settle(leases[0], Entry(b"value", created_at=0.0))
        result = [min(counts), max(counts), len(store.memory)]
    """)
    assert result == [1, 1, 100]


# --- Against a source -----------------------------------------------------------------------------


class AgainstASource(RuleBasedStateMachine):
    """Several at once load, write, change and invalidate what a source has, in any order.

    The source is a number for each key that grows with each change. Whatever has happened, the
    store has nothing older than what was last made invalid or written.
    """

    TAGS = {"a:1": ("t", "all"), "a:2": ("all",), "b:1": ()}  # noqa: RUF012
    LEASE_S = 10.0
    keys = st.sampled_from(sorted(TAGS))
    which = st.integers(0, 9)

    def __init__(self):
        super().__init__()
        self.time = virtual_clock()
        self.clock = self.time.__enter__()
        self.store = LocalStore(MIB, lease_s=self.LEASE_S)
        self.source = dict.fromkeys(self.TAGS, 0)
        self.valid_from = dict.fromkeys(self.TAGS, 0)
        self.fresh_from = dict.fromkeys(self.TAGS, 0)
        #: Of each load: its lease, what it has read, and whether no tag of it became invalid.
        self.loads = []
        #: By key: the load that others wait for, and until when.
        self.holder = {}
        self.writes = []
        self.backoff_until = {}

    def teardown(self):
        try:
            self.check_the_end()
        finally:
            self.time.__exit__(None, None, None)

    def check_the_end(self):
        while self.loads:
            self.settle(0, "value")
        while self.writes:
            self.end_write(0, is_known=True)
        self.has_nothing_old()
        self.clock.advance(self.LEASE_S)
        for key in self.TAGS:
            self.start_load(key, anyway=True)
            self.settle(0, "value")
            found = self.store.read(key)
            assert self.number(found) >= self.valid_from[key]

    def number(self, found):
        return int(found.payload)

    def entry(self, key):
        return entry(b"%d" % self.source[key], tags=self.TAGS[key], fresh_s=100)

    def changed(self, key):
        """Nothing older than this may be had from now on, and no load goes on."""
        self.valid_from[key] = self.source[key]
        self.holder.pop(key, None)
        self.backoff_until.pop(key, None)

    # Loads

    @rule(key=keys, anyway=st.booleans())
    def start_load(self, key, anyway):
        known, now = self.store.read(key), SYSTEM.now()
        got = self.store.lease(key, known, anyway=anyway)
        holder_until = self.holder.get(key, (None, 0))[1]
        if isinstance(got, Lease):
            assert now >= holder_until
            assert anyway or now >= self.backoff_until.get(key, 0)
            self.holder[key] = got, now + self.LEASE_S
            self.loads.append([got, None, True])
            self.backoff_until.pop(key, None)
        elif got.is_write:
            assert any(write.key == key for write, *_ in self.writes)
        elif got.is_backoff:
            assert not anyway
            assert now < self.backoff_until[key]
        else:
            assert now < holder_until

    @rule(which=which)
    def read_source(self, which):
        if self.loads:
            load = self.loads[which % len(self.loads)]
            load[1] = self.entry(load[0].key)

    @rule(which=which, how=st.sampled_from(["value", "value", "nothing", "failure"]))
    def settle(self, which, how):
        if not self.loads:
            return
        lease, read, is_valid = self.loads.pop(which % len(self.loads))
        key = lease.key
        held = self.holder.get(key, (None, 0))[0] is lease
        loaded = (read or self.entry(key)) if how == "value" else None
        is_in = self.store.settle(lease, loaded, backoff_s=5.0 if how == "failure" else 0.0)
        assert is_in == (held and is_valid and loaded is not None)
        assert not is_in or self.store.read(key) is loaded
        if held:
            del self.holder[key]
            if how == "failure":
                self.backoff_until[key] = SYSTEM.now() + 5.0

    # Writes of the source

    @rule(key=keys)
    def begin_write(self, key):
        self.writes.append([self.store.begin_write(key), None])
        self.holder.pop(key, None)
        self.backoff_until.pop(key, None)

    @rule(which=which)
    def write_source(self, which):
        if self.writes:
            write = self.writes[which % len(self.writes)]
            self.source[write[0].key] += 1
            write[1] = self.entry(write[0].key)

    @rule(which=which, is_known=st.booleans())
    def end_write(self, which, is_known):
        if not self.writes:
            return
        write, written = self.writes.pop(which % len(self.writes))
        assert self.store.end_write(write, written if is_known else None) is True
        self.holder.pop(write.key, None)
        self.backoff_until.pop(write.key, None)
        if written is not None:
            least = max(self.valid_from[write.key], self.number(written))
            self.valid_from[write.key] = least

    # Changes behind the cache's back, and invalidation

    @rule(key=keys)
    def change_source(self, key):
        self.source[key] += 1

    @rule(key=keys)
    def delete(self, key):
        assert self.store.delete(key) is True
        self.changed(key)

    @rule(key=keys)
    def write(self, key):
        assert self.store.write(key, self.entry(key)) is True
        assert self.number(self.store.read(key)) == self.source[key]
        self.changed(key)

    @rule(pattern=st.sampled_from(["a:*", "*:1", "*"]))
    def forget(self, pattern):
        matching = [
            key
            for key in self.TAGS
            if key.startswith(pattern.split("*")[0]) and key.endswith(pattern.split("*")[1])
        ]
        there = len(self.store.read_many(matching))
        assert self.store.forget(pattern) == there
        for key in matching:
            self.changed(key)

    @rule(tag=st.sampled_from(["t", "all", ""]), keep_stale=st.booleans())
    def invalidate_tag(self, tag, keep_stale):
        assert self.store.invalidate_tag(tag, keep_stale=keep_stale) is True
        for key in self.TAGS:
            if tag == "" or tag in self.TAGS[key]:
                self.fresh_from[key] = self.source[key]
                if not keep_stale:
                    self.valid_from[key] = self.source[key]
                    self.end_loads(key)
            if tag == "" and not keep_stale:
                self.changed(key)

    def end_loads(self, key):
        for load in self.loads:
            load[2] = load[2] and load[0].key != key

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @invariant()
    def has_nothing_old(self):
        for key in self.TAGS:
            found = self.store.read(key)
            if found is not None:
                assert self.number(found) >= self.valid_from[key]
                if self.number(found) < self.fresh_from[key]:
                    assert found.fresh_until <= SYSTEM.now()


TestAgainstASource = AgainstASource.TestCase
TestAgainstASource.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True
)
