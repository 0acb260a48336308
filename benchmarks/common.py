"""Shared by the measuring scripts: free ports, own Redis, instruction counts, tables.

Figures are ratios of what ran in the same run; instructions repeat within 2 %, times do not.
"""

import atexit
import importlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

HERE = os.path.dirname(os.path.abspath(__file__))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def stop(proc):
    """End one process that we started, by its own id."""
    if proc.poll() is None:
        proc.terminate()
        try:
            proc.wait(5)
        except subprocess.TimeoutExpired:
            proc.kill()
            proc.wait(5)


def wait_port(port, timeout=20):
    end = time.time() + timeout
    while time.time() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port}")


def start_redis():
    """A private redis-server without persistence; ended at exit. Returns (port, Popen)."""
    port = free_port()
    work = tempfile.mkdtemp(prefix="measure-redis-")
    proc = subprocess.Popen(
        [
            "redis-server",
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            work,
            "--loglevel",
            "warning",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(lambda: (stop(proc), shutil.rmtree(work, ignore_errors=True)))
    wait_port(port)
    return port, proc


def cpu_seconds(pid):
    """CPU time (user+system, ns resolution) of a live process of ours, dead threads included."""
    return time.clock_gettime((~pid << 3) | 2)


def _busy():
    with open("/proc/stat") as f:
        v = list(map(int, f.readline().split()[1:9]))
    return sum(v) - v[3] - v[4], sum(v)


GATE = {"waited_s": 0.0, "noisy": 0, "checks": 0}


def quiet(limit=0.12, budget=15.0):
    """Wait (at most `budget` s per script) until nobody else uses the cores; noted in GATE."""
    GATE["checks"] += 1
    while True:
        b0, t0 = _busy()
        time.sleep(0.25)
        b1, t1 = _busy()
        share = (b1 - b0) / max(1, t1 - t0)
        if share <= limit:
            return
        if GATE["waited_s"] >= budget:
            GATE["noisy"] += 1
            return
        GATE["waited_s"] += 0.25


def spin_ms():
    """A fixed pure-Python loop: shows the machine's speed at that moment."""
    t = time.process_time_ns()
    x = 0
    for i in range(1_000_000):
        x += i
    return round((time.process_time_ns() - t) / 1e6, 1)


SPIN = [spin_ms()]


def pct(values, p):
    s = sorted(values)
    return s[min(len(s) - 1, int(p / 100 * len(s)))]


def spread(values):
    """(max-min)/median in percent."""
    m = statistics.median(values)
    return 100 * (max(values) - min(values)) / m if m else 0.0


def versions(*names):
    out = {}
    for n in names:
        try:
            out[n] = metadata.version(n)
        except metadata.PackageNotFoundError:
            out[n] = None
    return out


def environment(*names):
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "kernel": platform.release().split("-")[0],
        "date": time.strftime("%Y-%m-%d"),
        "load1": round(os.getloadavg()[0], 2),
        "gate": GATE,
        "spin_ms_start_end": [*SPIN, spin_ms()],
        "versions": versions(*names),
    }


def instructions(cases, a=40, b=140):
    """Return the exact instructions per call by name, None where a case failed.

    Call it in a script that `under_valgrind` started. Each case runs in two forked children with
    `a` and `b` calls; the difference leaves import and set-up out.

    Args:
        cases: Set-ups by name; each returns the function that is counted.
        a: The smaller number of calls.
        b: The larger one.
    """
    logs = os.environ["MEASURE_VG"]
    jobs, out, running = [(n, k) for n in cases for k in (a, b)], {}, {}
    while jobs or running:
        while jobs and len(running) < (os.cpu_count() or 1):
            name, k = jobs.pop(0)
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                try:
                    fn = cases[name]()
                    for _ in range(15 + k):
                        fn()
                    os._exit(0)
                except BaseException as e:
                    print(name, repr(e), file=sys.stderr, flush=True)
                    os._exit(1)
            running[pid] = (name, k)
        pid, status = os.wait()
        name, k = running.pop(pid)
        with open(os.path.join(logs, str(pid))) as f:
            refs = [int(x.split()[-1].replace(",", "")) for x in f if "I   refs:" in x]
        out[name, k] = refs[0] if refs and not status else None
    return {
        n: (out[n, b] - out[n, a]) / (b - a) if out[n, a] and out[n, b] else None for n in cases
    }


def under_valgrind(argv, timeout=300, **env):
    """Run this python with argv under cachegrind (instruction counts only); returns its stdout."""
    logs = tempfile.mkdtemp(prefix="measure-vg-")
    try:
        return subprocess.run(
            [
                "valgrind",
                "--tool=cachegrind",
                "--cache-sim=no",
                "--cachegrind-out-file=/dev/null",
                f"--log-file={logs}/%p",
                sys.executable,
                *argv,
            ],
            text=True,
            timeout=timeout,
            stdout=subprocess.PIPE,
            check=True,
            stdin=subprocess.DEVNULL,
            env=dict(os.environ, PYTHONHASHSEED="0", MEASURE_VG=logs, **env),
        ).stdout
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def extras(pairs):
    """--extra NAME=module:attr, repeated: [(name, attr)]; sets the project beside its peers."""
    out = []
    for p in pairs or []:
        name, _, target = p.partition("=")
        mod, _, attr = target.partition(":")
        sys.path.insert(0, os.getcwd())
        out.append((name, getattr(importlib.import_module(mod), attr)))
    return out


def fmt(v):
    if isinstance(v, float):
        return f"{v:.0f}" if abs(v) >= 1000 else f"{v:.1f}" if abs(v) >= 100 else f"{v:.3g}"
    return "" if v is None else str(v)


def table(rows, cols=None):
    cols = cols or list(rows[0])
    print("| " + " | ".join(cols) + " |")
    print("|" + "|".join("---" for _ in cols) + "|")
    for r in rows:
        print("| " + " | ".join(fmt(r.get(c)) for c in cols) + " |")
    print()


def finish(title, rows, env, **more):
    print(json.dumps({"what": title, "env": env, "rows": rows, **more}))
