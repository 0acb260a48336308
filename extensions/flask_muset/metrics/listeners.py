"""What the other extensions tell, counted."""

from collections.abc import Callable
from typing import Any

from flask_muset.metrics.series import Families
from flask_muset.signals import (
    BreakerEvent,
    CacheEvent,
    ErrorEvent,
    LinkEvent,
    PolicyEvent,
    SharingEvent,
    WriteBehindEvent,
    breaker_changed,
    cache_operated,
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
        error_handled.connect(self.on_error)
        policy_decided.connect(self.on_decision)
        breaker_changed.connect(self.on_breaker)
        redis_link_changed.connect(self.on_link)
        sharing_changed.connect(self.on_sharing)
        cache_operated.connect(self.on_cache)
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
            self._show("circuit_breaker_state", event.name, event.new)
            self._families["circuit_breaker_state"].get(event.name, str(event.old)).set(
                float(event.old == event.new)
            )

    def on_link(self, sender: Any, *, event: LinkEvent, **_: Any) -> None:
        """Show the new state of a link to Redis."""
        if self._concerns(sender):
            for state in ("up", "doubt", "down"):
                self._families["redis_link_state"].get(event.name, state).set(0.0)
            self._show("redis_link_state", event.name, event.state)

    def on_sharing(self, sender: Any, *, event: SharingEvent, **_: Any) -> None:
        """Show whether all workers agree."""
        if self._concerns(sender):
            for state in ("shared", "doubt", "local"):
                self._families["shared_state"].get(state).set(float(state == event.state))

    def on_cache(self, sender: Any, *, event: CacheEvent, **_: Any) -> None:
        """Count an operation on the cache, and how long a read took."""
        if self._concerns(sender):
            self._families["cache_operations_total"].add(1, event.operation, event.status)
            if event.operation == "get" and event.duration_s is not None:
                self._families["cache_get_duration_seconds"].observe(event.duration_s)

    def on_write_behind(self, sender: Any, *, event: WriteBehindEvent, **_: Any) -> None:
        """Show how much waits to be written behind."""
        if self._concerns(sender):
            self._families["write_behind_pending"].get().set(event.pending)
            self._families["write_behind_oldest_seconds"].get().set(event.oldest_s)
            self._families["write_behind_dead_letters"].get().set(event.dead_letters)

    def _show(self, family: str, name: str, state: str) -> None:
        self._families[family].get(name, str(state)).set(1.0)
