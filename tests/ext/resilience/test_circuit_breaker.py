"""The breaker's states, what it counts, and whom it lets through."""

import threading

import pytest

from flask_muset.deadline import deadline
from flask_muset.errors import (
    CircuitOpenError,
    ConflictError,
    ExternalServiceError,
    NetworkError,
    OperationTimeoutError,
    OverloadedError,
)
from flask_muset.resilience import BreakerState, Bulkhead, CircuitBreaker, Policy
from flask_muset.signals import Decision, breaker_changed, policy_decided
from flask_muset.testing import virtual_clock


@pytest.fixture
def clock():
    with virtual_clock() as clock:
        yield clock


def fail(error=None):
    raise error or NetworkError("down")


def trip(breaker, times, error=None):
    for _ in range(times):
        with pytest.raises(type(error or NetworkError())):
            breaker.call(fail, error)


def refused(breaker):
    with pytest.raises(CircuitOpenError) as raised:
        breaker.call(lambda: "called")
    return raised.value


def test_opens_after_failures_in_a_row(clock):
    """The fifth failure in a row opens it; a success in between starts anew."""
    breaker = CircuitBreaker("x")
    trip(breaker, 4)
    assert breaker.call(lambda: 1) == 1
    trip(breaker, 4)
    assert breaker.state is BreakerState.CLOSED
    trip(breaker, 1)
    assert breaker.state == "open"
    assert refused(breaker).retry_after == 60


def test_one_probe_decides(clock):
    """After the open time one call is let through; its success closes, its failure opens again."""
    breaker = CircuitBreaker("x", failure_threshold=1, recovery_timeout=10)
    trip(breaker, 1)
    clock.advance(9.9)
    refused(breaker)
    clock.advance(0.2)
    assert breaker.state == "half_open"
    trip(breaker, 1)
    assert breaker.state == "open"
    clock.advance(10)
    assert breaker.call(lambda: 7) == 7
    assert breaker.state == "closed"


def test_state_needs_no_traffic(clock):
    """An open breaker that nobody calls does not report open for ever."""
    breaker = CircuitBreaker("x", failure_threshold=1, recovery_timeout=10)
    trip(breaker, 1)
    assert breaker.snapshot()["retry_after"] == 10
    clock.advance(10)
    assert breaker.snapshot()["state"] == "half_open"
    assert breaker.snapshot()["retry_after"] is None


@pytest.mark.parametrize("permitted", [1, 3])
def test_exactly_the_permitted_probes(clock, permitted):
    """While probes are under way all others are refused; all probes must succeed."""
    breaker = CircuitBreaker("x", failure_threshold=1, half_open_calls=permitted)
    trip(breaker, 1)
    clock.advance(60)
    tickets = [breaker.enter() for _ in range(permitted)]
    for _ in range(5):
        with pytest.raises(CircuitOpenError):
            breaker.enter()
    for number, ticket in enumerate(tickets):
        assert breaker.state == "half_open", number
        breaker.leave(ticket, None)
    assert breaker.state == "closed"


def test_a_dependency_slower_than_the_open_time_gets_well(clock):
    """A probe that ends after its time still counts; others may try meanwhile."""
    breaker = CircuitBreaker("x", failure_threshold=1, recovery_timeout=5)
    trip(breaker, 1)
    clock.advance(5)
    slow = breaker.enter()
    clock.advance(6)
    other = breaker.enter()
    refused(breaker)
    breaker.leave(slow, None)
    assert breaker.state == "closed"
    breaker.leave(other, NetworkError())
    assert breaker.state == "closed"


def test_a_probe_that_never_ends_is_given_up(clock):
    """After the open time another probe is let through, and the lost one is not counted."""
    breaker = CircuitBreaker("x", failure_threshold=1, recovery_timeout=10)
    trip(breaker, 1)
    clock.advance(10)
    lost = breaker.enter()
    clock.advance(9)
    refused(breaker)
    clock.advance(1)
    assert breaker.call(lambda: 1) == 1
    assert breaker.state == "closed"
    breaker.leave(lost, NetworkError())
    assert breaker.snapshot()["failures"] == 0


@pytest.mark.parametrize(
    "error", [KeyError("ignored"), OverloadedError(), CircuitOpenError(), KeyboardInterrupt()]
)
def test_what_counts_as_nothing_gives_its_probe_back(clock, error):
    """Ignored exceptions, refusals from within and foreign ends neither open nor close it."""
    breaker = CircuitBreaker("x", failure_threshold=1, ignore=KeyError)
    trip(breaker, 1)
    clock.advance(60)
    for _ in range(3):
        with pytest.raises(type(error)):
            breaker.call(fail, error)
        assert breaker.state == "half_open"
    assert breaker.call(lambda: 1) == 1
    assert breaker.state == "closed"


def test_an_answer_that_is_the_callers_fault_shows_life(clock):
    """A 409 of the dependency is not counted as a failure and closes a half-open breaker."""
    breaker = CircuitBreaker("x", failure_threshold=1)
    trip(breaker, 1)
    clock.advance(60)
    trip(breaker, 1, ConflictError())
    assert breaker.state == "closed"


def test_failure_rate_needs_its_minimum_of_calls(clock):
    """With a rate of 0.5 and 10 calls at least, 5 failures of 10 open it, 4 of 4 do not."""
    breaker = CircuitBreaker("x", failure_rate=0.5)
    trip(breaker, 4)
    assert breaker.state == "closed"
    for _ in range(5):
        breaker.call(lambda: 1)
    trip(breaker, 1)
    assert breaker.state == "open"


def test_count_window_forgets_the_oldest(clock):
    """Only the last calls count."""
    breaker = CircuitBreaker("x", failure_rate=0.5, window_calls=10, minimum_calls=10)
    trip(breaker, 4)
    for _ in range(10):
        breaker.call(lambda: 1)
    assert breaker.snapshot()["calls"] == 10
    assert breaker.snapshot()["failures"] == 0
    trip(breaker, 4)
    assert breaker.snapshot()["failure_rate"] == 0.4
    assert breaker.state == "closed"


def test_time_window_forgets_the_oldest(clock):
    """Only the last seconds count."""
    breaker = CircuitBreaker("x", failure_rate=0.5, window_seconds=10, minimum_calls=4)
    trip(breaker, 3)
    clock.advance(11)
    trip(breaker, 3)
    assert (breaker.snapshot()["calls"], breaker.state) == (3, "closed")
    trip(breaker, 1)
    assert breaker.state == "open"


def test_slow_calls_open_it(clock):
    """Calls that succeed too late are as bad as failures; a slow probe opens it again."""
    breaker = CircuitBreaker(
        "x", slow_call_rate=0.5, slow_call_duration=1.0, minimum_calls=2, recovery_timeout=5
    )
    for _ in range(2):
        breaker.call(clock.sleep, 1.0)
    assert breaker.state == "open"
    assert breaker.snapshot()["slow_call_rate"] == 1.0
    clock.advance(5)
    breaker.call(clock.sleep, 2.0)
    assert breaker.state == "open"
    clock.advance(5)
    breaker.call(clock.sleep, 0.5)
    assert breaker.state == "closed"


def test_open_time_grows_and_is_bounded(clock):
    """Each failed probe makes the open time longer, up to its bound; a success starts anew."""
    breaker = CircuitBreaker(
        "x",
        failure_threshold=1,
        recovery_timeout=10,
        recovery_growth=2,
        max_recovery_timeout=35,
    )
    waits = []
    for _ in range(4):
        trip(breaker, 1)
        waits.append(breaker.snapshot()["retry_after"])
        clock.advance(waits[-1])
    assert waits == [10, 20, 35, 35]
    breaker.call(lambda: 1)
    trip(breaker, 1)
    assert breaker.snapshot()["retry_after"] == 10


@pytest.mark.parametrize(("told", "waits"), [(90, 90), (5, 60), (10**6, 300)])
def test_open_time_follows_retry_after(clock, told, waits):
    """A longer Retry-After is followed, within reason."""
    breaker = CircuitBreaker("x", failure_threshold=1)
    trip(breaker, 1, ExternalServiceError(retry_after=told))
    assert breaker.snapshot()["retry_after"] == waits


def test_forced_states(clock):
    """Forced open refuses, forced closed lets through uncounted, both end by themselves."""
    breaker = CircuitBreaker("x", failure_threshold=1)
    breaker.force_open(30)
    assert refused(breaker).retry_after == 30
    assert breaker.state == "forced_open"
    clock.advance(30)
    assert breaker.state == "closed"
    breaker.force_closed(30)
    trip(breaker, 5)
    assert breaker.state == "forced_closed"
    clock.advance(30)
    trip(breaker, 1)
    assert breaker.state == "open"
    breaker.force_closed()
    assert breaker.call(lambda: 1) == 1
    breaker.reset()
    assert breaker.state == "closed"


def test_observe_counts_and_refuses_nothing(clock):
    """In observe mode calls pass while it is open; each is told as one that it would refuse."""
    seen = []
    breaker = CircuitBreaker("x", failure_threshold=2, mode="observe")

    def listen(_sender, event):
        seen.append(event.decision)

    with policy_decided.connected_to(listen):
        trip(breaker, 2)
        assert breaker.call(lambda: 1) == 1
    assert breaker.state == "open"
    assert seen == [Decision.WOULD_REJECT]


def test_off_counts_nothing(clock):
    """A breaker that is off never opens by itself; an operator can still open it."""
    breaker = CircuitBreaker("x", failure_threshold=1, mode="off")
    trip(breaker, 10)
    assert breaker.snapshot()["calls"] == 0
    breaker.force_open()
    refused(breaker)


def test_our_deadline_counts_a_callers_does_not(clock):
    """A call cut off by our own deadline has failed; by a time that its caller chose it has not."""
    breaker = CircuitBreaker("x", failure_threshold=1)
    with pytest.raises(OperationTimeoutError), deadline(1, counts=False):
        breaker.call(clock.sleep, 2)
    assert breaker.state == "closed"
    with pytest.raises(OperationTimeoutError), deadline(1):
        breaker.call(clock.sleep, 2)
    assert breaker.state == "open"


@pytest.mark.parametrize("how", ["check", "inside"])
def test_a_callers_time_opens_nothing(clock, how):
    """However a time that a caller chose ends a call, the dependency is not blamed."""
    breaker = CircuitBreaker("x", failure_threshold=1)

    def work():
        if how == "check":
            clock.advance(2)
            deadline.check()
        else:
            with deadline(0.5, counts=False):
                clock.sleep(1)

    for _ in range(5):
        with pytest.raises(OperationTimeoutError), deadline(1, counts=False):
            breaker.call(work)
    assert breaker.state == "closed"


def test_an_outcome_of_an_earlier_state_is_not_counted(clock):
    """A call that began before it opened and ends after it closed says nothing about now."""
    breaker = CircuitBreaker("x", failure_threshold=1)
    late = breaker.enter()
    trip(breaker, 1)
    clock.advance(60)
    breaker.call(lambda: 1)
    breaker.leave(late, NetworkError())
    assert breaker.state == "closed"


def test_with_block_and_decorator(clock):
    """All three forms count alike."""
    breaker = CircuitBreaker("x", failure_threshold=3)
    with pytest.raises(NetworkError), breaker:
        fail()
    with pytest.raises(NetworkError):
        breaker(fail)()
    trip(breaker, 1)
    with pytest.raises(CircuitOpenError), breaker:
        raise AssertionError("must not run")


def test_changes_are_told(clock):
    """One event for each change of state, with its name."""
    seen = []
    breaker = CircuitBreaker("x", failure_threshold=1)

    def listen(_sender, event):
        seen.append((event.name, event.old, event.new))

    with breaker_changed.connected_to(listen):
        trip(breaker, 1)
        clock.advance(60)
        breaker.call(lambda: 1)
    assert seen == [
        ("x", "closed", "open"),
        ("x", "open", "half_open"),
        ("x", "half_open", "closed"),
    ]


def test_counts_are_right_under_threads():
    """8 threads with 500 failures each: none is lost, and it opens exactly once."""
    changes = []
    breaker = CircuitBreaker("x", failure_threshold=4_000, window_calls=4_000)

    def listen(_sender, event):
        changes.append(event.new)

    def work():
        for _ in range(500):
            with pytest.raises(NetworkError):
                breaker.call(fail)

    with breaker_changed.connected_to(listen):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert changes == ["open"]


def test_a_bulkhead_inside_does_not_open_it(clock):
    """Refusals from within are ours, not the dependency's."""
    breaker = CircuitBreaker("x", failure_threshold=1)
    bulkhead = Bulkhead(1)
    policy = Policy("x", [breaker, bulkhead])
    with bulkhead, pytest.raises(OverloadedError):
        policy.call(lambda: 1)
    assert breaker.state == "closed"
    assert policy.call(lambda: 1) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"failure_threshold": 0}, "failure_threshold"),
        ({"failure_threshold": 1.5}, "failure_threshold"),
        ({"recovery_timeout": 0}, "recovery_timeout"),
        ({"failure_rate": 0}, "failure_rate"),
        ({"failure_rate": 50}, "failure_rate"),
        ({"slow_call_rate": 0.5}, "slow_call_duration"),
        ({"window_calls": 5}, "minimum_calls"),
        ({"window_seconds": 0}, "window_seconds"),
        ({"half_open_calls": 0}, "half_open_calls"),
        ({"recovery_growth": 0.5}, "recovery_growth"),
        ({"max_recovery_timeout": 5}, "max_recovery_timeout"),
        ({"ignore": "KeyError"}, "ignore"),
        ({"ignore": ("KeyError",)}, "ignore"),
        ({"recovery_timeout": float("inf")}, "recovery_timeout"),
        ({"mode": "on"}, "mode"),
    ],
)
def test_bad_arguments_are_named(options, name):
    """The text names the breaker and the argument."""
    with pytest.raises(ValueError, match=name) as raised:
        CircuitBreaker("shop", **options)
    assert "shop" in str(raised.value)
