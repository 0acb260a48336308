"""What the extensions cost under gunicorn: CPU time per request and memory per worker.

Bare Flask, ours and the peers on our fair worker, the former two with two workers too, all at once
and in rounds of one turn each, in another order every time. Ratios are of turns of the same round,
so that whatever else the machine does hits both alike, and the median of all rounds counts: each
one's best turn would be that of another moment. The load is 64 kept connections, each of which asks
again when all have been answered. CPU is that of the master and its workers, redis-server's apart.
OpenTelemetry counts as not installed: redis-py would import all of it.
"""

import argparse
import itertools
import os
import random
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common as c

OURS = ["muset_four", "muset_four_redis"]
BESIDE = ["bare_redis", "trio_local", "trio"]
CONNECTIONS = 64
_SETTINGS = "import sys\nsys.modules['opentelemetry'] = None\n"
_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)


class Connection:
    """A kept connection."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), 30)

    def status(self):
        """Read one answer; its status."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        left = int(_LENGTH.search(head)[1]) - len(body)
        while left > 0:
            left -= len(self._more())
        return int(head[9:12])

    def _more(self):
        data = self.socket.recv(65_536)
        if not data:
            raise ConnectionError("the server has closed the connection")
        return data


def load(port, count, requests=(b"GET /api/ping HTTP/1.1\r\nHost: x\r\n\r\n",)):
    """Send so many of these requests over 64 connections; the number of answers by status."""
    connections = [Connection(port) for _ in range(CONNECTIONS)]
    found, asked, ahead = {}, 0, itertools.cycle(requests)
    try:
        while asked < count:
            turn = connections[: min(CONNECTIONS, count - asked)]
            for connection in turn:
                connection.socket.sendall(next(ahead))
            waiting = {connection.socket: connection for connection in turn}
            while waiting:
                ready = select.select(list(waiting), [], [], 60)[0]
                if not ready:
                    raise TimeoutError(f"{len(waiting)} answers have not come within 60 s")
                for one in ready:
                    status = waiting.pop(one).status()
                    found[status] = found.get(status, 0) + 1
            asked += len(turn)
    finally:
        for connection in connections:
            connection.socket.close()
    return found


def children(pid):
    """The processes below a process."""
    below = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return below + [one for child in below for one in children(child)]


def pss_mb(pid):
    """Memory of a process in MB, what it shares counted in parts."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) / 1024


class Server:
    """One app of `http_apps` under gunicorn."""

    def __init__(self, app, workers, redis_port, folder):
        self.workers, self.port = workers, c.free_port()
        files = Path(folder) / f"{app}-{workers}"
        files.mkdir()
        env = dict(os.environ, REDIS_PORT=str(redis_port), PYTHONHASHSEED="0")
        env["PYTHONPATH"] = os.pathsep.join([c.HERE, env.get("PYTHONPATH", "")])
        if app in (*OURS, "trio"):
            env["PROMETHEUS_MULTIPROC_DIR"] = str(files)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-k", "flask_muset.worker.FairGeventWorker",
             "-w", str(workers), "--log-level", "warning", "--no-control-socket",
             "--worker-tmp-dir", folder, "-b", f"127.0.0.1:{self.port}", f"http_apps:{app}()"],
            env=env,
            cwd=folder,
        )  # fmt: skip

    def turn(self, count):
        """Milliseconds of CPU for 1,000 requests, over so many."""
        pids = [self._process.pid, *children(self._process.pid)]
        before = sum(map(c.cpu_seconds, pids))
        found = load(self.port, count)
        if set(found) != {200}:
            raise RuntimeError(f"answers by status: {found}")
        return (sum(map(c.cpu_seconds, pids)) - before) / count * 1e6

    def pss_mb(self):
        """Memory of a worker."""
        return sum(map(pss_mb, children(self._process.pid))) / self.workers

    def stop(self):
        c.stop(self._process)


def measure(names, *, rounds, count):
    """CPU per 1,000 requests and memory, by app and number of workers.

    Args:
        names: Apps of `http_apps`, beside `bare`.
        rounds: Turns of each server.
        count: Requests of a turn. Each server's memory is that after all of its turns.
    """
    redis_port, _ = c.start_redis()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "gunicorn.conf.py").write_text(_SETTINGS)
        servers = {}
        try:
            for name in ("bare", *names):
                for workers in (1, 2) if name in ("bare", *OURS) else (1,):
                    servers[name, workers] = Server(name, workers, redis_port, folder)
            for server in servers.values():
                c.wait_port(server.port, 60)
                load(server.port, 512)
            turns = {key: [] for key in servers}
            for number in range(rounds):
                order = list(servers)
                random.Random(number).shuffle(order)
                for key in order:
                    turns[key].append(servers[key].turn(count))
            memory = {key: server.pss_mb() for key, server in servers.items()}
        finally:
            for server in servers.values():
                server.stop()
    return {
        (name, workers): {
            "cpu ms/1k": statistics.median(turns[name, workers]),
            "cpu x bare": ratio(turns[name, workers], turns["bare", workers]),
            "cpu x one worker": ratio(turns[name, workers], turns[name, 1]),
            "PSS MB": memory[name, workers],
            "PSS x bare": memory[name, workers] / memory["bare", workers],
        }
        for name, workers in servers
    }


def ratio(some, others):
    """Of turns to those of the same rounds."""
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*OURS, *BESIDE])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--count", type=int, default=640)
    options = parser.parse_args()
    found = measure(options.only, rounds=options.rounds, count=options.count)
    rows = [{"app": name, "workers": workers, **row} for (name, workers), row in found.items()]
    print(f"## CPU and memory under gunicorn, medians of {options.rounds} rounds\n")
    c.table(rows)
    c.finish("http_overhead", rows, c.environment("flask", "werkzeug", "gunicorn", "gevent"))


if __name__ == "__main__":
    main()
