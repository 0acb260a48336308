"""Many workers of a real gunicorn: killed, recycled, and still counted."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from gunicorn_app import serve
from prometheus_client.parser import text_string_to_metric_families
from redis_server import free_port
from waiting import until

APP = """
from flask import Flask, Response
from flask_muset.metrics import Metrics

app = Flask("counted")
Metrics(app)

@app.get("/ok")
def ok():
    return "done"

@app.get("/fail")
def fail():
    return "failed", 500

@app.get("/slow")
def slow():
    import time
    time.sleep(30)
    return "late"
"""
HOOKS = """
import os
os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.path.abspath("files")
os.environ["METRICS_PORT"] = "{port}"
from flask_muset.metrics import gunicorn as metrics
from flask_muset.metrics.gunicorn import *

def on_starting(server):
    server.handle_int = server.handle_term
    metrics.on_starting(server)
"""
#: What each of its connections sent and got, by status.
CLIENT = """
import json, os, sys, time
import gevent
from gevent import socket
port, count, seconds, stop = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
pause_s, end = 8 * seconds / count, time.monotonic() + 240
PATHS = {"200": "/ok", "404": "/nowhere", "500": "/fail"}
sent, confirmed = dict.fromkeys(PATHS, 0), dict.fromkeys(PATHS, 0)

def answer(connection):
    data = b""
    while b"\\r\\n\\r\\n" not in data:
        more = connection.recv(65536)
        if not more:
            return None, True
        data += more
    head, _, body = data.partition(b"\\r\\n\\r\\n")
    fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\\r\\n")[1:])
    while len(body) < int(fields["content-length"]):
        more = connection.recv(65536)
        if not more:
            return None, True
        body += more
    return head.split()[1].decode(), fields.get("connection") == "close"

def caller(number):
    connection = None
    while time.monotonic() < end and (sum(sent.values()) < count or not os.path.exists(stop)):
        gevent.sleep(pause_s)
        status = ("200", "200", "404", "500")[sum(sent.values()) % 4]
        try:
            if connection is None:
                connection = socket.create_connection(("127.0.0.1", port), 10)
            sent[status] += 1
            connection.sendall(f"GET {PATHS[status]} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
            got, closes = answer(connection)
        except OSError:
            got, closes = None, True
        if got:
            confirmed[got] += 1
        if closes:
            if connection is not None:
                connection.close()
            connection = None
gevent.joinall([gevent.spawn(caller, n) for n in range(8)], raise_error=True)
print(json.dumps({"sent": sent, "confirmed": confirmed}))
"""


def workers_of(pid):
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def samples(text):
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def seen(port):
    """The samples, none while nothing listens."""
    with contextlib.suppress(OSError):
        return samples(scrape(port))
    return {}


def never_falls(name):
    return name.endswith(("_total", "_bucket", "_count", "_sum"))


def requests_by_status(found):
    totals = {}
    for (name, labels), value in found.items():
        if name == "muset_http_requests_total" and dict(labels)["endpoint"] != "/metrics":
            status = dict(labels)["status_code"]
            totals[status] = totals.get(status, 0) + int(value)
    return totals


class Scraper(threading.Thread):
    """Reads both ports in turn and notes every counter that fell."""

    def __init__(self, ports):
        super().__init__(daemon=True)
        self.ports, self.fell, self.scrapes, self.done = ports, [], 0, threading.Event()
        self.worker_reads = 0

    def run(self):
        before = {}
        while not self.done.is_set():
            port = self.ports[self.scrapes % len(self.ports)]
            try:
                now = samples(scrape(port))
            except (OSError, http.client.HTTPException):  # its worker was killed
                time.sleep(0.01)
                self.scrapes += 1
                continue
            self.worker_reads += port == self.ports[0]
            self.fell += [k for k, v in before.items() if never_falls(k[0]) and now.get(k, 0) < v]
            before = now
            self.scrapes += 1
            time.sleep(0.02)


def end_some(arbiter, kills, recycles, seconds, client):
    """End workers one after the other while the client runs: at once, or after their requests."""
    chance, told = random.Random(7), {arbiter}
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * recycles
    chance.shuffle(signals)
    since = {}
    for number in signals:
        time.sleep(seconds / len(signals))
        while client.poll() is None:
            now = time.monotonic()
            since = {pid: since.get(pid, now) for pid in workers_of(arbiter)}
            # A worker that has just been forked still has the master's handlers.
            pids = {pid for pid, began in since.items() if now - began > 0.2} - told
            if pids:
                pid = chance.choice(sorted(pids))
                told.add(pid)
                os.kill(pid, number)
                break
            time.sleep(0.01)
    return len(told) - 1


@pytest.mark.claim(
    "4 workers, 20,000 requests by a client that counts, 60 kill -9 and 200 recycles meanwhile: "
    "per status, client-confirmed <= counter <= client-sent; no counter ever falls between "
    "scrapes; files bounded; a scrape under 200 ms"
)
def test_counters_are_exact_while_workers_die(tmp_path, prove):
    """What a client has seen is counted, once, whatever happens to the worker that served it."""
    count, kills, recycles, seconds = (20_000, 60, 200, 45) if prove.full else (1_600, 5, 15, 3.5)
    own, stop = free_port(), tmp_path / "stop"

    def booted():
        return (tmp_path / "gunicorn.log").read_text().count("Booting worker") - 4

    def files():
        return len(list((tmp_path / "files").rglob("*.db")))

    options = ("-w", "4", "--preload", "--max-requests", "300", "--log-level", "info")
    with serve(tmp_path, APP, *options, config=HOOKS.format(port=own)) as (process, port):
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(port), str(count), str(seconds * 1.4 + 3), stop],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        scraper = Scraper([port, own])
        scraper.start()
        ended = end_some(process.pid, kills, recycles, seconds, client)
        stop.touch()
        out, _ = client.communicate(timeout=300)
        scraper.done.set()
        scraper.join(20)
        told = json.loads(out)
        until(lambda: booted() >= ended * 0.95 and files() <= 4 * 5 + 2 + 4)
        best = min(_seconds(own) for _ in range(5))
        found = samples(scrape(own))
    counted = requests_by_status(found)
    log = (tmp_path / "gunicorn.log").read_text()
    prove.figure(
        f"{told['confirmed']} <= {counted} <= {told['sent']}; {ended} ended, {kills} of them by "
        f"kill -9, {booted()} new workers; {scraper.scrapes} scrapes, {len(scraper.fell)} falls; "
        f"{files()} files; a scrape {best * 1000:.0f} ms"
    )
    assert scraper.fell == []
    assert scraper.worker_reads > 3
    for status, sent in told["sent"].items():
        assert told["confirmed"][status] <= counted[status] <= sent
    assert sum(told["sent"].values()) >= count
    assert ended == kills + recycles
    assert best < (0.2 if prove.full else 2)
    assert "Traceback" not in log


def _seconds(port):
    began = time.perf_counter()
    scrape(port)
    return time.perf_counter() - began


def test_gauges_return_to_zero_when_a_worker_is_killed(tmp_path):
    """A killed worker's active requests end with it, and the gauge is there from the start."""
    own = free_port()
    active = ("muset_http_requests_active", ())
    with serve(tmp_path, APP, "-w", "2", config=HOOKS.format(port=own)) as (process, port):
        until(lambda: seen(own).get(("muset_workers", ())) == 2)
        assert seen(own)[active] == 0
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: seen(own)[active] == 1)
            for pid in workers_of(process.pid):
                os.kill(pid, signal.SIGKILL)
            until(lambda: seen(own).get(active) == 0)
            until(lambda: seen(own).get(("muset_workers", ())) == 2)


def test_a_port_in_use_does_not_stop_the_start(tmp_path):
    """The server starts, says so once, and takes the port when it is free."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        own = taken.getsockname()[1]
        config = HOOKS.format(port=own) + (
            "from flask_muset.metrics import port as _port\n_port.keep_open.__defaults__ = "
            "(_port.keep_open.__defaults__[0], 0.2)\n"
        )
        with serve(tmp_path, APP, config=config) as (_, port):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ok", timeout=30) as answer:
                assert answer.status == 200
            taken.close()
            until(lambda: requests_by_status(seen(own)) == {"200": 1})
    log = (tmp_path / "gunicorn.log").read_text()
    assert log.count("METRICS_PORT: cannot listen") == 1


def test_requests_at_the_port_stay_with_the_master(tmp_path):
    """A worker that is forked while the port has a request does not answer it, nor end it."""
    own = free_port()
    with serve(tmp_path, APP, "--preload", config=HOOKS.format(port=own)) as (process, _):
        until(lambda: seen(own))
        until(lambda: workers_of(process.pid))
        (worker,) = workers_of(process.pid)
        with socket.create_connection(("127.0.0.1", own), 5) as connection:
            seen(own)  # the one before it has been accepted
            os.kill(worker, signal.SIGKILL)
            until(lambda: set(workers_of(process.pid)) - {worker})
            until(lambda: (tmp_path / "gunicorn.log").read_text().count("Booting worker") == 2)
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGSTOP)
            try:
                connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                connection.settimeout(1)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            finally:
                os.kill(process.pid, signal.SIGCONT)
            connection.settimeout(30)
            assert connection.recv(100).startswith(b"HTTP/1.0 200")
    assert "Traceback" not in (tmp_path / "gunicorn.log").read_text()


def test_preloaded_app_on_another_worker_and_a_clean_end(tmp_path):
    """gthread and preload: the app's own METRICS_PORT is taken; nothing is left behind."""
    own = free_port()
    app = APP.replace("Metrics(app)", f"app.config['METRICS_PORT'] = {own}\nMetrics(app)")
    config = HOOKS.format(port=0)
    options = ("-w", "2", "--threads", "4", "--preload")
    with serve(tmp_path, app, *options, worker="gthread", config=config) as (process, port):
        for _ in range(20):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ok", timeout=30).close()
        until(lambda: requests_by_status(seen(own)) == {"200": 20})
        process.terminate()
        assert process.wait(60) == 0
    assert list((tmp_path / "files").iterdir()) == []


def test_what_a_killed_master_left_is_removed(tmp_path):
    """The next master removes folders that nobody holds, and no others."""
    config = HOOKS.format(port=0)
    with serve(tmp_path, APP, "-w", "2", config=config) as (process, _):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (left,) = (tmp_path / "files").iterdir()
    (tmp_path / "files" / "other").mkdir()
    with serve(tmp_path, APP, "-w", "2", config=config) as (first, _):
        (own,) = (tmp_path / "files").glob("master-*")
        assert own != left
        with serve(tmp_path, APP, config=config) as (second, _):
            assert len(list((tmp_path / "files").glob("master-*"))) == 2
            second.terminate()
            assert second.wait(60) == 0
        first.terminate()
        assert first.wait(60) == 0
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["other"]


def test_one_process_without_hooks(tmp_path):
    """gunicorn with one worker and nothing in its configuration: the worker serves the port."""
    own = free_port()
    app = APP.replace("Metrics(app)", f"app.config['METRICS_PORT'] = {own}\nMetrics(app)")
    with serve(tmp_path, app, "--preload") as (_, port):
        for _ in range(3):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ok", timeout=30).close()
        until(lambda: requests_by_status(seen(own)) == {"200": 3})
        assert requests_by_status(samples(scrape(port))) == {"200": 3}


def test_a_port_in_the_configuration_that_the_master_cannot_see(tmp_path):
    """Without preload the master does not know the app, and the log says what to do."""
    app = APP.replace("Metrics(app)", "app.config['METRICS_PORT'] = 1\nMetrics(app)")
    with serve(tmp_path, app, config=HOOKS.format(port=0)) as (_, port):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ok", timeout=30).close()
    assert "preload_app = True" in (tmp_path / "gunicorn.log").read_text()


def test_a_port_of_its_own_without_gunicorn():
    """Any other server, and `flask run`: the process itself serves it, from the start."""
    own = free_port()
    code = f"""
import urllib.request
from flask import Flask
from flask_muset.metrics import Metrics
app = Flask("x")
app.config["METRICS_PORT"] = {own}
Metrics(app)
app.test_client().get("/nowhere").close()
with urllib.request.urlopen("http://127.0.0.1:{own}/metrics") as answer:
    assert b'muset_http_requests_total' in answer.read()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_folder_belongs_to_this_user(tmp_path, monkeypatch):
    """A folder of that name that somebody else made is not used."""
    code = """
import os, stat, tempfile
from flask_muset.metrics import gunicorn
base = os.path.dirname(os.environ["PROMETHEUS_MULTIPROC_DIR"])
print(base)
assert stat.S_IMODE(os.stat(os.environ["PROMETHEUS_MULTIPROC_DIR"]).st_mode) == 0o700
assert "prometheus_client" not in __import__("sys").modules
"""
    name = f"flask-muset-metrics-{os.geteuid()}"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = code.replace("from flask", "os.access = lambda *_: False\nfrom flask", 1)

    def base():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              timeout=30)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    assert base() == tmp_path / name
    (tmp_path / name).chmod(0o777)
    assert base() != tmp_path / name
