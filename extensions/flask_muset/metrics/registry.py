"""The metrics: one table, from which the code, the documentation and dashboards are made."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BY_NAME", "METRICS", "Kind", "Row", "markdown_table"]


class Kind(StrEnum):
    """The types of Prometheus that are used here."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Row:
    """One metric.

    Attributes:
        name: Without the namespace.
        kind: Its type.
        labels: Their names.
        help: What it counts, for people.
        buckets: Upper bounds of a histogram, rising, without infinity.
        across: How the workers' values of a gauge become one: `livesum`, `livemax` or `livemin`;
            dead workers do not count.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    across: str = "livesum"


# Each has the bound of its objective as a bucket: 0.1 s, 5 s, 0.05 s and 0.01 s.
_HTTP_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_AI_S = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0)
_DATABASE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_CACHE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

METRICS: tuple[Row, ...] = (
    Row("http_requests_total", _C, ("method", "endpoint", "status_code"), "HTTP requests"),
    Row(
        "http_request_duration_seconds",
        _H,
        ("method", "endpoint"),
        "From the request's arrival to the end of its response, streams included",
        _HTTP_S,
    ),
    Row("http_requests_active", _G, (), "HTTP requests that have not ended"),
    Row("ai_requests_total", _C, ("model", "status"), "Requests to AI models"),
    Row("ai_request_duration_seconds", _H, ("model",), "Duration of requests to AI models", _AI_S),
    Row("ai_tokens_total", _C, ("model", "type"), "Tokens of AI models; type is input or output"),
    Row("database_queries_total", _C, ("operation", "table"), "Database queries"),
    Row(
        "database_query_duration_seconds",
        _H,
        ("operation", "table"),
        "Duration of database queries",
        _DATABASE_S,
    ),
    Row("cache_operations_total", _C, ("operation", "status"), "Cache operations"),
    Row("errors_total", _C, ("category", "severity"), "Errors that were handled or tracked"),
    Row(
        "metrics_overflow_total",
        _C,
        ("metric",),
        "Updates that went to the series __overflow__ because the metric has too many",
    ),
    Row("cache_get_duration_seconds", _H, (), "Duration of cache reads", _CACHE_S),
    Row(
        "circuit_breaker_state",
        _G,
        ("name", "state"),
        "1 for the state that a breaker is in, else 0; in any worker",
        across="livemax",
    ),
    Row(
        "shared_state",
        _G,
        ("state",),
        "1 for what workers know of their circuit breakers: shared, doubt or local; else 0",
        across="livemax",
    ),
    Row(
        "policy_decisions_total",
        _C,
        ("policy", "part", "decision"),
        "Retries, refusals, time-outs and fallbacks of policies",
    ),
    Row(
        "redis_link_state",
        _G,
        ("name", "state"),
        "1 for the state that a link to Redis is in, else 0; in any worker",
        across="livemax",
    ),
    Row("redis_calls_total", _C, ("client", "outcome"), "Calls of guarded Redis clients"),
    Row(
        "redis_call_duration_seconds",
        _H,
        ("client",),
        "Duration of calls of guarded Redis clients, refused ones too",
        _CACHE_S,
    ),
    Row("http_client_requests_total", _C, ("host", "status_code"), "Requests to other services"),
    Row(
        "http_client_request_duration_seconds",
        _H,
        ("host",),
        "Duration of requests to other services, up to the response's head for streams",
        _HTTP_S,
    ),
    Row("write_behind_pending", _G, (), "Writes that wait in the journal", across="livemax"),
    Row(
        "write_behind_oldest_seconds",
        _G,
        (),
        "Age of the oldest write that waits",
        across="livemax",
    ),
    Row("write_behind_dead_letters", _G, (), "Writes that were given up", across="livemax"),
    Row(
        "hub_delay_seconds",
        _G,
        (),
        "The longest that gevent's hub was late in the last 30 to 60 s, in the worst worker",
        across="livemax",
    ),
    Row("connections_open", _G, (), "Connections of clients to the fair worker"),
    Row("database_connections_used", _G, (), "Connections that queries have out of their pools"),
    Row("requests_in_flight", _G, (), "Requests that the limit of Resilience counts now"),
    Row("worker_memory_bytes", _G, (), "Resident memory of all workers"),
    Row("workers", _G, (), "Worker processes that have served requests"),
    Row("build_info", _G, ("version", "python"), "1; the labels are versions", across="livemax"),
)

BY_NAME = {row.name: row for row in METRICS}


def markdown_table(namespace: str = "muset") -> str:
    """The metrics as a Markdown table, for documentation."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for row in METRICS:
        labels = ", ".join(f"`{label}`" for label in row.labels) or "-"
        lines.append(f"| `{namespace}_{row.name}` | {row.kind.value} | {labels} | {row.help} |")
    return "\n".join(lines) + "\n"
