"""The seven service level objectives, defined once: judged here, alerted on, and loaded against.

A latency objective says that a share of all operations takes less than a limit. The limit is a
bucket of the histogram, so the share is counted, not estimated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client.parser import text_string_to_metric_families

__all__ = [
    "MIN_SAMPLES",
    "OBJECTIVES",
    "Finding",
    "Kind",
    "Objective",
    "Verdict",
    "judge",
    "read_series",
    "series_of",
]

#: A share of fewer operations says little: one slow one in 20 is 5 %.
MIN_SAMPLES = 100


class Kind(StrEnum):
    """How an objective is judged."""

    LATENCY = "latency"
    HIT_RATE = "hit_rate"
    OFFERED_LOAD = "offered_load"


class Verdict(StrEnum):
    """What is said of an objective."""

    HOLDS = "holds"
    MISSED = "missed"
    NO_DATA = "no data"


@dataclass(frozen=True, slots=True)
class Objective:
    """One promise.

    Attributes:
        key: Label and part of names.
        title: For people.
        target: For people.
        kind: How it is judged.
        metric: Of the service, without `_bucket` and the like.
        limit: Seconds for a latency, a share for a rate, a number under offered load.
        share: Of the operations that must be within a latency's limit.
        only: Labels that a series must have, by name, as values or beginnings of values that end
            in `*`.
        but: The same for those that it must not have.
    """

    key: str
    title: str
    target: str
    kind: Kind
    metric: str
    limit: float
    share: float = 0.95
    only: tuple[tuple[str, str], ...] = ()
    but: tuple[tuple[str, str], ...] = ()


OBJECTIVES: tuple[Objective, ...] = (
    Objective(
        "api",
        "API response time",
        "95 % under 100 ms",
        Kind.LATENCY,
        "muset_http_request_duration_seconds",
        0.1,
        only=(("endpoint", "/api/*"),),
        but=(("endpoint", "/api/v1/ask"),),
    ),
    Objective(
        "ai",
        "AI response time",
        "95 % under 5 s",
        Kind.LATENCY,
        "muset_ai_request_duration_seconds",
        5.0,
    ),
    Objective(
        "database",
        "Database query time",
        "95 % under 50 ms",
        Kind.LATENCY,
        "muset_database_query_duration_seconds",
        0.05,
    ),
    Objective(
        "cache_get",
        "Cache get time",
        "95 % under 10 ms",
        Kind.LATENCY,
        "muset_cache_get_duration_seconds",
        0.01,
    ),
    Objective(
        "hit_rate",
        "Cache hit rate",
        "above 80 %",
        Kind.HIT_RATE,
        "muset_cache_operations_total",
        0.8,
        only=(("operation", "get"),),
    ),
    Objective(
        "concurrency",
        "Concurrent requests",
        "100 at once, under offered load",
        Kind.OFFERED_LOAD,
        "muset_http_requests_active",
        100,
    ),
    Objective(
        "throughput",
        "Throughput",
        "1000 requests/s, under offered load",
        Kind.OFFERED_LOAD,
        "muset_http_requests_total",
        1_000,
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a scrape says of an objective.

    Attributes:
        figure: For people.
        samples: Operations that it rests on.
    """

    objective: Objective
    figure: str
    samples: int
    verdict: Verdict


#: A series: its name, its labels and its value.
Series = tuple[str, dict[str, str], float]


def judge(exposition: str, since: str = "") -> Sequence[Finding]:
    """Judge all objectives by a scrape, which counts from the start of the service.

    Args:
        exposition: In Prometheus' text format.
        since: An earlier one, to judge only by what has happened since then.

    Raises:
        ValueError: It cannot be read.
    """
    series = read_series(exposition, since)
    judges = {
        Kind.LATENCY: _judge_latency,
        Kind.HIT_RATE: _judge_hit_rate,
        Kind.OFFERED_LOAD: _judge_load,
    }
    return [judges[objective.kind](objective, series) for objective in OBJECTIVES]


def read_series(exposition: str, since: str = "") -> list[Series]:
    """The series of a scrape, without what an earlier one had counted already.

    Gauges mean nothing in such a difference; no objective is judged by one.

    Raises:
        ValueError: One of them cannot be read.
    """
    before = {(name, *sorted(labels.items())): value for name, labels, value in _samples(since)}
    return [
        (name, labels, value - before.get((name, *sorted(labels.items())), 0.0))
        for name, labels, value in _samples(exposition)
    ]


def _samples(exposition: str) -> list[Series]:
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    ]


def _matches(value: str, pattern: str) -> bool:
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def series_of(objective: Objective, series: Iterable[Series], suffix: str) -> list[Series]:
    """Those of the objective's metric with this ending, and the labels that count."""
    return [
        (name, labels, value)
        for name, labels, value in series
        if name == objective.metric + suffix
        and all(_matches(labels.get(k, ""), v) for k, v in objective.only)
        and not any(_matches(labels.get(k, ""), v) for k, v in objective.but)
    ]


def _verdict(samples: float, held: bool) -> Verdict:
    if samples < MIN_SAMPLES:
        return Verdict.NO_DATA
    return Verdict.HOLDS if held else Verdict.MISSED


def _judge_latency(objective: Objective, series: Sequence[Series]) -> Finding:
    buckets = series_of(objective, series, "_bucket")
    within = sum(v for _, labels, v in buckets if float(labels["le"]) == objective.limit)
    count = sum(v for _, _, v in series_of(objective, series, "_count"))
    share = within / count if count else 0.0
    figure = f"{share:.1%} under {objective.limit:g} s" if count else "-"
    return Finding(objective, figure, int(count), _verdict(count, share >= objective.share))


def _judge_hit_rate(objective: Objective, series: Sequence[Series]) -> Finding:
    found = series_of(objective, series, "")
    hits = sum(v for _, labels, v in found if labels["status"] in ("hit", "stale"))
    reads = hits + sum(v for _, labels, v in found if labels["status"] == "miss")
    rate = hits / reads if reads else 0.0
    figure = f"{rate:.1%}" if reads else "-"
    return Finding(objective, figure, int(reads), _verdict(reads, rate > objective.limit))


def _judge_load(objective: Objective, series: Sequence[Series]) -> Finding:
    # What nobody asks for cannot be missed: only a load test can tell.
    return Finding(objective, "judged under offered load", 0, Verdict.NO_DATA)
