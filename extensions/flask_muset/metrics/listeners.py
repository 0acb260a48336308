"""What the other extensions tell, counted."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from flask_muset.metrics.series import Families, Histogram
from flask_muset.metrics.store import UNITS, Cell
from flask_muset.signals import (
    BreakerEvent,
    BreakerState,
    ErrorEvent,
    LinkEvent,
    PolicyEvent,
    SharingEvent,
    WriteBehindEvent,
    breaker_changed,
    error_handled,
    policy_decided,
    redis_link_changed,
    sharing_changed,
    write_behind_measured,
)

__all__ = ["Listeners"]


class Listeners:
    """Listens for one app, as long as somebody keeps this object.

    Args:
        families: Where the app's metrics are.
        concerns: Whether a signal's sender is the app.
    """

    def __init__(self, families: Families, concerns: Callable[[Any], bool]) -> None:
        self._families = families
        self._concerns = concerns
        self._store = families.store
        #: Bounded by the series that it stands for.
        self._operations: dict[tuple[str, str], Cell] = {}
        self._get_seconds: Histogram = families["cache_get_duration_seconds"].get()
        error_handled.connect(self.on_error)
        policy_decided.connect(self.on_decision)
        breaker_changed.connect(self.on_breaker)
        redis_link_changed.connect(self.on_link)
        sharing_changed.connect(self.on_sharing)
        write_behind_measured.connect(self.on_write_behind)

    def on_error(self, sender: Any, *, event: ErrorEvent, **_: Any) -> None:
        """Count an error."""
        if self._concerns(sender):
            self._families["errors_total"].add(1, event.category.value, event.severity.value)

    def on_decision(self, sender: Any, *, event: PolicyEvent, **_: Any) -> None:
        """Count what a part of a policy did."""
        if self._concerns(sender):
            self._families["policy_decisions_total"].add(
                1, event.policy, event.part, event.decision.value
            )

    def on_breaker(self, sender: Any, *, event: BreakerEvent, **_: Any) -> None:
        """Show a breaker's new state."""
        if self._concerns(sender):
            self.show_breaker(event.name, event.new)

    def show_breaker(self, name: str, state: str) -> None:
        """Show the state of a circuit breaker."""
        self._show("circuit_breaker_state", state, BreakerState, name)

    def on_link(self, sender: Any, *, event: LinkEvent, **_: Any) -> None:
        """Show the new state of a link to Redis."""
        if self._concerns(sender):
            self.show_link(event.name, event.state)

    def show_link(self, name: str, state: str) -> None:
        """Show the state of a link to Redis."""
        self._show("redis_link_state", state, ("up", "doubt", "down"), name)

    def on_sharing(self, sender: Any, *, event: SharingEvent, **_: Any) -> None:
        """Show whether all workers agree."""
        if self._concerns(sender):
            self._show("shared_state", event.state, ("shared", "doubt", "local"))

    def _show(self, family: str, state: str, states: Iterable[str], *labels: str) -> None:
        for each in states:
            self._families[family].get(*labels, str(each)).set(float(each == state))

    def count_cache(self, operation: str, status: str, duration_s: float | None) -> None:
        """Count an operation on the app's cache, and how long a read took.

        Written out like what is counted for every request: a call costs as much as the update.
        """
        key = operation, status
        number = self._operations.get(key) or self._operation(key)
        store = self._store
        if operation != "get" or duration_s is None:
            store.add(number, 1.0)
            return
        seconds = self._get_seconds
        total, bucket = seconds.total, seconds.buckets[bisect_left(seconds.bounds, duration_s)]
        exact = int(duration_s * UNITS) / UNITS
        with store._lock:
            if number.view is None or total.view is None or bucket.view is None:
                store.bind(number, total, bucket)
            number.view[number.index] += 1.0
            total.view[total.index] += exact
            bucket.view[bucket.index] += 1.0

    def _operation(self, key: tuple[str, str]) -> Cell:
        number, has_own = self._families["cache_operations_total"].find(key)
        cell: Cell = number.cell
        if has_own:
            self._operations[key] = cell
        return cell

    def on_write_behind(self, sender: Any, *, event: WriteBehindEvent, **_: Any) -> None:
        """Show how much waits to be written behind."""
        if self._concerns(sender):
            self._families["write_behind_pending"].get().set(event.pending)
            self._families["write_behind_oldest_seconds"].get().set(event.oldest_s)
            self._families["write_behind_dead_letters"].get().set(event.dead_letters)
