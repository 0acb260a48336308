"""The journal in Redis: what every journal must do, and what can happen to a Redis."""

import contextlib
import itertools
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from patched import run_patched
from redis_server import RedisServer, SlowWay
from waiting import until

from flask_muset import redis as guarded
from flask_muset.cache_strategies import journal_conformance, redis_journal
from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.envelope import unpack
from flask_muset.cache_strategies.journal import Failure, State
from flask_muset.cache_strategies.journal_conformance import JournalSuite
from flask_muset.cache_strategies.redis_journal import RedisJournal
from flask_muset.cache_strategies.tiered_store import TieredStore
from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import (
    CacheUnavailable,
    ConflictError,
    ExternalServiceError,
    MusetError,
    NetworkError,
    OperationTimeoutError,
)
from flask_muset.redis import GuardedRedis

# A budget that a busy machine keeps, for tests that are not about it.
EASY = 2.0
PLACE = "muset:default:w1:"
LARGE = random.Random(1).randbytes(2**19)  # cannot be made smaller


class CutWay(SlowWay):
    """A way on which answers are cut off, with their connections."""

    is_cut = False

    def _pieces(self, data):
        if self.is_cut:
            raise OSError("cut off")
        return super()._pieces(data)


@pytest.fixture(scope="class")
def shared_server(tmp_path_factory):
    """A server for many tests, which take a namespace each."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


class TestRedisJournal(JournalSuite):
    """The same over a real server, with times that a busy machine keeps."""

    lease_s = 0.8
    _names = itertools.count()

    @pytest.fixture(autouse=True)
    def _times(self, request, monkeypatch):
        if request.function.__name__ in ("test_renewing", "test_what_has_lost_its_home"):
            self.lease_s = 2.0  # most of it passes before it is renewed
        monkeypatch.setattr(journal_conformance, "_SHORT_S", 0.5)
        monkeypatch.setattr(journal_conformance, "_AFTER_SHORT_S", 0.6)
        monkeypatch.setattr(journal_conformance, "_NEAR_S", 0.5)

    @pytest.fixture
    def make_beside(self, shared_server):
        """A function that makes a journal on the records of a namespace."""
        made = []

        def make(name, **options):
            client = GuardedRedis(shared_server.url, budget_s=EASY, prefix=f"muset:{name}:")
            store = TieredStore(client, max_bytes=2**20)
            made.append((client, store))
            return RedisJournal(store, client, **{"lease_s": self.lease_s, **options})

        yield make
        for client, store in made:
            store.close()
            client.close()

    @pytest.fixture
    def make_journal(self, make_beside):
        return lambda **options: make_beside(next(self._names), **options)

    @pytest.fixture
    def namespace(self):
        return next(self._names)

    @pytest.fixture
    def journal(self, make_beside, namespace):
        return make_beside(namespace)

    @pytest.fixture
    def other_journal(self, make_beside, namespace):
        return make_beside(namespace)


@pytest.fixture
def make():
    """A function that makes a journal, closed afterwards."""
    with contextlib.ExitStack() as stack:

        def make(url, *, budget_s=EASY, **options):
            client = GuardedRedis(url, budget_s=budget_s)
            store = TieredStore(client, max_bytes=2**20)
            stack.callback(client.close)
            stack.callback(store.close)
            return RedisJournal(store, client, **options)

        yield make


@pytest.fixture
def journal(redis_server, make):
    return make(redis_server.url)


@pytest.fixture
def redis(redis_server):
    """A client beside."""
    client = GuardedRedis(redis_server.url, budget_s=EASY)
    yield client
    client.close()


def entry(payload=b"value"):
    now = SYSTEM.now()
    return Entry(payload, created_at=now, fresh_until=now + 60, gone_at=now + 60)


def put(journal, key, payload=b"value", **options):
    seq = journal.append(key, entry(payload), **{"writer": "w", **options})
    assert seq
    return seq


def give_up(journal, key, payload=b"value", **options):
    seq = put(journal, key, payload, **options)
    failure = Failure(seq, "no", is_final=True)
    assert journal.settle(journal.hold(key), failure=failure) is True
    return seq


def payloads(records):
    return [None if record.deleted else unpack(record.data, 0).payload for record in records]


def cached(journal, key):
    found = journal.store.read(key)
    return None if found is None else found.payload


def reached(journal):
    """Whether the journal may be asked again."""
    with contextlib.suppress(CacheUnavailable):
        return journal.store.reach() is not None
    return False


def written_of(journal):
    """All that waits, written as it is claimed."""
    written = []
    while claims := journal.claim(100, home="me", early=True)[0]:
        for claim in claims:
            written += [(claim.key, record.seq) for record in claim.records]
            assert journal.settle(claim, written=claim.records[-1].seq) is True
    return written


def written_records(journal):
    """All records of the only key, written as they are claimed."""
    written = []
    while claims := journal.claim(1, home="me")[0]:
        written += claims[0].records
        assert journal.settle(claims[0], written=written[-1].seq) is True
    return written


def calls(redis, command):
    """How often a command was carried out since the last CONFIG RESETSTAT."""
    stats = redis.execute("INFO", "commandstats").decode()
    found = re.search(rf"cmdstat_{command}:calls=(\d+)", stats)
    return int(found[1]) if found else 0


def set_back(redis, seconds):
    """Let all moments be what they are after the clock of Redis was set back."""
    shift = round(seconds * 1e6)
    for name in ("due", "homes"):
        for member in redis.execute("ZRANGE", PLACE + name, 0, -1):
            redis.execute("ZINCRBY", PLACE + name, shift, member)
    for name in redis.execute("KEYS", f"{PLACE}k:*"):
        if redis.execute("HEXISTS", name, "ends"):
            redis.execute("HINCRBY", name, "ends", shift)


def everything(redis):
    """All keys and what they have."""
    found = redis.execute("KEYS", "*")
    return {name: redis.execute("DUMP", name) for name in found if b":t1" not in name}


def names(redis):
    """What of the journal is in Redis, without its place."""
    found = redis.execute("KEYS", f"{PLACE}*")
    return sorted(name.decode().removeprefix(PLACE) for name in found)


# --- What is asked and what is left ---------------------------------------------------------------


def test_a_write_is_one_round_trip(journal, monkeypatch):
    """Record, cache and message of a write are one script, in which its data is sent once."""
    put(journal, "first")
    put(journal, "first")
    sent, pack = [], guarded._pack
    monkeypatch.setattr(guarded, "_pack", lambda *words: sent.append(words) or pack(*words))
    put(journal, "key", b"p" * 300)
    (words,) = sent
    assert words[0] == "EVALSHA"
    assert sum(b"ppp" in word for word in words if isinstance(word, bytes)) == 1


def test_nothing_is_left_of_a_key(journal, redis):
    """When a key has been written or its dead letters are gone, only counters are there."""
    seq = put(journal, "written")
    (claim,), _ = journal.claim(10, home="me")
    assert journal.settle(claim, failure=Failure(seq, "no")) is True
    put(journal, "written", coalesces=False)
    claim = journal.hold("written")
    assert journal.settle(claim, written=claim.records[-1].seq) is True
    for last in ("dropped", "requeued"):
        give_up(journal, last)
    one, two = journal.dead_letters()
    assert journal.drop(one.id) is True
    assert journal.requeue(two.id) is True
    put(journal, "requeued", home="me")
    journal.supersede("requeued", journal.now())
    assert journal.hold("held") is not None
    assert names(redis) == ["dead", "due", "k:held", "n"]
    assert redis.execute("XLEN", f"{PLACE}dead") == 0
    assert redis.execute("HKEYS", f"{PLACE}n") == [b"seq"]


def test_a_hold_whose_holder_is_gone_leaves_nothing(redis_server, make, redis):
    """Whoever claims next takes away what was held without a record."""
    journal = make(redis_server.url, lease_s=0.02)
    journal.hold("key")
    time.sleep(0.03)
    assert journal.claim(10, home="me") == ([], None)
    assert names(redis) == ["n"]


def test_a_load_or_write_that_goes_on_loses_its_turn(journal):
    """A load that has begun before puts nothing in, nor does a write that was not the only one."""
    lease = journal.store.lease("loaded", None)
    write = journal.store.begin_write("written")
    for key in ("loaded", "written"):
        put(journal, key, b"new")
    assert journal.store.settle(lease, entry(b"old")) is False
    journal.store.end_write(write, entry(b"old"))
    assert cached(journal, "loaded") == b"new"
    assert cached(journal, "written") is None


def test_other_memories_hear_of_it(redis_server, make):
    """The memory of another process drops the old value."""
    journal, other = make(redis_server.url), make(redis_server.url)
    put(journal, "key", b"old")
    until(lambda: cached(other, "key") == b"old" and other.store._feed.is_linked)
    put(journal, "key", b"new")
    until(lambda: other.store.memory.get("key") is None)
    assert cached(other, "key") == b"new"


def test_large_records_are_claimed_in_parts(journal):
    """All that is claimed at once has about a MiB; nothing is passed over."""
    large = LARGE[:400_000]
    for number in range(5):
        put(journal, "one", b"%d" % number + large, coalesces=False)
    for key in ("two", "three"):
        put(journal, key, large)
    claims, wait_s = journal.claim(10, home="me")
    assert ([claim.key for claim in claims], wait_s) == (["one", "two"], 0)
    assert [len(claim.records) for claim in claims] == [2, 1]
    assert [claim.is_whole for claim in claims] == [False, True]
    for claim in claims:
        assert journal.settle(claim, written=claim.records[-1].seq) is True
    assert [claim.key for claim in journal.claim(10, home="me")[0]] == ["three", "one"]


def test_a_record_that_is_too_large_is_claimed_alone(journal):
    """Neither what is before it nor what is behind it comes with it."""
    sizes = [1, 1, 3 * len(LARGE), 1, 1]
    for size in sizes:
        put(journal, "key", (LARGE * 3)[:size], coalesces=False)
    parts = []
    while claims := journal.claim(10, home="me")[0]:
        (claim,) = claims
        parts.append([len(payload) for payload in payloads(claim.records)])
        assert journal.settle(claim, written=claim.records[-1].seq) is True
    assert parts == [sizes[:2], sizes[2:3], sizes[3:]]


def test_large_records_are_superseded_in_parts(journal, redis):
    """No script reads more than about a MiB, and all that is older is forgotten."""
    for number in range(8):
        put(journal, "key", LARGE, writer=f"w{number % 2}")
    put(journal, "key", b"kept", coalesces=False)
    redis.execute("CONFIG", "RESETSTAT")
    journal.supersede("key", journal.now())
    assert calls(redis, "evalsha") > 2
    assert payloads(journal.hold("key").records) == [b"kept"]
    assert journal.state().pending == 1


def test_requeueing_before_large_records(journal):
    """They are moved as they are, and it stands before them."""
    give_up(journal, "key", b"first", coalesces=False)
    for number in range(3):
        put(journal, "key", b"%d" % number + LARGE, coalesces=False)
    (letter,) = journal.dead_letters()
    assert journal.requeue(letter.id) is True
    first, *others = [payload[:5] for payload in payloads(written_records(journal))]
    assert first == b"first"
    assert others == [b"%d" % number + LARGE[:4] for number in range(3)]
    assert journal.state() == State(0, 0, 0.0, 0)


def test_large_dead_letters_come_in_parts(journal):
    """However large they are, all are listed."""
    for number in range(5):
        give_up(journal, f"key{number}", LARGE)
    assert [letter.record.key[-1] for letter in journal.dead_letters()] == list("01234")
    assert len(journal.dead_letters(3)) == 3


def test_the_age_of_what_nobody_has_claimed(journal, redis):
    """It is that of the oldest, its delay does not count, and no data is read for it."""
    journal.hold("held")
    first = put(journal, "old", LARGE, delay_s=60)
    put(journal, "new", LARGE, delay_s=60)
    put(journal, "old", LARGE, delay_s=60)
    redis.execute("CONFIG", "RESETSTAT")
    _, _, since, _, _ = journal._run(redis_journal._STATE)
    assert int(since) == first
    assert calls(redis, "xrange") == 0
    claim = journal.hold("old")
    assert journal.settle(claim, written=claim.records[-1].seq) is True
    assert 0 < journal.state().oldest_s < (journal.now() - first / 1e6)


def test_what_failed_is_as_old_as_it_was(journal):
    """Its pause makes it no younger than what nobody has claimed."""
    seq = put(journal, "failed", delay_s=60)
    put(journal, "new", delay_s=60)
    assert journal.settle(journal.hold("failed"), failure=Failure(seq, "no", pause_s=9)) is True
    _, _, since, _, _ = journal._run(redis_journal._STATE)
    assert int(since) == seq


def test_a_pause_that_does_not_count(journal):
    """It is no failure: what was said before stays, and the first failure is still to come."""
    seq = put(journal, "key")

    def fail(error, **options):
        assert journal.settle(journal.hold("key"), failure=Failure(seq, error, **options)) is True
        record, said = journal.newest("key"), journal.explain("key")["error"]
        return record.attempts, record.first_failed is not None, said

    assert fail("", counts=False) == (0, False, None)
    assert fail("asleep", counts=False) == (0, False, "asleep")
    assert fail("no") == (1, True, "no")
    first = journal.newest("key").first_failed
    assert fail("", counts=False) == (1, True, "no")
    assert journal.settle(journal.hold("key"), failure=Failure(seq, "never", is_final=True)) is True
    (letter,) = journal.dead_letters()
    assert (letter.record.attempts, letter.first_failed, letter.error) == (2, first, "never")


# --- What was superseded --------------------------------------------------------------------------


def fails(journal, claim):
    failure = Failure(claim.records[0].seq, "no", pause_s=0)
    assert journal.settle(claim, failure=failure) is True


def fails_for_good(journal, claim):
    failure = Failure(claim.records[0].seq, "no", is_final=True)
    assert journal.settle(claim, failure=failure) is True


def is_let_go(journal, claim):
    journal._release(claim.token.partition(":")[0])


def is_left(journal, claim):
    """As by a process that was killed."""
    time.sleep(0.06)


@pytest.mark.parametrize("ends", [fails, fails_for_good, is_let_go, is_left])
def test_what_is_superseded_while_it_is_claimed(redis_server, make, redis, ends):
    """It is gone when its claim has ended, however that was; ledgers and newer ones stay."""
    journal = make(redis_server.url, lease_s=0.05 if ends is is_left else 10.0)
    put(journal, "key", b"old")
    put(journal, "key", b"ledger", writer="l", coalesces=False)
    put(journal, "alone", b"old")
    claims = [journal.hold("key"), journal.hold("alone")]
    for key in ("key", "alone"):
        journal.supersede(key, journal.now())
    new = put(journal, "key", b"new", coalesces=False)
    for claim in claims:
        ends(journal, claim)
    (claim,), _ = journal.claim(9, home="me", early=True)
    assert payloads(claim.records) == [b"ledger", b"new"]
    assert journal.settle(claim, written=new) is True
    assert journal.state() == State(0, 0, 0.0, 0)
    assert names(redis) == ["n"]


def test_what_is_superseded_and_written(journal, redis):
    """It is done with like any other, and nothing of it is remembered."""
    seq = put(journal, "key")
    claim = journal.hold("key")
    for _ in range(2):
        journal.supersede("key", journal.now())
    assert journal.settle(claim, written=seq) is True
    assert names(redis) == ["n"]


def test_what_has_taken_the_place_of_what_is_superseded(redis_server, make):
    """A newer value stays, whatever became of the claim of the older one."""
    journal = make(redis_server.url, lease_s=0.05)
    put(journal, "key", b"old")
    claim = journal.hold("key")
    journal.supersede("key", journal.now())
    is_left(journal, claim)
    put(journal, "key", b"new")
    assert payloads(journal.hold("key").records) == [b"new"]
    assert journal.state().pending == 1


@pytest.mark.parametrize(
    ("writer", "superseded"), [("w", ["w"]), ("l", []), ("v", ["v"]), ("", ["w", "v"])]
)
def test_dead_letters_that_a_holder_has_superseded(journal, redis, writer, superseded):
    """Those that coalesce and are older, of the writer or of all, also when the key has no more."""
    for name in ("w", "l", "v"):
        give_up(journal, "key", writer=name, coalesces=name != "l")
    give_up(journal, "other")
    assert journal.settle(journal.hold("key"), supersedes=None) is True
    claim = journal.hold("key")
    put(journal, "key", writer="later", coalesces=False)
    assert journal.settle(claim, supersedes=writer) is True
    give_up(journal, "key", b"later", writer="later", coalesces=False)
    letters = journal.dead_letters()
    refused = [letter for letter in letters if letter.is_superseded]
    assert [(one.record.key, one.record.writer) for one in refused] == [
        ("key", name) for name in superseded
    ]
    for letter in refused:
        with pytest.raises(ConflictError, match="superseded"):
            journal.requeue(letter.id)
    for letter in letters:
        assert journal.drop(letter.id) is True
    written_of(journal)
    assert names(redis) == ["dead", "n"]


def test_what_a_holder_supersedes_and_is_given_up_later(journal):
    """A dead letter that is older than what was written is superseded, whenever it became one."""
    seq = put(journal, "key")
    assert journal.settle(journal.hold("key"), supersedes="w") is True
    failure = Failure(seq, "no", is_final=True)
    assert journal.settle(journal.hold("key"), failure=failure) is True
    assert journal.dead_letters()[0].is_superseded


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_pending": 0}, "max_pending must be .* got 0"),
        ({"max_pending_bytes": 1.5}, "max_pending_bytes must be .* got 1.5"),
        ({"lease_s": 0}, "lease_s must be .* got 0"),
    ],
)
def test_options_that_are_refused(redis, options, said):
    """A number that is not allowed is named."""
    with pytest.raises(ValueError, match=said):
        RedisJournal(TieredStore(redis, max_bytes=0), redis, **options)


def test_arguments_that_are_refused(journal, redis):
    """A delay, a place in the list and a store that make no sense are named."""
    with pytest.raises(ValueError, match=r"delay_s must be .* got -1"):
        journal.append("key", None, writer="w", delay_s=-1)
    with pytest.raises(ValueError, match=r"after must be .* got 'x'"):
        journal.dead_letters(after="x")
    with pytest.raises(ValueError, match="has a journal already"):
        RedisJournal(journal.store, redis)


# --- Several processes ----------------------------------------------------------------------------


def test_two_processes_claim_at_once(redis_server, make):
    """Whatever is claimed at the same moment, each record is written once, and in order."""
    journals = [make(redis_server.url) for _ in range(2)]
    written = []

    def work(number):
        journal = journals[number % 2]
        while len(written) < 120:
            for claim in journal.claim(3, home=f"p{number}")[0]:
                written.extend((claim.key, one.seq) for one in claim.records)
                assert journal.settle(claim, written=claim.records[-1].seq) is True

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(work, number) for number in range(4)]
        accepted = [
            (f"k{n % 7}", put(journals[0], f"k{n % 7}", coalesces=False)) for n in range(120)
        ]
        for job in jobs:
            job.result()
    assert sorted(written) == sorted(accepted)
    for key in {key for key, _ in accepted}:
        order = [seq for one, seq in written if one == key]
        assert order == sorted(order)
    assert journals[0].state() == State(0, 0, 0.0, 0)


def test_claims_of_a_caller_that_is_cut_off_are_let_go(redis_server, make):
    """Others have the keys long before the lease ends."""
    way = SlowWay(redis_server.port)
    here, there = make(redis_server.url, lease_s=600), make(way.url, lease_s=600)
    there.claim(0, home="there")
    there.settle(there.hold("key"))
    put(here, "key")
    for ask in (lambda: there.claim(9, home="there"), lambda: there.hold("key")):
        way.delay_s, way.fixed = 0.2, True
        with deadline(0.1), pytest.raises(OperationTimeoutError):
            ask()
        way.delay_s = 0.0
        claims = []
        until(lambda: claims.extend(here.claim(9, home="here")[0]) or claims)  # noqa: B023
        assert here.settle(claims[0]) is True
    way.close()


def test_many_keys_that_others_have(journal):
    """More of them than are looked at together keep nobody from what is free behind them."""
    journal.beat("mine")
    for number in range(230):
        put(journal, f"mine{number}", writer="", home="mine")
    put(journal, "free")
    for early in (False, True):
        (claim,), wait_s = journal.claim(1, home="other", early=early)
        assert claim.key == "free"
        assert 0 < wait_s <= 10
        assert journal.settle(claim) is True
    assert len(journal.claim(1000, home="mine")[0]) == 231


def test_only_so_many_keys_are_looked_at(journal, redis):
    """What is behind a thousand keys of others is claimed when they are gone; nothing is read."""
    journal.beat("mine")
    for number in range(1050):
        put(journal, f"mine{number}", writer="", home="mine")
    put(journal, "free")
    redis.execute("CONFIG", "RESETSTAT")
    claims, wait_s = journal.claim(1, home="other")
    assert claims == []
    assert 0 < wait_s <= 1
    assert calls(redis, "hgetall") == 0
    assert len(journal.claim(1000, home="mine")[0]) == 1000
    (claim,), wait_s = journal.claim(1, home="other")
    assert claim.key == "free"
    assert wait_s > 0


def test_more_is_due_than_fits_a_page(journal):
    """Where the limit is reached at its end, the next ones are due at once."""
    for number in range(101):
        put(journal, f"key{number}")
    claims, wait_s = journal.claim(100, home="me")
    assert (len(claims), wait_s) == (100, 0)


# --- When the clock of Redis is set back ----------------------------------------------------------


def test_a_clock_that_is_set_back_by_an_hour(journal, redis):
    """Nobody waits an hour for the claims and the homes of processes that are gone."""
    for key in ("claimed", "held", "written"):
        put(journal, key)
    put(journal, "home", writer="", home="gone")
    journal.beat("gone")
    claim, holder = journal.hold("claimed"), journal.hold("held")
    journal.hold("empty")
    journal.hold("written")
    set_back(redis, 3600)
    redis.execute("ZADD", f"{PLACE}due", 1, "home")
    put(journal, "written", b"new")
    assert journal.state().pending == 4
    assert journal.hold("held").records == holder.records
    claims = {one.key: one for one in journal.claim(9, home="me")[0]}
    assert sorted(claims) == ["claimed", "home", "written"]
    assert payloads(claims["written"].records) == [b"new"]
    assert journal.settle(claim) is False
    assert journal.settle(holder) is False
    for one in claims.values():
        assert journal.settle(one, written=one.records[-1].seq) is True


def test_a_clock_that_is_set_back_a_little(journal, redis):
    """Within a lease nobody loses a claim."""
    put(journal, "key")
    claim = journal.hold("key")
    set_back(redis, 5)
    assert journal.hold("key") is None
    assert journal.claim(9, home="me", early=True)[0] == []
    assert journal.settle(claim, written=claim.records[-1].seq) is True


# --- When Redis is away ---------------------------------------------------------------------------


def test_a_frozen_redis(redis_server, make, redis):
    """The writer is told that it failed, and when Redis goes on nothing of it happens."""
    journal = make(redis_server.url, budget_s=0.2)
    put(journal, "warm", b"old")
    put(journal, "key", b"old")
    redis_server.freeze()
    with pytest.raises(OperationTimeoutError):
        journal.append("key", entry(b"new"), writer="w", coalesces=False)
    with pytest.raises(CacheUnavailable, match="nothing has changed"):
        journal.append("other", entry(b"new"), writer="w")
    assert cached(journal, "key") is None
    redis_server.thaw()
    until(lambda: reached(journal))
    assert payloads([journal.newest("key")]) == [b"old"]
    assert journal.newest("other") is None
    assert journal.state().pending == 2
    assert cached(journal, "key") is None
    assert cached(journal, "warm") == b"old"


def test_an_answer_that_is_lost(redis_server, make):
    """It may have been accepted, is not sent again, and no process serves the old value."""
    way = SlowWay(redis_server.port)
    journal, other = make(way.url, budget_s=0.2), make(redis_server.url)
    put(journal, "key", b"old", coalesces=False)
    assert cached(other, "key") == b"old"
    way.delay_s, way.fixed = 0.3, True
    with pytest.raises(OperationTimeoutError):
        journal.append("key", entry(b"new"), writer="w", coalesces=False)
    assert cached(journal, "key") is None
    way.delay_s = 0.0
    until(lambda: reached(journal))
    assert payloads(other.hold("key").records) == [b"old", b"new"]
    assert cached(journal, "key") is None
    until(lambda: cached(other, "key") is None)
    way.close()


def test_a_connection_that_breaks(redis_server, make):
    """A write that was accepted, but whose answer was cut off, is not sent again."""
    way = CutWay(redis_server.port)
    journal, other = make(way.url), make(redis_server.url)
    put(journal, "key", b"old", coalesces=False)
    way.is_cut = True
    with pytest.raises(NetworkError):
        journal.append("key", entry(b"new"), writer="w", coalesces=False)
    assert payloads(other.hold("key").records) == [b"old", b"new"]
    assert cached(journal, "key") is None
    way.is_cut = False
    until(lambda: cached(other, "key") is None)
    way.close()


def test_a_writer_that_is_cut_off(redis_server):
    """A greenlet that is killed while it waits leaves no value that may be old, in any memory."""
    code = f"""
        from flask_muset.cache_strategies.entry import Entry
        from flask_muset.cache_strategies.redis_journal import RedisJournal
        from flask_muset.cache_strategies.tiered_store import TieredStore
        from flask_muset.clock import SYSTEM
        from flask_muset.redis import GuardedRedis

        client = GuardedRedis({redis_server.url!r}, budget_s=5.0)
        beside = GuardedRedis({redis_server.url!r}, budget_s=5.0)
        store = TieredStore(client, max_bytes=2**20)
        journal = RedisJournal(store, client)
        entry = lambda payload: Entry(payload, created_at=SYSTEM.now())
        journal.append("key", entry(b"old"), writer="w")
        assert store.read("key").payload == b"old"
        beside.execute("CLIENT", "PAUSE", 300, "ALL")
        writer = gevent.spawn(journal.append, "key", entry(b"new"), writer="w", coalesces=False)
        gevent.sleep(0.1)
        writer.kill()
        result = [store.memory.get("key") is None, len(store._repairs)]
        result.append(store.read("key") is None)
    """
    assert run_patched(code) == [True, 1, True]


def test_clocks_that_are_apart(journal):
    """A write that Redis takes for late, as its clock was set, is sent again with the right one."""
    put(journal, "key", coalesces=False)
    journal.store._entries._shift_us -= 3_600_000_000
    journal.store._entries._latest_us = 0
    put(journal, "key", coalesces=False)
    assert len(journal.hold("key").records) == 2


def test_nothing_changes_while_redis_is_away(redis_server, make):
    """A write that is refused leaves the value that the memory has."""
    journal = make(redis_server.url)
    put(journal, "key", b"old")
    until(lambda: journal.store._feed.is_linked)
    assert cached(journal, "key") == b"old"
    until(lambda: journal.store.memory.get("key"))
    redis_server.kill()
    with pytest.raises(MusetError):
        journal.newest("key")
    until(lambda: journal._redis.state == "down")
    for ask in (
        lambda: journal.append("key", entry(b"new"), writer="w"),
        lambda: journal.claim(1, home="me"),
        lambda: journal.hold("key"),
        lambda: journal.newest("key"),
    ):
        with pytest.raises(CacheUnavailable) as caught:
            ask()
        assert caught.value.status == 503
    assert cached(journal, "key") == b"old"


def test_after_an_outage_nothing_is_claimed_before_all_have_caught_up(redis_server, make):
    """What could not be superseded is, by itself, before another process claims it."""
    journal, other = (make(redis_server.url, budget_s=0.2) for _ in range(2))
    put(journal, "key", b"old")
    put(journal, "kept", b"kept")
    before = journal.now()
    redis_server.freeze()
    assert abs(journal.now() - before) < EASY
    for ask in (lambda: journal.supersede("key", before), other.state):
        with pytest.raises(MusetError):
            ask()
    assert len(journal.store.owed) == 1
    redis_server.thaw()
    claims = []
    while not claims:
        with contextlib.suppress(MusetError):
            claims = other.claim(9, home="other", early=True)[0]
    assert [claim.key for claim in claims] == ["kept"]
    assert len(journal.store.owed) == 0


def test_what_could_not_be_superseded_is_before_anything_is_asked(journal, redis):
    """Also where the link stays up, and only the caller had no time left."""
    put(journal, "key")
    before = journal.now()
    redis.execute("CLIENT", "PAUSE", 1000, "ALL")
    with deadline(0.05), pytest.raises(OperationTimeoutError):
        journal.supersede("key", before)
    assert journal.claim(9, home="me") == ([], None)
    assert journal.newest("key") is None


def test_a_restart_keeps_what_was_accepted(tmp_path, make):
    """With appendfsync always a kill -9 loses nothing that was acknowledged."""
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    try:
        journal = make(server.url)
        accepted = []

        def write(number):
            with contextlib.suppress(MusetError):
                for count in itertools.count():
                    key = f"k{number}-{count % 3}"
                    accepted.append((key, put(journal, key, coalesces=False)))

        with ThreadPoolExecutor(4) as pool:
            for number in range(4):
                pool.submit(write, number)
            until(lambda: len(accepted) > 200)
            server.kill()
        server.start()
        until(lambda: reached(journal))
        kept = written_of(journal)
        assert set(accepted) <= set(kept)
        # Of each that wrote, one answer may have been lost.
        assert len(accepted) <= len(kept) <= len(accepted) + 4
    finally:
        server.kill()


def test_a_redis_that_loads(redis_server, make, redis):
    """While Redis reads its data a write is refused, and nothing has changed."""
    journal = make(redis_server.url)
    put(journal, "key", b"old")
    for number in range(4):  # it answers after each two MiB that it has read
        redis.execute("SET", f"large{number}", LARGE * 2)
    redis.execute("SAVE")
    redis_server.kill()
    redis_server._command += ["--key-load-delay", "50000"]  # microseconds
    redis_server.start()
    late = make(redis_server.url)
    with pytest.raises(ExternalServiceError, match="loading") as caught:
        late.append("key", entry(b"new"), writer="w")
    assert caught.value.unavailable
    until(lambda: reached(late))
    assert payloads([late.newest("key")]) == [b"old"]
    assert late.state().pending == 1


def test_a_redis_that_became_a_replica(redis_server, make, redis):
    """A write is refused, and is accepted again when it takes writes."""
    journal = make(redis_server.url)
    put(journal, "key", b"old")
    redis.execute("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(ExternalServiceError, match="read only") as caught:
        journal.append("key", entry(b"new"), writer="w")
    assert caught.value.unavailable
    until(lambda: journal._redis.state == "down")
    with pytest.raises(CacheUnavailable):
        journal.append("key", entry(b"new"), writer="w")
    redis.execute("REPLICAOF", "NO", "ONE")
    until(lambda: reached(journal))
    assert payloads([journal.newest("key")]) == [b"old"]
    put(journal, "key", b"new")


def test_a_redis_that_is_full(journal, redis):
    """Without memory a write is refused and changes nothing; what waits is written all the same."""
    put(journal, "key", b"old")
    for number in range(3):
        put(journal, f"more{number}", coalesces=False)
    before = everything(redis)
    redis.execute("CONFIG", "SET", "maxmemory", "1")
    for key, new in (("key", entry(b"new")), ("key", None), ("fresh", entry(b"new"))):
        with pytest.raises(ExternalServiceError, match="maxmemory"):
            journal.append(key, new, writer="w")
    assert everything(redis) == before
    journal.beat("me")
    claims, _ = journal.claim(10, home="me")
    assert len(claims) == 4
    journal.renew(claims)
    failure = Failure(claims[0].records[0].seq, "no", is_final=True)
    assert journal.settle(claims[0], failure=failure) is True
    for claim in claims[1:]:
        assert journal.settle(claim, written=claim.records[-1].seq) is True
    (letter,) = journal.dead_letters()
    assert journal.requeue(letter.id) is True
    assert journal.settle(journal.hold(letter.record.key)) is True
    journal.supersede(letter.record.key, journal.now())
    assert journal.state() == State(0, 0, 0.0, 0)


# --- What others put there ------------------------------------------------------------------------

GARBAGE = [
    ("7-0", "d", "no writer"),
    ("8-0", "w", "no data"),
    ("9-5", "w", "w", "d", "x"),
    ("99999999999999999-0", "w", "w", "d", "x"),
    ("18446744073709551615-18446744073709551615", "\xff", "\xfe"),
]


@pytest.mark.parametrize("planted", GARBAGE, ids=lambda planted: planted[0])
def test_entries_that_are_no_records(journal, redis, planted):
    """They become dead letters; what was accepted before and after is written, in its order."""
    put(journal, "key", b"1", coalesces=False)
    name = f"{PLACE}s:key"
    ((last, fields),) = redis.execute("XRANGE", name, "-", "+")
    if int(planted[0].partition("-")[0]) < 10:  # it has to stand before
        redis.execute("DEL", name)
        redis.execute("XADD", name, *planted)
        redis.execute("XADD", name, last, *fields)
    else:
        redis.execute("XADD", name, *planted)
    assert payloads([journal.newest("key")]) == [b"1"]
    put(journal, "key", b"2", coalesces=False)
    put(journal, "key", b"3", coalesces=False)
    (claim,), _ = journal.claim(10, home="me")
    assert payloads(claim.records) == [b"1", b"2", b"3"]
    assert claim.is_whole
    assert journal.settle(claim, written=claim.records[-1].seq) is True
    (letter,) = journal.dead_letters()
    assert (letter.record.key, letter.record.data) == ("key", b"")
    assert "cannot be read" in letter.error
    with pytest.raises(ConflictError, match="cannot be read"):
        journal.requeue(letter.id)
    assert journal.drop(letter.id) is True
    assert names(redis) == ["dead", "n"]


@pytest.mark.parametrize("kind", ["s", "k"])
def test_names_that_others_have_taken(journal, redis, kind):
    """What is of another type is in nobody's way; where records were, a dead letter says so."""
    for key in ("claimed", "held", "written"):
        put(journal, key, b"lost")
        redis.execute("SET", f"{PLACE}{kind}:{key}", "planted")
    put(journal, "written", b"new", coalesces=False)
    held, written = journal.hold("held"), journal.hold("written")
    (*claims,), _ = journal.claim(9, home="me")
    lost = {letter.record.key for letter in journal.dead_letters()}
    if kind == "s":
        assert (held.records, payloads(written.records), claims) == ((), [b"new"], [])
        assert lost == {"claimed", "held", "written"}
    else:
        assert payloads(written.records) == [b"lost", b"new"]
        assert [payloads(claim.records) for claim in (held, *claims)] == [[b"lost"]] * 2
        assert lost == set()


def test_records_with_strange_fields(journal, redis):
    """What can be a record is handed out, as good as it is."""
    put(journal, "key", b"1", coalesces=False)
    seq = journal.newest("key").seq
    redis.execute(
        "XADD", f"{PLACE}s:key", f"{seq + 1}-0", "w", "\xff", "d", "no envelope", "c", "yes"
    )
    redis.execute("XADD", f"{PLACE}s:key", f"{seq + 2}-0", "w", "", "d", "", "h", "gone", "a", "x")
    redis.execute("HSET", f"{PLACE}k:key", f"f{seq}", "many times", "dead", 3, "ends", "never")
    (claim,), _ = journal.claim(10, home="me")
    first, second, third = claim.records
    assert (first.attempts, first.first_failed) == (0, 0)
    assert (second.data, second.coalesces) == (b"no envelope", False)
    assert (third.deleted, third.home) == (True, "gone")
    failure = Failure(second.seq, "no envelope", is_final=True)
    assert journal.settle(claim, written=first.seq, failure=failure) is True
    assert journal.explain("key")["pending"] == 1
    assert journal.dead_letters()[0].record.writer == second.writer


# --- What could be lost ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"appendfsync": "everysec"}, ["two seconds .* CONFIG SET appendfsync always"]),
        ({"appendfsync": "no"}, ["half a minute .* CONFIG SET appendfsync always"]),
        ({"appendonly": "no"}, ["A restart .* CONFIG SET appendonly yes"]),
        ({"maxmemory-policy": "allkeys-lru"}, []),
        ({"maxmemory-policy": "volatile-lru", "maxmemory": "1gb"}, []),
        (
            {"maxmemory-policy": "allkeys-random", "maxmemory": "1gb", "appendonly": "no"},
            ["allkeys-random; CONFIG SET maxmemory-policy volatile-lru", "A restart"],
        ),
    ],
)
def test_risks(journal, redis, settings, said):
    """Each setting that could lose what was accepted is named, with its cure, and no other."""
    for name, value in {"appendonly": "yes", "appendfsync": "always", **settings}.items():
        redis.execute("CONFIG", "SET", name, value)
    risks = journal.risks()
    assert len(risks) == len(said)
    for risk, words in zip(risks, said, strict=True):
        assert re.search(words, risk)


def test_risks_that_may_not_be_read(redis_server, make, redis):
    """Where CONFIG is refused INFO says some of it; where that is too, this is the risk."""
    url = redis_server.url.replace("//", "//limited:secret@")
    redis.execute("ACL", "SETUSER", "limited", "on", ">secret", "~*", "&*", "+@all", "-config")
    (risk,) = make(url).risks()
    assert "CONFIG SET appendonly yes" in risk
    redis.execute("CONFIG", "SET", "appendonly", "yes")
    (risk,) = make(url).risks()
    assert "appendfsync cannot be read" in risk
    redis.execute("ACL", "SETUSER", "limited", "-info")
    (risk,) = make(url).risks()
    assert "configuration cannot be read" in risk


def test_risks_of_a_redis_that_is_away(redis_server, make):
    """Nobody knows them then."""
    redis_server.kill()
    with pytest.raises(MusetError):
        make(redis_server.url).risks()
