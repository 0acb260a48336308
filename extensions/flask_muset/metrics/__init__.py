"""Metrics: what a Flask app does, for Prometheus, on one worker or many.

The names are loaded when they are first used: `flask_muset.metrics.gunicorn` must be able to say
where the workers' files are before prometheus_client is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask_muset.metrics.extension import (
        Metrics,
        exporter,
        instrument_httpx,
        instrument_redis,
        instrument_sqlalchemy,
        track_ai_request,
        track_cache_operation,
        track_database_query,
        track_error,
        track_request,
    )

__all__ = [
    "Metrics",
    "exporter",
    "instrument_httpx",
    "instrument_redis",
    "instrument_sqlalchemy",
    "track_ai_request",
    "track_cache_operation",
    "track_database_query",
    "track_error",
    "track_request",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("flask_muset.metrics.extension"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
