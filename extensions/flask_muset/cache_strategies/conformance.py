"""What every store must do, as tests that whoever writes one can run.

    class TestMyStore(CacheStoreSuite):
        @pytest.fixture
        def store(self):
            store = MyStore()
            yield store
            store.close()

pytest shows the values of failed comparisons after
`pytest.register_assert_rewrite("flask_muset.cache_strategies.conformance")`.
"""

# ruff: noqa: S101 - to assert is what this is for

import json
import threading
from collections.abc import Callable, Iterable
from functools import partial
from hashlib import shake_128
from typing import Any, TypeVar

from flask_muset.cache_strategies.entry import NEVER, Busy, Entry, Lease
from flask_muset.cache_strategies.patterns import literal
from flask_muset.cache_strategies.stores import Store
from flask_muset.clock import SYSTEM

__all__ = ["CacheStoreSuite"]

#: A lifetime that ends within a test, and a wait after which it has ended for certain.
_SHORT_S = 0.05
_AFTER_SHORT_S = 0.1
#: A lifetime that no test sees the end of.
_LONG_S = 600.0
#: How far the moments of an entry may be off: a shared store translates them between two clocks.
_NEAR_S = 0.1

# Also single letters and names with colons, which a store may use for itself.
_ODD_TEXTS = [
    "a b", " a", "a ", "a\nb", "a\r\n", "a\tb", "a\0b", "\x7f", "é", "e\u0301", "日本", "😀",
    "a*", "a?", "[a]", "a\\", "\\*", "^a-b$", "{a}", "a:b:c", "%s", "'\"`", "\u202e", "A",
    "d", "e", "k", "x" * 1000, "é" * 1000,
]  # fmt: skip


_Test = TypeVar("_Test", bound=Callable[..., None])
#: By the name of a test, the attribute that says whether the store can do what is tested.
_abilities: dict[str, str] = {}


def _needs(ability: str) -> Callable[[_Test], _Test]:
    """A test of what not every store can do."""

    def mark(test: _Test) -> _Test:
        _abilities[test.__name__] = ability
        return test

    return mark


class CacheStoreSuite:
    """Tests of the `Store` protocol; a subclass has a pytest fixture `store` that gives a new one.

    The store must hold 64 MiB, unless it says less. Time passes by `SYSTEM.sleep`: really, or at
    once where the fixture uses `flask_muset.testing.virtual_clock`; all tests together sleep for
    less than a second.

    Attributes:
        matches_patterns: Whether it has `forget`.
        has_tags: Whether it has `invalidate_tag`.
        lease_s: Seconds after which a lease that nobody settles or renews has ended; None if it
            has not while its process lives.
        capacity_bytes: How much it keeps at most of payloads; None if it knows no bound.
    """

    matches_patterns: bool = True
    has_tags: bool = True
    lease_s: float | None = None
    capacity_bytes: int | None = None

    def __init_subclass__(cls) -> None:
        """Leave out the tests of what the store does not claim to do."""
        super().__init_subclass__()
        for name, ability in _abilities.items():
            if not getattr(cls, ability):
                setattr(cls, name, None)

    def advance(self, seconds: float) -> None:
        """Let time pass for the store."""
        SYSTEM.sleep(seconds)

    # --- Entries

    def test_an_absent_key_is_none(self, store: Store) -> None:
        """What was never written is not there."""
        assert store.read("absent") is None

    def test_what_was_written_is_read(self, store: Store) -> None:
        """A written entry is there at once, all of it."""
        now = SYSTEM.now()
        entry = Entry(
            b"value",
            created_at=now - 5,
            fresh_until=now + 100,
            gone_at=now + 200,
            tags=("a", "b"),
            is_negative=True,
        )
        assert store.write("key", entry) is True
        found = _found(store, "key")
        assert found.payload == b"value"
        assert found.tags == ("a", "b")
        assert found.is_negative is True
        assert abs(found.created_at - (now - 5)) < _NEAR_S
        assert abs(found.fresh_until - (now + 100)) < _NEAR_S
        assert abs(found.gone_at - (now + 200)) < _NEAR_S

    def test_an_entry_may_last_for_ever(self, store: Store) -> None:
        """Moments that do not come are kept as such."""
        store.write("key", Entry(b"value", created_at=SYSTEM.now()))
        found = _found(store, "key")
        assert (found.fresh_until, found.gone_at) == (NEVER, NEVER)
        assert (found.tags, found.is_negative) == ((), False)

    def test_a_write_takes_the_place_of_what_was_there(self, store: Store) -> None:
        """The last write counts, also with a shorter lifetime."""
        store.write("key", _entry(b"old"))
        store.write("key", _entry(b"new", lasts_s=_SHORT_S))
        assert _payload(store, "key") in {b"new", None}
        self.advance(_AFTER_SHORT_S)
        assert store.read("key") is None

    def test_a_stale_entry_is_read(self, store: Store) -> None:
        """What is not fresh any more is there until it is gone: the caller decides."""
        now = SYSTEM.now()
        entry = Entry(b"value", created_at=now - 9, fresh_until=now - 1, gone_at=now + _LONG_S)
        store.write("key", entry)
        assert _found(store, "key").fresh_until < SYSTEM.now()

    def test_an_entry_goes(self, store: Store) -> None:
        """After `gone_at` nobody gets it, alone or among others."""
        store.write("key", _entry(b"value", lasts_s=_SHORT_S))
        self.advance(_AFTER_SHORT_S)
        assert store.read("key") is None
        assert store.read_many(["key"]) == {}

    def test_deleting(self, store: Store) -> None:
        """A deleted entry is not there; deleting what is not there is carried out as well."""
        store.write("key", _entry(b"value"))
        store.write("other", _entry(b"other"))
        assert store.delete("key") is True
        assert store.read("key") is None
        assert store.delete("key") is True
        assert _payload(store, "other") == b"other"

    def test_many_at_once(self, store: Store) -> None:
        """Several are written, read and deleted as each alone would be."""
        payloads = {f"key{number}": b"%d" % number for number in range(1200)}
        assert store.write_many({key: _entry(one) for key, one in payloads.items()}) is True
        assert _payloads(store, [*payloads, "absent"]) == payloads
        assert store.delete_many([f"key{number}" for number in range(1, 1200)]) is True
        assert _payloads(store, payloads) == {"key0": b"0"}
        assert _payload(store, "key0") == b"0"

    def test_none_at_once(self, store: Store) -> None:
        """Nothing to do is done."""
        assert store.write_many({}) is True
        assert store.delete_many([]) is True
        assert store.read_many([]) == {}

    def test_the_same_key_twice_at_once(self, store: Store) -> None:
        """A key that is asked for twice is found once; one that is deleted twice is deleted."""
        store.write("key", _entry(b"value"))
        assert _payloads(store, ["key", "key"]) == {"key": b"value"}
        assert store.delete_many(["key", "key"]) is True
        assert store.read("key") is None

    def test_keys_of_any_text(self, store: Store) -> None:
        """Keys are told apart whatever is in them: spaces, newlines, wildcards, other scripts."""
        payloads = {key: str(number).encode() for number, key in enumerate(_ODD_TEXTS)}
        for key, payload in payloads.items():
            store.write(key, _entry(payload))
        assert _payloads(store, _ODD_TEXTS) == payloads
        for key in _ODD_TEXTS:
            assert _payload(store, key) == payloads[key]
            lease = _leased(store, key, known=store.read(key))
            assert store.settle(lease, _entry(b"loaded")) is True
            write = store.begin_write(key)
            assert store.end_write(write, _entry(b"written")) is True
            assert _payload(store, key) == b"written"
            assert store.delete(key) is True
            assert store.read(key) is None

    def test_payloads_of_any_size_and_bytes(self, store: Store) -> None:
        """No bytes, all bytes, and 1 MiB that can or cannot be compressed come back as they are."""
        mixed = bytes(range(256))
        large = b"".join(_noise(number) for number in range(4096))
        payloads = [b"", b"\0", mixed, b"\r\n", mixed * 64, b"a" * 2**20, large]
        assert len(large) == 2**20
        for number, payload in enumerate(payloads):
            store.write(str(number), _entry(payload))
            assert _payload(store, str(number)) == payload

    # --- Loads

    def test_one_gets_the_lease(self, store: Store) -> None:
        """The first who asks may load, the second hears that somebody does."""
        lease = _leased(store, "key")
        assert lease.key == "key"
        busy = _busy(store, "key")
        assert (busy.is_backoff, busy.is_write) == (False, False)
        assert isinstance(store.lease("other", None), Lease)

    def test_a_load_is_put_in(self, store: Store) -> None:
        """What the holder has loaded is there for all, and the lease has ended."""
        lease = _leased(store, "key")
        assert store.settle(lease, _entry(b"loaded")) is True
        found = _found(store, "key")
        assert found.payload == b"loaded"
        assert found.began_us == lease.began_us
        assert isinstance(store.lease("key", found), Lease)

    def test_who_comes_late_gets_the_entry(self, store: Store) -> None:
        """An entry that the caller has not seen is the answer, not a lease."""
        store.settle(_leased(store, "key"), _entry(b"loaded"))
        assert _is_entry(store.lease("key", None), b"loaded")
        old = _found(store, "key")
        store.write("key", _entry(b"loaded"))
        assert _is_entry(store.lease("key", old), b"loaded")
        assert isinstance(store.lease("key", _found(store, "key")), Lease)

    def test_an_entry_is_served_while_it_is_loaded_anew(self, store: Store) -> None:
        """A lease takes nothing away, and neither does one that ends without an entry."""
        store.write("key", _entry(b"old"))
        lease = _leased(store, "key", known=_found(store, "key"))
        assert _payload(store, "key") == b"old"
        assert isinstance(store.lease("key", _found(store, "key")), Busy)
        assert not store.settle(lease, None)
        assert _payload(store, "key") == b"old"

    def test_a_lease_may_end_without_an_entry(self, store: Store) -> None:
        """Nothing is put in, and the next who asks may load."""
        assert not store.settle(_leased(store, "key"), None)
        assert store.read("key") is None
        assert isinstance(store.lease("key", None), Lease)

    def test_a_lease_ends_once(self, store: Store) -> None:
        """Settling again changes nothing, neither the entry nor the lease of the next."""
        first = _leased(store, "key")
        assert store.settle(first, _entry(b"first")) is True
        assert store.settle(first, _entry(b"again")) is False
        second = _leased(store, "key", known=_found(store, "key"))
        assert store.settle(first, _entry(b"again")) is False
        assert _payload(store, "key") == b"first"
        assert store.settle(second, _entry(b"second")) is True

    def test_a_delete_ends_a_load(self, store: Store) -> None:
        """What was read before a delete is not put in after it; a new load may begin at once."""
        self._ends_a_load(store, lambda: store.delete("key"), None)
        self._ends_a_load(store, lambda: store.delete_many(["key", "other"]), None)

    def test_a_write_ends_a_load(self, store: Store) -> None:
        """What was read before a write does not take the place of what was written."""
        self._ends_a_load(store, lambda: store.write("key", _entry(b"new")), b"new")
        self._ends_a_load(store, lambda: store.write_many({"key": _entry(b"newer")}), b"newer")

    def _ends_a_load(self, store: Store, act: Callable[[], Any], left: bytes | None) -> None:
        lease = _leased(store, "key", known=store.read("key"))
        act()
        next_lease = _leased(store, "key", known=store.read("key"))
        assert store.settle(lease, _entry(b"old")) is False
        assert _payload(store, "key") == left
        assert store.settle(next_lease, _entry(b"next")) is True

    def test_a_backoff(self, store: Store) -> None:
        """After a failure nobody loads for a while, unless he asks for it anyway."""
        store.settle(_leased(store, "key"), None, backoff_s=_LONG_S)
        busy = _busy(store, "key")
        assert (busy.is_backoff, busy.is_write) == (True, False)
        lease = store.lease("key", None, anyway=True)
        assert isinstance(lease, Lease)
        assert not _busy(store, "key").is_backoff
        assert store.settle(lease, _entry(b"loaded")) is True
        assert isinstance(store.lease("key", _found(store, "key")), Lease)

    def test_a_backoff_ends(self, store: Store) -> None:
        """After its time anybody may load."""
        store.settle(_leased(store, "key"), None, backoff_s=_SHORT_S)
        self.advance(_AFTER_SHORT_S)
        assert isinstance(store.lease("key", None), Lease)

    def test_a_load_is_not_passed_over(self, store: Store) -> None:
        """Who asks anyway still does not load beside somebody else."""
        _leased(store, "key")
        assert isinstance(store.lease("key", None, anyway=True), Busy)

    @_needs("lease_s")
    def test_a_lease_ends_by_itself(self, store: Store) -> None:
        """Where the holder is gone somebody else loads, and the holder comes too late."""
        assert self.lease_s is not None
        lease = _leased(store, "key")
        self.advance(self.lease_s * 1.5)
        next_lease = _leased(store, "key")
        assert store.settle(lease, _entry(b"late")) is False
        assert store.read("key") is None
        assert store.settle(next_lease, _entry(b"loaded")) is True

    # --- Writes of the source

    def test_a_write_of_the_source(self, store: Store) -> None:
        """What the source has now is there when the write has ended."""
        store.write("key", _entry(b"old"))
        write = store.begin_write("key")
        assert write.key == "key"
        assert store.end_write(write, _entry(b"new")) is True
        assert _payload(store, "key") == b"new"
        assert isinstance(store.lease("key", _found(store, "key")), Lease)

    def test_a_write_whose_end_is_unknown(self, store: Store) -> None:
        """Nothing is left, and a load may begin."""
        store.write("key", _entry(b"old"))
        assert store.end_write(store.begin_write("key"), None) is True
        assert store.read("key") is None
        assert isinstance(store.lease("key", None), Lease)

    def test_nobody_loads_while_the_source_is_written(self, store: Store) -> None:
        """No lease is given meanwhile, not even to one who asks anyway."""
        write = store.begin_write("key")
        for anyway in (False, True):
            busy = store.lease("key", None, anyway=anyway)
            assert isinstance(busy, Busy)
            assert (busy.is_backoff, busy.is_write) == (False, True)
        assert isinstance(store.lease("other", None), Lease)
        store.end_write(write, None)

    def test_a_load_from_before_a_write_is_not_put_in(self, store: Store) -> None:
        """Neither while the source is written nor when that has ended."""
        for is_ended in (False, True):
            lease = _leased(store, "key")
            write = store.begin_write("key")
            if is_ended:
                store.end_write(write, None)
            assert store.settle(lease, _entry(b"old")) is False
            assert store.read("key") is None
            if not is_ended:
                store.end_write(write, None)

    def test_of_writes_at_once_none_is_kept(self, store: Store) -> None:
        """Where nobody knows which was the last nothing is left, whichever has ended first."""
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            writes = [store.begin_write("key") for _ in order]
            for number in order:
                assert _busy(store, "key").is_write
                assert store.end_write(writes[number], _entry(b"%d" % number)) is True
                assert store.read("key") is None
            lease = _leased(store, "key")
            assert store.settle(lease, _entry(b"loaded")) is True
            store.delete("key")

    def test_a_write_within_another(self, store: Store) -> None:
        """The longer of two writes does not know that it was the last."""
        longer = store.begin_write("key")
        shorter = store.begin_write("key")
        assert store.end_write(shorter, _entry(b"shorter")) is True
        assert store.end_write(longer, _entry(b"longer")) is True
        assert store.read("key") is None

    def test_a_write_after_another(self, store: Store) -> None:
        """Writes one after the other do not disturb each other."""
        for payload in (b"1", b"2", b"3"):
            assert store.end_write(store.begin_write("key"), _entry(payload)) is True
            assert _payload(store, "key") == payload

    def test_a_change_of_the_cache_while_the_source_is_written(self, store: Store) -> None:
        """Who deletes or writes an entry meanwhile may know better, so nothing is left."""
        acts: list[Callable[[], bool]] = [
            lambda: store.delete("key"),
            lambda: store.delete_many(["key"]),
            lambda: store.write("key", _entry(b"else")),
            lambda: store.write_many({"key": _entry(b"else")}),
        ]
        for act in acts:
            write = store.begin_write("key")
            act()
            assert store.end_write(write, _entry(b"written")) is True
            assert store.read("key") is None

    # --- Patterns

    @_needs("matches_patterns")
    def test_forgetting_counts_exactly(self, store: Store) -> None:
        """All that match are gone, and their number is right; the others stay."""
        store.write_many({f"user:{number}": _entry(b"u") for number in range(2500)})
        others = ["user", "users:1", "xuser:1", "User:1", "user;1"]
        store.write_many({key: _entry(b"o") for key in others})
        assert store.forget("user:*") == 2500
        assert store.read_many([f"user:{number}" for number in range(2500)]) == {}
        assert set(store.read_many(others)) == set(others)
        assert store.forget("user:*") == 0
        assert store.forget("*") == len(others)

    @_needs("matches_patterns")
    def test_forgetting_counts_what_there_is(self, store: Store) -> None:
        """Neither what is gone nor what is only being loaded or backed off from is counted."""
        store.write("user:there", _entry(b"there"))
        store.write("user:gone", _entry(b"gone", lasts_s=_SHORT_S))
        store.write("user:deleted", _entry(b"deleted"))
        store.delete("user:deleted")
        _leased(store, "user:loading")
        store.settle(_leased(store, "user:failed"), None, backoff_s=_LONG_S)
        self.advance(_AFTER_SHORT_S)
        assert store.forget("user:*") == 1

    @_needs("matches_patterns")
    def test_patterns_are_literal_but_for_the_asterisk(self, store: Store) -> None:
        """Characters that other languages of patterns know stand for themselves."""
        for text in _ODD_TEXTS:
            store.write_many({key: _entry(b"") for key in (text, f"<{text}>", "a", "ab", "aXb")})
            assert store.forget(f"<{literal(text)}>") == 1
            assert store.forget(literal(text)) == 1
            store.write_many({key: _entry(b"") for key in (f"{text}1", f"{text}\n2")})
            assert store.forget(f"{literal(text)}*\n2") == 1
            assert store.forget(f"{literal(text)}1") == 1
            assert store.forget("*") == len({"a", "ab", "aXb"} - {text})

    @_needs("matches_patterns")
    def test_an_asterisk_is_any_text(self, store: Store) -> None:
        """It stands for nothing, for newlines, and at any place; escaped it is an asterisk."""
        keys = ["a:", "a:b", "a:\n", "a:*", "b:a:c", "a"]
        for pattern, count in {"a:*": 4, "*:*": 5, "*a": 1, "*a*": 6, "a:\\*": 1, "a": 1}.items():
            store.write_many({key: _entry(b"") for key in keys})
            assert store.forget(pattern) == count
            assert len(store.read_many(keys)) == len(keys) - count

    @_needs("matches_patterns")
    def test_forgetting_ends_loads(self, store: Store) -> None:
        """What was read before is not put in after, whether there was an entry or not."""
        store.write("user:1", _entry(b"old"))
        leases = [
            _leased(store, key, known=store.read(key)) for key in ("user:1", "user:2", "other")
        ]
        assert store.forget("user:*") == 1
        assert [store.settle(lease, _entry(b"old")) for lease in leases] == [False, False, True]
        assert _payloads(store, ["user:1", "user:2", "other"]) == {"other": b"old"}
        assert isinstance(store.lease("user:1", None), Lease)

    @_needs("matches_patterns")
    def test_forgetting_does_not_let_loads_into_a_write(self, store: Store) -> None:
        """While the source is written no load is put in, also if its key is forgotten meanwhile."""
        write = store.begin_write("user:1")
        store.forget("user:*")
        got = store.lease("user:1", None)
        if isinstance(got, Lease):
            assert store.settle(got, _entry(b"old")) is False
        assert store.read("user:1") is None
        assert store.end_write(write, _entry(b"new")) is True
        assert _payload(store, "user:1") in {b"new", None}

    # --- Tags

    @_needs("has_tags")
    def test_a_tag_makes_its_entries_invalid(self, store: Store) -> None:
        """All that bear it are gone, whatever else they bear; the others stay."""
        store.write("one", _entry(b"1", tags=("a",)))
        store.write("two", _entry(b"2", tags=("b", "a")))
        store.write("three", _entry(b"3", tags=("b", "aa", "A")))
        store.write("none", _entry(b"0"))
        keys = ["one", "two", "three", "none"]
        assert store.invalidate_tag("a", keep_stale=False) is True
        assert _payloads(store, keys) == {"three": b"3", "none": b"0"}
        assert [store.read(key) is None for key in keys] == [True, True, False, False]
        assert isinstance(store.lease("one", None), Lease)

    @_needs("has_tags")
    def test_a_tag_makes_its_entries_stale(self, store: Store) -> None:
        """They are there, but not fresh; the others are as they were."""
        store.write("one", _entry(b"1", tags=("a",)))
        store.write("other", _entry(b"2", tags=("b",)))
        assert store.invalidate_tag("a", keep_stale=True) is True
        found = _found(store, "one")
        assert found.payload == b"1"
        assert found.fresh_until <= SYSTEM.now()
        assert store.read_many(["one"])["one"].fresh_until <= SYSTEM.now()
        assert _found(store, "other").fresh_until > SYSTEM.now()
        lease = _leased(store, "one", known=found)
        assert store.settle(lease, _entry(b"new", tags=("a",))) is True
        assert _found(store, "one").fresh_until > SYSTEM.now()

    @_needs("has_tags")
    def test_what_is_gone_does_not_become_stale(self, store: Store) -> None:
        """The stronger of two invalidations counts, in either order."""
        for first in (True, False):
            store.write("key", _entry(b"1", tags=("a", "b")))
            store.invalidate_tag("a", keep_stale=first)
            store.invalidate_tag("b", keep_stale=not first)
            assert store.read("key") is None

    @_needs("has_tags")
    def test_what_comes_after_is_valid(self, store: Store) -> None:
        """Writes and loads that begin after an invalidation are served, in the same moment too."""
        for keep_stale in (True, False):
            store.invalidate_tag("a", keep_stale=keep_stale)
            lease = _leased(store, "loaded", known=store.read("loaded"))
            store.settle(lease, _entry(b"1", tags=("a",)))
            store.write("written", _entry(b"2", tags=("a",)))
            write = store.begin_write("source")
            store.end_write(write, _entry(b"3", tags=("a",)))
            for key in ("loaded", "written", "source"):
                assert _found(store, key).fresh_until > SYSTEM.now()

    @_needs("has_tags")
    def test_an_old_entry_that_is_written_is_new(self, store: Store) -> None:
        """It is the store that says since when an entry holds, not who has read it before."""
        store.write("key", _entry(b"value", tags=("a",)))
        old = _found(store, "key")
        store.invalidate_tag("a", keep_stale=False)
        store.write("key", old)
        assert _payload(store, "key") == b"value"

    @_needs("has_tags")
    def test_loads_from_before_an_invalidation(self, store: Store) -> None:
        """What was read before it is invalid when it comes: gone, or stale."""
        for tag in ("a", ""):
            gone, stale = _leased(store, "gone"), _leased(store, "stale")
            store.invalidate_tag(tag, keep_stale=True)
            store.settle(stale, _entry(b"old", tags=("a",)))
            assert _found(store, "stale").fresh_until <= SYSTEM.now()
            store.invalidate_tag(tag, keep_stale=False)
            store.settle(gone, _entry(b"old", tags=("a",)))
            assert store.read_many(["gone", "stale"]) == {}

    @_needs("has_tags")
    def test_no_tag_is_all_entries(self, store: Store) -> None:
        """The empty tag makes all entries stale, or gone, those without tags too."""
        store.write_many({"one": _entry(b"1", tags=("a",)), "none": _entry(b"0")})
        assert store.invalidate_tag("", keep_stale=True) is True
        found = store.read_many(["one", "none"])
        assert [found[key].fresh_until <= SYSTEM.now() for key in ("one", "none")] == [True, True]
        assert store.invalidate_tag("", keep_stale=False) is True
        assert store.read_many(["one", "none"]) == {}
        assert store.read("none") is None
        store.write("none", _entry(b"new"))
        assert _payload(store, "none") == b"new"

    @_needs("has_tags")
    def test_tags_of_any_text(self, store: Store) -> None:
        """Tags are told apart whatever is in them."""
        store.write_many({tag: _entry(b"", tags=(tag,)) for tag in _ODD_TEXTS})
        for number, tag in enumerate(_ODD_TEXTS, 1):
            store.invalidate_tag(tag, keep_stale=False)
            assert set(store.read_many(_ODD_TEXTS)) == set(_ODD_TEXTS[number:])

    # --- Beside

    def test_explaining(self, store: Store) -> None:
        """It can be shown as JSON, says something else of what is there, and changes nothing."""
        absent = store.explain("key")
        store.write("key", _entry(b"secret", tags=("a",)))
        present = store.explain("key")
        assert absent != present
        for said in (absent, present):
            assert "secret" not in json.dumps(said)
        lease = _leased(store, "key", known=_found(store, "key"))
        store.explain("key")
        assert store.settle(lease, _entry(b"new")) is True

    def test_closing(self, store: Store) -> None:
        """A closed store begins anew with its next use; closing it twice does nothing."""
        store.write("key", _entry(b"value"))
        store.close()
        store.close()
        assert _payload(store, "key") in {b"value", None}
        store.write("key", _entry(b"new"))
        assert _payload(store, "key") == b"new"

    @_needs("capacity_bytes")
    def test_a_full_store_forgets(self, store: Store) -> None:
        """It keeps no more than it may, goes on taking entries, and has some of them."""
        assert self.capacity_bytes is not None
        payload = bytes(max(1, self.capacity_bytes // 16))
        for number in range(40):
            assert store.write(str(number), _entry(payload)) is True
        left = len(store.read_many([str(number) for number in range(40)]))
        assert 1 <= left <= self.capacity_bytes // len(payload)

    # --- Many at the same time

    def test_of_many_threads_one_loads(self, store: Store) -> None:
        """Exactly one of those who ask at the same time gets the lease."""
        for round_number in range(20):
            key = f"key{round_number}"
            got = _together([partial(store.lease, key, None)] * 8)
            leases = [one for one in got if isinstance(one, Lease)]
            assert len(leases) == 1
            assert sum(isinstance(one, Busy) for one in got) == 7
            assert store.settle(leases[0], _entry(b"loaded")) is True

    def test_loads_and_writes_by_many_threads(self, store: Store) -> None:
        """When all have ended, what is there is what the source has."""
        source = _Source(store)
        load, write, change = source.load, source.write, source.change
        groups = [
            [load, change], [load, write], [write, change], [write, write],
            [load, load, load, write, write, change],
        ]  # fmt: skip
        for group in groups * 12:
            _together(group)
            source.check()


class _Source:
    """A number that is loaded, written and changed by several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number = 0
        self._lock = threading.Lock()

    def _next(self) -> int:
        with self._lock:
            self._number += 1
            return self._number

    def load(self) -> None:
        """Put in what is there, if it is not put in already."""
        _switch()
        got = self._store.lease("key", self._store.read("key"))
        if isinstance(got, Lease):
            number = self._number
            _switch()
            self._store.settle(got, _entry(b"%d" % number))

    def write(self) -> None:
        """Write through the cache."""
        _switch()
        write = self._store.begin_write("key")
        number = self._next()
        _switch()
        self._store.end_write(write, _entry(b"%d" % number))

    def change(self) -> None:
        """Write beside the cache, and delete what is in it."""
        _switch()
        self._next()
        _switch()
        self._store.delete("key")

    def check(self) -> None:
        """Nothing old is there, and loads still work."""
        assert _payload(self._store, "key") in {None, b"%d" % self._number}
        self._store.delete("key")
        self.load()
        assert _payload(self._store, "key") == b"%d" % self._number


def _switch() -> None:
    """Let others run, for a while that no clock knows."""
    threading.Event().wait(SYSTEM.uniform(0, 0.001))


def _together(functions: list[Callable[[], Any]]) -> list[Any]:
    """What functions return that begin at the same time, each in a thread of its own."""
    barrier = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            barrier.wait(10)
            results[number] = functions[number]()
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def _noise(number: int) -> bytes:
    """256 bytes that no compression makes smaller."""
    return shake_128(b"%d" % number).digest(256)


def _entry(payload: bytes, *, lasts_s: float = _LONG_S, tags: tuple[str, ...] = ()) -> Entry:
    now = SYSTEM.now()
    return Entry(
        payload, created_at=now, fresh_until=now + lasts_s, gone_at=now + lasts_s, tags=tags
    )


def _found(store: Store, key: str) -> Entry:
    entry = store.read(key)
    assert entry is not None
    return entry


def _payload(store: Store, key: str) -> bytes | None:
    entry = store.read(key)
    return None if entry is None else entry.payload


def _payloads(store: Store, keys: Iterable[str]) -> dict[str, bytes]:
    return {key: entry.payload for key, entry in store.read_many(list(keys)).items()}


def _leased(store: Store, key: str, *, known: Entry | None = None) -> Lease:
    got = store.lease(key, known)
    assert isinstance(got, Lease)
    return got


def _busy(store: Store, key: str) -> Busy:
    got = store.lease(key, None)
    assert isinstance(got, Busy)
    return got


def _is_entry(got: Entry | Lease | Busy, payload: bytes) -> bool:
    return isinstance(got, Entry) and got.payload == payload
