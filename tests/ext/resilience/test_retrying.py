"""Retries: what is tried again, when, how often, and who decides."""

import asyncio
import email.utils

import pytest
import requests

from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import (
    CircuitOpenError,
    DatabaseError,
    ExternalServiceError,
    MusetError,
    NetworkError,
    NotFoundError,
    OperationTimeoutError,
    OverloadedError,
    RateLimitError,
)
from flask_muset.resilience import RetryBudget, RetryStrategy, retry, retry_async, retry_call
from flask_muset.signals import Decision, policy_decided
from flask_muset.testing import virtual_clock
from flask_muset.translate import translate


@pytest.fixture
def clock():
    with virtual_clock() as clock:
        yield clock


class Failing:
    """A function that raises so many times, then returns."""

    def __init__(self, error, times=10**9):
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, value="done"):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return value


def test_three_retries_are_four_calls(clock):
    """max_retries counts retries, not attempts; the last error is raised as it was."""
    failing = Failing(NetworkError("down"))
    with pytest.raises(NetworkError) as raised:
        retry_call(failing, max_retries=3)
    assert failing.calls == 4
    assert raised.value is failing.error


def test_waits_grow_to_their_bound(clock):
    """Without jitter the waits are min(max_delay, initial_delay * base ** n)."""
    waits = []
    strategy = RetryStrategy(6, 2.0, 30.0, 2.0, jitter=False)

    def listen(_sender, event):
        if event.decision is Decision.RETRIED:
            waits.append(event.wait_s)

    with policy_decided.connected_to(listen), pytest.raises(NetworkError):
        retry_call(Failing(NetworkError()), strategy=strategy)
    assert waits == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert clock.now == 1_000.0 + sum(waits)


def test_full_jitter_draws_from_the_whole_interval(clock):
    """Waits lie in [0, bound], spread over it, and differ from call to call."""
    starts = []
    for _ in range(200):
        began = clock.now
        retry_call(Failing(NetworkError(), 1), strategy=RetryStrategy(1, 8.0, 8.0))
        starts.append(clock.now - began)
    assert 0 <= min(starts) < 0.5
    assert 7.5 < max(starts) <= 8
    assert 3.5 < sum(starts) / 200 < 4.5


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (NetworkError(), 4),
        (OperationTimeoutError(), 4),
        (ExternalServiceError(), 4),
        (DatabaseError(unavailable=True), 4),
        (ConnectionResetError(), 4),
        (requests.Timeout(), 4),
        (RateLimitError(), 4),
        (DatabaseError(), 1),
        (NotFoundError(), 1),
        (ValueError(), 1),
        (ExternalServiceError(retryable=False), 1),
        # refusals by this process itself
        (CircuitOpenError(), 1),
        (OverloadedError(), 1),
    ],
)
def test_the_table_decides(clock, error, calls):
    """What the error table calls retryable is tried again, other libraries' errors too."""
    failing = Failing(error)
    with pytest.raises(type(error)):
        retry_call(failing)
    assert failing.calls == calls


@pytest.mark.parametrize(
    "retry_on", [KeyError, (KeyError, OSError), lambda error: "x" in str(error)]
)
def test_retry_on_replaces_the_table(clock, retry_on):
    """Classes or a function decide in the table's place, but refusals are never tried again."""
    strategy = RetryStrategy(2, retry_on=retry_on)
    failing = Failing(KeyError("x"))
    with pytest.raises(KeyError):
        retry_call(failing, strategy=strategy)
    assert failing.calls == 3
    refusing = Failing(CircuitOpenError("x"))
    with pytest.raises(CircuitOpenError):
        retry_call(refusing, strategy=RetryStrategy(2, retry_on=MusetError))
    assert refusing.calls == 1


def http_error(retry_after):
    """What requests raises for a 503 with this Retry-After."""
    response = requests.Response()
    response.status_code = 503
    response.headers["Retry-After"] = retry_after
    return requests.HTTPError("503", response=response)


def test_retry_after_in_seconds_is_waited_for(clock):
    """The wait is at least Retry-After, whatever the strategy would draw."""
    retry_call(Failing(http_error("7"), 1), strategy=RetryStrategy(1, 0.0))
    assert clock.now == 1_007.0


def test_retry_after_as_a_date_is_waited_for(clock):
    """An HTTP date is as good as seconds."""
    date = email.utils.formatdate(SYSTEM.wall() + 9, usegmt=True)
    retry_call(Failing(http_error(date), 1), strategy=RetryStrategy(1, 0.0))
    assert 7 <= clock.now - 1_000 <= 10


@pytest.mark.parametrize("value", ["-5", "soon", "", "1e3", "nan"])
def test_an_unreadable_retry_after_is_no_reason_to_wait(clock, value):
    """A negative or unreadable Retry-After changes nothing."""
    retry_call(Failing(http_error(value), 1), strategy=RetryStrategy(1, 0.0))
    assert clock.now == 1_000.0


def test_retry_after_has_a_draw_of_its_own(clock):
    """Callers that were told the same do not come back together, and none comes too early."""
    ends = set()
    for _ in range(20):
        began = clock.now
        retry_call(Failing(http_error("7"), 1), strategy=RetryStrategy(1, 2.0))
        ends.add(round(clock.now - began, 3))
    assert len(ends) > 10
    assert 7 <= min(ends) <= max(ends) <= 9
    began = clock.now
    with deadline(8):
        retry_call(Failing(http_error("7"), 1), strategy=RetryStrategy(1, 60.0))
    assert 7 <= clock.now - began < 8


def test_an_absurd_retry_after_is_no_error_of_ours():
    """400 digits are a long time and not an exception."""
    assert translate(http_error("9" * 400), {}).retry_after == 30 * 86_400


def test_a_retry_after_above_max_delay_is_not_ignored(clock):
    """Trying earlier than told would only be refused again, so the error is raised."""
    failing = Failing(http_error("120"))
    with pytest.raises(requests.HTTPError):
        retry_call(failing)
    assert failing.calls == 1


def test_no_sleep_past_the_deadline(clock):
    """A wait that would end after the deadline is not begun."""
    failing = Failing(NetworkError())
    strategy = RetryStrategy(10, 1.0, jitter=False)
    with deadline(5.0), pytest.raises(NetworkError):
        retry_call(failing, strategy=strategy)
    assert failing.calls == 3  # at 0, 1 and 3 seconds; the next would be at 7
    assert clock.now == 1_003.0


def test_max_elapsed_bounds_the_attempt_in_flight(clock):
    """An attempt that is still running when the time is up is cut off."""
    calls = []

    def slow():
        calls.append(clock.now)
        SYSTEM.sleep(4.0)
        raise NetworkError

    strategy = RetryStrategy(5, 1.0, jitter=False, max_elapsed=6.0)
    with pytest.raises(OperationTimeoutError):
        retry_call(slow, strategy=strategy)
    assert calls == [1_000.0, 1_005.0]
    assert clock.now == 1_006.0


@pytest.mark.parametrize("levels", [2, 3])
def test_of_nested_retries_the_outermost_wins(clock, levels):
    """Three layers of three attempts are three calls, not 27."""
    failing = Failing(NetworkError())
    guarded = failing
    for _ in range(levels):
        guarded = retry(max_retries=2)(guarded)
    with pytest.raises(NetworkError):
        guarded()
    assert failing.calls == 3


def test_nested_retries_of_two_colours(clock):
    """A plain retry inside of an awaited one is nested too."""
    failing = Failing(NetworkError())

    async def outer():
        return retry_call(failing, max_retries=5)

    with pytest.raises(NetworkError):
        asyncio.run(retry_async(outer, max_retries=1))
    assert failing.calls == 2


def test_state_is_per_call(clock):
    """Three calls in turn, each failing twice, wait alike: no call goes on where another was."""
    strategy = RetryStrategy(5, 1.0, jitter=False)
    took = []
    for _ in range(3):
        began = clock.now
        retry_call(Failing(NetworkError(), 2), strategy=strategy)
        took.append(clock.now - began)
    assert took == [3.0, 3.0, 3.0]


def test_budget_bounds_the_retries_of_all_calls(clock):
    """At 100 % failure 1,000 calls make ratio * calls + floor * window retries, no more."""
    budget = RetryBudget(ratio=0.2, floor=1.0, window=10.0)
    failing = Failing(NetworkError())
    strategy = RetryStrategy(3, 0.0, 0.0, budget=budget)
    for _ in range(1_000):
        with pytest.raises(NetworkError):
            retry_call(failing, strategy=strategy)
    assert failing.calls - 1_000 == 0.2 * 1_000 + 10


def test_budget_forgets_after_its_window(clock):
    """The floor is there again after a window without calls."""
    budget = RetryBudget(ratio=0.0, floor=0.2, window=10.0)
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]
    clock.advance(11)
    assert budget.withdraw()


def test_decorator_keeps_the_colour(clock):
    """A plain function gives its result, a coroutine function an awaitable, a generator items."""
    failing = Failing(NetworkError(), 1)

    @retry
    def plain(x):
        return failing(x)

    @retry(max_retries=1)
    async def awaited(x):
        return failing(x)

    @retry(max_retries=1)
    def items(x):
        yield failing(x)
        yield x + 1

    assert plain(1) == 1
    failing.calls = 0
    assert asyncio.run(awaited(2)) == 2
    failing.calls = 0
    assert list(items(3)) == [3, 4]
    assert plain.__name__ == "plain"


def test_generator_is_never_repeated_after_its_first_item(clock):
    """What fails after an item was given is raised; the consumer has seen the item already."""
    runs = []

    @retry(max_retries=3)
    def items():
        runs.append(1)
        if len(runs) < 3:
            raise NetworkError
        yield "a"
        raise NetworkError("late")

    seen = []
    with pytest.raises(NetworkError, match="late"):
        seen.extend(items())
    made = iter(items())
    assert next(made) == "a"
    with pytest.raises(NetworkError, match="late"):
        next(made)
    assert len(runs) == 4


def test_async_generator(clock):
    """An asynchronous generator is guarded until its first item and closed."""
    runs, closed = [], []

    @retry(max_retries=3)
    async def items():
        try:
            runs.append(1)
            if len(runs) < 2:
                raise NetworkError
            yield "a"
            yield "b"
        finally:
            closed.append(1)

    async def consume():
        return [item async for item in items()]

    assert asyncio.run(consume()) == ["a", "b"]
    assert len(runs) == len(closed) == 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 1.5}, "max_retries"),
        ({"max_retries": True}, "max_retries"),
        ({"initial_delay": -1}, "initial_delay"),
        ({"max_delay": 0.5}, "max_delay"),
        ({"exponential_base": 0.5}, "exponential_base"),
        ({"jitter": 1}, "jitter"),
        ({"max_elapsed": 0}, "max_elapsed"),
        ({"retry_on": "KeyError"}, "retry_on"),
    ],
)
def test_bad_arguments_are_named(options, name):
    """The text names the argument and the value."""
    with pytest.raises(ValueError, match=name) as raised:
        RetryStrategy(**options)
    assert repr(options[name]) in str(raised.value)


def test_not_both():
    """Two sources of the number of retries are one too many."""
    with pytest.raises(ValueError, match="not both"):
        retry(3, strategy=RetryStrategy())


def test_budget_refuses_bad_arguments():
    """A negative ratio is named."""
    with pytest.raises(ValueError, match="ratio must be at least 0, got -1"):
        RetryBudget(ratio=-1)
