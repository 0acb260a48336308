"""Load runs: they count right, say what does not hold, and leave nothing behind."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from redis_server import free_port
from scripted_service import ScriptedService
from waiting import until

ROOT = Path(__file__).parents[2]
LOCUST = ROOT / "locust"
sys.path.insert(0, str(LOCUST))

import stack as load_stack
from open_loop import Plan, percentile, run

LOCUST_COMMAND = [sys.executable, "-m", "locust", "--only-summary", "-f"]


@pytest.fixture
def make_stack(tmp_path):
    """Starts a whole one with some settings."""
    with contextlib.ExitStack() as parts:

        def make(**settings):
            folder = tmp_path / "stack"
            folder.mkdir()
            try:
                return parts.enter_context(load_stack.running(folder, **settings))
            except load_stack.MissingError as missing:
                pytest.skip(str(missing))

        yield make


def environ(**variables):
    """Of this process, without what would change a load run."""
    ours = ("MUSET_", "LOAD_", "LOCUST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | variables


def locust(*words, **variables):
    """Start Locust with the guide's file."""
    command = [*LOCUST_COMMAND, str(ROOT / "tests" / "locustfile.py"), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environ(**variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def plan(port, requests, **options):
    given = {"rate": 100, "count": 100, "connections": 10, "marker": "", "weights": None} | options
    weights = given.pop("weights") or [1.0] * len(requests)
    return Plan(host="127.0.0.1", port=port, requests=requests, weights=weights, **given)


def read_request(key, path="/api/v1/users/1"):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n"


def stream_request(key, number):
    body = json.dumps({"question": f"How many eggs does queen {number} lay a day?"})
    return (
        f"POST /api/v1/ask HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Accept: text/event-stream\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


# --- the files ------------------------------------------------------------------------------------


def test_what_the_file_refuses():
    """A run without a key, and a shape that there is not."""
    keyless, square = locust("--headless", "--run-time", "1s"), locust(LOAD_SHAPE="square")
    text, _ = keyless.communicate(timeout=60)
    assert keyless.returncode == 1
    assert "MUSET_KEY must be a key of an admin" in text
    text, _ = square.communicate(timeout=60)
    assert square.returncode != 0
    assert "LOAD_SHAPE must be one of smoke" in text


def test_shapes():
    """Each ends, and each of its stages comes after the one before."""
    code = (
        "import sys; sys.path.insert(0, 'locust'); import shapes, json;"
        "print(json.dumps({n: [[s.until_s for s in stages], len(events)]"
        " for n, (stages, events) in shapes.SHAPES.items()}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ(), capture_output=True, check=True
    )
    shapes = json.loads(found.stdout.splitlines()[-1])
    assert set(shapes) == {"smoke", "ramp", "spike", "soak", "fault"}
    for stages, _ in shapes.values():
        assert stages == sorted(set(stages))
    assert shapes["fault"][1] == 4


# --- the constant rate ----------------------------------------------------------------------------


def test_percentiles():
    """The smallest value that so many do not exceed."""
    assert percentile([], 0.95) == 0.0
    assert percentile([3.0], 0.95) == 3.0
    assert percentile(list(range(1, 101)), 0.95) == 95
    assert percentile(list(range(1, 11)), 0.5) == 5


def test_a_pause_of_the_server_is_seen():
    """Those who were due during a pause have waited; a loop of users would count one of them."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        with connection:
            for number in range(60):
                connection.recv(4096)
                if number == 10:
                    time.sleep(0.5)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    port = listener.getsockname()[1]
    found = run(plan(port, [request], count=60, connections=1, marker="ok"))
    thread.join()
    listener.close()
    assert (found.statuses, found.unmarked) == ({"200": 60}, 0)
    assert found.longest >= 0.45
    assert found.p50 >= 0.1
    assert found.waited >= 20


def test_what_is_lost_is_counted():
    """A server that closes in the middle of an answer, or sends another one, does not count."""
    listener = socket.create_server(("127.0.0.1", 0))
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
    ]

    def serve():
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)
        listener.accept()[0].close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    port = listener.getsockname()[1]
    found = run(plan(port, [request], rate=20, count=5, connections=1, marker="ok"))
    thread.join()
    listener.close()
    assert found.statuses == {"200": 3, "503": 1, "lost": 1}
    assert found.unmarked == 1


# --- the exit code --------------------------------------------------------------------------------


@dataclass
class Ended:
    """A run of Locust that is over."""

    code: int
    text: str
    rows: list
    page: str = ""

    @property
    def bad(self):
        return {row["title"] for row in self.rows if row["verdict"] != "holds"}


FILES = ("csv", "html", "json-file")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two at once: `healthy` ends by itself, `slow` is started by the page and ended by Ctrl-C."""
    folder, port = tmp_path_factory.mktemp("runs"), free_port()
    healthy, slow = ScriptedService(), ScriptedService(delay_s=0.3, hangs=True)
    files = [word for name in FILES for word in (f"--{name}", str(folder / name))]
    # Half of them ask, so that in so short a time enough is asked to judge by.
    weights = [f'{{"user_class_name": "{name}", "weight": 1}}' for name in ("Reader", "Asker")]
    many = ("--users", "90", "--spawn-rate", "90", "--run-time", "2s", "--config-users", *weights)
    few = ("--users", "10", "--spawn-rate", "10", "--stop-timeout", "1", "--autostart")
    web = ("--web-host", "127.0.0.1", "--web-port", str(port))
    with (
        started(healthy, folder / "healthy", "--headless", *many, *files) as first,
        started(slow, folder / "slow", *few, *web) as second,
    ):
        slow.wait_for_reads(200)
        page = requests.get(f"http://127.0.0.1:{port}/", timeout=10).text
        second.send_signal(signal.SIGINT)
        ended = over(first, folder / "healthy"), over(second, folder / "slow", page)
    return SimpleNamespace(
        healthy=ended[0], slow=ended[1], files={name: folder / name for name in FILES}
    )


@contextlib.contextmanager
def started(service, report, *words):
    """A run of Locust against a scripted service; both end with the block."""
    settings = {"MUSET_KEY": "msk_x", "MUSET_URL": service.url, "LOAD_PROBE_RATE": "100"}
    with locust(*words, LOAD_REPORT=str(report), **settings) as process:
        try:
            yield process
        finally:
            process.kill()
            service.close()


def over(process, report, page=""):
    text, _ = process.communicate(timeout=120)
    return Ended(process.returncode, text, json.loads(report.read_text())["rows"], page)


def test_what_holds_ends_with_0(runs):
    """A service that does what it should, and all users; the rows stand in all files."""
    found = runs.healthy
    assert all(f'"{name}": ' in found.text for name in ("Asker", "Listener", "Reader")), found.text
    # A busy machine may be slow at anything; it is the rows that decide, and nothing else.
    assert found.code == (1 if found.bad else 0), found.text
    assert all(
        row["target"] not in ("equal", "none") for row in found.rows if row["title"] in found.bad
    )
    assert "Questions = rows" in Path(f"{runs.files['csv']}_objectives.csv").read_text()
    assert "Questions = rows" in runs.files["html"].read_text()
    assert json.loads(Path(f"{runs.files['json-file']}_objectives.json").read_text())


def test_ctrl_c_on_the_page_ends_with_1(runs):
    """What is missed, what is too little and what was cut short is so however a run ends."""
    found = runs.slow
    assert "Listener" in found.page
    assert found.code == 1, found.text
    assert {"API, a constant rate, from when due", "Requests that were cut short"} <= found.bad
    (asked,) = [row for row in found.rows if row["title"] == "AI, as users see it"]
    assert re.fullmatch(r"not enough requests: \d+, needed 100", asked["figure"])


# --- the real stack -------------------------------------------------------------------------------


def children(pid):
    """All processes below one; none of one that has just gone."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [one for child in below for one in (int(child), *children(int(child)))]


def is_running(pid):
    """Whether a process is there and is not one that only has not been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A small `make load` that Ctrl-C ends after the constant rate."""
    try:
        load_stack.find("nginx")
    except load_stack.MissingError as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("load")
    words = ["--users", "10", "--locust-seconds", "1", "--rate", "200", "--seconds", "0.25"]
    process = subprocess.Popen(
        [sys.executable, str(LOCUST / "run.py"), *words], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environ(TMPDIR=str(folder)),
    )  # fmt: skip
    lines = [process.stdout.readline()]
    started = children(process.pid)
    for line in process.stdout:
        lines.append(line)
        if "The generator" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)
    end = time.monotonic() + 10
    while (left := [pid for pid in started if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return SimpleNamespace(
        text="".join(lines), code=process.returncode, started=started, left=left, folder=folder
    )


def test_a_small_run(interrupted):
    """Through nginx and two workers: no errors, and both sides have counted the same."""
    text = interrupted.text
    _, _, counts = text.partition("Counts:\n")
    verdicts = [line.split()[0] for line in counts.splitlines()[:5]]
    assert verdicts == ["holds"] * 5, text
    assert re.search(r"^  holds +Errors ", text, re.MULTILINE), text
    assert "50 of 50 answered" in text


def test_ctrl_c_ends_everything(interrupted):
    """Whatever make load has started is gone when it is."""
    assert "The service is at" in interrupted.text
    assert len(interrupted.started) >= 6
    assert interrupted.code == 130
    assert interrupted.left == []
    assert list(interrupted.folder.iterdir()) == []


def test_without_nginx_it_says_so(tmp_path):
    """make load ends with 2 and names what is missing."""
    code = "import stack, run, sys; stack._PLACES = (); sys.argv = ['x']; sys.exit(run.main())"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(LOCUST)!r}); {code}"],
        env=environ(PATH=str(tmp_path), TMPDIR=str(tmp_path)), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    assert "nginx is not installed" in found.stderr


# --- claims ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_load(tmp_path_factory):
    """One whole run, for all claims that it answers, and a Prometheus that has watched it."""
    command = [sys.executable, str(LOCUST / "run.py")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process, contextlib.ExitStack() as parts:
        first = process.stdout.readline()
        url = None
        if first and shutil.which("prometheus") is not None:
            (target,) = re.findall(r"http://([^/]+)/metrics", first)
            url = parts.enter_context(prometheus(tmp_path_factory.mktemp("prometheus"), target))
        text, errors = process.communicate(timeout=180)
        if process.returncode == 2:
            pytest.skip(errors.strip().splitlines()[-1])
        yield SimpleNamespace(
            code=process.returncode, text=first + text, prometheus=url, ended=time.time()
        )


def line(text, title):
    """The row of this title, as people read it."""
    (found,) = re.findall(rf"^  \w+ +{re.escape(title)}.*$", text, re.MULTILINE)
    return " ".join(found.split())


@pytest.mark.full_only
@pytest.mark.claim("make load: all seven objectives hold, and both sides have counted the same")
def test_seven_objectives(make_load, prove):
    """By users in a loop, a constant rate, and 128 streams at once."""
    code, text = make_load.code, make_load.text
    (held,) = re.findall(r"(\d of \d objectives hold)", text)
    prove.figure(f"{held}; {line(text, 'Concurrent requests')}; {line(text, 'API requests')}")
    assert code == 0, text


@pytest.mark.full_only
@pytest.mark.claim(
    "1,100 cached reads a second at a constant rate over 128 kept connections through nginx for "
    "60 s: all answered, p95 below 100 ms from when each was due"
)
def test_throughput(make_load, prove):
    """With keys, limits, metrics and the access log, on two workers."""
    text = make_load.text
    found = line(text, "Throughput")
    prove.figure(f"{found}; {line(text, 'The generator')}")
    assert found.startswith("holds"), text
    assert line(text, "The generator").startswith("holds"), text


@pytest.mark.full_only
@pytest.mark.claim(
    "RATE_LIMIT_REQUESTS_PER_MINUTE as the guide has it, through nginx: of 90 requests at once 60 "
    "are served, the rest are 429 with Retry-After"
)
def test_the_default_of_requests_a_minute(make_stack, prove):
    """What is within the limit is served, what is above it is told when to come back."""
    stack = make_stack(
        WEB_CONCURRENCY="1", RATE_LIMIT_REQUESTS_PER_MINUTE="60", MAX_CONCURRENT_REQUESTS="100"
    )
    headers = {"Authorization": f"Bearer {stack.key}"}
    # Some of the minute comes back meanwhile: one request a second.
    began = time.monotonic()
    request = read_request(stack.key)
    found = run(plan(stack.port, [request], rate=1000, count=90, marker='"email"'))
    took_s = time.monotonic() - began
    good, refused = found.statuses.get("200", 0), found.statuses.get("429", 0)
    url = f"{stack.url}/api/v1/users/1"
    answer = requests.get(url, headers=headers, timeout=10)
    while answer.ok:
        answer = requests.get(url, headers=headers, timeout=10)
    prove.figure(f"of 90 requests in {took_s:.1f} s {good} are served, {refused} are 429")
    assert 60 <= good <= 60 + took_s
    assert good + refused == 90
    assert (answer.status_code, int(answer.headers["Retry-After"])) == (429, 1)


@pytest.mark.full_only
@pytest.mark.claim(
    "100 requests are served at once by one worker with the guide's MAX_CONCURRENT_REQUESTS, the "
    "101st is 503 with Retry-After, through nginx; health is not shed"
)
def test_the_default_of_requests_at_once(make_stack, prove):
    """100 streams that wait for their first token take all places."""
    stack = make_stack(
        WEB_CONCURRENCY="1", RATE_LIMIT_REQUESTS_PER_MINUTE="0", MAX_CONCURRENT_REQUESTS="100"
    )
    headers = {"Authorization": f"Bearer {stack.key}"}
    text = {"title": "Bees", "text": "The queen lays 2,000 eggs a day."}
    url = f"{stack.url}/api/v1/documents"
    assert requests.post(url, json=text, headers=headers, timeout=10).ok
    stack.upstream.script([load_stack.Fault("slow_first_token", times=0, delay=6)])
    found = []
    streams = plan(
        stack.port, [stream_request(stack.key, n) for n in range(100)], rate=200, count=100,
        connections=100, marker="event: done",
    )  # fmt: skip
    thread = threading.Thread(target=lambda: found.append(run(streams)))
    thread.start()
    until(lambda: stack.upstream.state["active"] >= 100, 5)
    answer = requests.get(url, headers=headers, timeout=10)
    alive = requests.get(f"{stack.url}/health/live", timeout=10)
    thread.join()
    good = found[0].statuses.get("200", 0) - found[0].unmarked
    prove.figure(f"{good} of 100 streams whole; one more is {answer.status_code}")
    assert (good, answer.status_code, alive.status_code) == (100, 503, 200)
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.full_only
@pytest.mark.claim(
    "While the model fails 30 % of the time, and then Redis stands still for 10 s, 50 users and "
    "the service count the same: questions, tokens, and answers by status"
)
def test_counts_under_faults(make_stack, prove):
    """The shape `fault` through Locust, and its exit code."""
    process = locust("--headless", LOAD_SHAPE="fault", **make_stack().environ())
    text, _ = process.communicate(timeout=180)
    prove.figure("; ".join(line(text, title) for title in ("Questions", "Answers", "Errors")))
    assert process.returncode == 0, text


@pytest.mark.full_only
@pytest.mark.claim(
    "Every expression of the dashboard has data in a real Prometheus that has scraped make load"
)
def test_the_dashboard_has_data(make_load, prove):
    """A number, which NaN is none of, at the end of the run."""
    if make_load.prometheus is None:
        prove.missing("prometheus")
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "muset.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    empty = []
    for expression in expressions:
        # A little earlier, when the service had not begun to end.
        asked = {"query": expression, "time": make_load.ended - 8}
        answer = requests.get(f"{make_load.prometheus}/api/v1/query", params=asked, timeout=10)
        found = answer.json()
        assert found["status"] == "success", (expression, found)
        if all(math.isnan(float(one["value"][1])) for one in found["data"]["result"]):
            empty.append(expression)
    prove.figure(f"{len(expressions) - len(empty)} of {len(expressions)} have data")
    assert empty == []


@contextlib.contextmanager
def prometheus(folder, target):
    """A Prometheus with the shipped rules; gives its address."""
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "900ms"},
        "rule_files": [str(ROOT / "deploy" / "prometheus" / "rules.yml")],
        "scrape_configs": [{"job_name": "muset", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    process = subprocess.Popen(
        ["prometheus", f"--config.file={folder}/prometheus.yml",
         f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
