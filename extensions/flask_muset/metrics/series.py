"""The series of each metric: made once, kept, and bounded in number."""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any

from prometheus_client.mmap_dict import mmap_key
from prometheus_client.utils import floatToGoString

from flask_muset.metrics.registry import METRICS, Kind, Row
from flask_muset.metrics.store import Cell, Store, in_units

__all__ = ["OVERFLOW", "Families", "Family", "Histogram", "Number"]

#: Value of all labels of the series that takes what exceeds the cap.
OVERFLOW = "__overflow__"
_MAX_CHARACTERS = 120


class Number:
    """One series of a counter or a gauge."""

    __slots__ = ("cell", "store")

    def __init__(self, store: Store, cell: Cell) -> None:
        self.store = store
        self.cell = cell

    def add(self, amount: float = 1.0) -> None:
        """Add to it."""
        self.store.add(self.cell, amount)

    def set(self, value: float) -> None:
        """Set it."""
        self.store.set(self.cell, value)

    @property
    def value(self) -> float:
        """What this process has."""
        return self.store.value(self.cell)


class Histogram:
    """One series of a histogram."""

    __slots__ = ("bounds", "buckets", "store", "total")

    def __init__(
        self, store: Store, bounds: tuple[float, ...], total: Cell, buckets: list[Cell]
    ) -> None:
        self.store = store
        self.bounds = bounds
        self.total = total
        self.buckets = buckets

    def observe(self, value: float) -> None:
        """Count one value."""
        bucket = self.buckets[bisect_left(self.bounds, value)]
        self.store.add_observed(self.total, bucket, value)


class Family:
    """All series of one metric in this process.

    Args:
        store: Where the numbers are.
        row: What it is.
        namespace: Before its name.
        max_series: How many it may have; what exceeds them shares one more.
        overflowed: Called for each update that went there.
        archived: Labels of the series that dead workers have left.
    """

    def __init__(
        self,
        store: Store,
        row: Row,
        namespace: str,
        *,
        max_series: int,
        overflowed: Callable[[], None],
        archived: Callable[[str], frozenset[tuple[str, ...]]],
    ) -> None:
        self.name = f"{namespace}_{row.name}"
        self._store = store
        self._row = row
        self._max_series = max_series
        self._overflowed = overflowed
        self._archived = archived
        self._known: set[tuple[str, ...]] | None = None
        self._series: dict[tuple[str, ...], Any] = {}
        self._kind = row.kind.value
        if row.kind is Kind.GAUGE:
            self._kind += f"_{row.across}"

    def __len__(self) -> int:
        return len(self._series)

    def get(self, *labels: str) -> Any:
        """The series of these label values, or the one for what exceeds the cap."""
        return self.find(labels)[0]

    def find(self, labels: tuple[str, ...]) -> tuple[Any, bool]:
        """The same, and whether it is the labels' own."""
        found = self._series.get(labels)
        if found is not None:
            return found, True
        labels = tuple(str(label)[:_MAX_CHARACTERS] for label in labels)
        found = self._series.get(labels)
        if found is not None:
            return found, True
        if not self._has_room(labels):
            self._overflowed()
            return self._make((OVERFLOW,) * len(labels)), False
        return self._make(labels), True

    def _has_room(self, labels: tuple[str, ...]) -> bool:
        """Dead workers' series count too, else each new worker could add as many again."""
        if not labels:
            return True
        if self._known is None:
            self._known = set(self._archived(self.name))
        self._known.discard((OVERFLOW,) * len(labels))
        if labels in self._known:
            return True
        if len(self._known) >= self._max_series:
            return False
        self._known.add(labels)
        return True

    def _make(self, labels: tuple[str, ...]) -> Any:
        found = self._series.get(labels)
        if found is None:
            if self._row.kind is Kind.HISTOGRAM:
                found = self._histogram(labels)
            else:
                found = Number(self._store, self._cell(self.name, labels))
            found = self._series.setdefault(labels, found)
        return found

    def _histogram(self, labels: tuple[str, ...]) -> Histogram:
        bounds = self._row.buckets
        buckets = [
            self._cell(f"{self.name}_bucket", labels, floatToGoString(bound))  # type: ignore[no-untyped-call]
            for bound in (*bounds, inf)
        ]
        total = self._cell(f"{self.name}_sum", labels)
        return Histogram(self._store, bounds, total, buckets)

    def _cell(self, sample: str, labels: tuple[str, ...], bound: str | None = None) -> Cell:
        names, values = list(self._row.labels), list(labels)
        if bound is not None:
            names, values = [*names, "le"], [*values, bound]
        metric = self.name.removesuffix("_total")
        key = mmap_key(metric, sample, names, values, self._row.help)
        return self._store.cell(self._kind, key.encode())

    def add(self, amount: float, *labels: str) -> None:
        """Add to a series; an amount that no counter can take is left out."""
        if amount >= 0 and isfinite(amount):
            self.get(*labels).add(in_units(amount))

    def observe(self, value: float, *labels: str) -> None:
        """Count a value; one that no duration can have is left out."""
        if value >= 0 and isfinite(value):
            self.get(*labels).observe(value)


class Families:
    """All metrics of an app in one process.

    Args:
        store: Where the numbers are.
        namespace: Before all names.
        max_series: Of each metric.
        archived: By the full name of a metric, labels of the series that dead workers have left.
    """

    def __init__(
        self,
        store: Store,
        namespace: str,
        max_series: int,
        archived: Callable[[str], frozenset[tuple[str, ...]]] = lambda _name: frozenset(),
    ) -> None:
        self.store = store
        self._by_name: Mapping[str, Family] = {
            row.name: Family(
                store,
                row,
                namespace,
                max_series=max_series if row.name != "metrics_overflow_total" else len(METRICS),
                overflowed=self._counts_overflow_of(f"{namespace}_{row.name}"),
                archived=archived,
            )
            for row in METRICS
        }

    def _counts_overflow_of(self, name: str) -> Callable[[], None]:
        return lambda: self._by_name["metrics_overflow_total"].add(1, name)

    def __getitem__(self, name: str) -> Family:
        return self._by_name[name]
