"""Our wrappers as `micro.py` measures them beside the peers."""

from flask_muset.resilience import (
    Bulkhead,
    CircuitBreaker,
    Fallback,
    Policy,
    RateLimit,
    RetryStrategy,
    Timeout,
)


def retry(f):
    return RetryStrategy(max_retries=2)(f)


def breaker(f):
    return CircuitBreaker("x", failure_rate=0.5, recovery_timeout=30)(f)


def breaker_streak(f):
    return CircuitBreaker("x", failure_threshold=5, recovery_timeout=30)(f)


def limit(f):
    return RateLimit(10**9, 3600)(f)


def three(f):
    parts = [
        RetryStrategy(max_retries=2),
        CircuitBreaker("x", failure_rate=0.5),
        RateLimit(10**9, 3600),
    ]
    return Policy("x", parts)(f)


def timeout(f):
    return Timeout(30)(f)


def five(f):
    return Policy(
        "x",
        [
            Fallback(None),
            RetryStrategy(max_retries=2),
            CircuitBreaker("x", failure_rate=0.5),
            Bulkhead(100),
            Timeout(30),
        ],
    )(f)
