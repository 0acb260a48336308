"""Resilience: policies for what a service depends on, and limits for its requests."""

from flask_muset.deadline import deadline
from flask_muset.resilience.budget import RetryBudget
from flask_muset.resilience.bulkhead import Bulkhead
from flask_muset.resilience.circuit_breaker import CircuitBreaker
from flask_muset.resilience.extension import (
    UNLIMITED,
    Resilience,
    error_recovery,
    force,
    network_of,
    policies_of,
    sharing_state,
)
from flask_muset.resilience.fallback import Fallback
from flask_muset.resilience.policy import Outcome, Policy, breaker_of
from flask_muset.resilience.rate_limit import Hit, RateLimit
from flask_muset.resilience.recovery import ErrorRecovery
from flask_muset.resilience.retrying import RetryStrategy, retry, retry_async, retry_call
from flask_muset.resilience.timeout import Timeout
from flask_muset.signals import BreakerState

__all__ = [
    "UNLIMITED",
    "BreakerState",
    "Bulkhead",
    "CircuitBreaker",
    "ErrorRecovery",
    "Fallback",
    "Hit",
    "Outcome",
    "Policy",
    "RateLimit",
    "Resilience",
    "RetryBudget",
    "RetryStrategy",
    "Timeout",
    "breaker_of",
    "deadline",
    "error_recovery",
    "force",
    "network_of",
    "policies_of",
    "retry",
    "retry_async",
    "retry_call",
    "sharing_state",
]
