"""Bulkhead and rate limit."""

import asyncio
import random
import threading
import time

import pytest
from waiting import until

from flask_muset.clock import Clock
from flask_muset.errors import OverloadedError, RateLimitError
from flask_muset.resilience import Bulkhead, RateLimit
from flask_muset.resilience import rate_limit as module
from flask_muset.testing import virtual_clock


@pytest.fixture
def clock():
    with virtual_clock() as clock:
        yield clock


def test_the_whole_limit_at_once_then_one_at_a_time(clock):
    """A burst of the whole limit passes; then one each period / limit."""
    limit = RateLimit(60, 60)
    hits = [limit.hit("a") for _ in range(61)]
    assert [hit.allowed for hit in hits] == [True] * 60 + [False]
    assert [hit.remaining for hit in hits] == [*range(59, -1, -1), 0]
    assert hits[-1].retry_after == 1
    assert limit.hit("b").allowed
    clock.advance(1)
    assert limit.hit("a").allowed
    assert not limit.hit("a").allowed


@pytest.mark.claim(
    "Waiting exactly Retry-After always succeeds, 10,000 random arrivals; "
    "the limit is never exceeded"
)
def test_waiting_exactly_retry_after_always_succeeds(clock, prove):
    """Random limits and arrivals: after exactly Retry-After a hit passes, and none too many did."""
    rng = random.Random(7)
    arrivals = refused = exceeded = too_early = 0
    while arrivals < 10_000:
        count, period = rng.randint(1, 150), rng.choice([0.7, 1, 60, 3600])
        limit = RateLimit(count, period)
        clock.now = rng.uniform(0, 10**6)
        passed = []
        for _ in range(200):
            arrivals += 1
            clock.advance(rng.expovariate(3 * count / period))
            hit = limit.hit("x")
            if not hit.allowed:
                refused += 1
                clock.advance(hit.retry_after)
                hit = limit.hit("x")
                too_early += not hit.allowed
            if hit.allowed:
                passed.append(clock.now)
        exceeded += sum(
            number > count * (1 + (last - first) / period) + 1e-6 * count
            for i, first in enumerate(passed)
            for number, last in enumerate(passed[i:], 1)
        )
    prove.figure(
        f"{arrivals} arrivals, {refused} refused, {too_early} refused again, {exceeded} exceeded"
    )
    assert refused > 1_000
    assert (too_early, exceeded) == (0, 0)


def test_header_seconds_are_enough(clock):
    """The whole seconds of the Retry-After header are not fewer than needed."""
    limit = RateLimit(7, 60)
    for _ in range(7):
        limit.hit()
    with pytest.raises(RateLimitError) as raised, limit:
        pass
    clock.advance(raised.value.retry_after)
    with limit:
        pass


def test_reset_after_is_when_the_whole_limit_is_back(clock):
    """After reset_after exactly the whole limit passes."""
    limit = RateLimit(5, 10)
    for _ in range(3):
        hit = limit.hit()
    clock.advance(hit.reset_after)
    assert [limit.hit().allowed for _ in range(6)] == [True] * 5 + [False]


def test_keys_are_bounded(clock, monkeypatch):
    """The least recently hit key is forgotten, and a long one is kept as a digest."""
    monkeypatch.setattr(module, "_MAX_KEYS", 100)
    limit = RateLimit(2, 60)
    assert [limit.hit("greedy").allowed for _ in range(3)] == [True, True, False]
    for n in range(90):
        limit.hit(f"{n}" * 2_000)
    assert not limit.hit("greedy").allowed
    for n in range(1_000):
        limit.hit(f"later {n}")
    assert len(limit._free_at) == 100
    assert max(map(len, limit._free_at)) <= 64
    long = "x" * 5_000
    assert [limit.hit(long).allowed for _ in range(3)] == [True, True, False]


def test_limit_is_exact_under_threads():
    """8 threads hit at one moment: exactly the limit passes."""
    limit = RateLimit(500, 3600, clock=Clock(now_ns=lambda: 10**18))
    passed = []

    def work():
        passed.extend(limit.hit("x").allowed for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(passed) == 500


def test_a_limits_own_refusal_is_one():
    """Its error is a refusal by this process, so that no retry of ours repeats it."""
    limit = RateLimit(1, 60)
    limit.call(lambda: 1)
    with pytest.raises(RateLimitError) as raised:
        limit.call(lambda: 1)
    assert raised.value.refusal
    assert 59 < raised.value.retry_after_s <= 60


# --- Bulkhead ---


def in_thread(fn):
    """Run it beside the test; returns the thread and where its result will be."""
    results = []

    def run():
        try:
            results.append(fn())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_one_too_many_is_refused_at_once():
    """Without max_wait nobody waits."""
    bulkhead = Bulkhead(2)
    with bulkhead, bulkhead:
        assert bulkhead.in_use == 2
        with pytest.raises(OverloadedError):
            bulkhead.call(lambda: 1)
    assert bulkhead.call(lambda: 1) == 1
    assert bulkhead.in_use == 0


def test_permits_go_to_whoever_waits_longest():
    """Those in line are served in the order in which they came."""
    bulkhead = Bulkhead(1, max_wait=10)
    order, waiting = [], []
    with bulkhead:
        for n in range(3):
            waiting.append(in_thread(lambda n=n: bulkhead.call(order.append, n))[0])
            until(lambda n=n: bulkhead.waiting == n + 1)
    for thread in waiting:
        thread.join()
    assert order == [0, 1, 2]
    assert (bulkhead.in_use, bulkhead.waiting) == (0, 0)


def test_a_wait_ends():
    """After max_wait the call is refused and leaves the line."""
    bulkhead = Bulkhead(1, max_wait=0.02)
    with bulkhead:
        thread, results = in_thread(lambda: bulkhead.call(lambda: 1))
        thread.join()
    assert isinstance(results[0], OverloadedError)
    assert (bulkhead.in_use, bulkhead.waiting) == (0, 0)


def test_no_permit_is_lost_under_threads():
    """Short waits and many callers: every permit is back at the end, and never too many are out."""
    bulkhead = Bulkhead(3, max_wait=0.001)
    out, most = [], []

    def call():
        out.append(1)
        most.append(len(out))
        time.sleep(0.0005)
        out.pop()

    def work():
        for _ in range(100):
            try:
                bulkhead.call(call)
            except OverloadedError:
                continue

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 3
    assert (bulkhead.in_use, bulkhead.waiting) == (0, 0)


def test_under_asyncio():
    """Tasks wait in line without stopping the loop; cancelled ones give up their place."""
    bulkhead = Bulkhead(1, max_wait=10)
    order = []

    @bulkhead
    async def work(n):
        order.append(n)
        await asyncio.sleep(0.01)

    async def main():
        first, second, third = (asyncio.create_task(work(n)) for n in range(3))
        await asyncio.sleep(0.001)
        second.cancel()
        await asyncio.gather(first, third)
        assert second.cancelled()

    asyncio.run(main())
    assert order == [0, 2]
    assert (bulkhead.in_use, bulkhead.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Bulkhead(0), "Bulkhead: limit must be a whole number of at least 1, got 0"),
        (lambda: Bulkhead(1, -1), "Bulkhead: max_wait must be at least 0, got -1"),
        (lambda: RateLimit(0, 60), "RateLimit: limit must be a whole number of at least 1, got 0"),
        (lambda: RateLimit(1, 0), "RateLimit: period must be above 0, got 0"),
    ],
)
def test_bad_arguments_are_named(make, text):
    """The text names part, argument and value."""
    with pytest.raises(ValueError, match=text):
        make()
