"""What stands beside the cache: one that keeps nothing, and a look at what waits to be written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flask_muset.deadline import deadline
from muset.ports import NotReadyError

__all__ = ["JournalProbe", "NoCache"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_LATE_S = 60.0


class JournalProbe:
    """Implements `muset.ports.Probe`: writes that wait too long are not lost, but not done either.

    Args:
        pending: Tells `oldest_s`, how long the oldest write has waited, in seconds.
    """

    name = "journal"
    is_needed = False

    def __init__(self, pending: Callable[[], Mapping[str, Any]]) -> None:
        self._pending = pending

    def check(self, timeout_s: float) -> None:
        """Return if nothing waits for long, else raise."""
        with deadline(timeout_s):
            oldest_s = self._pending()["oldest_s"]
        if oldest_s > _LATE_S:
            raise NotReadyError(f"a write that was accepted has waited for more than {_LATE_S:g} s")


class NoCache:
    """Implements `muset.ports.Cache`, for commands that serve nobody."""

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

    def get(self, key: str, default: Any = None) -> Any:
        """There is none."""
        return default

    def set(self, key: str, value: Any, expire: float | None = None) -> bool:
        """Nothing is kept."""
        return False

    def delete(self, key: str) -> bool:
        """There is nothing to forget."""
        return True

    def delete_pattern(self, pattern: str) -> int:
        """There is nothing to forget."""
        return 0

    def write_through(
        self,
        key: str,
        value: T,
        write_func: Callable[[T], Any],
        expire: float | None = None,
    ) -> bool:
        """Write the source."""
        write_func(value)
        return True

    def pending(self) -> Mapping[str, Any]:
        """Nothing waits."""
        return {"pending": 0, "oldest_s": 0.0}

    def writer(
        self,
        name: str,
        *,
        coalesce: bool = True,
        batch: int | None = None,
        patterns: Iterable[str] = (),
    ) -> Callable[[F], F]:
        """Nothing is ever written later."""
        return lambda fn: fn

    def write_behind(
        self,
        key: str,
        value: T,
        write_func: Callable[..., Any],
        expire: float | None = None,
    ) -> bool:
        """There is no journal; nothing has changed."""
        return False

    def dead_letters(self, limit: int = 1000, *, after: str = "") -> Sequence[Mapping[str, Any]]:
        """None were given up."""
        return []

    def requeue(self, id: str) -> bool:  # noqa: A002 - the field's name
        """There is none."""
        return False

    def drop(self, id: str) -> bool:  # noqa: A002
        """There is none."""
        return False
