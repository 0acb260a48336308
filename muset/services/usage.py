"""What was used by whom: one entry for each question, none lost and none twice."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from muset.ports import Asker, Cache, UsageEntry, UsageStore

__all__ = ["UsageService"]

_log = logging.getLogger(__name__)

_BATCH = 100
#: Seconds for which the cache keeps an entry; nobody reads it there.
_KEPT_S = 1.0
_PREFIX = "usage:"
#: Seconds that a question which has failed waits for its entry, which is written all the same.
_FAILED_S = 1.0


class _Running(Protocol):
    def join(self, timeout: float | None) -> object:
        """Wait until it has ended; None for as long as that takes."""
        ...


class UsageService:
    """Implements `muset.ports.Ledger`.

    Args:
        store: Where entries get to.
        cache: Accepts them before the store has them.
        wall: Unix time, seconds.
        beside: Runs something that a deadline of the request does not cut off.
    """

    def __init__(
        self,
        store: UsageStore,
        cache: Cache,
        wall: Callable[[], float],
        beside: Callable[[Callable[[], object]], _Running],
    ) -> None:
        self._store = store
        self._cache = cache
        self._wall = wall
        self._beside = beside
        # Once: a journal knows it by the name, the cache by its identity.
        declare = cache.writer(
            "usage.ledger", coalesce=False, batch=_BATCH, patterns=[f"{_PREFIX}*"]
        )
        self._writer = declare(self._write)

    def record(
        self,
        asker: Asker,
        *,
        provider: str,
        model: str,
        status: str,
        input_tokens: int = 0,
        output_tokens: int = 0,
        estimated: bool = False,
        cost: int = 0,
    ) -> None:
        """Write one request down, whatever has become of it; it raises nothing.

        A request whose time is up has used something too. So this waits for work that goes on when
        the request is cut off. One that has failed waits for a moment only: it may be cut off
        already, which happens once, and what it has waited for in vain may be the same stores.
        """
        entry = UsageEntry(
            id=str(uuid4()),
            user_id=asker.user_id,
            request_id=asker.request_id,
            model=model,
            provider=provider,
            day=datetime.fromtimestamp(self._wall(), UTC).date().isoformat(),
            status=status,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            estimated=estimated,
            cost=cost,
        )
        running = self._beside(partial(self._keep, asdict(entry)))
        running.join(None if status == "success" else _FAILED_S)

    def _keep(self, entry: dict[str, Any]) -> None:
        try:
            if not self._cache.write_behind(
                f"{_PREFIX}{entry['id']}", entry, self._writer, _KEPT_S
            ):
                self._write([(entry, None)])
        except Exception:  # noqa: BLE001 - whatever it is, the client gets its answer
            # The log is the last place that it can be found in.
            _log.exception("an entry of the usage ledger is lost: %s", entry)

    def _write(self, writes: Sequence[tuple[Mapping[str, Any] | None, object]]) -> None:
        # An entry is never deleted; that the cache forgets it says nothing about the ledger.
        self._store.add([entry for entry, _ in writes if entry is not None])
