"""Our apps for the metrics measurements: factories beside those of `http_apps`, and updates.

`metrics` and `metrics_mp` are bare Flask with Metrics and nothing else, `metrics_off` the same with
METRICS_ENABLED=False; PROMETHEUS_MULTIPROC_DIR is set for `metrics_mp`. `updates` gives
`metrics_cost.py --extra ours=ours_metrics:updates` our own updates beside prometheus_client's.

As a script: instructions per request of these apps, of bare Flask and of
prometheus-flask-exporter, as JSON by name (valgrind; some 15 s).
"""

import json
import logging
import os
import shutil
import sys
import tempfile

import common as c
import http_apps


def _metrics(app):
    from flask_muset.metrics import Metrics

    Metrics(app)


def metrics():
    return http_apps._flask(before=_metrics)


metrics_mp = metrics


def metrics_off():
    def before(app):
        app.config["METRICS_ENABLED"] = False
        _metrics(app)

    return http_apps._flask(before=before)


def updates():
    from flask_muset.metrics.http import HttpObserver
    from flask_muset.metrics.series import Families
    from flask_muset.metrics.store import Store

    families = Families(Store(os.environ.get("PROMETHEUS_MULTIPROC_DIR")), "bench", 1000)
    counter = families["http_requests_total"].get("GET", "/api/ping", "200")
    durations = families["http_request_duration_seconds"].get("GET", "/api/ping")
    observer = HttpObserver(families, lambda _now: None)

    class Exchange:
        status, failed, duration_s, route, began = 200, False, 0.0123, "/api/ping", 0.0
        environ = {"REQUEST_METHOD": "GET"}  # noqa: RUF012

    exchange = Exchange()

    def request():
        observer.begin(exchange)
        observer.end(exchange)
        observer.close(exchange)

    return {
        "ours: counter, bound": counter.add,
        "ours: histogram, bound": lambda: durations.observe(0.0123),
        "ours: counter, by labels": lambda: families["http_requests_total"].add(
            1, "GET", "/api/ping", "200"
        ),
        "ours: a whole request (count, duration, active)": request,
    }


NAMES = ["bare", "metrics_off", "metrics", "metrics_mp", "exporter_mp"]


def measure():
    """Instructions per request by name, None without valgrind."""
    if shutil.which("valgrind") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        found = c.under_valgrind([__file__, "--child"], MEASURE_TMP=folder)
    return json.loads(found.splitlines()[-1])


def child():
    import http_instructions

    logging.disable(logging.CRITICAL)
    for factory in (metrics, metrics_off):
        setattr(http_apps, factory.__name__, factory)
    http_apps.metrics_mp = metrics
    http_instructions.NEED_A_FOLDER.append("metrics_mp")
    http_apps.bare(), http_apps.metrics_off()  # imports once what all forked processes need
    cases = {name: http_instructions.client(name, "/api/ping", "2") for name in NAMES}
    print(json.dumps(c.instructions(cases, 100, 500)))


if __name__ == "__main__":
    if "--child" in sys.argv:
        child()
    else:
        print(json.dumps(measure()))
