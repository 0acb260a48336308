"""One load for all who ask, stale values and their limits, and what is left by who is cut off."""

import contextlib
import gc
import inspect
import itertools
import os
import textwrap
import threading
import time
import traceback
import weakref

import pytest
from patched import run_patched
from waiting import until

from flask_muset.cache_strategies import loading
from flask_muset.cache_strategies.codec import Codec
from flask_muset.cache_strategies.entry import NEVER, Entry, Lease
from flask_muset.cache_strategies.loading import Answer, Loader, LoadOptions, Outcome
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.clock import SYSTEM
from flask_muset.context import spawn
from flask_muset.deadline import deadline
from flask_muset.errors import (
    AuthorizationError,
    CircuitOpenError,
    ConflictError,
    ExternalServiceError,
    NetworkError,
    NotFoundError,
    OperationTimeoutError,
    RateLimitError,
    ValidationError,
)
from flask_muset.testing import virtual_clock


class Rig:
    """A loader over a store in memory, what it has told, and what it has put off."""

    def __init__(self, store=None, *, in_background=None, **options):
        self.store = LocalStore(1 << 20) if store is None else store
        self.told, self.later, self.calls = [], [], []
        self.loader = Loader(
            self.store,
            Codec(),
            in_background=in_background or self.later.append,
            tell=lambda *what: self.told.append(what),
            **{"jitter": 0, **options},
        )

    def get(self, result, key="k", *, takes_s=0, **options):
        """Ask; the source takes some seconds and returns, calls or raises its result."""

        def fetch():
            self.calls.append(key)
            if takes_s:
                SYSTEM.sleep(takes_s)
            if isinstance(result, BaseException):
                raise result
            return result() if callable(result) else result

        return self.loader.get(key, fetch, LoadOptions(**options))

    def run_later(self):
        """Run what was put off."""
        while self.later:
            self.later.pop(0)()

    def counts(self):
        """What was told, without seconds."""
        return [f"{operation} {status}" for operation, status, _ in self.told]

    def is_idle(self, *keys):
        """Whether nobody loads, and anybody may."""
        if len(self.loader._flights):
            return False
        for key in keys or ("k",):
            lease = self.store.lease(key, self.store.read(key), anyway=True)
            if not isinstance(lease, Lease):
                return False
            self.store.settle(lease, None)
        return True


class Elsewhere(LocalStore):
    """A store in which others do something at some time."""

    def __init__(self):
        super().__init__(1 << 20)
        self.due, self.asked_at = [], []

    def lease(self, key, known, /, *, anyway=False):
        self.asked_at.append(SYSTEM.now())
        while self.due and self.due[0][0] <= SYSTEM.now():
            self.due.pop(0)[1]()
        return super().lease(key, known, anyway=anyway)


@pytest.fixture
def rig(clock):
    return Rig()


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"expire": 0}, {"expire": -1}, {"expire": "60"}, {"expire": float("inf")},
        {"expire": True}, {"tags": ["a"]}, {"tags": "a"}, {"tags": ("",)}, {"tags": (1,)},
        {"stale_while_revalidate": -1}, {"stale_if_error": None}, {"refresh_backoff": -1},
        {"soft_timeout": -0.1}, {"hard_timeout": 0}, {"negative_expire": 0}, {"immutable": 1},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    """An option that is not allowed is a ValueError that names it and the value."""
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=name) as caught:
        LoadOptions(**wrong)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("wrong", [{"jitter": 1}, {"jitter": -0.1}, {"max_refreshes": 0}])
def test_a_loader_refuses_wrong_numbers(wrong):
    """So are the numbers of a loader."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rig(**wrong)


@pytest.mark.parametrize(
    ("expire", "given", "backoff_s"),
    [(100, None, 10), (5, None, 1), (3600, None, 30), (None, None, 30), (100, 0, 0), (5, 60, 60)],
)
def test_the_backoff_is_a_tenth_of_the_lifetime(expire, given, backoff_s):
    """At least 1 s, at most 30 s, unless it is given."""
    assert LoadOptions(expire=expire, refresh_backoff=given).backoff_s == backoff_s


# --- Hits and misses ------------------------------------------------------------------------------


def test_a_miss_is_loaded_and_then_hit(rig, clock):
    """The loader's caller gets the object itself, others copies with its age."""
    value = {"a": [1, 2]}
    first = rig.get(value, expire=60)
    assert first == Answer(value, Outcome.MISS, 0.0)
    assert first.value is value
    clock.advance(5)
    second, third = rig.get(None, expire=60), rig.get(None, expire=60)
    assert second == third == Answer({"a": [1, 2]}, Outcome.HIT, 5.0)
    assert second.value is not third.value is not value
    assert rig.calls == ["k"]
    assert rig.told == [
        ("load", "ok", 0.0), ("get", "miss", 0.0), ("get", "hit", 0.0), ("get", "hit", 0.0),
    ]  # fmt: skip


def test_the_seconds_of_a_get_are_without_the_load(rig):
    """What the source takes is told of the load, not of the get."""
    rig.get(1, takes_s=2)
    assert rig.told == [("load", "ok", 2.0), ("get", "miss", 0.0)]


def test_those_who_change_nothing_share(rig):
    """`immutable` decodes once at most for all, and others still get copies."""
    rig.get([1])
    first, second = rig.get(None, immutable=True), rig.get(None, immutable=True)
    assert first.value is second.value
    assert rig.get(None).value is not first.value
    loaded = rig.get([2], "other", immutable=True)
    assert rig.store.read("other").shared is loaded.value  # there when its weight was taken
    assert rig.get(None, "other", immutable=True).value is loaded.value


def test_none_is_a_value(rig):
    """None is kept like any other."""
    assert rig.get(None, expire=60) == (None, Outcome.MISS, 0.0)
    assert rig.get(1, expire=60) == (None, Outcome.HIT, 0.0)


def test_what_cannot_be_read_is_a_miss(rig, clock):
    """Foreign bytes, fresh or stale, are counted, loaded anew and replaced."""
    now = clock.now
    for fresh_until in (NEVER, now - 1):
        rig.store.write("k", Entry(b"\xc1", created_at=now, fresh_until=fresh_until))
        del rig.told[:]
        assert rig.get(7, stale_while_revalidate=60, expire=60).outcome == "MISS"
        assert rig.counts() == ["get unreadable", "load ok", "get miss"]
        assert rig.get(8, expire=60).value == 7


def test_a_lifetime_is_only_shortened(clock):
    """By up to the jitter, drawn for each load, counted from the end of the load."""
    rig = Rig(jitter=0.1)
    lifetimes = []
    for i in range(200):
        rig.get(1, str(i), takes_s=1, expire=100, stale_if_error=50)
        entry = rig.store.read(str(i))
        assert entry.created_at == clock.now
        assert entry.gone_at == entry.fresh_until + 50
        lifetimes.append(entry.fresh_until - entry.created_at)
    assert 90 <= min(lifetimes) < 92
    assert 98 < max(lifetimes) <= 100


def test_an_entry_has_its_tags_and_both_windows(rig, clock):
    """It is gone after the longer window; without `expire` it is always fresh."""
    rig.get(1, expire=10, stale_while_revalidate=5, stale_if_error=20, tags=("a", "b"))
    entry = rig.store.read("k")
    assert (entry.fresh_until - clock.now, entry.gone_at - clock.now) == (10, 30)
    assert entry.tags == ("a", "b")
    rig.get(1, "forever", stale_if_error=20)
    assert rig.store.read("forever").fresh_until == NEVER


def test_a_value_that_cannot_be_kept_is_the_callers_error(rig, clock):
    """The TypeError is raised, by what is stale too, and the lease has ended."""
    rig.get(1, expire=10, stale_if_error=60)
    clock.advance(11)
    with pytest.raises(TypeError):
        rig.get(object(), expire=10, stale_if_error=60)
    assert rig.is_idle()


@pytest.mark.parametrize("change", ["delete", "write"])
def test_a_load_that_was_overtaken_is_not_kept(rig, change):
    """Its caller gets what it brought; the cache has what came meanwhile."""
    new = Entry(Codec().encode("new"), created_at=0)

    def fetch():
        rig.store.delete("k") if change == "delete" else rig.store.write("k", new)
        return "old"

    assert rig.get(fetch) == ("old", Outcome.MISS, 0.0)
    entry = rig.store.read("k")
    assert entry is None if change == "delete" else Codec().decode(entry.payload) == "new"


# --- Nothing there --------------------------------------------------------------------------------


def test_none_may_be_kept_for_a_time_of_its_own(rig, clock):
    """`negative_expire` holds for None, which is then never stale."""
    options = {"expire": 100, "negative_expire": 5, "stale_if_error": 100}
    assert rig.get(None, **options).value is None
    entry = rig.store.read("k")
    assert entry.is_negative
    assert entry.gone_at == entry.fresh_until == clock.now + 5
    clock.advance(4)
    assert rig.get(1, **options) == (None, Outcome.HIT, 4.0)
    clock.advance(2)
    with pytest.raises(NetworkError):
        rig.get(NetworkError("away"), **options)
    assert rig.get(1, **options) == (1, Outcome.MISS, 0.0)


def test_not_found_may_be_kept(rig, clock):
    """It is raised anew, as it was, for `negative_expire`."""
    error = NotFoundError(
        "no user 7", "user", {"id": 7}, user_message="Nobody.", code="no_user"
    )  # fmt: skip
    error.status = 410
    with pytest.raises(NotFoundError) as first:
        rig.get(error, negative_expire=5)
    assert first.value is error
    seen = []
    for _ in range(2):
        with pytest.raises(NotFoundError) as again:
            rig.get(1, negative_expire=5)
        seen.append(again.value)
    assert seen[0] is not seen[1] is not error
    for each in seen:
        known = (each.message, each.resource_type, each.details, each.user_message, each.code)
        assert known == ("no user 7", "user", {"id": 7}, "Nobody.", "no_user")
        assert each.status == 410
    assert rig.counts() == ["load error", "get miss", "get hit", "get hit"]
    clock.advance(6)
    assert rig.get(1, negative_expire=5).value == 1


def test_not_found_is_not_kept_unless_that_is_said(rig, caplog):
    """Nor where its details cannot be; the error is the source's own in both cases."""
    for options in ({}, {"negative_expire": 5}):
        error = NotFoundError("x", details={"what": object()})
        for _ in range(2):
            with pytest.raises(NotFoundError) as caught:
                rig.get(error, **options)
            assert caught.value is error
    assert len(rig.calls) == 4
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert rig.is_idle()


def test_what_is_gone_does_not_come_back(rig, clock):
    """NotFoundError is raised in spite of a stale value, which no failure brings back."""
    options = {"expire": 10, "stale_if_error": 100}
    rig.get(1, **options)
    clock.advance(11)
    with pytest.raises(NotFoundError):
        rig.get(NotFoundError("gone"), **options)
    with pytest.raises(NetworkError):
        rig.get(NetworkError("away"), **options)


def test_a_refresh_that_finds_nothing_ends_the_stale_value(rig, clock):
    """It was served once more; the next caller loads."""
    options = {"expire": 10, "stale_while_revalidate": 100}
    rig.get(1, **options)
    clock.advance(11)
    assert rig.get(NotFoundError("gone"), **options).outcome == "STALE"
    rig.run_later()
    assert rig.get(2, **options) == (2, Outcome.MISS, 0.0)


# --- Stale while revalidate -----------------------------------------------------------------------


def test_stale_at_once_and_one_refresh(rig, clock):
    """All get the old value at once; one refresh brings the new one; the source is asked once."""
    options = {"expire": 10, "stale_while_revalidate": 5}
    rig.get("old", **options)
    clock.advance(14.9)
    del rig.calls[:], rig.told[:]
    for _ in range(3):
        answer = rig.get("new", takes_s=2, **options)
        assert answer.value == "old"
        assert answer.outcome == "STALE"
        assert answer.age_s == pytest.approx(14.9)
    assert len(rig.later) == 1
    rig.run_later()
    assert rig.get(None, **options) == ("new", Outcome.HIT, 0.0)
    assert rig.calls == ["k"]
    assert rig.counts() == ["get stale"] * 3 + ["refresh ok", "get hit"]


def test_after_the_window_it_is_loaded(rig, clock):
    """At its very end the value is not served any more."""
    options = {"expire": 10, "stale_while_revalidate": 5}
    rig.get("old", **options)
    clock.advance(15)
    assert rig.get("new", **options) == ("new", Outcome.MISS, 0.0)


def test_a_failed_refresh_is_not_tried_again_at_once(rig, clock, caplog):
    """During the backoff stale is served without the source, here and in other processes."""
    options = {"expire": 10, "stale_while_revalidate": 60, "refresh_backoff": 4}
    other = Rig(rig.store)
    rig.get("old", **options)
    clock.advance(11)
    rig.get(NetworkError("away"), **options)
    rig.run_later()
    assert "could not be refreshed" in caplog.text
    clock.advance(3.9)
    for each in (rig, other, rig, other):
        assert each.get("new", **options).value == "old"
        assert rig.later == []  # this process knows without asking the store
        each.run_later()
    assert (len(rig.calls), other.calls) == (2, [])
    assert rig.counts()[2:] == ["get stale", "refresh error"] + ["get stale"] * 2
    clock.advance(0.2)
    rig.get("new", **options)
    rig.run_later()
    assert other.get(None, **options) == ("new", Outcome.HIT, 0.0)


def test_a_load_that_succeeds_ends_the_backoff(rig, clock):
    """Whoever has brought it: the next refresh is begun when it is due."""
    options = {"expire": 10, "stale_while_revalidate": 60, "refresh_backoff": 30}
    rig.get("old", **options)
    clock.advance(11)
    rig.get(Mine(), **options)
    rig.run_later()
    assert rig.get("new", expire=10) == ("new", Outcome.MISS, 0.0)
    clock.advance(9)
    rig.store.write("k", Entry(Codec().encode(1), created_at=0, fresh_until=clock.now))
    rig.get("newer", **options)
    assert len(rig.later) == 1


def test_a_refresh_elsewhere_is_not_waited_for(rig, clock):
    """A refresh gives way to another process, and is asked for again four times a second."""
    options = {"expire": 10, "stale_while_revalidate": 60}
    rig.get("old", **options)
    clock.advance(11)
    lease = rig.store.lease("k", rig.store.read("k"))
    for _ in range(10):
        assert rig.get("new", **options).value == "old"
        rig.run_later()
    assert len(rig.calls) == 1
    rig.store.settle(lease, None)
    clock.advance(0.26)
    rig.get("new", **options)
    rig.run_later()
    assert rig.get(None, **options).value == "new"


def test_only_so_many_refreshes_at_once(clock):
    """What is too many is skipped and counted; when there is room it is done."""
    rig = Rig(max_refreshes=2)
    options = {"expire": 10, "stale_while_revalidate": 60}
    for key in "abc":
        rig.get("old", key, **options)
    clock.advance(11)
    for key in "abc":
        assert rig.get("new", key, **options).outcome == "STALE"
    assert len(rig.later) == 2
    assert rig.counts()[-2:] == ["refresh skipped", "get stale"]
    rig.run_later()
    rig.get("new", "c", **options)
    rig.run_later()
    assert rig.get(None, "c", **options).value == "new"


def test_a_refresh_that_never_begins_is_made_up_for(clock):
    """Its greenlet was killed before it ran: the next one begins after a second."""
    rig = Rig(max_refreshes=1)
    options = {"expire": 10, "stale_while_revalidate": 60}
    rig.get("old", **options)
    rig.get("old", "other", **options)
    clock.advance(11)
    rig.get("new", **options)
    lost = rig.later.pop()
    rig.get("new", **options)
    assert rig.later == []
    clock.advance(1.1)
    rig.get("new", "other", **options)  # its place is free too
    rig.run_later()
    rig.get("new", **options)
    rig.run_later()
    lost()  # too late
    assert rig.get(None, **options).value == rig.get(None, "other", **options).value == "new"
    assert rig.calls.count("k") == 2
    assert rig.is_idle()


def test_who_needs_a_value_does_not_wait_for_a_refresh_that_has_not_begun(clock):
    """He loads at once, and the refresh has nothing left to do, not even to ask."""
    rig = Rig(Elsewhere())
    options = {"expire": 10, "stale_while_revalidate": 60}
    rig.get("old", **options)
    clock.advance(11)
    rig.get("new", **options)
    assert rig.get("newer", expire=10) == ("newer", Outcome.MISS, 0.0)
    asked = len(rig.store.asked_at)
    rig.run_later()
    assert (rig.calls, len(rig.store.asked_at)) == (["k", "k"], asked)
    assert rig.is_idle()


def test_a_refresh_that_cannot_be_started_is_logged(clock, caplog):
    """The caller gets his stale value all the same, and nothing is left."""

    def refuse(_fn):
        raise RuntimeError("can't start new thread")

    rig = Rig(in_background=refuse)
    options = {"expire": 10, "stale_while_revalidate": 60}
    rig.get("old", **options)
    clock.advance(11)
    assert rig.get("new", **options).outcome == "STALE"
    assert "no refresh of 'k' could be started" in caplog.text
    assert rig.is_idle()


# --- Stale if error -------------------------------------------------------------------------------


class Mine(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        NetworkError("away"), Mine("x"), OperationTimeoutError("late"), ConnectionError("no"),
        CircuitOpenError("open"), RateLimitError("slow down"), ExternalServiceError("bad"),
        TypeError("a fault of the source"), ConflictError("again", retryable=True),
    ],
)  # fmt: skip
def test_a_failing_source_serves_stale_up_to_its_maximum_age(rig, clock, caplog, error):
    """The source is asked first; beyond the window its own error is raised."""
    options = {"expire": 10, "stale_if_error": 50, "refresh_backoff": 0}
    rig.get("old", **options)
    clock.advance(59.9)
    answer = rig.get(error, **options)
    assert (answer.value, answer.outcome) == ("old", "STALE")
    assert answer.age_s == pytest.approx(59.9)
    assert rig.counts()[2:] == ["load error", "get stale"]
    assert "served stale" in caplog.text
    clock.advance(0.2)
    with pytest.raises(type(error)) as caught:
        rig.get(error, **options)
    assert caught.value is error
    assert rig.get("new", **options).value == "new"
    assert rig.is_idle()


@pytest.mark.parametrize(
    "error",
    [
        ValidationError("wrong"), AuthorizationError("no"), ConflictError("meanwhile"),
        NotFoundError("gone"),
    ],
)  # fmt: skip
def test_an_error_of_the_callers_is_not_hidden(rig, clock, error):
    """It is raised in spite of a stale value, each time: there is no backoff."""
    options = {"expire": 10, "stale_if_error": 50}
    rig.get("old", **options)
    clock.advance(11)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            rig.get(error, **options)
        assert caught.value is error
    assert len(rig.calls) == 3


def test_while_a_failed_load_backs_off_stale_is_served_at_once(clock):
    """Without the source, here and in another process; after the window it is asked in any case."""
    options = {"expire": 10, "stale_if_error": 50, "refresh_backoff": 100}
    rig = Rig(Elsewhere())
    other = Rig(rig.store)
    rig.get("old", **options)
    clock.advance(11)
    rig.get(Mine(), **options)
    asked = len(rig.store.asked_at)
    clock.advance(40)
    assert rig.get("new", **options).outcome == "STALE"
    assert len(rig.store.asked_at) == asked  # this process knows without asking the store
    assert other.get("new", **options).outcome == "STALE"
    assert (len(rig.calls), other.calls) == (2, [])
    clock.advance(9)  # the backoff still holds
    assert other.get("new", **options) == ("new", Outcome.MISS, 0.0)
    assert rig.get(None, **options).outcome == "HIT"


def test_what_backs_off_is_bounded(rig, clock):
    """This process remembers a thousand keys; for others it asks the store."""
    options = {"expire": 10, "stale_if_error": 500, "refresh_backoff": 100}
    keys = [str(i) for i in range(1100)]
    for key in keys:
        rig.get("old", key, **options)
    clock.advance(11)
    for _ in range(2):
        for key in keys:
            assert rig.get(Mine(), key, **options).outcome == "STALE"
    assert len(rig.calls) == 2200
    assert len(rig.loader._pauses._until) <= 1000


def test_without_a_stale_value_there_is_no_backoff(rig):
    """Each caller gets the error of a try of his own."""
    for _ in range(3):
        with pytest.raises(Mine):
            rig.get(Mine(), expire=10, stale_if_error=50)
    assert len(rig.calls) == 3


def test_an_open_circuit_says_how_long(rig, clock):
    """Its `retry_after` counts where it is longer than the backoff."""
    options = {"expire": 10, "stale_if_error": 500, "refresh_backoff": 2}
    rig.get("old", **options)
    clock.advance(11)
    rig.get(CircuitOpenError("open", retry_after=20), **options)
    for passed_s, calls in ((19, 2), (1.1, 3), (1.9, 3), (0.2, 4)):
        clock.advance(passed_s)
        rig.get(CircuitOpenError("open", retry_after=0.5), **options)
        assert len(rig.calls) == calls


def test_both_windows(rig, clock):
    """Within the first at once, within the second if the load fails."""
    options = {
        "expire": 10, "stale_while_revalidate": 5, "stale_if_error": 20, "refresh_backoff": 0
    }  # fmt: skip
    rig.get("old", **options)
    clock.advance(12)
    assert rig.get(Mine(), **options).outcome == "STALE"
    assert len(rig.calls) == 1
    rig.run_later()
    clock.advance(4)
    assert rig.get(Mine(), **options).outcome == "STALE"
    assert len(rig.calls) == 3
    clock.advance(14)
    with pytest.raises(Mine):
        rig.get(Mine(), **options)


def test_stale_after_an_invalidation_by_tag(rig, clock):
    """What never expires may be stale where its tag has said so."""
    options = {"tags": ("t",), "stale_if_error": 50}
    rig.get("old", **options)
    clock.advance(1)
    rig.store.invalidate_tag("t", keep_stale=True)
    answer = rig.get(Mine(), **options)
    assert (answer.value, answer.outcome) == ("old", "STALE")
    rig.get(None, "none", negative_expire=60, tags=("t",))
    clock.advance(1)
    rig.store.invalidate_tag("t", keep_stale=True)
    with pytest.raises(Mine):  # that there was nothing is never served stale
        rig.get(Mine(), "none", negative_expire=60, **options)


# --- Other processes ------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(clock):
    """A rig, and a function that lets another process load for some seconds."""
    rig = Rig(Elsewhere())

    def begin(key, takes_s, value):
        lease = rig.store.lease(key, rig.store.read(key))
        at = clock.now + takes_s

        def end():
            entry = Entry(
                Codec().encode(value), created_at=at, fresh_until=at + 10, began_us=lease.began_us
            )
            rig.store.settle(lease, None if value is None else entry)

        rig.store.due.append((at, end))
        del rig.store.asked_at[:]

    rig.begin = begin
    return rig


@pytest.mark.parametrize(("takes_s", "late_s"), [(0.02, 0.006), (0.1, 0.0125), (10, 0.25)])
def test_a_load_elsewhere_is_noticed_soon(elsewhere, clock, takes_s, late_s):
    """Another process's value is taken, a tenth of its load late at most; nothing is loaded."""
    elsewhere.begin("k", takes_s, "theirs")
    began = clock.now
    answer = elsewhere.get("mine")
    assert (answer.value, answer.outcome, elsewhere.calls) == ("theirs", "MISS", [])
    assert takes_s <= clock.now - began <= takes_s + late_s
    pauses = [b - a for a, b in itertools.pairwise(elsewhere.store.asked_at)]
    assert min(pauses) >= 0.005 - 1e-9
    assert max(pauses) <= 0.25 + 1e-9
    assert elsewhere.told == [("get", "miss", pytest.approx(0, abs=1e-9))]


def test_a_holder_elsewhere_that_brings_nothing_is_replaced(elsewhere):
    """Its lease ends, and the one who waits loads."""
    elsewhere.begin("k", 1, None)
    assert elsewhere.get("mine") == ("mine", Outcome.MISS, 0.0)


def test_a_load_elsewhere_that_has_expired_is_still_an_answer(elsewhere, clock):
    """Loaded after the caller had asked, it is good enough, however short it lasts."""
    lease = elsewhere.store.lease("k", None)

    def end():
        now = clock.now
        entry = Entry(Codec().encode(1), created_at=now, fresh_until=now, gone_at=now + 10)
        entry.began_us = lease.began_us
        elsewhere.store.settle(lease, entry)

    elsewhere.store.due.append((clock.now + 1, end))
    assert elsewhere.get(2).value == 1
    assert elsewhere.calls == []


def test_what_another_process_puts_in_may_be_of_no_use(elsewhere, clock):
    """Bytes that cannot be read are counted and loaded over; NotFoundError is raised."""
    lease, at = elsewhere.store.lease("k", None), clock.now + 1
    unreadable = Entry(b"\xc1", created_at=at, began_us=lease.began_us)
    elsewhere.store.due.append((at, lambda: elsewhere.store.settle(lease, unreadable)))
    assert elsewhere.get("mine") == ("mine", Outcome.MISS, 0.0)
    assert elsewhere.counts() == ["get unreadable", "load ok", "get miss"]
    other = Rig(LocalStore(1 << 20))
    with pytest.raises(NotFoundError):
        other.get(NotFoundError("nobody"), "nothing", negative_expire=60)
    nothing = other.store.read("nothing")
    elsewhere.begin("nothing", 1, None)
    elsewhere.store.due[0] = (at + 1, lambda: elsewhere.store.write("nothing", nothing))
    with pytest.raises(NotFoundError, match="nobody"):
        elsewhere.get("mine", "nothing")
    assert elsewhere.calls == ["k"]
    assert len(elsewhere.loader._flights) == 0


def test_what_is_newer_but_stale_is_loaded_over(elsewhere, clock):
    """It takes the place of the stale value that the caller had, also where the load fails."""
    options = {"expire": 10, "stale_if_error": 60}
    elsewhere.get("old", **options)
    clock.advance(20)
    now = clock.now

    def write(gone_at):
        newer = Entry(
            Codec().encode("newer"), created_at=now - 9, fresh_until=now - 1, gone_at=gone_at
        )
        elsewhere.store.write("k", newer)

    elsewhere.store.due.append((now, lambda: write(now + 50)))
    assert elsewhere.get(Mine(), **options) == ("newer", Outcome.STALE, 9.0)
    clock.advance(2)
    elsewhere.store.due.append((clock.now, lambda: write(clock.now + 50)))
    with pytest.raises(Mine):
        elsewhere.get(Mine(), expire=10, stale_if_error=1.5)


def test_waiting_for_another_process_is_bounded_by_the_hard_limit(elsewhere, clock):
    """Then stale where that is allowed, else OperationTimeoutError."""
    options = {"expire": 10, "stale_if_error": 50, "hard_timeout": 0.5}
    elsewhere.get("old", **options)
    clock.advance(11)
    elsewhere.begin("k", 100, "theirs")
    elsewhere.begin("other", 100, "theirs")
    began = clock.now
    assert elsewhere.get("mine", **options).outcome == "STALE"
    assert clock.now - began == pytest.approx(0.5)
    with pytest.raises(OperationTimeoutError, match=r"'other' within 0\.5 s"):
        elsewhere.get("mine", "other", **options)
    assert elsewhere.calls == ["k"]
    assert len(elsewhere.loader._flights) == 0


def test_a_load_within_a_load_waits_three_seconds_for_another_process(elsewhere, clock):
    """The other one may wait for us: after that it loads without putting in."""
    elsewhere.begin("inner", 100, "theirs")
    began = clock.now
    inner = []

    def outer():
        inner.append(elsewhere.get("mine", "inner"))
        return "outer"

    assert elsewhere.get(outer, "outer").value == "outer"
    assert inner == [("mine", Outcome.BYPASS, 0.0)]
    assert 3 <= clock.now - began <= 3.3
    assert elsewhere.store.read("inner") is None


def test_a_load_within_a_load_does_not_wait_for_one_that_waits(monkeypatch):
    """Two processes whose loads wait for each other through third ones do not stop for ever."""
    monkeypatch.setattr(loading, "_NESTED_WAIT_S", 0.2)
    rig, seen = Rig(), []
    theirs = rig.store.lease("inner", None)
    waiting = threading.Thread(target=rig.get, args=("late", "inner"))
    waiting.start()
    until(lambda: len(rig.loader._flights) == 1)
    began = time.monotonic()

    def outer():
        seen.append(rig.get("mine", "inner"))
        return "outer"

    assert rig.get(outer, "outer").value == "outer"
    assert seen == [("mine", Outcome.BYPASS, 0.0)]
    assert 0.2 <= time.monotonic() - began < 2
    rig.store.settle(theirs, None)
    waiting.join(10)
    assert rig.is_idle("inner", "outer")


def test_while_the_source_is_written_nothing_is_put_in(rig):
    """A load during a write of the source is a BYPASS."""
    write = rig.store.begin_write("k")
    assert rig.get("between") == ("between", Outcome.BYPASS, 0.0)
    assert rig.store.read("k") is None
    rig.store.end_write(write, None)
    assert rig.get("after") == ("after", Outcome.MISS, 0.0)
    assert rig.counts() == ["load ok", "get bypass", "load ok", "get miss"]


# --- Limits of time -------------------------------------------------------------------------------


def test_the_hard_limit_cuts_the_load(rig, clock):
    """OperationTimeoutError, or stale where that is allowed."""
    options = {"expire": 10, "stale_if_error": 50, "hard_timeout": 0.5}
    began = clock.now
    with pytest.raises(OperationTimeoutError):
        rig.get("never", takes_s=2, **options)
    assert clock.now - began == pytest.approx(0.5)
    rig.get("old", takes_s=0.4, **options)
    clock.advance(11)
    assert rig.get("never", takes_s=2, **options).outcome == "STALE"
    assert rig.is_idle()


def test_a_callers_own_deadline_is_no_failure_of_the_source(rig, clock):
    """It ends his get alone: no backoff, no lease, no load is left."""
    options = {"expire": 10, "stale_if_error": 50}
    rig.get("old", **options)
    clock.advance(11)
    with pytest.raises(OperationTimeoutError), deadline(1):
        rig.get("late", takes_s=2, **options)
    assert rig.is_idle()

    def fail():
        SYSTEM.sleep(deadline.remaining())
        raise NetworkError("no time left")

    with deadline(1):
        assert rig.get(fail, **options).outcome == "STALE"
    assert rig.get("new", **options) == ("new", Outcome.MISS, 0.0)


def test_a_lease_ends_where_no_time_is_left(clock):
    """The store gets its own time for that, whatever the caller's deadline says."""

    class Asking(LocalStore):
        def settle(self, lease, entry, /, *, backoff_s=0.0):
            left.append(deadline.remaining())
            return super().settle(lease, entry, backoff_s=backoff_s)

    left = []
    rig = Rig(Asking(1 << 20))
    with pytest.raises(OperationTimeoutError), deadline(1):
        rig.get("late", takes_s=2)
    with deadline(1):
        rig.get("in time", takes_s=0.5)
        assert deadline.remaining() == 0.5
    assert left == [None, None]


# --- Within a load --------------------------------------------------------------------------------


def test_a_load_may_ask_for_its_own_key(rig):
    """Directly or through other keys, the inner one is a load of its own and not put in."""
    inner = []

    def direct():
        inner.append(rig.get("inner", "a"))
        return "outer"

    assert rig.get(direct, "a") == ("outer", Outcome.MISS, 0.0)

    def through():
        inner.append(rig.get(lambda: rig.get("deep", "b").value, "c"))
        return "outer"

    assert rig.get(through, "b").value == "outer"
    assert inner == [("inner", Outcome.BYPASS, 0.0), ("deep", Outcome.MISS, 0.0)]
    assert rig.get(None, "b").value == "outer"
    assert rig.is_idle("a", "b", "c")


def test_a_load_may_ask_for_its_own_key_after_it_was_made_invalid(rig):
    """A load that nobody can join any more is still one of which the work is a part."""

    def fetch():
        rig.store.delete("k")
        rig.loader.detach("k")
        return list(rig.get("inner"))

    assert rig.get(fetch).value == ["inner", "BYPASS", 0.0]


def test_work_that_outlives_its_load_is_part_of_it_no_more():
    """What a load has started asks like anybody else once the load is over."""
    rig, go, seen = Rig(), threading.Event(), []

    def fetch():
        def later():
            go.wait(10)
            seen.append(rig.get("second", expire=60))

        threads.append(spawn(later))
        return "first"

    threads = []
    rig.get(fetch)
    rig.store.delete("k")
    go.set()
    threads[0].join(10)
    assert seen == [("second", Outcome.MISS, 0.0)]
    assert rig.get(None).outcome == "HIT"


def test_a_thread_of_a_load_may_ask_for_its_key():
    """`context.spawn` carries the knowledge of which keys are being loaded."""
    rig, seen = Rig(), []

    def fetch():
        spawn(lambda: seen.append(rig.get("inner"))).join(10)
        return "outer"

    assert rig.get(fetch).value == "outer"
    assert seen == [("inner", Outcome.BYPASS, 0.0)]


def test_two_loads_that_wait_for_each_other():
    """The circle is seen and broken at once; both callers get their values."""
    rig, both, answers = Rig(), threading.Barrier(2), {}

    def load(mine, other):
        def fetch():
            both.wait(10)
            return mine + rig.get(f"direct {other}", other).value

        answers[mine] = rig.get(fetch, mine)

    began = time.monotonic()
    threads = [threading.Thread(target=load, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 2
    values = {key: answer.value for key, answer in answers.items()}
    assert values in (
        {"a": "adirect b", "b": "badirect b"},
        {"a": "abdirect a", "b": "bdirect a"},
        {"a": "adirect b", "b": "bdirect a"},
    )
    assert rig.is_idle("a", "b")


# --- Cut off anywhere -----------------------------------------------------------------------------


class Cut(BaseException):
    pass


class Stepping:
    """A store and a source that can be cut off before and after everything they do."""

    def __init__(self, store, cut_at):
        self.store, self.cut_at, self.steps = store, cut_at, 0

    def step(self):
        self.steps += 1
        if self.steps == self.cut_at:
            raise Cut

    def read(self, key, /):
        self.step()
        found = self.store.read(key)
        self.step()
        return found

    def lease(self, key, known, /, *, anyway=False):
        self.step()
        got = self.store.lease(key, known, anyway=anyway)
        try:
            self.step()
        except Cut:
            if isinstance(got, Lease):
                self.store.settle(got, None)
            raise
        return got

    def settle(self, lease, entry, /, *, backoff_s=0.0):
        self.step()
        is_kept = self.store.settle(lease, entry, backoff_s=backoff_s)
        self.step()
        return is_kept

    def delete(self, key, /):
        self.step()
        is_done = self.store.delete(key)
        self.step()
        return is_done


OPTIONS = {"expire": 10, "stale_if_error": 50, "hard_timeout": 5}
#: What a get meets: whether there is a stale value, what the source does, more options.
SCENARIOS = {
    "load": (False, "new", {}),
    "stale": (True, NetworkError("x"), {}),
    "refresh": (True, "new", {"stale_while_revalidate": 40}),
    "failed refresh": (True, NetworkError("x"), {"stale_while_revalidate": 40}),
    "gone": (True, NotFoundError("x"), {}),
    "nothing": (False, NotFoundError("x"), {"negative_expire": 1}),
    "waiting": (False, "new", {}),
}


def let_another_process_load(stepping, clock):
    """For a moment, during which whoever waits can be cut off."""
    lease, sleep, ends = stepping.store.lease("k", None), clock.sleep, clock.now + 0.05

    def sleep_in_steps(seconds):
        stepping.step()
        sleep(seconds)
        if clock.now >= ends:
            stepping.store.settle(lease, None)

    SYSTEM.sleep = sleep_in_steps


def ask_in_steps(name, stepping, clock):
    """Meet a scenario; the rig, and whether everything went on to its end."""
    has_stale, result, options = SCENARIOS[name]
    rig, now = Rig(stepping, in_background=lambda fn: fn()), clock.now
    if has_stale:
        value = Codec().encode("old")
        entry = Entry(value, created_at=now - 11, fresh_until=now - 1, gone_at=now + 49)
        stepping.store.write("k", entry)
    if name == "waiting":
        let_another_process_load(stepping, clock)

    def fetch():
        stepping.step()
        if isinstance(result, Exception):
            raise result
        return result

    with contextlib.suppress(Cut, NotFoundError):
        rig.loader.get("k", fetch, LoadOptions(**OPTIONS, **options))
    return rig, stepping.steps < stepping.cut_at


@pytest.mark.parametrize("name", SCENARIOS)
def test_whoever_is_cut_off_anywhere_leaves_nothing(name):
    """At every point at which others may run: no load, no lease is left, and the next get works."""
    for cut_at in itertools.count(1):
        with virtual_clock() as clock:
            stepping = Stepping(LocalStore(1 << 20), cut_at)
            rig, is_whole = ask_in_steps(name, stepping, clock)
            assert len(rig.loader._flights) == 0, cut_at
            stepping.cut_at = 0
            SYSTEM.sleep(0.06)  # the other process's load ends too
            lease = stepping.store.lease("k", stepping.store.read("k"), anyway=True)
            assert isinstance(lease, Lease), cut_at
            stepping.store.settle(lease, None)
            assert rig.get("next", "k2").value == "next"
        if is_whole:
            break
    assert cut_at > 6


# --- Threads --------------------------------------------------------------------------------------


def run_all(count, work):
    """Run in threads at the same time; what each returned or raised."""
    results, ready = [], threading.Barrier(count)

    def run(number):
        ready.wait(10)
        try:
            results.append(work(number))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == count, "somebody hangs"
    return results


def beside(fn):
    threading.Thread(target=fn, daemon=True).start()


def test_threads_share_one_load():
    """Fifty cold threads: one load, and a copy for each."""
    rig = Rig()
    answers = run_all(50, lambda _: rig.get(lambda: {"a": []}, takes_s=1, expire=60))
    assert rig.calls == ["k"]
    assert {answer.outcome for answer in answers} <= {"MISS", "HIT"}
    assert len({id(answer.value["a"]) for answer in answers}) == 50
    assert rig.is_idle()


def test_threads_share_one_error():
    """All who wait get the same error, none with the frames of another; the next get tries anew."""
    rig, error = Rig(), Mine("once")

    def ask(_):
        return rig.get(error, takes_s=1)

    seen = run_all(10, ask)
    assert seen == [error] * 10
    assert rig.calls == ["k"]
    asked = [f.name for f in traceback.extract_tb(error.__traceback__) if f.name == "ask"]
    assert len(asked) == 1
    assert rig.get(1).value == 1


def test_an_error_for_which_nobody_waits_leaves_no_circle():
    """What a load has failed with is freed without the collector."""

    def fail():
        raise Mine

    rig, gone = Rig(), None
    gc.disable()
    try:
        try:
            rig.get(fail)
        except Mine as error:
            gone = weakref.ref(error)
        assert gone() is None
    finally:
        gc.enable()


def test_a_waiting_threads_deadline_is_its_own():
    """It stops waiting in time; the load goes on for the others."""
    rig = Rig()

    def ask(number):
        if number:
            until(lambda: rig.calls)
        began = time.monotonic()
        try:
            with deadline(0.1 if number == 1 else 20):
                return rig.get("v", takes_s=2).value
        except OperationTimeoutError:
            return time.monotonic() - began

    short, *others = sorted(run_all(3, ask), key=str)
    assert 0.09 <= short < 1.5
    assert (others, rig.calls) == (["v", "v"], ["k"])


def test_waiting_threads_stop_at_the_hard_limit():
    """The load of a thread cannot be cut; those who wait do not wait for it."""
    rig = Rig()

    def ask(number):
        if number:
            until(lambda: rig.calls)
        began = time.monotonic()
        try:
            return rig.get("v", takes_s=2, hard_timeout=0.1).value
        except OperationTimeoutError:
            return time.monotonic() - began

    first, second, value = sorted(run_all(3, ask), key=str)
    assert max(first, second) < 1.5
    assert (value, rig.calls) == ("v", ["k"])


def test_who_comes_after_an_invalidation_does_not_join():
    """Those who waited get the old value, those who come later share a new load."""
    rig, answers = Rig(), {"old": [], "new": []}
    gates = {value: threading.Event() for value in answers}

    def ask(value):
        def fetch():
            gates[value].wait(10)
            return value

        answers[value].append(rig.get(fetch, expire=60).value)

    def start(value, condition):
        thread = threading.Thread(target=ask, args=(value,))
        thread.start()
        until(condition)
        return thread

    def is_awaited():
        return rig.loader._flights._by_key["k"]._is_awaited

    old = [start("old", lambda: len(rig.calls) == 1), start("old", is_awaited)]
    rig.store.delete("k")
    rig.loader.detach_matching(lambda key: key.startswith("x"))
    assert len(rig.loader._flights) == 1
    rig.loader.detach_matching(lambda key: key.startswith("k"))
    new = [start("new", lambda: len(rig.calls) == 2)]
    gates["old"].set()
    for thread in old:
        thread.join(10)
    assert len(rig.loader._flights) == 1  # the old load's end has left the new one alone
    new.append(start("new", is_awaited))
    gates["new"].set()
    for thread in new:
        thread.join(10)
    assert answers == {"old": ["old"] * 2, "new": ["new"] * 2}
    assert rig.get(None).value == "new"
    assert len(rig.calls) == 2
    assert rig.is_idle()


def test_another_caller_loads_where_the_first_was_cut_off():
    """Those who wait do not fail with him: one of them loads."""
    rig = Rig()

    def ask(number):
        if number:
            until(lambda: rig.calls)
            return rig.get("second").value
        with contextlib.suppress(Cut):
            rig.get(Cut(), takes_s=0.3)
        return "cut off"

    assert sorted(run_all(5, ask)) == ["cut off"] + ["second"] * 4
    assert rig.calls == ["k", "k"]


def test_those_who_wait_are_told_that_nothing_was_kept():
    """A load during a write of the source is a BYPASS for all whom it serves."""
    rig = Rig()
    rig.store.begin_write("k")
    answers = run_all(5, lambda _: rig.get("v", takes_s=1))
    assert {(answer.value, str(answer.outcome)) for answer in answers} == {("v", "BYPASS")}
    assert rig.calls == ["k"]


def test_those_with_a_stale_value_take_it_where_the_shared_load_fails():
    """One load fails: who may be stale is, who may not gets the error."""
    rig = Rig()
    now = SYSTEM.now()
    old = Entry(Codec().encode("old"), created_at=now - 9, fresh_until=now - 1, gone_at=now + 60)
    rig.store.write("k", old)

    def ask(number):
        window = 60 if number % 2 else 0
        return rig.get(Mine(), takes_s=1, expire=1, stale_if_error=window)

    results = run_all(6, ask)
    assert [type(r) for r in results].count(Mine) == 3
    assert [r.value for r in results if isinstance(r, Answer)] == ["old"] * 3
    assert rig.calls == ["k"]


CLAIM = (
    "A source that takes 2 s with a soft limit of 50 ms and a stale value: answers under 100 ms, "
    "one load; a failing source serves stale up to its maximum age, then the original error"
)


@pytest.mark.claim(CLAIM + " (threads)")
def test_soft_limit_of_threads(prove):
    """All callers get the stale value in time, the load goes on beside them and is put in."""
    rig = Rig(in_background=beside)
    options = {"expire": 0.1, "stale_if_error": 30, "soft_timeout": 0.05}
    rig.get("old", **options)
    time.sleep(0.11)
    took = []

    def ask(_):
        began = time.monotonic()
        answer = rig.get("new", takes_s=2, **options)
        took.append(time.monotonic() - began)
        return answer

    answers = run_all(20, ask)
    prove.figure(f"{max(took) * 1000:.0f} ms the slowest of 20, {len(rig.calls) - 1} load")
    assert {(a.value, str(a.outcome)) for a in answers} == {("old", "STALE")}
    assert min(took) >= 0.045
    assert max(took) < (0.1 if prove.full else 1.5)
    assert len(rig.calls) == 2
    until(lambda: rig.store.read("k").payload == Codec().encode("new"))
    assert rig.is_idle()
    assert_stale_up_to_its_maximum_age(rig, prove)


def assert_stale_up_to_its_maximum_age(rig, prove):
    """Ask a failing source until its error comes through."""
    unit = 0.1 if prove.full else 0.4
    options = {"expire": unit, "stale_if_error": 4 * unit, "refresh_backoff": unit / 2}
    began, error, oldest_s = time.monotonic(), Mine("x"), 0.0
    rig.get("old", "failing", **options)
    time.sleep(1.2 * unit)
    raised = None
    while raised is None:
        try:
            oldest_s = rig.get(error, "failing", **options).age_s
        except Mine as caught:
            raised = caught
        time.sleep(0.01)
    assert raised is error
    assert (0.4 if prove.full else 0) < oldest_s <= 5 * unit <= time.monotonic() - began
    assert (3 if prove.full else 1) < rig.calls.count("failing") < 12


def test_soft_limit_without_a_stale_value_waits(clock):
    """There is nothing else to serve."""
    rig = Rig()
    assert rig.get("v", takes_s=2, soft_timeout=0.05) == ("v", Outcome.MISS, 0.0)


def test_a_load_in_time_is_better_than_stale():
    """Within the soft limit callers get what is new, in the first window too; errors not."""
    rig = Rig(in_background=beside)
    options = {"expire": 0.05, "stale_while_revalidate": 30, "soft_timeout": 20}
    rig.get("old", **options)
    time.sleep(0.06)
    assert {a.value for a in run_all(5, lambda _: rig.get("new", takes_s=1, **options))} == {"new"}
    assert len(rig.calls) == 2
    time.sleep(0.06)
    assert rig.get(Mine(), **options).outcome == "STALE"
    rig.store.invalidate_tag("", keep_stale=False)
    assert rig.get("newer", **options).outcome == "MISS"


def test_who_has_stopped_waiting_waits_for_nobody():
    """A load that has got a stale value is not in a circle with the load that it left behind."""
    rig, done = Rig(in_background=beside), []
    options = {"expire": 0.05, "stale_if_error": 30, "soft_timeout": 0.05}
    rig.get("old", "b", **options)
    time.sleep(0.06)

    def fetch_b():
        time.sleep(0.15)
        done.append(list(rig.get("another", "a")))
        return "new"

    def fetch_a():
        found = rig.get(fetch_b, "b", **options).value
        until(lambda: rig.loader._flights._by_key["a"]._is_awaited)
        return f"a of {found}"

    assert rig.get(fetch_a, "a").value == "a of old"
    until(lambda: done)
    assert done[0][:2] == ["a of old", "MISS"]
    assert rig.calls == ["b", "a", "b"]


def test_a_fork_has_no_loads_of_its_parent():
    """A child does not wait for a load that goes on in its parent alone."""
    rig, go = Rig(), threading.Event()
    thread = threading.Thread(target=lambda: rig.get(lambda: go.wait(10)))
    thread.start()
    until(lambda: rig.calls == ["k"])
    rig.store.delete("k")  # its lease is none of the child's
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, rig.get("child").value.encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    assert os.read(reader, 100) == b"child"
    os.close(reader)
    go.set()
    thread.join(10)


# --- gevent ---------------------------------------------------------------------------------------

COMMON = (
    """
import contextlib, random, sys, time
from flask_muset.cache_strategies.codec import Codec
from flask_muset.cache_strategies.entry import *
from flask_muset.cache_strategies.loading import *
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.clock import SYSTEM
from flask_muset.context import spawn
from flask_muset.deadline import Expired, deadline
from flask_muset.errors import *

class Mine(Exception): pass

"""
    + inspect.getsource(Rig)
    + """
def timed(fn, *args, **options):
    began = time.perf_counter()
    try:
        found = fn(*args, **options)
    except Exception as error:
        found = type(error).__name__
    return found, time.perf_counter() - began
"""
)


def patched(code, *args):
    return run_patched(COMMON + textwrap.dedent(code), *args)


@pytest.mark.claim(
    "1,000 greenlets ask for a cold key: one load; its holder is killed: one of them loads instead"
)
def test_a_thousand_greenlets_share_one_load(prove):
    """Cold, and once more with the first holder killed while it loads."""
    found = patched("""
    rig = Rig()
    cold = [gevent.spawn(rig.get, {"a": 1}, takes_s=0.1, expire=60) for _ in range(1000)]
    gevent.joinall(cold, timeout=30)
    result = {"cold": len(rig.calls), "values": sum(g.value[0] == {"a": 1} for g in cold)}
    result["copies"] = len({id(g.value[0]) for g in cold})
    rig = Rig()
    holder = gevent.spawn(rig.get, "never", takes_s=10)
    gevent.sleep(0.01)
    began = time.perf_counter()
    others = [gevent.spawn(rig.get, "second", takes_s=0.1) for _ in range(1000)]
    gevent.sleep(0.05)
    holder.kill()
    gevent.joinall(others, timeout=30)
    result.update(killed=len(rig.calls), second=sum(g.value[0] == "second" for g in others),
                  took=time.perf_counter() - began, idle=rig.is_idle())
    """)
    prove.figure(
        f"cold {found['cold']} load, holder killed {found['killed'] - 1} load, "
        f"all served after {found['took'] * 1000:.0f} ms"
    )
    assert found.pop("took") < 5
    assert found == {
        "cold": 1, "values": 1000, "copies": 1000, "killed": 2, "second": 1000, "idle": True,
    }  # fmt: skip


@pytest.mark.claim(CLAIM + " (greenlets)")
def test_soft_and_hard_limits_of_greenlets(prove):
    """A source of 2 s is answered in time by its stale value, and cut off by a hard limit."""
    unit = 0.1 if prove.full else 0.4
    code = """
    rig = Rig(in_background=gevent.spawn)
    options = dict(expire=0.1, stale_if_error=30, soft_timeout=0.05)
    rig.get("old", **options)
    gevent.sleep(0.11)
    asked = [gevent.spawn(timed, rig.get, "new", takes_s=2, **options) for _ in range(100)]
    gevent.joinall(asked, timeout=30)
    result = {"soft": max(g.value[1] for g in asked), "loads": len(rig.calls) - 1}
    result["outcomes"] = sorted({str(g.value[0].outcome) for g in asked})
    gevent.sleep(2)
    result["after"] = rig.get(None).value if rig.store.read("k") else None
    late, hard = timed(rig.get, "never", "hard", takes_s=2, hard_timeout=0.05)
    result.update(late=late, hard=hard)
    options = dict(expire=0.1, stale_if_error=30, hard_timeout=0.05)
    rig.get("old", "both", **options)
    gevent.sleep(0.11)
    stale, result["stale"] = timed(rig.get, "never", "both", takes_s=2, **options)
    result["outcome"] = str(stale.outcome)
    # a failing source
    unit = float(sys.argv[1])
    options = dict(expire=unit, stale_if_error=4 * unit, refresh_backoff=unit / 2)
    error = Mine("x")
    rig.get("old", "failing", **options)
    gevent.sleep(1.2 * unit)
    try:
        while True:
            result["oldest"] = rig.get(error, "failing", **options).age_s
            gevent.sleep(0.01)
    except Mine as raised:
        result["original"] = raised is error
    result["tries"] = rig.calls.count("failing")
    result["idle"] = rig.is_idle("k", "hard", "both", "failing")
    """
    found = patched(code, unit)
    prove.figure(
        f"soft {found['soft'] * 1000:.0f} ms the slowest of 100, {found['loads']} load; hard limit "
        f"of 50 ms {found['hard'] * 1000:.0f} ms; "
        f"stale up to {found['oldest']:.2f} of {5 * unit:.1f} s"
    )
    limit = 0.1 if prove.full else 1.5
    assert max(found["soft"], found["hard"], found["stale"]) < limit
    assert (found["loads"], found["outcomes"]) == (1, ["STALE"])
    assert found["after"] in ("new", None)  # it lasts 0.1 s
    assert (found["late"], found["outcome"]) == ("OperationTimeoutError", "STALE")
    assert (0.3 if prove.full else 0) < found["oldest"] <= 5 * unit
    assert found["original"]
    assert (3 if prove.full else 1) < found["tries"] < 12
    assert found["idle"]


def test_greenlets_within_loads():
    """A greenlet of a load may ask for its key, and loads that wait for each other do not stop."""
    found = patched("""
    rig = Rig()
    def outer():
        return spawn(lambda: list(rig.get("inner"))).get(timeout=5)
    result = {"inner": rig.get(outer).value[:2]}
    # three loads in a circle, each through a greenlet of its own
    ring = ["a", "b", "c"]
    def load(i):
        def fetch():
            gevent.sleep(0.02)
            nearest = lambda: rig.get("direct", ring[(i + 1) % 3]).value
            return ring[i] + spawn(nearest).get(timeout=5)
        return rig.get(fetch, ring[i])
    loads = [gevent.spawn(load, i) for i in range(3)]
    gevent.joinall(loads, timeout=10)
    result["ring"] = [g.value.value for g in loads]
    result["idle"] = rig.is_idle("k", *ring)
    """)
    assert found["inner"] == ["inner", "BYPASS"]
    assert all(value.endswith("direct") for value in found["ring"])
    assert any(value == key + "direct" for key, value in zip("abc", found["ring"], strict=True))
    assert found["idle"]


def test_deadlines_of_greenlets():
    """A waiter's ends his wait alone; a loader's makes another caller load."""
    found = patched("""
    def bounded(seconds, fn, *args, **options):
        with deadline(seconds):
            return fn(*args, **options).value
    rig = Rig()
    long = gevent.spawn(rig.get, "v", takes_s=2)
    gevent.sleep(0.01)
    short = gevent.spawn(timed, bounded, 0.05, rig.get, "v")
    other = gevent.spawn(rig.get, "v")
    gevent.joinall([long, short, other], timeout=10)
    result = {"waiter": short.value, "load": [long.value.value, other.value.value, len(rig.calls)]}
    rig = Rig()
    first = gevent.spawn(timed, bounded, 0.05, rig.get, "v", takes_s=10)
    gevent.sleep(0.01)
    others = [gevent.spawn(rig.get, "w", takes_s=0.05) for _ in range(10)]
    gevent.joinall([first, *others], timeout=10)
    result["loader"] = first.value
    result["others"] = [sum(g.value.value == "w" for g in others), len(rig.calls), rig.is_idle()]
    """)
    for who in ("waiter", "loader"):
        error, took = found[who]
        assert error == "OperationTimeoutError"
        assert 0.04 < took < 1.5
    assert found["load"] == ["v", "v", 1]
    assert found["others"] == [10, 2, True]


@pytest.mark.claim(
    "Greenlets killed at random moments in 2,000 rounds, callers and refreshes: nobody hangs, "
    "no load and no lease is left"
)
def test_random_kills_leave_nothing(prove):
    """Loads, refreshes and waits, over a store that switches, with errors and time-outs."""
    code = """
    rounds = int(sys.argv[1])
    rng = random.Random(7)
    class Switching(LocalStore):
        def read(self, key, /):
            gevent.sleep(0)
            return super().read(key)
        def lease(self, key, known, /, *, anyway=False):
            gevent.sleep(0)
            got = super().lease(key, known, anyway=anyway)
            try:
                gevent.sleep(0)
            except BaseException:
                if isinstance(got, Lease):
                    super().settle(got, None)
                raise
            return got
        def settle(self, lease, entry, /, *, backoff_s=0.0):
            gevent.sleep(0)
            is_kept = super().settle(lease, entry, backoff_s=backoff_s)
            gevent.sleep(0)
            return is_kept
    refreshes, ends = [], []
    def in_background(fn):
        # What ends a lease is beside its caller because he was killed; nobody kills it.
        is_refresh = fn.func.__name__ == "_load_beside"
        (refreshes if is_refresh else ends).append(gevent.spawn(fn))
    rigs = [Rig(store := Switching(1 << 20), in_background=in_background, max_refreshes=4)]
    rigs.append(Rig(store, in_background=in_background))
    keys = "abc"
    kinds = [
        dict(expire=0.001, stale_while_revalidate=0.002),
        dict(expire=0.001, stale_if_error=0.002, refresh_backoff=0.001),
        dict(expire=0.001, stale_if_error=0.002, soft_timeout=0.001),
        dict(expire=0.001, hard_timeout=0.003, negative_expire=0.0005),
    ]
    counts = {}
    def count(what):
        counts[what] = counts.get(what, 0) + 1
    def ask():
        key, options, rig = rng.choice(keys), rng.choice(kinds), rng.choice(rigs)
        what = rng.choice(["v", "v", "v", Mine("x"), NotFoundError("n")])
        takes_s = rng.choice([0, 0.0005, 0.002])
        if rig is rigs[0] and rng.random() < 0.3:
            other = rng.choice(keys)
            what = lambda: rig.get("v", other, takes_s=0.0005).value
        try:
            with deadline(rng.choice([0.002, 1, 1])):
                answer = rig.get(what, key, takes_s=takes_s, **options)
            count("ok" if answer.value == "v" else "wrong")
        except (Mine, NotFoundError, OperationTimeoutError) as error:
            count(type(error).__name__)
        except gevent.GreenletExit:
            count("killed")
            raise
    hung = 0
    for _ in range(rounds):
        batch = [gevent.spawn(ask) for _ in range(8)]
        gevent.sleep(rng.choice([0, 0.0002, 0.0005, 0.002]))
        victims = [g for g in batch + refreshes if rng.random() < 0.3]
        gevent.killall(victims, block=False)
        hung += len(batch) - len(gevent.joinall(batch, timeout=10))
        refreshes[:] = [g for g in refreshes if not g.dead]
    gevent.joinall(refreshes + ends, timeout=10)
    lost = sum(len(rig.loader._flights) for rig in rigs)
    gevent.sleep(1.1)  # a refresh that was killed before it began is lost for a second
    for rig in rigs:
        for key in keys:
            assert rig.get("v", key).value == "v"
    result = dict(counts=counts, hung=hung, lost=lost, loads=sum(len(r.calls) for r in rigs),
                  idle=[rig.is_idle(*keys) for rig in rigs],
                  beside=[len(rig.loader._flights._beside) for rig in rigs])
    """
    rounds = 2_000
    found = patched(code, rounds)
    prove.figure(f"{rounds} rounds of 8 callers, {found['loads']} loads: {found['counts']}")
    assert found["hung"] == 0
    assert (found["idle"], found["beside"]) == ([True, True], [0, 0])
    assert found["loads"] > 1000
    assert found["lost"] <= 3
    assert found["counts"].get("wrong", 0) == 0
    assert min(found["counts"][what] for what in ("ok", "killed", "Mine", "NotFoundError")) > 50
