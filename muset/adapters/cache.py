"""A cache that keeps nothing, for commands that serve nobody."""

from collections.abc import Callable
from typing import Any

__all__ = ["NoCache"]


class NoCache:
    """Implements `muset.ports.Cache`."""

    def cache_aside(
        self, key: str, fetch_func: Callable[[], Any], expire: float | None = None, **options: Any
    ) -> Any:
        """Fetch."""
        return fetch_func()

    def delete(self, key: str) -> bool:
        """There is nothing to forget."""
        return True
