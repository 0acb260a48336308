"""What could not be made invalid in Redis, kept until it can.

Bounded: the newest of each key, and one for all entries when there are too many.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from flask_muset.cache_strategies.redis_entries import RedisEntries
from flask_muset.errors import ExternalServiceError
from flask_muset.locks import give_lock

__all__ = ["Repairs"]

_log = logging.getLogger(__name__)


class Repairs:
    """Keys and tags that Redis still has to be told of.

    Args:
        limit: How many of them are kept one by one, at least 1.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        # Each with a mark of its own, so that one that comes again while it is sent stays.
        self._keys: dict[str, object] = {}
        self._tags: dict[tuple[str, bool], object] = {}
        give_lock(self)

    _lock: Any

    def __len__(self) -> int:
        return len(self._keys) + len(self._tags)

    def add_keys(self, keys: Iterable[str]) -> None:
        """These are to be deleted."""
        with self._lock:
            for key in keys:
                self._keys[key] = object()
            self._bound()

    def add_tag(self, tag: str, *, keep_stale: bool) -> None:
        """The entries of this are to be made invalid; the empty tag stands for all."""
        with self._lock:
            self._tags[tag, keep_stale] = object()
            self._bound()

    def _bound(self) -> None:
        if len(self) > self._limit:
            self._keys.clear()
            self._tags.clear()
            self._tags["", False] = object()

    def send(self, entries: RedisEntries, note_tag: Callable[[str, int], None]) -> None:
        """Tell Redis; what it was told is forgotten.

        Args:
            entries: Where.
            note_tag: Is told of each tag: its member, and the microseconds of when.

        Raises:
            MusetError: Redis is away again; the rest is kept.
        """
        with self._lock:
            keys, tags = dict(self._keys), dict(self._tags)
        for (tag, keep_stale), mark in tags.items():
            note_tag(*entries.invalidate_tag(tag, keep_stale=keep_stale))
            self._forget(self._tags, (tag, keep_stale), mark)
        _delete(entries, list(keys))
        for key, mark in keys.items():
            self._forget(self._keys, key, mark)

    def _forget(self, kept: dict[Any, object], what: Any, mark: object) -> None:
        with self._lock:
            if kept.get(what) is mark:
                del kept[what]


def _delete(entries: RedisEntries, keys: list[str]) -> None:
    """Delete keys; one that Redis refuses must not stand in the way of the others."""
    try:
        entries.change(dict.fromkeys(keys))
    except ExternalServiceError as error:
        _log.warning("keys are deleted one by one, because Redis says: %s", error.message)
        for key in keys:
            entries.unlink(key)
