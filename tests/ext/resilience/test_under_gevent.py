"""The traps of gevent, in processes that it has patched; one test for each."""

import pytest
from patched import run_patched


@pytest.mark.claim(
    "50 callers at the half-open moment: exactly the permitted probes; 20 greenlets of 50 ms "
    "through one breaker take 50 ms, not 1 s"
)
def test_callers_at_the_half_open_moment(prove):
    """The breaker's lock covers counters only, and only the permitted probes are let through."""
    code = """
    import sys, time
    from gevent.event import Event
    from flask_muset.errors import CircuitOpenError
    from flask_muset.resilience import CircuitBreaker
    probes = {}
    for permitted in (1, 5):
        breaker = CircuitBreaker(
            "x", failure_threshold=1, recovery_timeout=0.05, half_open_calls=permitted)
        try:
            breaker.call(lambda: 1 / 0)
        except ZeroDivisionError:
            pass
        gevent.sleep(0.06)
        seen, refused, all_have_called = [], [], Event()
        def work():
            seen.append(1)
            all_have_called.wait()
        def call():
            try:
                breaker.call(work)
            except CircuitOpenError:
                refused.append(1)
        callers = [gevent.spawn(call) for _ in range(50)]
        while len(seen) + len(refused) < 50:
            gevent.sleep(0.001)
        all_have_called.set()
        gevent.joinall(callers)
        probes[permitted] = [len(seen), len(refused), str(breaker.state)]
    breaker, seconds = CircuitBreaker("y", failure_rate=0.5), float(sys.argv[1])
    began = time.monotonic()
    gevent.joinall([gevent.spawn(breaker.call, gevent.sleep, seconds) for _ in range(20)])
    result = {"probes": probes, "took": time.monotonic() - began}
    """
    found = run_patched(code, 0.05 if prove.full else 0.5)
    prove.figure(
        f"{found['probes']['1'][0]} of 1 and {found['probes']['5'][0]} of 5 probes, "
        f"20 greenlets in {found['took'] * 1000:.0f} ms"
    )
    assert found["probes"] == {"1": [1, 49, "closed"], "5": [5, 45, "closed"]}
    assert found["took"] < (0.1 if prove.full else 5)


@pytest.mark.claim(
    "Our own time-out counts as a failure and is retried; a foreign gevent.Timeout passes "
    "untouched and releases every permit (10,000 random cancellations, no permit lost)"
)
def test_foreign_timeouts_pass_and_release(prove):
    """Random foreign time-outs, kills and deadlines cut calls off everywhere; no permit is lost."""
    code = """
    import random, sys
    from flask_muset.deadline import deadline
    from flask_muset.errors import *
    from flask_muset.resilience import *
    total = int(sys.argv[1])
    class Foreign(gevent.Timeout): pass
    rng = random.Random(3)
    bulkhead = Bulkhead(5, max_wait=0.02)
    breaker = CircuitBreaker("x", failure_threshold=10**9, half_open_calls=3)
    policy = Policy("p", [RetryStrategy(2, 0.001, 0.002), breaker, bulkhead, Timeout(0.004)])
    counts = dict(done=0, foreign=0, killed=0, ours=0, full=0, wrong=0)
    def work(seconds):
        gevent.sleep(seconds)
        return "done"
    def call():
        foreign = Foreign(rng.uniform(0, 0.012))
        foreign.start()
        try:
            with deadline(rng.uniform(0.001, 0.02)):
                value = policy.call(work, rng.uniform(0, 0.006))
            counts["done" if value == "done" else "wrong"] += 1
        except Foreign as seen:
            counts["foreign" if seen is foreign else "wrong"] += 1
        except gevent.GreenletExit:
            counts["killed"] += 1
        except OperationTimeoutError:
            counts["ours"] += 1
        except OverloadedError:
            counts["full"] += 1
        finally:
            foreign.close()
    left = total
    while left > 0:
        batch = [gevent.spawn(call) for _ in range(min(50, left))]
        left -= len(batch)
        gevent.sleep(rng.uniform(0, 0.004))
        gevent.killall([g for g in batch if rng.random() < 0.2])
        gevent.joinall(batch)
    # at the half-open moment too: a probe that is cut off gives its place back
    breaker.force_open(0.001)
    gevent.sleep(0.002)
    assert breaker.state == "closed"
    one = CircuitBreaker("one", failure_threshold=1, recovery_timeout=0.01)
    def fail(): raise NetworkError
    def cut():
        with Foreign(0.001):
            one.call(gevent.sleep, 1)
    try: one.call(fail)
    except NetworkError: pass
    gevent.sleep(0.011)
    for _ in range(3):
        try: cut()
        except Foreign: pass
    after = one.call(lambda: "probe")
    # our own time-out is a failure, and is tried again
    calls = []
    def slow():
        calls.append(1)
        gevent.sleep(1)
    own = CircuitBreaker("own")
    try: Policy("q", [RetryStrategy(2, 0.0), own, Timeout(0.05)]).call(slow)
    except OperationTimeoutError: pass
    hub = gevent.get_hub()._flask_muset_timers
    result = dict(counts=counts, in_use=bulkhead.in_use, waiting=bulkhead.waiting, after=after,
                  own=own.snapshot()["failures"], calls=len(calls), running=hub._running)
    """
    total = 10_000 if prove.full else 1_500
    found = run_patched(code, total)
    counts = found["counts"]
    prove.figure(
        f"{sum(counts.values())} calls: {counts}; {found['in_use']} permits lost; "
        f"own time-outs: {found['own']} failures in {found['calls']} attempts"
    )
    assert sum(counts.values()) >= 0.8 * total  # a greenlet that is killed unstarted is not counted
    assert counts["wrong"] == 0
    assert min(counts["foreign"], counts["killed"], counts["ours"]) > 0
    assert (found["in_use"], found["waiting"], found["running"]) == (0, 0, 0)
    assert found["after"] == "probe"
    assert (found["own"], found["calls"]) == (3, 3)


def test_a_foreign_timeout_is_known_by_identity():
    """A caller's Timeout around ours, and False as its exception, are not mistaken for ours."""
    code = """
    from flask_muset.deadline import deadline
    from flask_muset.errors import OperationTimeoutError
    result = []
    with gevent.Timeout(0.01, False):
        with deadline(5):
            gevent.sleep(1)
            result.append("not cut")
    result.append("silenced")
    outer = gevent.Timeout(0.5)
    outer.start()
    try:
        try:
            with deadline(0.01):
                gevent.sleep(1)
        except OperationTimeoutError:
            result.append("ours")
        gevent.sleep(5)
    except gevent.Timeout as seen:
        result.append(seen is outer)
    """
    assert run_patched(code) == ["silenced", "ours", True]


def test_work_that_computes_is_counted_not_cut():
    """A deadline cannot cut a busy loop; it is told as an overrun when it ends."""
    code = """
    import time
    from flask_muset.resilience import Timeout
    from flask_muset.signals import policy_decided
    seen = []
    def listen(_sender, event): seen.append(event.decision.value)
    policy_decided.connect(listen)
    def compute():
        end = time.monotonic() + 0.2
        while time.monotonic() < end: pass
        return "computed"
    result = [Timeout(0.05).call(compute), seen]
    """
    assert run_patched(code) == ["computed", ["overrun"]]


def test_no_signal_hits_an_innocent():
    """The greenlet whose time is up is cut off, whichever one runs just then."""
    code = """
    import time
    from flask_muset.errors import OperationTimeoutError
    from flask_muset.resilience import Timeout
    def victim():
        try:
            Timeout(0.03).call(gevent.sleep, 5)
        except OperationTimeoutError:
            return "cut"
    def innocent():
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            gevent.sleep(0)
        return "whole"
    pair = [gevent.spawn(victim), gevent.spawn(innocent)]
    gevent.joinall(pair)
    result = [g.value for g in pair]
    """
    assert run_patched(code) == ["cut", "whole"]


def test_blocks_made_before_patching():
    """Breaker, bulkhead and limit that were made before gevent patched work after it."""
    import json
    import subprocess
    import sys

    code = """
import json
from flask_muset.resilience import *
bulkhead, breaker, limit = Bulkhead(2, max_wait=20), CircuitBreaker("x"), RateLimit(100, 60)
policy = Policy("p", [breaker, limit, bulkhead, Timeout(20)])
from gevent import monkey; monkey.patch_all()
import gevent
most, now = [], []
def work():
    now.append(1); most.append(len(now)); gevent.sleep(0.01); now.pop()
greenlets = [gevent.spawn(policy.call, work) for _ in range(20)]
gevent.joinall(greenlets, timeout=60, raise_error=True)
print(json.dumps([max(most), bulkhead.in_use, sum(g.successful() for g in greenlets)]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [2, 0, 20]


def test_who_waits_in_line_until_the_deadline_is_no_failure():
    """A full bulkhead says that it is full before the time is up, which no breaker counts."""
    code = """
    from flask_muset.deadline import deadline
    from flask_muset.errors import *
    from flask_muset.resilience import *
    breaker, bulkhead = CircuitBreaker("x", failure_threshold=1), Bulkhead(1, max_wait=60)
    policy = Policy("p", [breaker, bulkhead])
    def call():
        try:
            with deadline(0.2): policy.call(gevent.sleep, 0)
        except MusetError as error:
            return type(error).__name__
    told, stand_still = [], monkey.get_original("time", "sleep")
    with bulkhead:
        for stands_still_s in (0, 0.5):
            waiting = [gevent.spawn(call) for _ in range(10)]
            gevent.sleep(0.05)
            stand_still(stands_still_s)
            gevent.joinall(waiting)
            told.append({w.value for w in waiting})
    are_known = told[0] | told[1] <= {"OverloadedError", "OperationTimeoutError"}
    is_told = "OverloadedError" in told[0]
    result = [is_told, are_known, breaker.snapshot()["calls"], policy.call(int)]
    """
    assert run_patched(code) == [True, True, 0, 0]


def test_a_breaker_used_before_a_fork_works_after_it():
    """The child counts and opens for itself; the parent's state is its own."""
    code = """
    import os
    from flask_muset.deadline import deadline
    from flask_muset.errors import *
    from flask_muset.resilience import *
    breaker = CircuitBreaker("x", failure_threshold=2)
    policy = Policy("p", [breaker, Bulkhead(1), Timeout(5)])
    policy.call(lambda: 1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for _ in range(2):
                try: policy.call(lambda: 1 / 0)
                except ZeroDivisionError: pass
            try: policy.call(lambda: 1)
            except CircuitOpenError: code = 0
            try:
                with deadline(0.05): gevent.sleep(5)
            except OperationTimeoutError: pass
            else: code = 2
        finally:
            os._exit(code)
    result = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), str(breaker.state)]
    """
    assert run_patched(code) == [0, "closed"]


def test_spawned_greenlets_carry_deadline_and_context():
    """context.spawn hands on context variables and deadline; plain gevent.spawn does not."""
    code = """
    from contextvars import ContextVar
    from flask_muset import context
    from flask_muset.deadline import deadline
    from flask_muset.errors import OperationTimeoutError
    field = ContextVar("field", default=None)
    field.set("kept")
    def look():
        left = deadline.remaining()
        try:
            gevent.sleep(30)
        except BaseException as error:
            return [field.get(), left is not None, type(error).__name__]
    def plain():
        return [field.get(), deadline.remaining()]
    with deadline(0.5):
        other = gevent.spawn(plain)
        child = context.spawn(look)
        other.join()
        try: child.join()
        except BaseException as error: pass
    child.join(20)
    result = [other.value, child.value]
    """
    plain, carried = run_patched(code.replace("child.join()", "gevent.sleep(0)"))
    assert plain == [None, None]
    assert carried == ["kept", True, "Expired"]


def test_asyncio_is_refused_with_the_cure():
    """In a patched process awaited forms raise one clear error instead of mixing up loops."""
    code = """
    import asyncio
    from flask_muset import aio
    from flask_muset.resilience import Timeout, retry, retry_async
    async def work(): return 1
    result = []
    recovery = aio.ErrorRecovery().recover_from_error(KeyError(), [])
    for make in (retry_async(work), retry(work)(), recovery):
        try:
            make.send(None)
        except RuntimeError as error:
            result.append("plain function" in str(error))
        make.close()
    """
    assert run_patched(code) == [True, True, True]


def test_concurrent_calls_have_waits_of_their_own():
    """Three greenlets through one strategy each wait 1, 2, 4: no iterator is shared."""
    code = """
    from flask_muset.clock import Clock
    from flask_muset.errors import NetworkError
    from flask_muset.resilience import RetryStrategy
    waits = {}
    def sleep(seconds):
        waits.setdefault(gevent.getcurrent(), []).append(seconds)
        gevent.sleep(0)
    strategy = RetryStrategy(3, 1.0, jitter=False, clock=Clock(sleep=sleep))
    def fail(): raise NetworkError
    def call():
        try: strategy.call(fail)
        except NetworkError: pass
    gevent.joinall([gevent.spawn(call) for _ in range(3)])
    result = list(waits.values())
    """
    assert run_patched(code) == [[1.0, 2.0, 4.0]] * 3


def test_one_request_does_not_inherit_anothers_deadline():
    """A greenlet that serves many requests, as a kept connection does, starts each without one."""
    code = """
    from flask_muset.deadline import deadline
    from flask_muset.errors import OperationTimeoutError
    result = []
    for _ in range(3):
        result.append(deadline.remaining())
        try:
            with deadline(0.01): gevent.sleep(1)
        except OperationTimeoutError: pass
    """
    assert run_patched(code) == [None] * 3


def test_many_deadlines_leave_nothing_behind():
    """10,000 deadlines that end early keep the heap small, and none fires late."""
    code = """
    import time
    from flask_muset.deadline import deadline
    for _ in range(10_000):
        with deadline(30): pass
    timers = gevent.get_hub()._flask_muset_timers
    began = time.monotonic()
    gevent.get_hub().join(timeout=5)  # the loop does not live on for a timer that nobody needs
    result = [len(timers._heap) < 200, timers._running, time.monotonic() - began < 4]
    """
    assert run_patched(code) == [True, 0, True]


def test_native_threads_and_greenlets_share_a_breaker():
    """gevent's own native threads and greenlets count into one breaker; nobody starves."""
    code = """
    from flask_muset.resilience import CircuitBreaker, RateLimit
    breaker = CircuitBreaker("x", failure_threshold=10**6, window_calls=10_000)
    limit = RateLimit(1_000, 3600)
    passed = []
    def fail(): raise OSError
    def work():
        for n in range(200):
            try: breaker.call(fail)
            except OSError: pass
            if limit.hit("x").allowed: passed.append(1)
    threads = [gevent.get_hub().threadpool.spawn(work) for _ in range(4)]
    greenlets = [gevent.spawn(work) for _ in range(4)]
    for task in threads: task.get(timeout=20)
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    result = [breaker.snapshot()["failures"], breaker._streak, len(passed)]
    """
    assert run_patched(code) == [1_600, 1_600, 1_000]
