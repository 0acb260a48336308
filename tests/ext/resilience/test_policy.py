"""Several parts under one name."""

import asyncio
import itertools
import threading

import pytest

from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import (
    CircuitOpenError,
    NetworkError,
    NotFoundError,
    OperationTimeoutError,
    OverloadedError,
)
from flask_muset.resilience import (
    Bulkhead,
    CircuitBreaker,
    Fallback,
    Policy,
    RateLimit,
    RetryStrategy,
    Timeout,
)
from flask_muset.signals import breaker_changed, policy_decided
from flask_muset.testing import faults, virtual_clock


@pytest.fixture
def clock():
    with virtual_clock() as clock:
        yield clock


def parts():
    return [
        Fallback("fallback"),
        RetryStrategy(3, 1.0, jitter=False),
        CircuitBreaker("x"),
        RateLimit(100, 60),
        Bulkhead(10),
        Timeout(5),
    ]


def test_right_orders_are_taken():
    """Every selection in the fixed order is right, and a time-out may stand outermost as well."""
    made = parts()
    for size in range(1, 7):
        for selection in itertools.combinations(made, size):
            Policy("x", selection)
            if size > 1:
                Policy("x", [Timeout(9), *(p for p in selection if not isinstance(p, Timeout))])


def test_wrong_orders_are_refused_with_the_reason():
    """Two parts in the wrong order, and two of one kind, are refused; the text says why."""
    made = parts()
    for outer, inner in itertools.combinations(range(6), 2):
        if outer == 5 or inner == 5:
            continue
        with pytest.raises(ValueError, match="policy 'shop'") as raised:
            Policy("shop", [made[inner], made[outer]])
        first, second = type(made[outer]).__name__, type(made[inner]).__name__
        assert f"{first} must stand before {second}: " in str(raised.value)
    with pytest.raises(ValueError, match="more than one Bulkhead"):
        Policy("shop", [Bulkhead(1), Bulkhead(2)])
    with pytest.raises(ValueError, match="is no part"):
        Policy("shop", [3])
    with pytest.raises(ValueError, match="name"):
        Policy("", [Bulkhead(1)])
    with pytest.raises(ValueError, match="Fallback must stand before Timeout"):
        Policy("shop", [Bulkhead(1), Timeout(1), Fallback(1)])


def test_all_parts_together(clock):
    """A time-out and an error are retried, the third attempt gives the result."""
    policy = Policy("x", parts())
    with faults(policy, {1: 9.0, 2: NetworkError()}) as seen:
        assert policy.call(lambda x: x * 2, 21) == 42
    assert seen.calls == 3
    assert clock.now == 1_000 + 5 + 1 + 2
    assert policy.breaker.snapshot()["failures"] == 2


def test_fallback_answers_for_what_is_left(clock):
    """When the retries are used up the fallback gives the result."""
    policy = Policy("x", parts())
    with faults(policy, dict.fromkeys(range(1, 5), NetworkError())):
        assert policy.call(lambda: "never") == "fallback"


def test_an_open_circuit_goes_straight_to_the_fallback(clock):
    """A refusal is not retried: the fallback answers without a wait."""
    policy = Policy("x", parts())
    policy.breaker.force_open()
    assert policy.call(lambda: "never") == "fallback"
    assert clock.now == 1_000


def test_fallback_forms(clock):
    """A value, a function without and one with the exception; other exceptions pass."""
    error = NotFoundError("x")

    def fail():
        raise error

    assert Fallback([1]).call(fail) == [1]
    assert Fallback(lambda: "made").call(fail) == "made"
    assert Fallback(lambda e: e).call(fail) is error
    assert Fallback(lambda e=None: e).call(fail) is None  # it asks for none
    with pytest.raises(NotFoundError):
        Fallback(1, on=KeyError).call(fail)
    with pytest.raises(KeyboardInterrupt):
        Fallback(1).call(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert Fallback(list).call(fail) == []
    assert Fallback(dict).call(fail) == {}
    assert list(Fallback([1, 2])(_failing_items)()) == [1, 2]
    with pytest.raises(ValueError, match="classes of Exception"):
        Fallback(1, on=BaseException)


def _failing_items():
    raise NotFoundError
    yield 0


def test_timeout_is_a_failure_and_is_retried(clock):
    """Our own time-out is an error like any other: counted by the breaker, tried again."""
    policy = Policy("x", [RetryStrategy(2, 0.0), CircuitBreaker("x"), Timeout(1)])
    calls = []

    def slow():
        calls.append(clock.now)
        clock.sleep(3)

    with pytest.raises(OperationTimeoutError):
        policy.call(slow)
    assert calls == [1_000, 1_001, 1_002]
    assert policy.breaker.snapshot()["failures"] == 3


@pytest.mark.claim(
    "A deadline of 2 s over retries and nested calls ends at 2.0 s within 0.1 s; "
    "nothing is retried twice by nested layers"
)
def test_one_deadline_over_everything(prove):
    """Real time under gevent: attempts of 0.3 s that fail, nested, end when the deadline does."""
    from patched import run_patched

    code = """
    import time
    from flask_muset.deadline import deadline
    from flask_muset.errors import NetworkError, OperationTimeoutError
    from flask_muset.resilience import *
    ends, calls = [], []
    inner = Policy("inner", [RetryStrategy(50, 0.05, 0.05), Timeout(0.7)])
    breaker = CircuitBreaker("x", failure_threshold=99)
    outer = Policy("outer", [RetryStrategy(50, 0.01, 0.01), breaker])
    def work():
        calls.append(1)
        if len(calls) < 4:
            gevent.sleep(0.3)
            raise NetworkError
        gevent.sleep(60)
    def nested():
        return inner.call(work)
    for attempt in range(3):
        del calls[:]
        began = time.monotonic()
        try:
            with deadline(2.0):
                outer.call(nested)
        except OperationTimeoutError:
            ends.append(time.monotonic() - began)
    flat = []
    def failing():
        flat.append(1)
        raise NetworkError
    once = retry(max_retries=2)(retry(max_retries=2)(retry(max_retries=2)(failing)))
    strategy = RetryStrategy(2, 0.0)
    try:
        retry_call(lambda: retry_call(strategy.call, failing, strategy=strategy), strategy=strategy)
    except NetworkError:
        pass
    result = {"ends": ends, "calls": len(flat)}
    """
    found = run_patched(code)
    ends = ", ".join(f"{end:.3f}" for end in found["ends"])
    prove.figure(
        f"ended at {ends} s; three nested layers of three attempts: {found['calls']} calls"
    )
    assert len(found["ends"]) == 3
    assert all(1.9 <= end <= 2.1 for end in found["ends"]) or not prove.full
    assert found["calls"] == 3


def test_with_blocks(clock):
    """Parts that do not repeat guard a block; those that do say why they cannot."""
    policy = Policy("x", [CircuitBreaker("x", failure_threshold=1), Bulkhead(1), Timeout(1)])
    with policy:
        assert deadline.remaining() == 1
        with pytest.raises(OverloadedError), policy:
            pass
    with pytest.raises(OperationTimeoutError), policy:
        clock.sleep(2)
    with pytest.raises(CircuitOpenError), policy:
        pass
    assert policy.parts[1].in_use == 0
    assert deadline.remaining() is None
    with pytest.raises(TypeError, match="RetryStrategy cannot guard a `with` block"):
        Policy("y", [RetryStrategy(), Bulkhead(1)]).__enter__()


def test_outcome(clock):
    """What happened, in figures: attempts, waits, the part that decided, and why it ended."""
    policy = Policy("x", parts()[1:])
    with faults(policy, {1: NetworkError()}):
        fine = policy.outcome(lambda: 7)
    assert (fine.result(), fine.attempts, fine.waits) == (7, 2, [1.0])
    assert (fine.decided_by, fine.stop_reason) == (None, "succeeded")

    bad = policy.outcome(lambda: 1 / 0)
    assert (bad.attempts, bad.decided_by, bad.stop_reason) == (1, "retry", "not_retryable")
    with pytest.raises(ZeroDivisionError):
        bad.result()

    policy.breaker.force_open()
    refused = policy.outcome(lambda: 7)
    assert isinstance(refused.error, CircuitOpenError)
    assert (refused.attempts, refused.decided_by) == (0, "circuit_breaker")
    assert Policy("y", [CircuitBreaker("z")]).outcome(lambda: 1 / 0).stop_reason == "failed"


def test_outcome_is_of_the_policys_own_parts(clock):
    """What another policy decides inside of the function is not noted; max_elapsed is."""
    inner = Policy("inner", [Fallback(1)])
    outer = Policy("outer", [RetryStrategy(1, max_elapsed=2)])
    assert outer.outcome(inner.call, lambda: 1 / 0).stop_reason == "succeeded"
    late = outer.outcome(clock.sleep, 3)
    assert (late.decided_by, late.stop_reason) == ("timeout", "timed_out")

    async def awaited():
        raise NetworkError

    found = asyncio.run(Policy("x", [RetryStrategy(2, 0.0)]).outcome(awaited))
    assert (found.attempts, found.stop_reason) == (3, "retries_exhausted")
    with pytest.raises(TypeError, match="generator"):
        outer.outcome(_failing_items)


def test_outcome_names_who_refused(clock):
    """Each refusing part is named; the fallback too."""
    breaker = CircuitBreaker("x")
    breaker.force_open()
    full = Bulkhead(1)
    full.enter()
    over = RateLimit(1, 60)
    over.hit()
    for part in (breaker, full, over):
        outcome = Policy("y", [part]).outcome(lambda: 7)
        assert (outcome.decided_by, outcome.stop_reason) == (part.kind, "rejected")
        assert outcome.attempts == 0
    outcome = Policy("y", [Fallback(3), breaker]).outcome(lambda: 7)
    assert (outcome.value, outcome.decided_by, outcome.stop_reason) == (3, "fallback", "fell_back")
    outcome = Policy("y", [Timeout(1)]).outcome(clock.sleep, 2)
    assert (outcome.decided_by, outcome.stop_reason) == ("timeout", "timed_out")


def test_events_bear_the_policys_name(clock):
    """Each decision is one event with bounded labels."""
    seen = []

    def listen(_sender, event):
        seen.append((event.policy, event.part, event.decision.value))

    policy = Policy(
        "shop", [Fallback(0), RetryStrategy(1, 0.0), CircuitBreaker("shop"), Timeout(1)]
    )
    with policy_decided.connected_to(listen), faults(policy, {1: 2.0, 2: NetworkError()}):
        assert policy.call(lambda: 1) == 0
    assert seen == [
        ("shop", "timeout", "timed_out"),
        ("shop", "retry", "retried"),
        ("shop", "retry", "retries_exhausted"),
        ("shop", "fallback", "fell_back"),
    ]


def test_coroutine_functions(clock):
    """The same policy guards awaited calls, an awaitable fallback too."""
    policy = Policy("x", parts())

    @policy
    async def work(x):
        return x + 1

    async def other():
        return "other"

    with faults(policy, {1: NetworkError(), 2: 9.0}) as seen:
        assert asyncio.run(work(1)) == 2
    assert seen.calls == 3
    assert asyncio.run(policy.call(work.__wrapped__, 2)) == 3
    policy = Policy("x", [Fallback(other), CircuitBreaker("x")])
    policy.breaker.force_open()
    assert asyncio.run(policy.call(work.__wrapped__, 2)) == "other"


def test_real_asyncio_timeout():
    """asyncio's own time-out cuts a task off, and inner cancellations pass untouched."""

    @Timeout(0.05)
    async def slow():
        await asyncio.sleep(10)

    @Timeout(5)
    async def cancelled():
        raise asyncio.CancelledError

    @Timeout(5)
    async def own():
        raise TimeoutError("the library's own")

    with pytest.raises(OperationTimeoutError):
        asyncio.run(slow())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    with pytest.raises(TimeoutError, match="the library's own"):
        asyncio.run(own())


def test_deadline_under_asyncio():
    """`async with deadline` cuts off, and a plain one shortens the time-outs inside of it."""

    async def cut():
        async with deadline(0.02):
            assert deadline.remaining() <= 0.02
            await asyncio.sleep(10)

    async def shortened():
        with deadline(0.02):
            await Timeout(30).call(asyncio.sleep, 10)

    for work in (cut, shortened):
        began = asyncio.run(_time_of(work))
        assert began < 5


async def _time_of(work):
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(OperationTimeoutError):
        await work()
    return loop.time() - began


def test_generators(clock):
    """A generator is guarded until its first item: retried before it, never after."""
    policy = Policy("x", [RetryStrategy(3, 0.0), CircuitBreaker("x"), Timeout(1)])
    runs = []

    @policy
    def items():
        runs.append(1)
        if len(runs) < 3:
            clock.sleep(2)
        yield 1
        clock.sleep(100)  # the time-out is over with the first item
        yield 2

    assert list(items()) == [1, 2]
    assert len(runs) == 3
    assert list(policy.call(lambda: iter(()))) == []


def test_virtual_overrun_is_told(clock):
    """Work that could not be cut off is counted, and its result is given."""
    seen = []

    def listen(_sender, event):
        seen.append(event.decision.value)

    with policy_decided.connected_to(listen):
        assert Timeout(1).call(lambda: clock.advance(3)) is None
    assert seen == ["overrun"]


def test_a_cut_that_is_swallowed_is_told(clock):
    """Work that catches everything and returns too late is an overrun."""
    seen = []

    def swallow():
        try:
            clock.sleep(2)
        except BaseException:
            clock.advance(1)
            return "late"

    def listen(_sender, event):
        seen.append(event.decision.value)

    with policy_decided.connected_to(listen):
        assert Timeout(1).call(swallow) == "late"
    assert seen == ["overrun"]


def test_scripted_faults_refuse_nonsense():
    """A script that cannot be meant is refused with its value."""
    policy = Policy("x", [Timeout(1)])
    with pytest.raises(ValueError, match="number 1, got 0"), faults(policy, {0: 1.0}):
        pass
    with pytest.raises(ValueError, match="got 'x'"), faults(policy, {1: "x"}):
        pass
    assert policy.call(lambda: 3) == 3


def test_virtual_clock_is_put_back():
    """The system's clock is there again after the block, also after an exception."""
    before = SYSTEM.now, SYSTEM.sleep
    with pytest.raises(KeyError), virtual_clock():
        raise KeyError
    assert (SYSTEM.now, SYSTEM.sleep) == before
    assert not SYSTEM.is_virtual


def test_seed_repeats():
    """The same seed draws the same waits."""
    ends = []
    for _ in range(2):
        with virtual_clock(seed=5) as clock:
            policy = Policy("x", [RetryStrategy(3)])
            with faults(policy, {1: NetworkError(), 2: NetworkError()}):
                policy.call(lambda: 1)
            ends.append(clock.now)
    assert ends[0] == ends[1] != 1_000


# --- Found in review ---


def test_with_blocks_in_generators_keep_to_themselves():
    """Blocks that do not end in the order in which they began give back what is their own."""
    first, second = Bulkhead(1), Bulkhead(1)

    def hold(bulkhead):
        with bulkhead:
            yield

    a, b = hold(first), hold(second)
    next(a)
    next(b)
    a.close()
    assert (first.in_use, second.in_use) == (0, 1)
    b.close()
    assert second.in_use == 0
    c = hold(first)
    next(c)
    thread = threading.Thread(target=c.close)
    thread.start()
    thread.join()
    assert first.in_use == 0


def test_an_outer_deadline_that_has_ended_does_not_hold(clock):
    """A block that ends after the one around it leaves no dead deadline behind."""

    def stream():
        with deadline(5):
            yield
        yield

    with deadline(9):
        items = stream()
        next(items)
    next(items)
    clock.advance(100)
    assert deadline.remaining() is None
    deadline.check()
    with pytest.raises(OperationTimeoutError), deadline(1):
        clock.sleep(2)


def test_a_deadline_used_twice_begins_anew(clock):
    """What cut off the first use says nothing about the second."""
    block = deadline(1)
    with pytest.raises(OperationTimeoutError), block:
        clock.sleep(2)
    with pytest.raises(KeyError), block:
        raise KeyError


def test_a_listener_that_raises_changes_nothing(clock, caplog):
    """A broken listener is logged; permits, probes and results are as without it."""

    def broken(_sender, event):
        raise ZeroDivisionError

    bulkhead = Bulkhead(1)
    policy = Policy("x", [CircuitBreaker("x", failure_threshold=1), bulkhead, Timeout(1)])
    with policy_decided.connected_to(broken), breaker_changed.connected_to(broken):
        with pytest.raises(OperationTimeoutError), policy:
            clock.sleep(2)
        clock.advance(60)
        assert policy.call(lambda: 1) == 1
    assert (bulkhead.in_use, policy.breaker.state) == (0, "closed")
    assert "a listener of the signal 'policy-decided' failed" in caplog.text


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1])
def test_times_are_finite(seconds):
    """No end is said by leaving the deadline out."""
    with pytest.raises(ValueError, match="finite"):
        deadline(seconds)
    with pytest.raises(ValueError, match="seconds"):
        Timeout(seconds)


def test_a_task_outlives_the_retry_that_began_it(clock):
    """Work that began inside of a retry has retries of its own once that has ended."""
    calls = []

    async def fail():
        calls.append(1)
        raise NetworkError

    async def main():
        go = asyncio.Event()

        async def later():
            await go.wait()
            with pytest.raises(NetworkError):
                await RetryStrategy(3, 0.0).call(fail)

        async def begin():
            return asyncio.create_task(later())

        task = await RetryStrategy(1).call(begin)
        go.set()
        await task

    asyncio.run(main())
    assert len(calls) == 4


def test_generators_keep_their_value_and_are_closed():
    """`return` of a generator is kept; an asynchronous one is closed with its wrapper."""
    closed = []

    @Timeout(5)
    def items():
        yield 1
        return "value"

    @Timeout(5)
    async def awaited():
        try:
            yield 1
            yield 2
        finally:
            closed.append("closed")

    def outer():
        return (yield from items())

    made = outer()
    assert next(made) == 1
    with pytest.raises(StopIteration) as ended:
        next(made)
    assert ended.value.value == "value"

    async def main():
        made = awaited()
        await anext(made)
        await made.aclose()
        closed.append("after")

    asyncio.run(main())
    assert closed == ["closed", "after"]


def test_an_object_that_is_awaited_is_guarded(clock):
    """An object with an asynchronous `__call__` is a coroutine function."""

    class Ask:
        calls = 0

        async def __call__(self):
            Ask.calls += 1
            raise NetworkError

    with pytest.raises(NetworkError):
        asyncio.run(RetryStrategy(2, 0.0).call(Ask()))
    assert Ask.calls == 3
