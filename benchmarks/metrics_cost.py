"""What does one metric update cost, and one scrape with the files of dead workers left over?

prometheus_client in one process and in multiprocess mode (files), labels() each time or a bound
child; ours beside it in the same run. Each mode runs in its own process, since the client chooses
its mode at import. CPU time, the median of 7. A scrape is measured after the dead workers' files
were folded, and with prometheus_client's own collector as they are.

Beside another project: --extra NAME=package.module:make, where make() -> {"operation": callable}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import common as c

_SERIES = 50
_DEAD = (2, 8, 32)


def operations():
    from prometheus_client import CollectorRegistry, Counter, Histogram

    registry = CollectorRegistry()
    counter = Counter("requests", "x", ["method", "route", "status"], registry=registry)
    histogram = Histogram("latency_seconds", "x", ["method", "route"], registry=registry)
    plain = Counter("plain", "x", registry=registry)
    bound_counter = counter.labels("GET", "/api/ping", "200")
    bound_histogram = histogram.labels("GET", "/api/ping")
    numbers, lock, clock = {"k": 0.0}, threading.Lock(), time.perf_counter

    def floor_dict():
        numbers["k"] += 1

    def floor_locked():
        with lock:
            numbers["k"] += 1

    def both():
        bound_counter.inc()
        bound_histogram.observe(0.0123)

    return {
        "floor: d[k] += 1": floor_dict,
        "floor: lock, d[k] += 1": floor_locked,
        "floor: two perf_counter()": lambda: clock() - clock(),
        "Counter.inc, no labels": plain.inc,
        "Counter.inc, bound child": bound_counter.inc,
        "Counter.labels(3).inc": lambda: counter.labels("GET", "/api/ping", "200").inc(),
        "Histogram.observe, bound child": lambda: bound_histogram.observe(0.0123),
        "Histogram.labels(2).observe": lambda: histogram.labels("GET", "/api/ping").observe(0.0123),
        "Counter and Histogram, bound children": both,
    }


def child_operations(extra):
    found = operations()
    for _, make in c.extras(["ours=ours_metrics:updates", *extra]):
        found |= make()
    if "MEASURE_VG" in os.environ:
        cases = {name: (lambda f=f: f) for name, f in found.items()}
        return print(json.dumps(c.instructions(cases, 500, 2500)))
    took = {name: [] for name in found}
    for _ in range(7):
        for name, update in found.items():
            count = 20_000
            began = time.process_time_ns()
            for _ in range(count):
                update()
            took[name].append((time.process_time_ns() - began) / count)
    return print(json.dumps(took))


def child_fill(series):
    """One worker, one counter and one histogram of so many series each; then it dies."""
    from prometheus_client import Counter, Histogram

    counter = Counter("requests", "x", ["route", "status"])
    histogram = Histogram("latency_seconds", "x", ["route"])
    for number in range(int(series)):
        counter.labels(f"/api/r{number}", "200").inc()
        histogram.labels(f"/api/r{number}").observe(0.01 * number)


def child_fill_ours(series):
    """The same with ours."""
    from flask_muset.metrics.series import Families
    from flask_muset.metrics.store import Store

    families = Families(Store(os.environ["PROMETHEUS_MULTIPROC_DIR"]), "bench", 1000)
    for number in range(int(series)):
        families["http_requests_total"].add(1, "GET", f"/api/r{number}", "200")
        families["http_request_duration_seconds"].observe(0.01 * number, "GET", f"/api/r{number}")


def child_scrape(single):
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess

    registry = CollectorRegistry()
    if single:
        child_fill(single)
        registry = REGISTRY
    else:
        multiprocess.MultiProcessCollector(registry)
    _time_scrapes(lambda: generate_latest(registry))


def child_scrape_ours(_):
    from flask_muset.metrics.exposition import FolderCollector, render
    from flask_muset.metrics.files import fold

    folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    fold(folder)
    _time_scrapes(lambda: render([FolderCollector(folder)], None)[0])


def _time_scrapes(scrape):
    took = []
    for _ in range(7):
        began = time.process_time_ns()
        for _ in range(5):
            text = scrape()
        took.append((time.process_time_ns() - began) / 5 / 1e6)
    print(json.dumps([took, len(text), text.count(b"\n")]))


CHILDREN = {
    "fill": child_fill,
    "fill_ours": child_fill_ours,
    "scrape": child_scrape,
    "scrape_ours": child_scrape_ours,
}


def spawn(argv, folder=None):
    env = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    if folder:
        env["PROMETHEUS_MULTIPROC_DIR"] = folder
    out = subprocess.run(
        [sys.executable, __file__, *argv],
        env=env,
        text=True,
        check=True,
        stdout=subprocess.PIPE,
        timeout=120,
    ).stdout
    return json.loads(out) if out.strip() else None


def measure_updates(extra, valgrind):
    rows, base = [], None
    given = [word for each in extra for word in ("--extra", each)]
    for mode in ("single", "multiprocess"):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
            c.quiet()
            took = spawn(["--child", "operations", *given], folder if mode != "single" else None)
            counts = {}
            if valgrind:
                env = {"PROMETHEUS_MULTIPROC_DIR": other} if mode != "single" else {}
                argv = [__file__, "--child", "operations", *given]
                counts = json.loads(c.under_valgrind(argv, **env))
        base = base or statistics.median(took["floor: lock, d[k] += 1"])
        rows += [
            {
                "operation": name,
                "mode": mode,
                "ns": statistics.median(values),
                "x locked add": statistics.median(values) / base,
                "instructions": counts.get(name),
                "spread %": c.spread(values),
            }
            for name, values in took.items()
            if mode == "single" or "floor" not in name
        ]
    return rows


def measure_scrape(title, dead, suffix):
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(dead):
            spawn(["--child", f"fill{suffix}", "--arg", str(_SERIES)], folder)
        c.quiet()
        took, size, lines = spawn(["--child", f"scrape{suffix}"], folder)
        names = [name for name in os.listdir(folder) if name.endswith(".db")]
        disk = sum(os.path.getsize(os.path.join(folder, name)) for name in names)
    return {
        "scrape": f"{title}, {dead} dead workers",
        "label sets": _SERIES,
        "ms": statistics.median(took),
        "bytes": size,
        "lines": lines,
        "files": len(names),
        "MB of files": disk / 2**20,
        "spread %": c.spread(took),
    }


def measure_scrapes():
    c.quiet()
    took, size, lines = spawn(["--child", "scrape", "--arg", str(_SERIES)])
    one = {
        "scrape": "one process, in memory",
        "label sets": _SERIES,
        "ms": statistics.median(took),
        "bytes": size,
        "lines": lines,
        "spread %": c.spread(took),
    }
    return [
        one,
        *(measure_scrape("prometheus_client", dead, "") for dead in _DEAD),
        *(measure_scrape("ours, folded", dead, "_ours") for dead in _DEAD),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arg", default="", help=argparse.SUPPRESS)
    parser.add_argument("--valgrind", action="store_true", help="count instructions too")
    parser.add_argument("--extra", action="append", default=[])
    options = parser.parse_args()
    if options.child == "operations":
        return child_operations(options.extra)
    if options.child:
        return CHILDREN[options.child](options.arg)
    print("## Metric updates\n")
    rows = measure_updates(options.extra, options.valgrind)
    c.table(rows)
    print("## Scrape\n")
    scrapes = measure_scrapes()
    c.table(scrapes, list(scrapes[-1]))
    return c.finish("metrics_cost", rows, c.environment("prometheus_client"), scrapes=scrapes)


if __name__ == "__main__":
    main()
