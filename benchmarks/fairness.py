"""Kept connections at full speed on one worker: who waits, and what fairness costs.

The same bare Flask app on gunicorn's stock gevent worker and on ours, in turns, with wrk's 64 kept
connections; meanwhile a probe on a new connection each time. Needs wrk.
"""

import contextlib
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_APP = """
from flask import Flask, jsonify
app = Flask("bench")

@app.get("/api/ping")
def ping():
    return jsonify({"status": "ok", "n": 1})

@app.get("/health/live")
def live():
    return jsonify({"status": "alive"})
"""
_LUA = """done = function(s, l, r)
 io.write(string.format("RESULT %d %d %d %d %d %d\\n", s.requests, s.duration, l:percentile(50),
  l:percentile(99), s.errors.status,
  s.errors.connect + s.errors.read + s.errors.write + s.errors.timeout))
end
"""
_CLASSES = {"stock": "gevent", "ours": "flask_muset.worker.FairGeventWorker"}


class Server:
    """One gunicorn with one worker."""

    def __init__(self, worker_class: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-k", worker_class, "-w", "1", "--log-level",
             "warning", "--no-control-socket", "-b", f"127.0.0.1:{self.port}", "bench_app:app"],
            cwd=folder,
        )  # fmt: skip
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 0.5).close()
                return
            time.sleep(0.05)
        raise RuntimeError("gunicorn did not start")

    def load(self, seconds: int, script: Path) -> dict[str, float]:
        """Run wrk, and a probe on new connections beside it."""
        probes: list[float] = []
        over = threading.Event()
        thread = threading.Thread(target=self._probe, args=(probes, over))
        thread.start()
        out = subprocess.run(
            ["wrk", "-t1", "-c64", f"-d{seconds}s", "-s", str(script),
             f"http://127.0.0.1:{self.port}/api/ping"],
            capture_output=True, text=True, timeout=seconds + 20, check=True,
        ).stdout  # fmt: skip
        over.set()
        thread.join()
        found = re.search(r"RESULT (.*)", out)
        count, duration_us, p50, p99, bad, lost = map(int, found[1].split()) if found else [0] * 6
        probes.sort()
        return {
            "requests_s": count / duration_us * 1e6,
            "p50_ms": p50 / 1000,
            "p99_ms": p99 / 1000,
            "lost": bad + lost,
            "probe_p99_ms": probes[int(0.99 * (len(probes) - 1))] * 1000,
            "probes": len(probes),
        }

    def _probe(self, times: list[float], over: threading.Event) -> None:
        request = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        while not over.is_set():
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
                connection.sendall(request)
                while connection.recv(4096):
                    pass
            times.append(time.monotonic() - began)
            time.sleep(0.02)

    def stop(self) -> None:
        """End it, by its own process id."""
        self._process.terminate()
        self._process.wait(15)


def measure(seconds: int = 4, rounds: int = 3) -> dict[str, dict[str, float]] | None:
    """Medians of the rounds for both workers; None without wrk."""
    if shutil.which("wrk") is None:
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bench_app.py").write_text(_APP)
        script = folder / "report.lua"
        script.write_text(_LUA)
        servers = {kind: Server(cls, folder) for kind, cls in _CLASSES.items()}
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in servers}
        try:
            for server in servers.values():
                server.load(1, script)
            for _ in range(rounds):
                for kind, server in servers.items():
                    runs[kind].append(server.load(seconds, script))
        finally:
            for server in servers.values():
                server.stop()
    out = {
        kind: {key: statistics.median(run[key] for run in of) for key in of[0]}
        for kind, of in runs.items()
    }
    out["ours"]["p99_x_p50"] = out["ours"]["p99_ms"] / out["ours"]["p50_ms"]
    out["ours"]["requests_x_stock"] = out["ours"]["requests_s"] / out["stock"]["requests_s"]
    return out


if __name__ == "__main__":
    print(json.dumps(measure() or "not measured: wrk is missing", indent=1))
