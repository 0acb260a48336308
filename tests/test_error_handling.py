"""The guide's own examples: the names that it gives, used as it uses them."""

import asyncio

import pytest

from flask_muset import aio
from flask_muset.errors import CircuitOpenError, NetworkError, NotFoundError
from flask_muset.resilience import ErrorRecovery, RetryStrategy, retry
from flask_muset.testing import virtual_clock


@pytest.fixture(autouse=True)
def clock():
    with virtual_clock() as clock:
        yield clock


class Flaky:
    """A coroutine function that fails so many times, then gives its arguments."""

    def __init__(self, times, error=None):
        self.times, self.calls = times, 0
        self.error = error or NetworkError("down")

    async def __call__(self, *args):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return args


class TestRetryAsync:
    def test_retry_async_success(self):
        """A call that succeeds is made once, with its arguments, and its result is given."""
        flaky = Flaky(0)
        assert asyncio.run(aio.retry_async(flaky, "arg1", "arg2", max_retries=3)) == (
            "arg1",
            "arg2",
        )
        assert flaky.calls == 1

    def test_retry_async_after_failures(self):
        """Two failures and a success are three calls and two waits."""
        flaky = Flaky(2)
        assert asyncio.run(aio.retry_async(flaky, 1, max_retries=3)) == (1,)
        assert flaky.calls == 3

    def test_retry_async_gives_up(self, clock):
        """With a strategy of five retries the sixth failure is raised, after waits up to 30 s."""
        strategy = RetryStrategy(
            max_retries=5, initial_delay=2.0, max_delay=30.0, exponential_base=2.0, jitter=True
        )
        flaky = Flaky(10)
        with pytest.raises(NetworkError):
            asyncio.run(aio.retry_async(flaky, 1, strategy=strategy))
        assert flaky.calls == 6
        assert 1_000 < clock.now <= 1_000 + 2 + 4 + 8 + 16 + 30

    def test_retry_async_not_retryable(self):
        """An error that will not pass is raised at once."""
        flaky = Flaky(1, NotFoundError("no such user"))
        with pytest.raises(NotFoundError):
            asyncio.run(aio.retry_async(flaky))
        assert flaky.calls == 1


class TestRetryDecorator:
    def test_coroutine_function(self):
        """The decorated coroutine function is awaited as before."""
        flaky = Flaky(3)

        @retry(max_retries=3)
        async def fetch_external_data():
            return await flaky("data")

        assert asyncio.run(fetch_external_data()) == ("data",)
        assert flaky.calls == 4


class TestCircuitBreaker:
    def test_get_circuit_breaker_and_call(self):
        """After five failures the function is not called for 60 seconds."""
        recovery = ErrorRecovery()
        breaker = recovery.get_circuit_breaker(
            name="external_api", failure_threshold=5, recovery_timeout=60
        )

        def my_function(first, second):
            raise NetworkError(f"{first} {second}")

        for _ in range(5):
            with pytest.raises(NetworkError):
                breaker.call(my_function, "arg1", "arg2")
        with pytest.raises(CircuitOpenError) as refused:
            breaker.call(my_function, "arg1", "arg2")
        assert refused.value.retry_after == 60

    def test_awaited(self):
        """The same breaker guards a coroutine function."""
        breaker = aio.ErrorRecovery().get_circuit_breaker("x", failure_threshold=1)
        with pytest.raises(NetworkError):
            asyncio.run(breaker.call(Flaky(1).__call__))
        with pytest.raises(CircuitOpenError):
            asyncio.run(breaker.call(Flaky(0).__call__))


class TestErrorRecovery:
    def test_recover_from_error(self):
        """The actions run in order until one succeeds."""
        done = []

        async def reconnect():
            done.append("reconnect")
            raise NetworkError("still down")

        async def use_backup():
            done.append("backup")

        async def never():
            done.append("never")

        error = NetworkError("down")
        recovery = aio.ErrorRecovery()
        actions = [reconnect, use_backup, never]
        assert asyncio.run(recovery.recover_from_error(error=error, recovery_actions=actions))
        assert done == ["reconnect", "backup"]
        assert error.__notes__ == ["recovery failed: NetworkError: still down"]
        assert not asyncio.run(recovery.recover_from_error(error, [reconnect]))

    def test_plain_actions(self, clock):
        """Plain functions without await; one that takes too long is given up."""
        from flask_muset.clock import SYSTEM

        recovery = ErrorRecovery(action_timeout=2)
        done = []
        actions = [lambda: SYSTEM.sleep(10), lambda: done.append("second")]
        assert recovery.recover_from_error(error=KeyError(), recovery_actions=actions)
        assert done == ["second"]
        assert clock.now == 1_002

        async def awaited(): ...

        with pytest.raises(TypeError, match=r"flask_muset\.aio"):
            recovery.recover_from_error(KeyError(), [awaited])

    def test_of_the_current_app(self):
        """The module's own name has the current app's breakers, plain and awaited."""
        from flask import Flask

        from flask_muset import Resilience
        from flask_muset.resilience import error_recovery

        app = Flask("x")
        Resilience(app)
        with app.app_context():
            breaker = error_recovery.get_circuit_breaker("x")
            assert aio.error_recovery.get_circuit_breaker("x") is breaker
            assert asyncio.run(aio.error_recovery.recover_from_error(KeyError(), [lambda: 1]))
        other = Flask("y")
        with other.app_context(), pytest.raises(RuntimeError, match="not set up on app 'y'"):
            error_recovery.breakers()
