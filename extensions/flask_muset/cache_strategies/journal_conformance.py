"""What every journal must do, as tests that whoever writes one can run.

    class TestMyJournal(JournalSuite):
        @pytest.fixture
        def make_journal(self, tmp_path):
            made = []

            def make(**options):
                made.append(MyJournal(tmp_path / str(len(made)), LocalStore(2**20), **options))
                return made[-1]

            yield make
            for journal in made:
                journal.close()

        @pytest.fixture
        def journal(self, make_journal):
            return make_journal(lease_s=self.lease_s)

        @pytest.fixture
        def other_journal(self, journal):
            other = MyJournal(journal.path, LocalStore(2**20), lease_s=self.lease_s)
            yield other
            other.close()

pytest shows the values of failed comparisons after
`pytest.register_assert_rewrite("flask_muset.cache_strategies.journal_conformance")`.
"""

# ruff: noqa: S101 - to assert is what this is for

import json
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.envelope import pack, unpack
from flask_muset.cache_strategies.journal import Claim, DeadLetter, Failure, Journal, Record, State
from flask_muset.cache_strategies.stores import Store
from flask_muset.clock import SYSTEM
from flask_muset.errors import ConflictError

__all__ = ["JournalSuite"]

#: A wait that no test sees the end of.
_LONG_S = 600.0
#: One that ends within a test, and a while after which it has.
_SHORT_S = 0.05
_AFTER_SHORT_S = 0.1
#: How far moments may be off where time passes really.
_NEAR_S = 0.2
#: More than there is in any test.
_ALL = 10_000

# Also what a journal may use for itself as a separator, a wildcard or the end of a text.
_ODD_KEYS = [
    "a b", " a", "a ", "a\nb", "a\r\n", "a\tb", "a\0b", "\x7f", "é", "e\u0301", "日本", "😀",
    "a*", "a?", "[a]", "a\\", "{a}", "a:b:c", "a-b", "%s", "'\"`", "\u202e", "A", "a", "k", "",
    "x" * 1024, "é" * 1024,
]  # fmt: skip


class _Tested(Journal, Protocol):
    """A journal whose store can be looked at."""

    @property
    def store(self) -> Store:
        """What `append` writes."""
        ...


_Make = Callable[..., _Tested]


class JournalSuite:
    """Tests of the `Journal` protocol.

    A subclass has these pytest fixtures. `make_journal` is a function that gives a new journal,
    with room for all that a test needs unless it is called with `max_pending` or
    `max_pending_bytes`, and with the `lease_s` it is called with; nothing is in it, and its `store`
    is the `Store` that it writes. `journal` is one with the suite's `lease_s`. `other_journal` is a
    second object on the same records, as another process has it.

    Time passes by `SYSTEM.sleep`: really, or at once where the fixture uses
    `flask_muset.testing.virtual_clock`.

    Attributes:
        lease_s: Seconds that a claim, and the sign of life of a home, lasts in `journal`.
    """

    lease_s: float = 0.3

    def advance(self, seconds: float) -> None:
        """Let time pass for the journal."""
        SYSTEM.sleep(seconds)

    def _let_leases_end(self) -> None:
        self.advance(self.lease_s + 0.05)

    # --- Accepting

    def test_what_was_accepted_waits(self, journal: _Tested) -> None:
        """A write is there with all that was said of it."""
        before = journal.now()
        seq = journal.append("key", _entry(b"value", tags=("a",)), writer="save", home="me")
        assert seq is not None
        record = _newest(journal, "key")
        assert record == Record("key", seq, "save", record.data, coalesces=True, home="me")
        found = unpack(record.data, 0)
        assert (found.payload, found.tags) == (b"value", ("a",))
        assert not record.deleted
        assert before - _NEAR_S < record.accepted_at < journal.now() + _NEAR_S

    def test_moments_of_the_value_survive(self, journal: _Tested) -> None:
        """The envelope is in the journal's own time, so that any process can read it."""
        entry = _entry(b"value")
        journal.append("key", entry, writer="w")
        shift_s = journal.now() - SYSTEM.now()
        found = unpack(_newest(journal, "key").data, round(shift_s * 1e6))
        assert abs(found.created_at - entry.created_at) < _NEAR_S
        assert abs(found.gone_at - entry.gone_at) < _NEAR_S

    def test_a_delete_waits(self, journal: _Tested) -> None:
        """It has no data, and is a record as others are."""
        journal.append("key", None, writer="w")
        record = _newest(journal, "key")
        assert (record.data, record.deleted) == (b"", True)
        assert journal.state().pending == 1
        assert journal.state().pending_bytes == 0

    def test_the_key_of_a_dead_letter(self, journal: _Tested) -> None:
        """So that the cache can forget it where the letter is settled."""
        seq = _put(journal, "kéy")
        (claim,), _ = journal.claim(1, home="me", early=True)
        journal.settle(claim, failure=Failure(seq, "no", is_final=True))
        (letter,) = journal.dead_letters()
        assert journal.key_of(letter.id) == "kéy"
        journal.drop(letter.id)
        assert journal.key_of(letter.id) is None
        assert journal.key_of("nothing like that") is None

    def test_what_waits_of_several_keys(self, journal: _Tested, other_journal: _Tested) -> None:
        """Those that have records, claimed ones too; not those that are only held."""
        for number in range(0, 3000, 2):
            _put(journal, f"key{number}")
        keys = [f"key{number}" for number in range(3000)]
        journal.hold("key1")
        journal.claim(5, home="me")
        assert other_journal.waiting(keys) == set(keys[::2])
        assert journal.waiting([]) == set()

    def test_whether_it_is_used(self, journal: _Tested, other_journal: _Tested) -> None:
        """Another process knows within a tenth of a second, and for good."""
        assert other_journal.is_used() is False
        _put(journal, "key")
        self.advance(0.11)
        assert other_journal.is_used() is True

    def test_a_holder_has_a_place_in_the_order(self, journal: _Tested) -> None:
        """Its sequence stands between those of all records before and of all after."""
        before = _put(journal, "key")
        claim = journal.hold("key")
        assert claim is not None
        assert before < claim.seq < (_put(journal, "key") or 0)
        assert journal.claim(1, home="me", early=True)[0] == []
        assert journal.settle(claim)
        (again,), _ = journal.claim(1, home="me", early=True)
        assert again.seq == 0

    def test_sequences_increase(self, journal: _Tested, other_journal: _Tested) -> None:
        """Each is greater than all before, of whatever key, in the same moment and process."""
        seqs = [
            _put(one, f"key{number % 3}", coalesces=number % 2 == 0)
            for number in range(30)
            for one in (journal, other_journal)
        ]
        assert seqs == sorted(set(seqs))

    def test_sequences_increase_after_all_are_gone(self, journal: _Tested) -> None:
        """A sequence is not given again, though nothing is left of the first."""
        first = [_put(journal, "key", coalesces=False) for _ in range(5)]
        claim = _one(journal)
        assert journal.settle(claim, written=first[-1]) is True
        journal.close()
        assert _put(journal, "other") > first[-1]

    def test_what_is_pending_is_in_order(self, journal: _Tested) -> None:
        """The records of a key are claimed as they were accepted, whoever writes them."""
        values = [b"%d" % number for number in range(20)]
        for number, value in enumerate(values):
            _put(journal, "key", value, writer=f"w{number % 3}", coalesces=False)
        assert _values(_one(journal).records) == values

    # --- The cache

    def test_the_cache_agrees(self, journal: _Tested) -> None:
        """A value that was accepted is served, one that was deleted is not."""
        _put(journal, "key", b"first")
        assert _cached(journal, "key") == b"first"
        _put(journal, "key", b"second", coalesces=False)
        assert _cached(journal, "key") == b"second"
        journal.append("key", None, writer="w")
        assert _cached(journal, "key") is None

    def test_the_cached_entry_is_whole(self, journal: _Tested) -> None:
        """Its tags and lifetimes are those that were given."""
        entry = _entry(b"value", tags=("a", "b"))
        fresh_until, gone_at = entry.fresh_until, entry.gone_at
        journal.append("key", entry, writer="w")
        found = journal.store.read("key")
        assert found is not None
        assert found.tags == ("a", "b")
        assert abs(found.fresh_until - fresh_until) < _NEAR_S
        assert abs(found.gone_at - gone_at) < _NEAR_S

    # --- Coalescing

    def test_a_newer_value_takes_the_place_of_an_older(self, journal: _Tested) -> None:
        """One record is left, the newer; a delete and a value are alike in this."""
        for newer, deleted in ((_entry(b"2"), False), (None, True), (_entry(b"3"), False)):
            first = _put(journal, "key", b"1")
            seq = journal.append("key", newer, writer="w")
            assert seq is not None
            assert seq > first
            assert [record.seq for record in _waiting(journal, "key")] == [seq]
            assert _newest(journal, "key").deleted is deleted
            assert journal.state().pending == 1
            assert journal.state().pending_bytes == len(_newest(journal, "key").data)

    def test_ledgers_keep_every_write(self, journal: _Tested) -> None:
        """Where either of two does not coalesce, both are kept."""
        for flags in ((False, False), (True, False), (False, True)):
            key = str(flags)
            for number, coalesces in enumerate(flags):
                _put(journal, key, b"%d" % number, coalesces=coalesces)
            assert _values(_waiting(journal, key)) == [b"0", b"1"]

    def test_only_neighbours_coalesce(self, journal: _Tested) -> None:
        """A record of another writer, or a ledger's, between two keeps both of them."""
        _put(journal, "key", b"1", writer="a")
        _put(journal, "key", b"2", writer="b")
        _put(journal, "key", b"3", writer="a")
        _put(journal, "key", b"4", writer="a", coalesces=False)
        _put(journal, "key", b"5", writer="a")
        _put(journal, "key", b"6", writer="a")
        assert _values(_waiting(journal, "key")) == [b"1", b"2", b"3", b"4", b"6"]

    def test_only_the_same_writer_coalesces(self, journal: _Tested) -> None:
        """The functions of homes are one writer, whose name is empty."""
        _put(journal, "key", b"1", writer="a")
        _put(journal, "key", b"2", writer="", home="one")
        _put(journal, "key", b"3", writer="", home="two")
        left = _waiting(journal, "key")
        assert _values(left) == [b"1", b"3"]
        assert [(record.writer, record.home) for record in left] == [("a", ""), ("", "two")]

    def test_keys_do_not_coalesce(self, journal: _Tested) -> None:
        """What is accepted for one key takes nothing from another."""
        _put(journal, "one", b"1")
        _put(journal, "two", b"2")
        assert journal.state().pending == 2

    def test_what_is_claimed_stays(self, journal: _Tested, other_journal: _Tested) -> None:
        """A record that is being written is not taken away; what comes after it coalesces."""
        first = _put(journal, "key", b"1")
        claim = _one(journal)
        _put(other_journal, "key", b"2")
        last = _put(journal, "key", b"3")
        assert journal.state().pending == 2
        assert journal.settle(claim, written=first) is True
        claim = _one(journal)
        assert [record.seq for record in claim.records] == [last]

    def test_what_is_not_claimed_any_more_coalesces(self, journal: _Tested) -> None:
        """After a claim has ended, by itself too, the record may be replaced."""
        _put(journal, "key", b"1")
        _one(journal)
        self._let_leases_end()
        _put(journal, "key", b"2")
        assert _values(_waiting(journal, "key")) == [b"2"]

    def test_a_replacement_is_due_when_the_older_was(self, journal: _Tested) -> None:
        """Writes that go on do not put off what waits, nor does a longer delay."""
        _put(journal, "key", b"1", delay_s=_SHORT_S)
        _put(journal, "key", b"2", delay_s=_LONG_S)
        self.advance(_AFTER_SHORT_S)
        assert _values(_one(journal).records) == [b"2"]

    def test_a_replacement_does_not_hurry(self, journal: _Tested) -> None:
        """The pause after a failure holds for what is accepted meanwhile."""
        seq = _put(journal, "key", b"1")
        failure = Failure(seq, "refused", pause_s=_LONG_S)
        assert journal.settle(_one(journal), failure=failure) is True
        _put(journal, "key", b"2")
        assert _claims(journal) == []
        record = _one(journal, early=True).records[0]
        assert (_value(record), record.attempts, record.first_failed) == (b"2", 0, None)

    def test_a_replacement_is_as_old_as_the_older(self, journal: _Tested) -> None:
        """The age of what waits is not made less by newer writes of it."""
        _put(journal, "key", b"1")
        self.advance(_AFTER_SHORT_S)
        _put(journal, "key", b"2")
        assert journal.state().oldest_s >= _SHORT_S
        assert journal.explain("key")["oldest_s"] >= _SHORT_S

    # --- The writer of the last record

    def test_no_writer_is_the_last_one(self, journal: _Tested) -> None:
        """Without a writer the record takes what is known of the key's last."""
        _put(journal, "key", b"1", writer="a", coalesces=False, home="one")
        _put(journal, "key", b"2", writer="b", coalesces=False, home="two")
        seq = journal.append("key", _entry(b"3"), writer=None, coalesces=True, home="three")
        assert seq
        last = _newest(journal, "key")
        assert (last.seq, last.writer, last.coalesces, last.home) == (seq, "b", False, "two")
        assert len(_waiting(journal, "key")) == 3

    def test_no_writer_coalesces(self, journal: _Tested) -> None:
        """It takes the place of the last record where that coalesces, not of a claimed one."""
        _put(journal, "key", b"1")
        assert journal.append("key", None, writer=None)
        assert [record.deleted for record in _waiting(journal, "key")] == [True]
        claim = _hold(journal, "key")
        assert journal.append("key", _entry(b"2"), writer=None)
        assert journal.state().pending == 2
        assert journal.settle(claim) is True

    def test_no_writer_and_no_record(self, journal: _Tested) -> None:
        """Nothing happens, not in the cache either."""
        journal.store.write("key", _entry(b"cached"))
        assert journal.append("key", _entry(b"new"), writer=None) == 0
        assert journal.append("key", None, writer=None) == 0
        assert journal.newest("key") is None
        assert _cached(journal, "key") == b"cached"
        assert journal.state() == State(0, 0, 0.0, 0)

    # --- Room

    def test_a_full_journal_takes_no_more(self, make_journal: _Make) -> None:
        """None is the answer, and nothing has changed, in the cache neither."""
        journal = make_journal(max_pending=3)
        for number in range(3):
            _put(journal, f"key{number}", b"old")
        before = journal.state()
        for key in ("key3", "key0"):
            cached = _cached(journal, key)
            assert journal.append(key, _entry(b"new"), writer="w", coalesces=False) is None
            assert journal.append(key, None, writer="w", coalesces=False) is None
            assert _cached(journal, key) == cached
        assert journal.newest("key3") is None
        assert _same(journal.state(), before)
        assert _values(_waiting(journal, "key0")) == [b"old"]

    def test_a_replacement_needs_no_room(self, make_journal: _Make) -> None:
        """It is accepted where all else is refused."""
        journal = make_journal(max_pending=1)
        _put(journal, "key", b"1")
        assert journal.append("other", _entry(b"1"), writer="w") is None
        assert _put(journal, "key", b"2")
        assert _cached(journal, "key") == b"2"
        assert journal.append("key", None, writer=None)
        assert journal.state().pending == 1

    def test_room_comes_back(self, make_journal: _Make) -> None:
        """What was written, superseded or given up takes no room."""
        journal = make_journal(max_pending=1)
        seq = _put(journal, "key")
        assert journal.settle(_one(journal), written=seq) is True
        seq = _put(journal, "key")
        assert journal.settle(_one(journal), failure=Failure(seq, "no", is_final=True)) is True
        _put(journal, "key")
        journal.supersede("key", journal.now() + 1)
        _put(journal, "key")
        assert journal.append("other", _entry(b""), writer="w") is None

    def test_room_in_bytes(self, make_journal: _Make) -> None:
        """The data of all records together has a bound; deletes need none of it."""
        one = len(pack(_entry(b"value"), 0))
        journal = make_journal(max_pending_bytes=3 * one)
        for number in range(3):
            _put(journal, f"key{number}", b"value")
        assert journal.state().pending_bytes == 3 * one
        assert journal.append("key3", _entry(b"value"), writer="w") is None
        assert journal.append("key3", None, writer="w")
        assert _put(journal, "key0", b"VALUE")
        assert journal.append("key0", None, writer="w")
        assert _put(journal, "key4", b"value")
        assert journal.append("key5", _entry(b""), writer="w") is None

    def test_claimed_records_need_room(self, make_journal: _Make) -> None:
        """What is being written still waits."""
        journal = make_journal(max_pending=1, lease_s=_LONG_S)
        seq = _put(journal, "key")
        claim = _one(journal)
        assert journal.append("key", _entry(b"2"), writer="w") is None
        assert journal.settle(claim, written=seq) is True
        _put(journal, "key")

    # --- Claiming

    def test_nothing_to_claim(self, journal: _Tested) -> None:
        """There are no claims, and no moment to wait for."""
        assert journal.claim(10, home="home") == ([], None)
        assert journal.newest("key") is None

    def test_what_is_due_longest_comes_first(self, journal: _Tested) -> None:
        """Keys are claimed by when they were due, not by when they were accepted."""
        for key, delay_s in (("c", 0.03), ("a", 0.01), ("d", 0.04), ("b", 0.02)):
            _put(journal, key, delay_s=delay_s + _SHORT_S)
        self.advance(_AFTER_SHORT_S + _SHORT_S)
        assert [claim.key for claim in _claims(journal, limit=2)] == ["a", "b"]
        assert [claim.key for claim in _claims(journal)] == ["c", "d"]

    def test_a_delay(self, journal: _Tested) -> None:
        """A key is not claimed before it is due, and the wait for it is told."""
        _put(journal, "key", delay_s=_LONG_S)
        claims, wait_s = journal.claim(10, home="home")
        assert claims == []
        assert wait_s is not None
        assert _LONG_S - _NEAR_S < wait_s <= _LONG_S
        _put(journal, "soon", delay_s=_SHORT_S)
        wait_s = journal.claim(10, home="home")[1]
        assert wait_s is not None
        assert 0 <= wait_s <= _SHORT_S
        self.advance(_AFTER_SHORT_S)
        assert _one(journal).key == "soon"

    def test_a_delay_counts_where_nothing_waited(self, journal: _Tested) -> None:
        """A key that is due stays due, and one that waits is due no sooner."""
        _put(journal, "due", coalesces=False)
        _put(journal, "due", coalesces=False, delay_s=_LONG_S)
        _put(journal, "waits", coalesces=False, delay_s=_LONG_S)
        _put(journal, "waits", coalesces=False)
        claim = _one(journal)
        assert (claim.key, len(claim.records)) == ("due", 2)

    def test_claiming_early(self, journal: _Tested) -> None:
        """What is not due yet may be claimed as well, the key that is due first before others."""
        _put(journal, "later", delay_s=_LONG_S)
        _put(journal, "soon", delay_s=_LONG_S / 2)
        _put(journal, "due")
        assert [claim.key for claim in _claims(journal, limit=2, early=True)] == ["due", "soon"]
        assert [claim.key for claim in _claims(journal, early=True)] == ["later"]
        assert _claims(journal, early=True) == []

    def test_more_is_due(self, journal: _Tested) -> None:
        """Where not all that is due was claimed, there is nothing to wait for."""
        for number in range(5):
            _put(journal, f"key{number}")
        claims, wait_s = journal.claim(3, home="home")
        assert (len(claims), wait_s) == (3, 0)
        claims, wait_s = journal.claim(0, home="home")
        assert (claims, wait_s) == ([], 0)

    def test_one_has_a_key(self, journal: _Tested, other_journal: _Tested) -> None:
        """What is claimed nobody else claims or holds, not even early; other keys are free."""
        _put(journal, "key")
        claim = _one(journal)
        assert _claims(other_journal, early=True) == []
        assert other_journal.hold("key") is None
        assert journal.hold("key") is None
        _put(other_journal, "other")
        assert _one(other_journal).key == "other"
        assert journal.settle(claim) is True
        assert _one(other_journal).key == "key"

    def test_the_wait_for_what_others_have(self, journal: _Tested, other_journal: _Tested) -> None:
        """A key that is claimed is due again when the claim ends, at the latest."""
        _put(journal, "key")
        _one(journal)
        claims, wait_s = other_journal.claim(10, home="other")
        assert claims == []
        assert wait_s is not None
        assert 0 <= wait_s <= self.lease_s

    def test_a_claim_has_the_oldest(self, journal: _Tested) -> None:
        """It has all of the key's records, or the first and says so; the rest comes after."""
        values = [b"%d" % number for number in range(300)]
        for value in values:
            _put(journal, "key", value, coalesces=False)
        got: list[bytes | None] = []
        while len(got) < len(values):
            claim = _one(journal)
            got += _values(claim.records)
            assert claim.is_whole is (len(got) == len(values))
            assert journal.settle(claim, written=claim.records[-1].seq) is True
        assert got == values
        assert journal.state().pending == 0

    def test_there_is_no_more(self, journal: _Tested) -> None:
        """What was claimed is not waited for."""
        _put(journal, "key")
        _put(journal, "other")
        claims, wait_s = journal.claim(2, home="home")
        assert (len(claims), wait_s) == (2, None)

    def test_tokens_differ(self, journal: _Tested, other_journal: _Tested) -> None:
        """Each claim has its own, also of the same key."""
        tokens = []
        for one in (journal, other_journal, journal):
            claim = _hold(one, "key")
            tokens.append(claim.token)
            one.settle(claim)
        assert len(set(tokens)) == 3
        assert all(tokens)

    # --- Holding

    def test_holding_what_waits(self, journal: _Tested, other_journal: _Tested) -> None:
        """A key is held with its records, due or not, and nobody claims it meanwhile."""
        _put(journal, "key", b"1", coalesces=False, delay_s=_LONG_S)
        _put(journal, "key", b"2", coalesces=False)
        claim = _hold(journal, "key")
        assert claim.key == "key"
        assert claim.is_whole
        assert _values(claim.records) == [b"1", b"2"]
        assert _claims(other_journal, early=True) == []
        assert journal.settle(claim, written=claim.records[0].seq) is True
        assert _values(_one(other_journal).records) == [b"2"]

    def test_holding_what_is_empty(self, journal: _Tested, other_journal: _Tested) -> None:
        """A key without records is held as well: what is accepted meanwhile is not claimed."""
        claim = _hold(journal, "key")
        assert (claim.records, claim.is_whole) == ((), True)
        assert other_journal.hold("key") is None
        assert journal.state().pending == 0
        _put(journal, "key", b"1")
        _put(other_journal, "key", b"2")
        assert _claims(other_journal, early=True) == []
        assert _newest(other_journal, "key").data
        assert journal.state().pending == 1
        assert journal.settle(claim) is True
        assert _values(_one(other_journal).records) == [b"2"]

    def test_a_hold_takes_nothing_with_it(self, journal: _Tested) -> None:
        """What was accepted during a hold is not done with when the hold ends."""
        claim = _hold(journal, "key")
        seq = _put(journal, "key", b"1", delay_s=_LONG_S)
        assert journal.settle(claim, written=seq + 1) is True
        assert _values(_one(journal).records) == [b"1"]

    def test_a_hold_of_nothing_leaves_nothing(self, journal: _Tested) -> None:
        """After it the key is as if it had never been."""
        assert journal.settle(_hold(journal, "key")) is True
        assert journal.claim(10, home="home", early=True) == ([], None)
        assert journal.newest("key") is None
        assert journal.state() == State(0, 0, 0.0, 0)
        _put(journal, "key", delay_s=_LONG_S)
        assert _claims(journal) == []

    # --- Leases

    def test_a_claim_ends_by_itself(self, journal: _Tested, other_journal: _Tested) -> None:
        """Somebody else writes the records, and who comes late changes nothing."""
        seq = _put(journal, "key", b"1")
        late = _one(journal)
        self._let_leases_end()
        claim = _one(other_journal)
        assert claim.records == late.records
        for failure in (None, Failure(seq, "late", is_final=True)):
            assert journal.settle(late, written=seq, failure=failure) is False
            assert journal.settle(late, failure=failure) is False
        assert journal.state().pending == 1
        assert journal.state().dead_letters == 0
        assert journal.hold("key") is None
        assert other_journal.settle(claim, written=seq) is True
        assert journal.state().pending == 0

    def test_a_claim_that_has_ended_is_not_held(self, journal: _Tested) -> None:
        """That nobody else has the key yet makes no difference, and renewing comes too late."""
        seq = _put(journal, "key")
        claim = _one(journal)
        self._let_leases_end()
        journal.renew([claim])
        assert journal.settle(claim, written=seq) is False
        assert journal.state().pending == 1
        assert _one(journal).records == claim.records

    def test_a_hold_ends_by_itself(self, journal: _Tested, other_journal: _Tested) -> None:
        """Also one of a key that has no record; what came meanwhile is due."""
        claim = _hold(journal, "key")
        self._let_leases_end()
        next_claim = _hold(other_journal, "key")
        assert journal.settle(claim) is False
        assert journal.hold("key") is None
        _put(journal, "key")
        self._let_leases_end()
        assert other_journal.settle(next_claim) is False
        assert len(_one(journal).records) == 1

    def test_renewing(self, journal: _Tested, other_journal: _Tested) -> None:
        """A claim that is renewed lasts on; one that is not does not."""
        _put(journal, "one")
        _put(journal, "two")
        claims = {claim.key: claim for claim in _claims(journal)}
        for _ in range(2):
            self.advance(self.lease_s * 0.6)
            journal.renew([claims["one"]])
        assert [claim.key for claim in _claims(other_journal)] == ["two"]
        assert journal.settle(claims["one"]) is True
        assert journal.settle(claims["two"]) is False
        journal.renew([])

    def test_renewing_takes_nothing_away(self, journal: _Tested, other_journal: _Tested) -> None:
        """Who renews too late does not lengthen what another has."""
        _put(journal, "key")
        late = _one(journal)
        self._let_leases_end()
        _one(other_journal)
        self.advance(self.lease_s * 0.6)
        journal.renew([late])
        self.advance(self.lease_s * 0.5)
        assert journal.settle(late) is False
        assert _one(journal).key == "key"

    # --- Settling

    def test_what_was_written_is_done_with(self, journal: _Tested) -> None:
        """Records up to the written one are gone; the others are due at once."""
        seqs = [_put(journal, "key", b"%d" % number, coalesces=False) for number in range(4)]
        assert journal.settle(_one(journal), written=seqs[1]) is True
        claim = _one(journal)
        assert _values(claim.records) == [b"2", b"3"]
        assert journal.settle(claim, written=seqs[3]) is True
        assert journal.newest("key") is None
        assert journal.claim(10, home="home", early=True) == ([], None)

    def test_nothing_written_changes_nothing(self, journal: _Tested) -> None:
        """A claim that is let go of leaves its records as they were, due at once."""
        _put(journal, "key", delay_s=_LONG_S)
        claim = _one(journal, early=True)
        assert journal.settle(claim) is True
        assert _one(journal).records == claim.records

    def test_settling_twice(self, journal: _Tested) -> None:
        """A claim ends once."""
        seq = _put(journal, "key")
        claim = _one(journal)
        assert journal.settle(claim) is True
        assert journal.settle(claim, written=seq) is False
        assert journal.state().pending == 1

    def test_only_its_own_records_are_done_with(self, journal: _Tested) -> None:
        """What was accepted since the claim is left, whatever sequence is named."""
        _put(journal, "key", b"1")
        _put(journal, "other", b"1")
        claim = _hold(journal, "key")
        last = _put(journal, "key", b"2")
        assert journal.settle(claim, written=last + 1000) is True
        assert _values(_waiting(journal, "key")) == [b"2"]
        assert journal.state().pending == 2

    def test_a_failure(self, journal: _Tested) -> None:
        """The record is counted as tried, and its key pauses; the ones behind it wait too."""
        seq = _put(journal, "key", b"1", coalesces=False)
        _put(journal, "key", b"2", coalesces=False)
        before = journal.now()
        failure = Failure(seq, "refused", pause_s=_SHORT_S)
        assert journal.settle(_one(journal), failure=failure) is True
        claims, wait_s = journal.claim(10, home="home")
        assert claims == []
        assert wait_s is not None
        assert 0 <= wait_s <= _SHORT_S
        self.advance(_AFTER_SHORT_S)
        first, second = _one(journal).records
        assert (first.seq, first.attempts, second.attempts) == (seq, 1, 0)
        assert first.first_failed is not None
        assert before - _NEAR_S < first.first_failed < before + _NEAR_S
        assert second.first_failed is None

    def test_failures_add_up(self, journal: _Tested) -> None:
        """Attempts are counted, those that count; the first failure is remembered."""
        seq = _put(journal, "key")
        firsts = set()
        for counts in (True, False, True):
            failure = Failure(seq, "refused", counts=counts)
            assert journal.settle(_one(journal), failure=failure) is True
            self.advance(0.01)
            firsts.add(_newest(journal, "key").first_failed)
        assert _newest(journal, "key").attempts == 2
        assert len(firsts) == 1
        assert journal.explain("key")["attempts"] == 2

    def test_some_written_and_one_failed(self, journal: _Tested) -> None:
        """What stands before the one that failed is done with."""
        seqs = [_put(journal, "key", b"%d" % number, coalesces=False) for number in range(3)]
        failure = Failure(seqs[1], "refused", pause_s=_LONG_S)
        assert journal.settle(_one(journal), written=seqs[0], failure=failure) is True
        assert _claims(journal) == []
        left = _one(journal, early=True).records
        assert [(record.seq, record.attempts) for record in left] == [(seqs[1], 1), (seqs[2], 0)]

    def test_an_attempt_that_does_not_count(self, journal: _Tested) -> None:
        """Without an error of its own it leaves the last one, and nothing has failed first."""
        seq = _put(journal, "key")
        pause = Failure(seq, "", counts=False)
        assert journal.settle(_one(journal), failure=pause) is True
        assert _newest(journal, "key").first_failed is None
        assert journal.settle(_one(journal), failure=Failure(seq, "refused")) is True
        first = _newest(journal, "key").first_failed
        self.advance(0.01)
        assert journal.settle(_one(journal), failure=pause) is True
        assert journal.explain("key")["error"] == "refused"
        record = _newest(journal, "key")
        assert (record.attempts, record.first_failed) == (1, first)
        assert journal.settle(_one(journal), failure=Failure(seq, "shut", counts=False)) is True
        assert journal.explain("key")["error"] == "shut"

    # --- Dead letters

    def test_giving_up_without_an_attempt(self, journal: _Tested) -> None:
        """A dead letter has the last error, and the attempts that counted."""
        seq = _put(journal, "key")
        assert journal.settle(_one(journal), failure=Failure(seq, "refused")) is True
        failure = Failure(seq, "", is_final=True, counts=False)
        assert journal.settle(_one(journal), failure=failure) is True
        assert (_letter(journal).error, _letter(journal).record.attempts) == ("refused", 1)

    def test_a_final_failure_does_not_pause(self, journal: _Tested) -> None:
        """What stands behind a record that is given up is due at once, whatever pause is named."""
        seq = _put(journal, "key", b"1", coalesces=False)
        _put(journal, "key", b"2", coalesces=False)
        failure = Failure(seq, "poison", is_final=True, pause_s=_LONG_S)
        assert journal.settle(_one(journal), failure=failure) is True
        assert _values(_one(journal).records) == [b"2"]

    def test_a_final_failure(self, journal: _Tested, other_journal: _Tested) -> None:
        """The record is given up and kept aside; the one behind it is due at once."""
        seq = _put(journal, "key", b"1", coalesces=False, home="me")
        _put(journal, "key", b"2", coalesces=False)
        assert journal.settle(_one(journal, home="me"), failure=Failure(seq, "refused")) is True
        self.advance(0.01)
        failure = Failure(seq, "poison", is_final=True)
        assert journal.settle(_one(journal, home="me"), failure=failure) is True
        letter = _letter(other_journal)
        assert (letter.record.key, letter.record.seq, letter.record.home) == ("key", seq, "me")
        assert (_value(letter.record), letter.record.coalesces) == (b"1", False)
        assert (letter.error, letter.record.attempts) == ("poison", 2)
        assert letter.first_failed < letter.last_failed
        assert not letter.is_superseded
        assert letter.id.replace("-", "").isalnum()
        assert _values(_one(journal).records) == [b"2"]
        assert (journal.state().pending, journal.state().dead_letters) == (1, 1)

    def test_long_errors_are_cut(self, journal: _Tested) -> None:
        """1,000 characters of a description are kept, whatever they are."""
        for number, text in enumerate(("x" * 5000, "é" * 5000, "short\0\n")):
            _give_up(journal, f"key{number}", error=text)
        found = [letter.error for letter in journal.dead_letters()]
        assert found == ["x" * 1000, "é" * 1000, "short\0\n"]

    def test_dead_letters_in_pages(self, journal: _Tested) -> None:
        """They come in the order in which they were given up, and from behind any of them."""
        keys = [f"key{number}" for number in (3, 1, 4, 0, 2)]
        for key in keys:
            _give_up(journal, key)
        letters = journal.dead_letters()
        assert [letter.record.key for letter in letters] == keys
        assert len({letter.id for letter in letters}) == 5
        assert journal.dead_letters(2) == letters[:2]
        assert journal.dead_letters(2, after=letters[1].id) == letters[2:4]
        assert journal.dead_letters(2, after=letters[3].id) == letters[4:]
        assert journal.dead_letters(after=letters[4].id) == []

    def test_dropping(self, journal: _Tested) -> None:
        """A dead letter is forgotten once; the others stay."""
        _give_up(journal, "one")
        _give_up(journal, "two")
        one, two = journal.dead_letters()
        assert journal.drop(one.id) is True
        assert journal.drop(one.id) is False
        assert journal.requeue(one.id) is False
        assert journal.dead_letters() == [two]
        assert journal.state().dead_letters == 1

    def test_unknown_dead_letters(self, journal: _Tested) -> None:
        """What no letter is called is not there, whatever it looks like."""
        _give_up(journal, "key")
        for name in ("", "0", "nobody", "1-2-3", "-", "é", "*"):
            assert journal.drop(name) is False
            assert journal.requeue(name) is False
        assert journal.state().dead_letters == 1

    def test_requeueing(self, journal: _Tested) -> None:
        """A dead letter is due at once, as it was accepted and not yet tried."""
        seq = _give_up(journal, "key", b"1")
        assert journal.requeue(_letter(journal).id) is True
        assert journal.dead_letters() == []
        record = _newest(journal, "key")
        assert record == Record("key", seq, "w", record.data, coalesces=True)
        assert _value(record) == b"1"
        assert _one(journal).records == (record,)
        assert (journal.state().pending, journal.state().dead_letters) == (1, 0)
        assert journal.state().pending_bytes == len(record.data)

    def test_requeueing_to_the_old_place(self, journal: _Tested) -> None:
        """It is written before the newer ones that wait."""
        _give_up(journal, "key", b"1", coalesces=False)
        _put(journal, "key", b"2", coalesces=False)
        _put(journal, "key", b"3", coalesces=False)
        assert journal.requeue(_letter(journal).id) is True
        assert _values(_one(journal, early=True).records) == [b"1", b"2", b"3"]

    def test_requeueing_while_newer_ones_are_claimed(self, journal: _Tested) -> None:
        """Whoever writes the newer ones is not done with the older; that comes next."""
        _give_up(journal, "key", b"1", coalesces=False)
        newer = _put(journal, "key", b"2", coalesces=False)
        claim = _one(journal)
        assert journal.requeue(_letter(journal).id) is True
        assert _claims(journal, early=True) == []
        assert journal.settle(claim, written=newer) is True
        assert _values(_one(journal).records) == [b"1"]

    def test_a_requeued_record_is_not_claimed(self, journal: _Tested) -> None:
        """What comes back during a claim is none of its records, though older than they are."""
        _give_up(journal, "key", b"1")
        _put(journal, "key", b"2", writer="ledger", coalesces=False)
        claim = _one(journal)
        assert journal.requeue(_letter(journal).id) is True
        journal.supersede("key", journal.now() + 1)
        assert journal.settle(claim) is True
        assert _values(_waiting(journal, "key")) == [b"2"]

    def test_requeueing_into_a_full_journal(self, make_journal: _Make) -> None:
        """What was accepted once is not refused."""
        journal = make_journal(max_pending=1)
        _give_up(journal, "key")
        _put(journal, "other")
        assert journal.requeue(_letter(journal).id) is True
        assert journal.state().pending == 2

    def test_superseded_dead_letters(self, journal: _Tested) -> None:
        """A newer value by the same writer makes the old one useless, also a delete."""
        for newer in (_entry(b"new"), None):
            _give_up(journal, "key", b"old")
            journal.append("key", newer, writer="w")
            letter = _letter(journal)
            assert letter.is_superseded
            assert _is_refused(journal, letter)
            assert journal.dead_letters() == [letter]
            assert journal.state().pending == 1
            assert journal.drop(letter.id) is True
            journal.supersede("key", journal.now() + 1)

    def test_what_supersedes_no_dead_letter(self, journal: _Tested) -> None:
        """Ledgers, other writers, other keys and what was refused leave it as it is."""
        _give_up(journal, "key", b"old")
        _put(journal, "key", coalesces=False)
        _put(journal, "key", writer="other")
        _put(journal, "other")
        assert not _letter(journal).is_superseded

    def test_superseded_before_it_was_given_up(self, journal: _Tested) -> None:
        """A newer value that was accepted while the older was tried counts as well."""
        seq = _put(journal, "key", b"old")
        claim = _one(journal)
        _put(journal, "key", b"new")
        assert journal.settle(claim, failure=Failure(seq, "no", is_final=True)) is True
        assert _letter(journal).is_superseded
        assert _values(_one(journal).records) == [b"new"]

    def test_superseded_by_nobody_in_particular(self, journal: _Tested) -> None:
        """A write without a writer supersedes as the writer would whose place it takes."""
        _give_up(journal, "key", b"old", coalesces=False)
        _put(journal, "key", b"1", coalesces=False)
        assert journal.append("key", _entry(b"2"), writer=None)
        assert not _letter(journal).is_superseded
        _put(journal, "key", b"3")
        assert _letter(journal).is_superseded

    def test_superseded_by_who_held_the_key(self, journal: _Tested) -> None:
        """A holder that has written a newer value says so of its writer, or of all."""
        _give_up(journal, "key", writer="w")
        _give_up(journal, "key", writer="v")
        _give_up(journal, "key", writer="w", coalesces=False)
        _give_up(journal, "other", writer="w")

        def settle(supersedes: str | None) -> list[bool]:
            assert journal.settle(_hold(journal, "key"), supersedes=supersedes) is True
            return [letter.is_superseded for letter in journal.dead_letters()]

        assert settle(None) == [False, False, False, False]
        assert settle("u") == [False, False, False, False]
        assert settle("w") == [True, False, False, False]
        assert _is_refused(journal, journal.dead_letters()[0])
        assert settle("") == [True, True, False, False]
        assert journal.requeue(journal.dead_letters()[2].id) is True

    def test_a_claim_that_was_no_hold_supersedes_nothing(self, journal: _Tested) -> None:
        """What it has written is not newer than what was given up."""
        _give_up(journal, "key")
        seq = _put(journal, "key", writer="v")
        assert journal.settle(_one(journal), written=seq, supersedes="w") is True
        assert not _letter(journal).is_superseded

    def test_who_came_too_late_supersedes_nothing(self, journal: _Tested) -> None:
        """A claim that has ended marks no dead letter."""
        _give_up(journal, "key")
        claim = _hold(journal, "key")
        self._let_leases_end()
        assert journal.settle(claim, supersedes="w") is False
        assert not _letter(journal).is_superseded

    # --- Homes

    def test_what_is_at_home(self, journal: _Tested, other_journal: _Tested) -> None:
        """A key of a home that is alive is left to that one, and the wait for it is told."""
        journal.beat("mine")
        _put(journal, "key", writer="", home="mine")
        _put(journal, "free")
        claims, wait_s = other_journal.claim(10, home="other")
        assert [claim.key for claim in claims] == ["free"]
        assert wait_s is not None
        assert 0 <= wait_s <= self.lease_s
        assert _claims(other_journal, home="other", early=True) == []
        assert _one(journal, home="mine").key == "key"

    def test_what_has_lost_its_home(self, journal: _Tested, other_journal: _Tested) -> None:
        """Anybody claims it when its home has been silent for a lease's time, or was never seen."""
        journal.beat("mine")
        _put(journal, "key", writer="", home="mine")
        _put(journal, "unseen", writer="", home="nobody")
        unseen = _one(other_journal, home="other")
        assert unseen.key == "unseen"
        assert other_journal.settle(unseen, written=unseen.records[0].seq) is True
        self.advance(self.lease_s * 0.6)
        journal.beat("mine")
        self.advance(self.lease_s * 0.6)
        assert _claims(other_journal, home="other") == []
        self.advance(self.lease_s * 0.6)
        assert _one(other_journal, home="other").key == "key"

    def test_the_oldest_record_is_at_home(self, journal: _Tested) -> None:
        """Whose the newer ones are makes no difference."""
        journal.beat("mine")
        _put(journal, "key", b"1", coalesces=False)
        _put(journal, "key", b"2", writer="", home="mine")
        claim = _one(journal, home="other")
        assert journal.settle(claim, written=claim.records[0].seq) is True
        assert _claims(journal, home="other") == []
        assert _values(_one(journal, home="mine").records) == [b"2"]

    def test_the_home_of_a_replacement(self, journal: _Tested) -> None:
        """A key moves with the record that took the place of its only one."""
        for home in ("one", "two"):
            journal.beat(home)
            _put(journal, "key", writer="", home=home)
        assert _claims(journal, home="one") == []
        assert _one(journal, home="two").key == "key"

    def test_the_oldest_record_changes(self, journal: _Tested) -> None:
        """A key moves where older ones are superseded, or come back from the dead."""
        journal.beat("mine")
        _give_up(journal, "back", b"1", writer="", home="mine", coalesces=False)
        _put(journal, "back", b"2")
        _put(journal, "moves", b"1")
        _put(journal, "moves", b"2", writer="", home="mine", coalesces=False)
        journal.supersede("moves", journal.now() + 1)
        assert [claim.key for claim in _claims(journal, home="other")] == ["back"]
        self._let_leases_end()
        journal.beat("mine")
        assert journal.requeue(_letter(journal).id) is True
        assert _claims(journal, home="other") == []
        assert {claim.key for claim in _claims(journal, home="mine")} == {"back", "moves"}

    def test_much_at_home_keeps_nobody_from_the_rest(self, journal: _Tested) -> None:
        """Keys that are left to their home do not count to the limit."""
        journal.beat("mine")
        for number in range(20):
            _put(journal, f"mine{number}", writer="", home="mine")
        self.advance(0.001)
        _put(journal, "free")
        assert [claim.key for claim in _claims(journal, home="other", limit=1)] == ["free"]

    def test_holding_what_is_at_home(self, journal: _Tested) -> None:
        """A key is held by whoever asks, wherever its records are at home."""
        journal.beat("mine")
        _put(journal, "key", writer="", home="mine")
        assert len(_hold(journal, "key").records) == 1

    # --- Superseding

    def test_superseding(self, journal: _Tested) -> None:
        """Records that coalesce and are older are forgotten; ledgers and newer ones stay."""
        _put(journal, "key", b"1")
        _put(journal, "key", b"2", writer="ledger", coalesces=False)
        _put(journal, "other", b"3")
        self.advance(0.02)
        before = journal.now()
        self.advance(0.02)
        _put(journal, "key", b"4")
        journal.supersede("key", before)
        assert _values(_waiting(journal, "key")) == [b"2", b"4"]
        assert _values(_waiting(journal, "other")) == [b"3"]
        assert journal.state().pending == 3
        journal.supersede("absent", before)

    def test_superseding_what_is_claimed(self, journal: _Tested) -> None:
        """A record that is being written stays; one that came after it goes."""
        seq = _put(journal, "key", b"1")
        claim = _one(journal)
        _put(journal, "key", b"2")
        journal.supersede("key", journal.now() + 1)
        assert _value(_newest(journal, "key")) == b"1"
        assert journal.settle(claim, failure=Failure(seq, "refused")) is True
        assert journal.newest("key") is None
        assert journal.state() == State(0, 0, 0.0, 0)

    def test_superseded_when_a_claim_ends(self, journal: _Tested) -> None:
        """However it ends, what was older and coalesces is forgotten; the rest is due at once."""
        for is_final in (None, False, True):
            seq = _put(journal, "key", b"1")
            _put(journal, "key", b"2", writer="ledger", coalesces=False)
            self.advance(0.002)
            before = journal.now()
            self.advance(0.002)
            last = _put(journal, "key", b"3")
            claim = _one(journal)
            journal.supersede("key", before)
            failure = Failure(seq, "refused", is_final=bool(is_final), pause_s=_LONG_S)
            assert journal.settle(claim, failure=None if is_final is None else failure) is True
            claim = _one(journal)
            assert _values(claim.records) == [b"2", b"3"]
            assert journal.settle(claim, written=last) is True
        assert journal.state() == State(0, 0, 0.0, 0)

    def test_superseded_when_it_was_written(self, journal: _Tested) -> None:
        """What was written is done with; what comes after the claim is not forgotten with it."""
        first = _put(journal, "key", b"1")
        claim = _one(journal)
        self.advance(0.002)
        journal.supersede("key", journal.now())
        _put(journal, "key", b"2")
        assert journal.settle(claim, written=first) is True
        assert _values(_waiting(journal, "key")) == [b"2"]

    def test_superseded_when_a_claim_ends_by_itself(
        self, journal: _Tested, other_journal: _Tested
    ) -> None:
        """Nobody writes it again, whoever claims or holds the key next."""
        for key in ("one", "two"):
            _put(journal, key, b"1")
        _put(journal, "two", b"2", writer="ledger", coalesces=False)
        claims = _claims(journal)
        assert len(claims) == 2
        self.advance(0.002)
        for key in ("one", "two"):
            other_journal.supersede(key, journal.now())
        journal.renew(claims)
        self._let_leases_end()
        assert _values(_hold(other_journal, "two").records) == [b"2"]
        assert _claims(other_journal) == []
        assert journal.state().pending == 1
        _put(journal, "one", b"3")
        assert _values(_one(journal).records) == [b"3"]

    def test_superseding_all(self, journal: _Tested) -> None:
        """A key without records is as if it had never been; one that is held stays held."""
        _put(journal, "key", delay_s=_LONG_S)
        journal.supersede("key", journal.now() + 1)
        assert journal.claim(10, home="home", early=True) == ([], None)
        assert journal.state() == State(0, 0, 0.0, 0)
        _put(journal, "key")
        assert _one(journal).key == "key"
        claim = _hold(journal, "held")
        _put(journal, "held")
        journal.supersede("held", journal.now() + 1)
        assert journal.hold("held") is None
        self._let_leases_end()
        assert journal.settle(claim) is False
        assert [claim.key for claim in _claims(journal, early=True)] == ["key"]

    # --- Beside

    def test_the_clock(self, journal: _Tested, other_journal: _Tested) -> None:
        """All who use the journal have one clock, and it goes on."""
        first = journal.now()
        assert abs(other_journal.now() - first) < _NEAR_S
        self.advance(_SHORT_S)
        assert journal.now() >= first + _SHORT_S / 2

    def test_the_state(self, journal: _Tested, other_journal: _Tested) -> None:
        """It counts what waits, claimed or not, and how old the oldest is."""
        assert journal.state() == State(0, 0, 0.0, 0)
        _put(journal, "one", coalesces=False)
        self.advance(_AFTER_SHORT_S)
        seq = _put(journal, "two", b"22")
        claim = _hold(journal, "one")
        _give_up(journal, "three")
        for state in (journal.state(), other_journal.state()):
            assert (state.pending, state.dead_letters) == (2, 1)
            waiting = [_newest(journal, key) for key in ("one", "two")]
            assert state.pending_bytes == sum(len(record.data) for record in waiting)
            assert _SHORT_S <= state.oldest_s < _AFTER_SHORT_S + _NEAR_S
        assert journal.settle(claim, written=claim.records[0].seq) is True
        assert journal.state().oldest_s < _AFTER_SHORT_S + _NEAR_S - _SHORT_S
        assert journal.settle(_hold(journal, "two"), written=seq) is True
        assert journal.state() == State(0, 0, 0.0, 1)

    def test_explaining(self, journal: _Tested) -> None:
        """It says what waits and why, can be shown as JSON, and changes nothing."""
        names = {"pending", "oldest_s", "attempts", "error"}
        empty = journal.explain("key")
        assert names <= set(empty)
        assert (empty["pending"], empty["oldest_s"], empty["attempts"]) == (0, 0, 0)
        assert not empty["error"]
        seq = _put(journal, "key", b"secret", coalesces=False)
        _put(journal, "key", b"secret", coalesces=False)
        journal.settle(_one(journal), failure=Failure(seq, "refused", pause_s=_LONG_S))
        said = journal.explain("key")
        assert (said["pending"], said["attempts"], said["error"]) == (2, 1, "refused")
        assert said["oldest_s"] >= 0
        assert "secret" not in json.dumps([empty, said])
        assert _claims(journal) == []
        assert journal.state().pending == 2

    def test_risks(self, journal: _Tested) -> None:
        """Each is a sentence."""
        risks = journal.risks()
        assert isinstance(risks, list)
        assert all(isinstance(risk, str) and risk for risk in risks)

    def test_keys_of_any_text(self, journal: _Tested) -> None:
        """Keys are told apart whatever is in them, in all that is done with them."""
        for number, key in enumerate(_ODD_KEYS):
            _put(journal, key, b"%d" % number)
        for number, key in enumerate(_ODD_KEYS):
            assert _value(_newest(journal, key)) == b"%d" % number
            assert _cached(journal, key) == b"%d" % number
            assert journal.explain(key)["pending"] == 1
        claims = {claim.key: claim for claim in _claims(journal)}
        assert set(claims) == set(_ODD_KEYS)
        journal.renew(list(claims.values()))
        for key in _ODD_KEYS:
            self._give_back(journal, claims[key])
        assert journal.state() == State(0, 0, 0.0, 0)

    def _give_back(self, journal: _Tested, claim: Claim) -> None:
        """Let its record be given up, come back and be written."""
        failure = Failure(claim.records[0].seq, claim.key, is_final=True)
        if not journal.settle(claim, failure=failure):
            claim = _hold(journal, claim.key)  # a busy machine was longer at it than a lease lasts
            assert journal.settle(claim, failure=failure) is True
        letter = _letter(journal)
        assert (letter.record.key, letter.error) == (claim.key, claim.key[:1000])
        assert journal.requeue(letter.id) is True
        assert journal.settle(_hold(journal, claim.key), written=claim.records[0].seq) is True

    def test_names_of_any_text(self, journal: _Tested) -> None:
        """Writers and homes may be called anything as well."""
        for number, name in enumerate(_ODD_KEYS):
            journal.beat(name)
            _put(journal, f"key{number}", writer=name, home=name)
        for number, name in enumerate(_ODD_KEYS):
            record = _newest(journal, f"key{number}")
            assert (record.writer, record.home) == (name, name)
        assert len(_claims(journal, home="a b", limit=1)) == 1

    def test_data_of_any_bytes(self, journal: _Tested) -> None:
        """Values of no bytes, all bytes and many come back as they were, one of none is a value."""
        mixed = bytes(range(256))
        large = random.Random(1).randbytes(2**20)  # noqa: S311 - it must repeat
        for payload in (b"", b"\0", mixed, b"\r\n", large):
            _put(journal, "key", payload)
            record = _newest(journal, "key")
            assert _value(record) == payload
            assert not record.deleted
            claim = _hold(journal, "key")
            assert claim.records == (record,)
            assert journal.settle(claim, written=record.seq) is True

    def test_closing(self, journal: _Tested) -> None:
        """Nothing is lost with it, the next use begins anew, and closing twice does nothing."""
        seq = _put(journal, "key", b"1")
        _give_up(journal, "dead")
        claim = _hold(journal, "key")
        journal.close()
        journal.close()
        assert journal.hold("key") is None
        assert _letter(journal).record.key == "dead"
        journal.close()
        assert journal.settle(claim, written=seq) is True
        assert _put(journal, "key", b"2") > seq

    # --- Many at the same time

    def test_appending_by_many(self, journal: _Tested, other_journal: _Tested) -> None:
        """Nothing is lost or doubled, and each key is in the order of its sequences."""

        def put(number: int) -> int:
            one = journal if number % 2 else other_journal
            return _put(one, f"key{number % 5}", b"%d" % number, coalesces=False)

        with ThreadPoolExecutor(8) as pool:
            seqs = list(pool.map(put, range(200)))
        assert len(set(seqs)) == 200
        assert journal.state().pending == 200
        for index in range(5):
            records = _waiting(journal, f"key{index}")
            assert [record.seq for record in records] == sorted(seqs[index::5])
            assert set(_values(records)) == {b"%d" % number for number in range(index, 200, 5)}

    def test_claiming_by_many(self, make_journal: _Make) -> None:
        """Each key is had by one."""
        journal = make_journal(lease_s=_LONG_S)
        keys = [f"key{number}" for number in range(60)]
        for key in keys:
            _put(journal, key)
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda _: _claims(journal, limit=7), range(12)))
        claimed = [claim.key for claims in got for claim in claims]
        assert sorted(claimed) == sorted(keys)

    def test_holding_by_many(self, journal: _Tested, other_journal: _Tested) -> None:
        """Of those who ask at once one gets the key."""
        both = (journal, other_journal)
        for number in range(10):
            with ThreadPoolExecutor(6) as pool:
                got = list(pool.map(lambda n: both[n % 2].hold(f"key{number}"), range(6)))  # noqa: B023
            assert sum(claim is not None for claim in got) == 1

    # --- Anything in any order

    def test_against_a_model(self, make_journal: _Make) -> None:
        """What some hundred operations by chance do is what a plain list does."""
        for seed in (1, 2):
            journal = make_journal(lease_s=_LONG_S, max_pending=12, max_pending_bytes=12 * 60)
            _Walk(journal, _Model(12, 12 * 60), seed).run(250)


# --- A journal of lists ---------------------------------------------------------------------------


@dataclass
class _Kept:
    """One record of the model."""

    seq: int
    value: bytes | None
    writer: str
    coalesces: bool
    attempts: int = 0
    token: str = ""
    is_superseded: bool = False

    @property
    def size(self) -> int:
        return 0 if self.value is None else len(pack(_entry(self.value), 0))


@dataclass
class _Dead:
    """One dead letter of the model."""

    key: str
    kept: _Kept
    is_superseded: bool


class _Model:
    """The contract, in the plainest way; claims do not end and what is not due never will be."""

    def __init__(self, max_pending: int, max_bytes: int) -> None:
        self.max_pending = max_pending
        self.max_bytes = max_bytes
        self.records: dict[str, list[_Kept]] = {}
        self.is_due: dict[str, bool] = {}
        self.tokens: dict[str, str] = {}
        self.dead: list[_Dead] = []

    def all(self) -> list[_Kept]:
        return [kept for records in self.records.values() for kept in records]

    def of(self, key: str) -> list[_Kept]:
        return self.records.get(key, [])

    def counts(self) -> tuple[int, int, int]:
        return len(self.all()), sum(kept.size for kept in self.all()), len(self.dead)

    def append(self, key: str, kept: _Kept, *, is_due: bool) -> bool:
        """Whether there was room."""
        last = self.of(key)[-1] if self.of(key) else None
        if last is None or last.token or not self._coalesce(last, kept):
            pending, size, _ = self.counts()
            if pending >= self.max_pending or size + kept.size > self.max_bytes:
                return False
        else:
            self.records[key].remove(last)
        if last is None:
            self.is_due[key] = is_due
        self.records.setdefault(key, []).append(kept)
        for dead in self.dead:
            same = (dead.key, dead.kept.writer) == (key, kept.writer)
            dead.is_superseded |= same and kept.coalesces
        return True

    def _coalesce(self, last: _Kept, kept: _Kept) -> bool:
        return last.coalesces and kept.coalesces and last.writer == kept.writer

    def claimable(self, *, early: bool) -> set[str]:
        return {
            key
            for key, records in self.records.items()
            if records and key not in self.tokens and (early or self.is_due[key])
        }

    def claim(self, claim: Claim) -> None:
        self.tokens[claim.key] = claim.token
        for kept in self.of(claim.key)[: len(claim.records)]:
            kept.token = claim.token

    def settle(self, claim: Claim, written: int, failure: Failure | None) -> None:
        key, records = claim.key, self.of(claim.key)
        del self.tokens[key]
        records[:] = [kept for kept in records if not (kept.token and kept.seq <= written)]
        records[:] = [kept for kept in records if not kept.is_superseded]
        for kept in list(records):
            kept.token = ""
            if failure is not None and kept.seq == failure.seq:
                self._fail(key, kept, failure)
        self.is_due[key] = failure is None or failure.pause_s == 0

    def _fail(self, key: str, kept: _Kept, failure: Failure) -> None:
        kept.attempts += failure.counts
        if failure.is_final:
            self.records[key].remove(kept)
            newer = [
                one
                for one in self.records[key]
                if one.seq > kept.seq and one.writer == kept.writer and one.coalesces
            ]
            self.dead.append(_Dead(key, kept, bool(newer)))

    def supersede(self, key: str) -> None:
        self.of(key)[:] = [kept for kept in self.of(key) if kept.token or not kept.coalesces]
        for kept in self.of(key):
            kept.is_superseded = kept.coalesces

    def requeue(self, dead: _Dead) -> None:
        self.dead.remove(dead)
        dead.kept.attempts = 0
        records = self.records.setdefault(dead.key, [])
        if not records:
            self.is_due[dead.key] = True
        records.append(dead.kept)
        records.sort(key=lambda kept: kept.seq)


class _Walk:
    """Operations by chance, on a journal and on the model."""

    _KEYS = ("a", "b", "c", "d")

    def __init__(self, journal: _Tested, model: _Model, seed: int) -> None:
        self._journal = journal
        self._model = model
        self._random = random.Random(seed)  # noqa: S311 - it must repeat
        self._claims: list[Claim] = []
        self._last_seq = 0

    def run(self, count: int) -> None:
        """Make some, and compare after each."""
        acts: list[Callable[[], None]] = [self._claim, self._hold, self._supersede, self._letter]
        for _ in range(count):
            self._random.choice([self._append] * 5 + [self._settle] * 3 + acts)()
            self._compare()
        while self._claims:
            self._settle()
        for key in self._KEYS:
            self._compare_records(key, _waiting(self._journal, key))

    def _key(self) -> str:
        return self._random.choice(self._KEYS)

    def _append(self) -> None:
        key, chance = self._key(), self._random
        value = None if chance.random() < 0.2 else chance.randbytes(chance.randrange(60))
        writer = chance.choice(["v", "w", None])
        coalesces, is_due = chance.random() < 0.7, chance.random() < 0.7
        seq = self._journal.append(
            key,
            None if value is None else _entry(value),
            writer=writer,
            coalesces=coalesces,
            delay_s=0.0 if is_due else _LONG_S,
        )
        records = self._model.of(key)
        if writer is None and not records:
            assert seq == 0
            return
        kept = _Kept(seq or 0, value, writer or "", coalesces)
        if writer is None:
            kept.writer, kept.coalesces = records[-1].writer, records[-1].coalesces
        assert (seq is not None) is self._model.append(key, kept, is_due=is_due)
        assert seq is None or seq > self._last_seq
        self._last_seq = seq or self._last_seq

    def _claim(self) -> None:
        early, limit = self._random.random() < 0.3, self._random.choice([1, 2, 9])
        expected = self._model.claimable(early=early)
        claims, _wait_s = self._journal.claim(limit, home="home", early=early)
        assert len(claims) == min(limit, len(expected))
        assert {claim.key for claim in claims} <= expected
        for claim in claims:
            self._take(claim)

    def _hold(self) -> None:
        key = self._key()
        claim = self._journal.hold(key)
        assert (claim is None) is (key in self._model.tokens)
        if claim is not None:
            self._take(claim)

    def _take(self, claim: Claim) -> None:
        self._compare_records(claim.key, claim.records)
        assert claim.is_whole
        self._model.claim(claim)
        self._claims.append(claim)

    def _settle(self) -> None:
        if not self._claims:
            return
        claim = self._claims.pop(self._random.randrange(len(self._claims)))
        count = self._random.randint(0, len(claim.records))
        written = claim.records[count - 1].seq if count else 0
        failure = None
        if count < len(claim.records) and self._random.random() < 0.7:
            failure = Failure(
                claim.records[count].seq,
                "refused",
                is_final=self._random.random() < 0.4,
                pause_s=0.0,
                counts=self._random.random() < 0.8,
            )
            if not failure.is_final and self._random.random() < 0.5:
                failure = Failure(failure.seq, "refused", pause_s=_LONG_S, counts=failure.counts)
        assert self._journal.settle(claim, written=written, failure=failure) is True
        assert self._journal.settle(claim, written=written, failure=failure) is False
        self._model.settle(claim, written, failure)

    def _supersede(self) -> None:
        key = self._key()
        self._journal.supersede(key, self._journal.now() + 1)
        self._model.supersede(key)

    def _letter(self) -> None:
        if not self._model.dead:
            return
        number = self._random.randrange(len(self._model.dead))
        letter, dead = self._journal.dead_letters()[number], self._model.dead[number]
        if self._random.random() < 0.3:
            assert self._journal.drop(letter.id) is True
            self._model.dead.remove(dead)
        elif dead.is_superseded:
            assert _is_refused(self._journal, letter)
        else:
            # The key may be due at once or stay as it is where others of it wait.
            assert self._journal.requeue(letter.id) is True
            self._model.requeue(dead)
            self._let_be_due(dead.key)

    def _let_be_due(self, key: str) -> None:
        claim = self._journal.hold(key)
        if claim is not None:
            assert self._journal.settle(claim) is True
            self._model.is_due[key] = True

    def _compare(self) -> None:
        state = self._journal.state()
        found = state.pending, state.pending_bytes, state.dead_letters
        assert found == self._model.counts()
        assert state.pending or state.oldest_s == 0
        key = self._key()
        record, records = self._journal.newest(key), self._model.of(key)
        self._compare_records(key, [] if record is None else [record], records[-1:])
        assert self._journal.explain(key)["pending"] == len(records)
        for letter, dead in zip(self._journal.dead_letters(), self._model.dead, strict=True):
            assert letter.is_superseded is dead.is_superseded
            self._compare_records(dead.key, [letter.record], [dead.kept])

    def _compare_records(
        self, key: str, records: Iterable[Record], expected: list[_Kept] | None = None
    ) -> None:
        found = [
            (one.key, one.seq, _value(one), one.writer, one.coalesces, one.attempts)
            for one in records
        ]
        assert found == [
            (key, kept.seq, kept.value, kept.writer, kept.coalesces, kept.attempts)
            for kept in (self._model.of(key) if expected is None else expected)
        ]


# --- In short -------------------------------------------------------------------------------------


def _entry(payload: bytes, *, tags: tuple[str, ...] = ()) -> Entry:
    now = SYSTEM.now()
    until = now + _LONG_S
    return Entry(payload, created_at=now, fresh_until=until, gone_at=until, tags=tags)


def _put(
    journal: _Tested, key: str, value: bytes = b"value", *, writer: str = "w", **options: Any
) -> int:
    """Accept a value that there is room for."""
    seq = journal.append(key, _entry(value), writer=writer, **options)
    assert seq
    return seq


def _give_up(
    journal: _Tested, key: str, value: bytes = b"value", *, error: str = "refused", **options: Any
) -> int:
    """Let a value become a dead letter."""
    seq = _put(journal, key, value, **options)
    claim = _hold(journal, key)
    assert journal.settle(claim, failure=Failure(seq, error, is_final=True)) is True
    return seq


def _newest(journal: _Tested, key: str) -> Record:
    record = journal.newest(key)
    assert record is not None
    return record


def _cached(journal: _Tested, key: str) -> bytes | None:
    entry = journal.store.read(key)
    return None if entry is None else entry.payload


def _value(record: Record) -> bytes | None:
    return None if record.deleted else unpack(record.data, 0).payload


def _values(records: Iterable[Record]) -> list[bytes | None]:
    return [_value(record) for record in records]


def _claims(
    journal: _Tested, *, limit: int = _ALL, home: str = "home", early: bool = False
) -> list[Claim]:
    return journal.claim(limit, home=home, early=early)[0]


def _one(journal: _Tested, *, home: str = "home", early: bool = False) -> Claim:
    """The claim of the only key that can be claimed."""
    (claim,) = _claims(journal, home=home, early=early)
    return claim


def _hold(journal: _Tested, key: str) -> Claim:
    claim = journal.hold(key)
    assert claim is not None
    return claim


def _waiting(journal: _Tested, key: str) -> tuple[Record, ...]:
    """All records of a key that nobody has; it is due after that."""
    claim = _hold(journal, key)
    assert claim.is_whole
    assert journal.settle(claim) is True
    return claim.records


def _letter(journal: _Tested) -> DeadLetter:
    (letter,) = journal.dead_letters()
    return letter


def _is_refused(journal: _Tested, letter: DeadLetter) -> bool:
    """Whether it may not come back."""
    try:
        journal.requeue(letter.id)
    except ConflictError:
        return True
    return False


def _same(one: State, other: State) -> bool:
    """Whether the counts are equal; ages go on."""
    return (one.pending, one.pending_bytes, one.dead_letters) == (
        other.pending,
        other.pending_bytes,
        other.dead_letters,
    )
