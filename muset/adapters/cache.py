"""A cache that keeps nothing, for commands that serve nobody."""

from collections.abc import Callable
from typing import TypeVar

__all__ = ["NoCache"]

T = TypeVar("T")


class NoCache:
    """Implements `muset.ports.Cache`."""

    def cache_aside(
        self,
        key: str,
        fetch_func: Callable[[], T],
        expire: float | None = None,
        *,
        stale_if_error: float = 0,
        negative_expire: float | None = None,
    ) -> T:
        """Fetch."""
        return fetch_func()

    def delete(self, key: str) -> bool:
        """There is nothing to forget."""
        return True
