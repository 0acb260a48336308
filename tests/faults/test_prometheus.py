"""A real Prometheus reads the service and another team's app."""

import json
import shutil
import subprocess
import time

import pytest
import requests
from gunicorn_app import serve
from redis_server import free_port

SHOP = """
from flask import Flask, abort, current_app
from flask_muset import ErrorHandler, Metrics
from flask_muset.metrics import (
    track_ai_request, track_cache_operation, track_database_query, track_error, track_request)

app = Flask("shop")
app.config["METRICS_NAMESPACE"] = "shop"
ErrorHandler(app)
Metrics(app)

@app.get("/events")
def events():
    track_request(method="GET", endpoint="/job", status_code=200, duration=0.5)
    track_ai_request(model="m", duration=2.5, status="success", input_tokens=100, output_tokens=200)
    track_database_query(operation="select", table="users", duration=0.01)
    for status in ("hit", "hit", "miss"):
        track_cache_operation(operation="get", status=status)
    track_error(category="authentication", severity="high")
    return "tracked"

@app.get("/gone")
def gone():
    abort(404)
"""


class Prometheus:
    """One process that reads targets every half second."""

    def __init__(self, folder, targets):
        found = shutil.which("prometheus")
        if found is None:
            pytest.skip("prometheus is not installed")
        self.port = free_port()
        jobs = [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
            for name, port in targets.items()
        ]
        config = {"global": {"scrape_interval": "500ms", "scrape_timeout": "400ms"},
                  "scrape_configs": jobs}  # fmt: skip
        (folder / "prometheus.yml").write_text(json.dumps(config))
        self.process = subprocess.Popen(
            [found, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
             f"--web.listen-address=127.0.0.1:{self.port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def value(self, query):
        """The single value of a query, None without one."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query"
        found = requests.get(url, params={"query": query}, timeout=30).json()["data"]["result"]
        assert len(found) <= 1, (query, found)
        return float(found[0]["value"][1]) if found else None


@pytest.mark.claim(
    "After a scripted scenario of HTTP, AI, database, cache and error events, a real Prometheus "
    "that scrapes the service and a test app has the ten names with the right values"
)
def test_the_ten_metrics_of_the_guide(service, prove, tmp_path):
    """What was done is what Prometheus says, name by name."""
    folder = tmp_path / "shop"
    folder.mkdir()
    config = "from flask_muset.metrics.gunicorn import *\n"
    with serve(folder, SHOP, "-w", "2", config=config, stops_well=False) as (_, shop):
        service.start()
        targets = {"muset": service.port, "shop": shop}
        prometheus = Prometheus(tmp_path, targets)
        try:
            for _ in range(3):
                assert requests.get(f"http://127.0.0.1:{shop}/events", timeout=30).ok
            assert requests.get(f"http://127.0.0.1:{shop}/gone", timeout=30).status_code == 404
            body = {"title": "Bees", "text": "A bee colony has one queen. She lays many eggs."}
            for _ in range(2):
                requests.post(
                    f"{service.url}/api/v1/documents",
                    json=body,
                    headers=service.headers,
                    timeout=30,
                )
            # The last one is asked twice, and answered from the cache.
            for k in (1, 2, 3, 4, 4):
                question = {"question": "How many queens has a bee colony?", "k": k}
                answer = requests.post(
                    f"{service.url}/api/v1/ask", json=question, headers=service.headers, timeout=30
                )
                assert answer.ok
            assert requests.get(f"{service.url}/api/v1/documents", timeout=30).status_code == 401
            ask = 'method="POST",endpoint="/api/v1/ask"'
            expected = {
                f'muset_http_requests_total{{{ask},status_code="200"}}': 5,
                f"muset_http_request_duration_seconds_count{{{ask}}}": 5,
                'muset_cache_operations_total{operation="get",status="miss"}': 4,
                'muset_cache_operations_total{operation="get",status="hit"}': 1,
                'muset_cache_operations_total{operation="load",status="ok"}': 4,
                "muset_cache_get_duration_seconds_count": 5,
                'muset_ai_requests_total{model="extractive",status="success"}': 4,
                'muset_ai_request_duration_seconds_count{model="extractive"}': 4,
                'muset_database_queries_total{operation="insert",table="documents"}': 1,
                'muset_database_query_duration_seconds_count{operation="insert",table="documents"}':
                    1,
                'muset_errors_total{category="authentication",severity="medium"}': 1,
                'shop_http_requests_total{endpoint="/job"}': 3,
                'shop_http_request_duration_seconds_sum{endpoint="/job"}': 1.5,
                'shop_http_requests_total{status_code="404"}': 1,
                'shop_ai_requests_total{model="m"}': 3,
                'shop_ai_tokens_total{type="input"}': 300,
                'shop_ai_tokens_total{type="output"}': 600,
                'shop_ai_request_duration_seconds_sum{model="m"}': 7.5,
                'shop_database_queries_total{operation="select",table="users"}': 3,
                'shop_cache_operations_total{operation="get",status="hit"}': 6,
                'shop_cache_operations_total{operation="get",status="miss"}': 3,
                'shop_errors_total{category="authentication",severity="high"}': 3,
                'shop_errors_total{category="not_found"}': 1,
                # The scrape itself is the one request that is being served.
                "muset_http_requests_active": 1,
                "shop_http_requests_active": 1,
            }  # fmt: skip
            end, wrong = time.monotonic() + 60, expected
            while wrong and time.monotonic() < end:
                time.sleep(0.3)
                try:
                    seen = {query: prometheus.value(query) for query in expected}
                    connections = prometheus.value("muset_connections_open")
                except requests.RequestException:
                    continue  # it has not come up yet
                wrong = {
                    query: (seen[query], value)
                    for query, value in expected.items()
                    if seen[query] is None or abs(seen[query] - value) > 1e-3
                }
                # Prometheus' own connection is one.
                if not connections:
                    wrong["muset_connections_open"] = (connections, "1 or more")
            prove.figure(f"{len(expected) - len(wrong)} of {len(expected)} values right")
            assert wrong == {}
        finally:
            prometheus.process.terminate()
            prometheus.process.wait(10)
