"""From numbers to the text that Prometheus reads."""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from flask_muset.metrics import files
from flask_muset.metrics.store import Store, read_entries

__all__ = ["FolderCollector", "StoreCollector", "labels_in_archive", "render"]


@lru_cache(maxsize=65_536)
def _parsed(key: bytes) -> tuple[str, str, dict[str, str], str]:
    metric, sample, labels, text = json.loads(key)
    return metric, sample, labels, text


def _metrics(kind: str, numbers: dict[bytes, float]) -> Iterator[Metric]:
    """The metrics of one type, all their samples together."""
    found: OrderedDict[str, Metric] = OrderedDict()
    buckets: dict[str, dict[tuple[tuple[str, str], ...], list[tuple[float, float]]]] = {}
    for key, value in numbers.items():
        name, sample, labels, text = _parsed(key)
        metric = found.get(name)
        if metric is None:
            metric = found[name] = Metric(name, text, kind)
        bound = labels.get("le") if kind == "histogram" else None
        if bound is None:
            metric.add_sample(sample, labels, value)
            continue
        others = tuple((k, v) for k, v in labels.items() if k != "le")
        buckets.setdefault(name, {}).setdefault(others, []).append((float(bound), value))
    for name, by_labels in buckets.items():
        _accumulate(found[name], by_labels)
    yield from found.values()


def _accumulate(
    metric: Metric, by_labels: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]]
) -> None:
    """A bucket counts those below it too; the highest has them all."""
    for others, values in by_labels.items():
        labels, count = dict(others), 0.0
        for bound, value in sorted(values):
            count += value
            le = floatToGoString(bound)  # type: ignore[no-untyped-call]
            metric.add_sample(f"{metric.name}_bucket", {**labels, "le": le}, count)
        metric.add_sample(f"{metric.name}_count", labels, count)


class StoreCollector:
    """The numbers of one app that are in memory.

    Args:
        store: What has them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        for kind, numbers in self._store.own().items():
            yield from _metrics(kind.partition("_")[0], numbers)


class FolderCollector:
    """The numbers of all workers, dead ones too.

    Args:
        folder: Of their files.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """All metrics.

        Raises:
            TimeoutError: The files were locked for too long. Read without the lock they might count
                a dead worker twice, and fall the next time.
        """
        sums: dict[str, dict[bytes, float]] = {}
        with files.locked(self._folder, exclusive=False) as mine:
            if not mine:
                raise TimeoutError(f"metrics: the files in {self._folder} stayed locked")
            gauges = []
            for path in files.paths(self._folder):
                kind = os.path.basename(path).partition("_")[0]
                if kind == "gauge":
                    if _has_content(path):
                        gauges.append(path)
                    continue
                of_kind = sums.setdefault(kind, {})
                for key, value, _ in read_entries(path):
                    of_kind[key] = of_kind.get(key, 0.0) + value
            merged = list(MultiProcessCollector.merge(gauges))  # type: ignore[no-untyped-call]
        for kind, numbers in sums.items():
            yield from _metrics(kind, numbers)
        yield from merged


def _has_content(path: str) -> bool:
    """A worker may have made a file this moment; prometheus_client fails on an empty one."""
    try:
        return os.path.getsize(path) > 0
    except FileNotFoundError:
        return False


def labels_in_archive(folder: str) -> dict[str, set[tuple[str, ...]]]:
    """By the name of each metric that dead workers have left, the label values of its series."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for kind in ("counter", "histogram"):
        for key, _, _ in read_entries(files.archived(folder, kind)):
            metric, sample, labels, _ = _parsed(key)
            if "le" not in labels:
                name = sample if kind == "counter" else metric
                found.setdefault(name, set()).add(tuple(labels.values()))
    return found


def render(collectors: Iterable[Any], accept: str | None) -> tuple[bytes, str]:
    """The text of collectors and its content type, in the format that the reader asks for."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    encoder, content_type = choose_encoder(accept or "")
    return encoder(registry), content_type


def process_registry() -> Any:
    """What the app's own code, and prometheus_client for the process, has in this process."""
    return REGISTRY
