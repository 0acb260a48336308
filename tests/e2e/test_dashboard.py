"""Every expression of the dashboard, asked of a real Prometheus after a load run with faults."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from postgres_server import PostgresServer
from redis_server import free_port

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "locust"))

from stack import MissingError, running  # noqa: E402 - it is no package

#: What has no series here, each with its reason.
SILENT = {
    "muset_metrics_overflow_total": "no metric has too many series",
    "muset_http_client_requests_total": "for apps that instrument httpx; models are asked without",
    "muset_http_client_request_duration_seconds": "likewise",
}


def expressions():
    """Title and expression of each query of the dashboard."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "muset.json").read_text())
    panels = list(dashboard["panels"])
    for panel in panels:
        panels += panel.get("panels", [])
    return [
        (panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])
    ]


@contextlib.contextmanager
def prometheus(folder, target):
    """One that reads a service every second, by the shipped rules; gives the URL of its queries."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    # The rules are those that are shipped; a run of a minute cannot wait a minute for each.
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    (folder / "rules.yml").write_text(rules.replace('interval: "1m"', 'interval: "2s"'))
    jobs = [{"job_name": "muset", "static_configs": [{"targets": [target]}]}]
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
              "rule_files": ["rules.yml"], "scrape_configs": jobs}  # fmt: skip
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    with (folder / "prometheus.txt").open("wb") as output:
        process = subprocess.Popen(
            [program, f"--config.file={folder}/prometheus.yml",
             f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/-/ready", timeout=5).ok:
                    break
            said = (folder / "prometheus.txt").read_text(errors="replace")
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.1)
        yield f"{url}/api/v1/query"
    finally:
        process.terminate()
        process.wait(20)


def load(stack, shape):
    """Let Locust's users do what they do, with what the shape breaks."""
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "locust" / "locustfile.py")]
    done = subprocess.run(
        [*command, "--headless", "--only-summary"],
        env=os.environ | stack.environ() | {"LOAD_SHAPE": shape},
        cwd=ROOT, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    # It has come to its end; how slow all was meanwhile is for others to judge.
    assert "Counts:" in done.stdout, done.stderr[-3000:]
    return done.stdout


def ask(url, expression):
    """The numbers that an expression comes to now."""
    answer = requests.get(url, params={"query": expression}, timeout=30).json()
    assert answer["status"] == "success", (expression, answer)
    values = [float(one["value"][1]) for one in answer["data"]["result"]]
    return [value for value in values if not math.isnan(value)]


def provoke(stack):
    """Cause what chance may not: an error, as all faults are withstood, and a breaker's change."""
    head = {"Authorization": f"Bearer {stack.key}"}
    answer = requests.get(f"{stack.url}/api/v1/documents/999999", headers=head, timeout=30)
    assert answer.status_code == 404
    url = f"{stack.url}/api/v1/admin/policies/database"
    for mode in ("closed", "auto"):
        assert requests.post(url, json={"mode": mode}, headers=head, timeout=30).ok


def reason(expression):
    """Why it is silent here, empty if it must not be."""
    found = [why for name, why in SILENT.items() if re.search(rf"\b{name}(_bucket)?\[", expression)]
    return "".join(found)


def ask_all(url):
    """Each expression with its numbers; what comes with the next scrapes is waited for."""
    found, until = {}, time.monotonic() + 20
    while True:
        found |= {expr: ask(url, expr) for _, expr in expressions() if not found.get(expr)}
        if all(found[expr] or reason(expr) for expr in found) or time.monotonic() > until:
            return found
        time.sleep(1)


@pytest.mark.full_only
@pytest.mark.claim(
    "After a load run with faults on PostgreSQL and Redis, each expression of the dashboard "
    "returns data from a real Prometheus that scraped it, but for those that are listed"
)
def test_every_expression_has_data(prove, tmp_path):
    """None is an error, and what is listed as silent is silent."""
    server = PostgresServer()
    try:
        database = server.start().database()
        place, load_place = tmp_path / "prometheus", tmp_path / "stack"
        place.mkdir()
        load_place.mkdir()
        try:
            with running(load_place, DATABASE_URL=database) as stack:
                target = stack.service_url.removeprefix("http://")
                with prometheus(place, target) as url:
                    shown = load(stack, "fault")
                    provoke(stack)
                    found = ask_all(url)
        except MissingError as error:
            pytest.skip(str(error))
    finally:
        server.remove()
    silent = [expression for expression, values in found.items() if not values]
    names = ", ".join(f"`{name}` ({why})" for name, why in SILENT.items())
    prove.figure(f"{len(found) - len(silent)} of {len(found)} have data; listed: {names}")
    assert len(found) >= 30
    unexplained = [expression for expression in silent if not reason(expression)]
    assert unexplained == [], shown
    # What is listed without need is listed no longer.
    assert len(silent) == len(SILENT)
