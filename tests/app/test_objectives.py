"""The objectives: judged, alerted on, and drawn from one definition."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from flask_muset.metrics.registry import METRICS, Kind
from muset.objectives import OBJECTIVES, judge

ROOT = Path(__file__).parents[2]
GENERATE = runpy.run_path(str(ROOT / "deploy" / "generate.py"))
#: Labels of a series of each latency objective.
LABELS = {"api": 'endpoint="/api/v1/documents",method="GET"', "ai": 'model="m"'}


def verdicts(exposition):
    return {each.objective.key: each.verdict.value for each in judge(exposition)}


def histogram(name, labels, le, within, count):
    return (
        f"# TYPE {name} histogram\n"
        f'{name}_bucket{{{labels},le="{le}"}} {within}\n'
        f'{name}_bucket{{{labels},le="+Inf"}} {count}\n'
        f"{name}_count{{{labels}}} {count}\n{name}_sum{{{labels}}} 1\n"
    )


def test_each_objective_is_judged_by_its_own_series():
    """Shares are counted at the limit's bucket; other endpoints and few samples do not count."""
    api = "muset_http_request_duration_seconds"
    fine = histogram(api, 'endpoint="/api/v1/documents"', "0.1", 96, 100)
    assert verdicts(fine)["api"] == "holds"
    slow = histogram(api, 'endpoint="/api/v1/documents"', "0.1", 94, 100)
    assert verdicts(slow)["api"] == "missed"
    few = histogram(api, 'endpoint="/api/v1/documents"', "0.1", 0, 99)
    assert verdicts(few)["api"] == "no data"
    for endpoint in ("/api/v1/ask", "/health/live"):
        other = histogram(api, f'endpoint="{endpoint}"', "0.1", 0, 1000)
        assert verdicts(other)["api"] == "no data"
    query = histogram("muset_database_query_duration_seconds", 'table="x"', "0.05", 950, 1000)
    assert verdicts(query)["database"] == "holds"
    cache = "# TYPE muset_cache_operations counter\n" + "".join(
        f'muset_cache_operations_total{{operation="{operation}",status="{status}"}} {value}\n'
        for operation, status, value in (
            ("get", "hit", 790), ("get", "stale", 20), ("get", "miss", 190), ("set", "error", 99),
        )
    )  # fmt: skip
    assert verdicts(cache)["hit_rate"] == "holds"
    assert verdicts(cache.replace("790", "700"))["hit_rate"] == "missed"
    assert set(verdicts("").values()) == {"no data"}


def test_limits_are_buckets():
    """A latency's limit is a bound of its histogram, else the share could not be counted."""
    table = {f"muset_{metric.name}": metric for metric in METRICS}
    for objective in OBJECTIVES:
        metric = table[objective.metric]
        if objective.kind.value == "latency":
            assert metric.kind is Kind.HISTOGRAM
            assert objective.limit in metric.buckets
        assert {name for name, _ in objective.only + objective.but} <= set(metric.labels)


@pytest.mark.parametrize("path", GENERATE["files"](), ids=lambda path: path.name)
def test_what_is_generated_is_what_is_committed(path):
    """Rules and dashboard are those that `make generate` makes."""
    assert path.read_text(encoding="utf-8") == GENERATE["files"]()[path]


def test_every_name_exists():
    """Rules and dashboard use metrics of the table and recorded series alone."""
    known = {f"muset_{metric.name}" for metric in METRICS}
    for text in GENERATE["files"]().values():
        for name in re.findall(r"muset_[a-z_]+", text):
            assert name in known or re.sub(r"_(bucket|count|sum)$", "", name) in known, name
        recorded = set(re.findall(r"muset:[a-z_]+:ratio_rate\d+[mhd]", text))
        assert recorded <= {
            GENERATE["recorded"](objective, window)
            for objective in GENERATE["latencies"]()
            for window in GENERATE["WINDOWS"]
        }


def test_the_dashboard_adds_up_only_what_is_each_instance_s_own():
    """A gauge that all instances say alike, or of the worst one, is their maximum, no sum."""
    shown = {panel["targets"][0]["expr"] for panel in GENERATE["dashboard"]()["panels"]}
    assert "max(muset_write_behind_pending)" in shown
    assert "max by (name, state) (muset_circuit_breaker_state)" in shown
    assert "sum(muset_http_requests_active)" in shown
    calls = "sum by (client, outcome) (rate(muset_redis_calls_total[5m]))"
    assert f"{calls} or on() 0 * max(muset_build_info)" in shown
    alike = {metric.name for metric in METRICS if metric.across == "livemax"}
    sums = [expr.partition(" or ")[0] for expr in shown]
    added = {name for expr in sums for name in re.findall(r"sum.*\(muset_(\w+)\)$", expr)}
    assert added
    assert not alike & added


def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    return found


def series(objective, within, count):
    labels = LABELS.get(objective.key, "")
    bucket = ",".join(filter(None, [labels, f'le="{float(objective.limit)}"']))
    return [
        {"series": f"{objective.metric}_bucket{{{bucket}}}", "values": within},
        {"series": f"{objective.metric}_count{{{labels}}}", "values": count},
    ]


def gauges(oldest, dead):
    """What write-behind says, the same in two instances."""
    said = {"write_behind_oldest_seconds": oldest, "write_behind_dead_letters": dead}
    return [
        {"series": f'muset_{name}{{instance="{instance}"}}', "values": values}
        for name, values in said.items()
        for instance in ("a", "b")
    ]


def fired(alert):
    return {"exp_labels": alert["labels"], "exp_annotations": alert["annotations"]}


def test_each_alert_fires_once(tmp_path):
    """Seven bad hours fire every alert, for longer windows have no more; five minutes fire none."""
    alerts = GENERATE["alerts"]()
    slow, spike = [], []
    for objective in GENERATE["latencies"]():
        slow += series(objective, "0+0x430", "0+100x430")
        spike += series(objective, "0+100x360 36000+0x5 36000+100x30", "0+100x400")
    cache = 'muset_cache_operations_total{operation="get",status="%s"}'
    slow += [
        {"series": cache % "hit", "values": "0+70x430"},
        {"series": cache % "miss", "values": "0+30x430"},
        *gauges(oldest="61+0x430", dead="1+0x430"),
    ]
    # Half of the limit, twice, is none.
    spike += gauges(oldest="31+0x360 61+0x5 31+0x30", dead="0+0x400")
    tests = [
        {
            "interval": "1m",
            "input_series": slow,
            "alert_rule_test": [
                {"eval_time": "7h", "alertname": alert["alert"], "exp_alerts": [fired(alert)]}
                for alert in alerts
            ],
        },
        {
            "interval": "1m",
            "input_series": spike,
            "alert_rule_test": [
                {"eval_time": "365m", "alertname": alert["alert"], "exp_alerts": []}
                for alert in alerts
            ],
        },
    ]
    rules = str(ROOT / "deploy" / "prometheus" / "rules.yml")
    page = {"rule_files": [rules], "evaluation_interval": "5m", "tests": tests}
    checked = subprocess.run([promtool(), "check", "rules", rules], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    check(page, tmp_path)


def check(page, folder):
    """promtool's own tests hold."""
    (folder / "tests.yml").write_text(json.dumps(page))
    done = subprocess.run(
        [promtool(), "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]


def test_a_counter_that_has_counted_nothing_is_shown_as_0(tmp_path):
    """Only if the service is there, and only until there is something else to be shown."""
    metric = next(metric for metric in METRICS if metric.name == "errors_total")
    expr, _ = GENERATE["expression"](metric)
    here = {"series": 'muset_build_info{instance="a"}', "values": "1+0x10"}
    labels = '{category="timeout",severity="error"}'
    counted = {"series": f"muset_errors_total{labels}", "values": "0+60x10"}
    cases = (
        ([here], [{"labels": "{}", "value": 0}]),
        ([here, counted], [{"labels": labels, "value": 1}]),
        ([], []),
    )
    tests = [
        {
            "interval": "1m",
            "input_series": given,
            "promql_expr_test": [{"expr": expr, "eval_time": "10m", "exp_samples": expected}],
        }
        for given, expected in cases
    ]
    check({"tests": tests}, tmp_path)


def test_the_runbook_has_an_entry_for_each_alert():
    """Each alert's link leads to a heading of the runbook."""
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert headings == [alert["alert"] for alert in GENERATE["alerts"]()]
