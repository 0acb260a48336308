"""Makes the alert rules, the dashboard and nginx's errors of the tables that define them.

make generate
"""

import json
from pathlib import Path

from werkzeug.http import HTTP_STATUS_CODES

from flask_muset.error_handler.render import PROBLEM_TYPE, Answer, Form, render
from flask_muset.errors import TABLE, ErrorCategory
from flask_muset.metrics.registry import BY_NAME, METRICS, Kind, Row
from muset.objectives import OBJECTIVES, Objective
from muset.objectives import Kind as ObjectiveKind

DEPLOY = Path(__file__).parent
NAMESPACE = "muset"
#: Of the SRE workbook: how fast the budget is used up, over which two windows, and what to do.
BURN_RATES = (
    (14.4, "1h", "5m", "page"),
    (6.0, "6h", "30m", "page"),
    (3.0, "1d", "2h", "ticket"),
    (1.0, "3d", "6h", "ticket"),
)
#: The service calls models over connections of its own; ai_requests_total and the like count those.
NEVER_USED = {"http_client_requests_total", "http_client_request_duration_seconds"}
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
RUNBOOK = "docs/runbook.md"
#: A counter has no series before it has counted; 0 is the truth then, if the service is there.
ZERO = f"0 * max({NAMESPACE}_build_info)"
#: Of gauges that say how much is wrong: the gauge, the name of its alert, above what, for how long,
#: and what that means. A write is late when `/health/ready` says so.
WATCHED = (
    (
        "write_behind_oldest_seconds",
        "WriteBehindOld",
        60,
        "5m",
        "Write-behind: a write that was accepted has waited for more than 60 s, for 5 minutes.",
    ),
    (
        "write_behind_dead_letters",
        "WriteBehindDeadLetters",
        0,
        None,
        "Write-behind: writes that were accepted could not be brought to the database.",
    ),
)


#: What nginx answers itself: the statuses it has for it, what is answered, and after how many
#: seconds the same request may succeed. 494 and 497 are nginx's own: a head that is too large, and
#: plain HTTP on a port for TLS; 501 and 505 are for encodings and versions that it does not know.
NGINX_ERRORS = (
    ((400, 497, 501, 505), 400, ErrorCategory.VALIDATION, "The request cannot be read.", None),
    ((405,), 405, ErrorCategory.VALIDATION, "The method is not allowed.", None),
    ((408,), 408, ErrorCategory.TIMEOUT, "The request took too long to arrive.", 1),
    ((413,), 413, ErrorCategory.VALIDATION, "The request is too large.", None),
    ((414,), 414, ErrorCategory.VALIDATION, "The address is too long.", None),
    ((494,), 431, ErrorCategory.VALIDATION, "The headers are too large.", None),
    ((429,), 429, ErrorCategory.RATE_LIMIT, "Too many connections from this address.", 1),
    ((500,), 500, ErrorCategory.INTERNAL, TABLE[ErrorCategory.INTERNAL].message, None),
    ((502, 503), 502, ErrorCategory.EXTERNAL_SERVICE, "The service did not answer.", 1),
    ((504,), 504, ErrorCategory.TIMEOUT, "The service took too long.", 1),
)


def selector(objective: Objective, **more: str) -> str:
    """The labels of an objective's series, as PromQL has them."""
    parts = [f'{name}="{value}"' for name, value in more.items()]
    for equal, like, labels in (("=", "=~", objective.only), ("!=", "!~", objective.but)):
        for name, value in labels:
            is_beginning = value.endswith("*")
            text = f"{value[:-1]}.*" if is_beginning else value
            parts.append(f'{name}{like if is_beginning else equal}"{text}"')
    return "{" + ",".join(parts) + "}" if parts else ""


def slow_ratio(objective: Objective, window: str) -> str:
    """The share of operations that took longer than the objective's limit."""
    # As prometheus_client writes the bounds of buckets.
    within = f"{objective.metric}_bucket{selector(objective, le=str(float(objective.limit)))}"
    count = f"{objective.metric}_count{selector(objective)}"
    return f"1 - sum(rate({within}[{window}])) / sum(rate({count}[{window}]))"


def recorded(objective: Objective, window: str) -> str:
    """Name of a recording rule's series."""
    return f"{NAMESPACE}:{objective.key}_slow:ratio_rate{window}"


def latencies() -> list[Objective]:
    """The objectives that have burn-rate alerts."""
    return [each for each in OBJECTIVES if each.kind is ObjectiveKind.LATENCY]


def camel(key: str) -> str:
    """A name as alerts have it."""
    return "".join(word.capitalize() for word in key.split("_"))


def alert_name(objective: Objective, rate: float) -> str:
    """Name of one alert."""
    return f"{NAMESPACE.capitalize()}{camel(objective.key)}Burn{f'{rate:g}'.replace('.', '_')}x"


def alerts() -> list[dict[str, object]]:
    """All alerts."""
    return [*objective_alerts(), *gauge_alerts()]


def gauge_alerts() -> list[dict[str, object]]:
    """The alerts on gauges."""
    found: list[dict[str, object]] = []
    for gauge, title, limit, lasting, summary in WATCHED:
        name = f"{NAMESPACE.capitalize()}{title}"
        shown, _ = expression(BY_NAME[gauge])
        found.append(
            {
                "alert": name,
                "expr": f"{shown} > {limit}",
                **({} if lasting is None else {"for": lasting}),
                "labels": {"severity": "ticket"},
                "annotations": {"summary": summary, "runbook": f"{RUNBOOK}#{name.lower()}"},
            }
        )
    return found


def objective_alerts() -> list[dict[str, object]]:
    """The alerts on objectives."""
    found: list[dict[str, object]] = []
    for objective in latencies():
        for rate, long, short, severity in BURN_RATES:
            limit = f"{rate * (1 - objective.share):.10g}"
            name = alert_name(objective, rate)
            found.append(
                {
                    "alert": name,
                    "expr": f"{recorded(objective, long)} > {limit} "
                    f"and {recorded(objective, short)} > {limit}",
                    "labels": {"severity": severity, "objective": objective.key},
                    "annotations": {
                        "summary": f"{objective.title}: the budget of '{objective.target}' is "
                        f"used up {rate:g} times too fast over {long} and {short}.",
                        "runbook": f"{RUNBOOK}#{name.lower()}",
                    },
                }
            )
    hit = next(each for each in OBJECTIVES if each.kind is ObjectiveKind.HIT_RATE)
    hits = f'sum(rate({hit.metric}{{operation="get",status=~"hit|stale"}}[30m]))'
    reads = f'sum(rate({hit.metric}{{operation="get",status=~"hit|stale|miss"}}[30m]))'
    name = f"{NAMESPACE.capitalize()}{camel(hit.key)}Low"
    found.append(
        {
            "alert": name,
            "expr": f"{hits} / {reads} < {hit.limit:g}",
            "for": "15m",
            "labels": {"severity": "ticket", "objective": hit.key},
            "annotations": {
                "summary": f"{hit.title}: not {hit.target} over 30 minutes.",
                "runbook": f"{RUNBOOK}#{name.lower()}",
            },
        }
    )
    return found


def rules() -> dict[str, object]:
    """The recording rules and the alerts."""
    recordings = [
        {
            "record": recorded(objective, window),
            "expr": slow_ratio(objective, window),
            "labels": {"objective": objective.key},
        }
        for objective in latencies()
        for window in WINDOWS
    ]
    return {
        "groups": [
            {"name": f"{NAMESPACE}-objectives", "interval": "1m", "rules": recordings},
            {"name": f"{NAMESPACE}-alerts", "rules": alerts()},
        ]
    }


def yaml(value: object, indent: int = 0) -> str:
    """Write plain data as YAML; texts are written as JSON, which YAML reads."""
    pad = "  " * indent
    lines = []
    if isinstance(value, dict):
        for key, each in value.items():
            if isinstance(each, dict | list):
                lines.append(f"{pad}{key}:\n{yaml(each, indent + 1)}")
            else:
                lines.append(f"{pad}{key}: {json.dumps(each)}\n")
    elif isinstance(value, list):
        for each in value:
            text = yaml(each, indent + 1)
            lines.append(f"{pad}- {text[len(pad) + 2 :]}")
    return "".join(lines)


def expression(metric: Row) -> tuple[str, str]:
    """What a panel shows of a metric, and its legend."""
    name = f"{NAMESPACE}_{metric.name}"
    labels = ", ".join(metric.labels)
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    if metric.kind is Kind.HISTOGRAM:
        by = f"le, {labels}" if labels else "le"
        return f"histogram_quantile(0.95, sum by ({by}) (rate({name}_bucket[5m])))", legend
    inner = f"rate({name}[5m])" if metric.kind is Kind.COUNTER else name
    # Instances become one as their workers do.
    together = metric.across.removeprefix("live")
    shown = f"{together} by ({labels}) ({inner})" if labels else f"{together}({inner})"
    return (f"{shown} or on() {ZERO}" if metric.kind is Kind.COUNTER else shown), legend


def unit(metric: Row) -> str:
    """Grafana's unit of a panel."""
    if metric.name.endswith("_seconds"):
        return "s"
    if metric.name.endswith("_bytes"):
        return "bytes"
    return "reqps" if metric.kind is Kind.COUNTER else "short"


def panel(number: int, title: str, expr: str, legend: str, of_unit: str) -> dict[str, object]:
    """One graph, three in a row."""
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"h": 8, "w": 8, "x": 8 * ((number - 1) % 3), "y": 8 * ((number - 1) // 3)},
        "fieldConfig": {"defaults": {"unit": of_unit}, "overrides": []},
        "targets": [{"refId": "A", "expr": expr, "legendFormat": legend or title}],
    }


def dashboard() -> dict[str, object]:
    """The objectives first, then every metric that the service has."""
    shown = [
        (f"{each.title}: share above {each.limit:g} s", recorded(each, "5m"), "", "percentunit")
        for each in latencies()
    ]
    shown += [
        (metric.help, *expression(metric), unit(metric))
        for metric in METRICS
        if metric.name not in NEVER_USED
    ]
    return {
        "uid": NAMESPACE,
        "title": "Muset",
        "schemaVersion": 39,
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [panel(number, *each) for number, each in enumerate(shown, 1)],
    }


def nginx_errors() -> str:
    """Errors of nginx itself in the form of the service's."""
    form = Form(PROBLEM_TYPE, json.dumps, "/errors")
    blocks = []
    for own, status, category, message, wait_s in NGINX_ERRORS:
        row = TABLE[category]
        answer = Answer(
            row.error, message, category, row.severity, wait_s is not None, status, wait_s
        )
        content_type, body = render(
            answer, "$edge_path", "$edge_request_id", form, details={}, errors=()
        )
        # Python's own phrases differ from version to version.
        text = json.dumps(json.loads(body) | {"title": HTTP_STATUS_CODES[status]})
        numbers = " ".join(map(str, own))
        retry = "" if wait_s is None else f"    add_header Retry-After {wait_s} always;\n"
        blocks.append(
            f"error_page {numbers} = /_nginx/{status};\nlocation = /_nginx/{status} {{\n"
            f"    internal;\n    default_type {content_type};\n"
            f"    add_header X-Request-ID $edge_request_id always;\n{retry}"
            f"    return {status} '{text}';\n}}\n"
        )
    return "".join(blocks)


def files() -> dict[Path, str]:
    """What is generated, by its path."""
    head = "# Made by deploy/generate.py from the metrics' table and the objectives.\n"
    of_errors = "# Made by deploy/generate.py from the table of errors.\n"
    return {
        DEPLOY / "nginx" / "errors.conf": of_errors + nginx_errors(),
        DEPLOY / "prometheus" / "rules.yml": head + yaml(rules()),
        DEPLOY / "grafana" / "muset.json": json.dumps(dashboard(), indent=1) + "\n",
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path)
