"""Flask extensions that keep a service up when what it depends on is not.

The names are loaded when they are first used, so that importing one extension loads no other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask_muset.cache_strategies import CacheStrategies
    from flask_muset.error_handler import ErrorHandler
    from flask_muset.metrics import Metrics
    from flask_muset.resilience import Resilience

__all__ = ["CacheStrategies", "ErrorHandler", "Metrics", "Resilience"]

_HOMES = {
    "CacheStrategies": "flask_muset.cache_strategies",
    "ErrorHandler": "flask_muset.error_handler",
    "Metrics": "flask_muset.metrics",
    "Resilience": "flask_muset.resilience",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
