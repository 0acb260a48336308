"""Circuit breakers of several processes: gunicorn's workers, kills, outages, all under load."""

import contextlib
import http.client
import json
import os
import signal
import time

import pytest
from breaker_worker import BreakerWorker
from gunicorn_app import serve
from redis_server import RedisServer, SlowWay
from waiting import until

from flask_muset.redis import GuardedRedis

_APP = """
import os, time
from flask import Flask
from flask_muset import ErrorHandler, Resilience
from flask_muset.errors import NetworkError
from flask_muset.resilience import CircuitBreaker, force, sharing_state
from flask_muset.signals import breaker_changed

app = Flask("shop")
app.config.update(RESILIENCE_REDIS_URL={url!r}, RESILIENCE_REDIS_BUDGET=1.0,
                  RESILIENCE_NAMESPACE={namespace!r})
resilience = Resilience()
policy = resilience.policy("x", CircuitBreaker("x", failure_threshold=1, recovery_timeout=600))
resilience.init_app(app)
ErrorHandler(app)
# Used before the workers are forked, if the app is preloaded.
assert policy.call(lambda: 1) == 1

def note(sender, event):
    line = f"{{time.time()}} {{os.getpid()}} {{event.new}}\\n"
    file = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)

breaker_changed.connect(note)

def fail():
    raise NetworkError("down")

@app.get("/call")
def call():
    return {{"pid": os.getpid(), "value": policy.call(lambda: 1)}}

@app.get("/fail")
def fails():
    policy.call(fail)

@app.get("/force/<mode>")
def forced(mode):
    return {{"shared": force(app, "x", mode)}}

@app.get("/state")
def state():
    return {{"pid": os.getpid(), "state": policy.breaker.state, "sharing": sharing_state(app)}}
"""


def ask(port, path):
    """Status and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Redis that a test may freeze and kill, if it leaves it as it was."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.thaw()
    server.kill()


@pytest.fixture(scope="module")
def proxy(server):
    """A way to it that may be cut."""
    proxy = SlowWay(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def workers(server):
    """A function that starts workers, all at once."""
    started = []

    def start(*urls, **config):
        made = [BreakerWorker(url, **config) for url in urls]
        started.extend(made)
        return [worker.ready() for worker in made]

    yield start
    for worker in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
        worker.kill()


@pytest.fixture(scope="module")
def fleet(workers, server, proxy):
    """Three workers, one of them on another way to Redis."""
    return workers(server.url, server.url, proxy.url)


def make(team, name, **options):
    """Have a breaker in all of them."""
    for worker in team:
        worker.start(f"make({name!r}, **{options!r})")
    for worker in team:
        worker.end()


# --- gunicorn -------------------------------------------------------------------------------------


@pytest.mark.claim(
    "4 gunicorn workers of two masters: a breaker that opens in one, is forced or is reset, is so "
    "in all within 1 s, preloaded and used before the fork or not"
)
@pytest.mark.parametrize("preload", [True, False])
def test_all_gunicorn_workers_agree(server, tmp_path, preload, prove):
    """Each worker notes when its breaker changes; the last one is measured from the first."""
    log = tmp_path / "changes"
    source = _APP.format(url=server.url, log=str(log), namespace=f"gunicorn.{preload}")
    options = ["-w", "2", *(["--preload"] if preload else [])]
    folders = [tmp_path / "one", tmp_path / "two"]
    with contextlib.ExitStack() as stack:
        ports = []
        for folder in folders:
            folder.mkdir()
            ports.append(stack.enter_context(serve(folder, source, *options))[1])
        pids = set()

        def all_know():
            for port in ports:
                body = ask(port, "/state")[1]
                if body["sharing"] == "shared":
                    pids.add(body["pid"])
            return len(pids) == 4

        until(all_know)
        longest = 0.0
        paths = [("/fail", "open"), ("/force/auto", "closed"), ("/force/open", "forced_open")]
        rounds = 20 if prove.full else 1
        for number in range(rounds):
            for path, state in [*paths, ("/force/auto", "closed")]:
                log.write_bytes(b"")
                ask(ports[number % 2], path)
                longest = max(longest, until_all(log, pids, state))
        ask(ports[0], "/fail")
        until(lambda: all(ask(port, "/call")[0] == 503 for port in ports * 8))
    prove.figure(
        f"{4 * rounds} changes, {'preloaded' if preload else 'not preloaded'}: the last of "
        f"{len(pids)} workers at most {longest * 1e3:.0f} ms after the first"
    )
    assert longest < (1 if prove.full else 10)


def until_all(log, pids, state):
    """Wait until all workers have noted a state; seconds between the first and the last."""

    def noted():
        lines = [line.split() for line in log.read_text().splitlines()]
        return {int(pid): float(at) for at, pid, new in lines if new == state}

    # A master that has loaded the app listens too.
    until(lambda: pids <= noted().keys())
    times = [at for pid, at in noted().items() if pid in pids]
    return max(times) - min(times)


# --- Probes ---------------------------------------------------------------------------------------

_PROBE = """
import threading
began = []
def probe():
    began.append(time.time())
    gevent.sleep({probe_s})
def call():
    while time.time() < {until}:
        try:
            policy.call(probe)
            return
        except CircuitOpenError:
            gevent.sleep(0.005)
gevent.sleep(max(0, {at} - time.time()))
gevent.joinall([gevent.spawn(call) for _ in range({callers})])
result = len(began)
"""


def half_open(workers):
    """Let the breakers of all workers be half-open now, their leases long all the same."""
    workers[0].run("breaker._open_s = 0.3; trip()")
    until(lambda: all(worker.state == "half_open" for worker in workers))
    until(lambda: workers[0].run("result = breaker.debt() is None"))


@pytest.mark.claim(
    "Half-open, 8 processes of 50 callers: exactly the permitted probes in total, for 1 and 3; "
    "a prober that is killed with -9 frees its place within its lease of 3 s"
)
def test_exactly_the_permitted_probes(server, workers, fleet, prove):
    """All callers try again and again while the probes run; a killed one is replaced."""
    team = [*fleet, *workers(*[server.url] * 5)] if prove.full else fleet
    callers, rounds = (50, 5) if prove.full else (20, 1)
    totals, expected = [], []
    for permitted in (1, 3):
        make(team, f"permits {permitted}", recovery_timeout=30.0, half_open_calls=permitted)
        for _ in range(rounds):
            half_open(team)
            at = time.time() + 0.3
            code = _PROBE.format(at=at, until=at + 0.7, probe_s=1.0, callers=callers)
            for worker in team:
                worker.start(code)
            totals.append(sum(worker.end() for worker in team))
            expected.append(permitted)
            until(lambda: all(worker.state == "closed" for worker in team))
    prove.figure(f"probes in rounds of {len(team)} x {callers} callers: {totals}")
    assert totals == expected
    if prove.full:
        frees_s = replace_a_killed_prober(server, workers(server.url)[0], team)
        prove.figure(f"a killed prober was replaced after {frees_s:.2f} s")
        # The lease, and what a question takes.
        assert frees_s < 3.3


def replace_a_killed_prober(server, victim, team):
    """Seconds until the three places of a killed process are had by others."""
    make([victim, *team], "killed", recovery_timeout=30.0, half_open_calls=3)
    half_open([victim, *team])
    client = GuardedRedis(server.url, budget_s=5)
    victim.run("for _ in range(3): gevent.spawn(policy.call, gevent.sleep, 60)\ngevent.sleep(0)")

    def leases():
        fields = client.execute("HKEYS", "muset:default:breaker:killed")
        return [field for field in fields if field.startswith(b"probe:")]

    until(lambda: len(leases()) == 3)
    victim.kill()
    began, at = time.monotonic(), time.time()
    team[0].start(_PROBE.format(at=at, until=at + 30, probe_s=0.0, callers=3))
    assert team[0].end() == 3
    client.close()
    until(lambda: all(worker.state == "closed" for worker in team))
    return time.monotonic() - began


def test_a_late_close_changes_nothing(fleet):
    """While a prober is stopped others open again; its success, when it goes on, is nobody's."""
    sleeper, other, _ = fleet
    make(fleet, "late", recovery_timeout=0.5)
    sleeper.run("trip()")
    until(lambda: sleeper.state == other.state == "half_open")
    sleeper.run("probe = gevent.spawn(policy.call, gevent.sleep, 1.0); gevent.sleep(0.05)")
    os.kill(sleeper.pid, signal.SIGSTOP)
    other.run("""
breaker._open_s = 60
def probe_fails():
    trip()
    return breaker.state == "open"
until(probe_fails)
until(lambda: breaker.debt() is None)
""")
    time.sleep(1.0)  # it has slept for longer than its probe takes
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.run("probe.join(); gevent.sleep(0.5); result = look()") == ["open", "shared"]
    assert other.run("result = look()") == ["open", "shared"]


# --- Outages --------------------------------------------------------------------------------------

_LOAD = """
from flask_muset.signals import redis_link_changed
logs.clear()
changes, wrong, waits, calls = [], [], [0.0], [0]
def changed(sender, event):
    changes.append(event.state)
redis_link_changed.connect(changed)
def work():
    gevent.sleep(0.002)
def load():
    while True:
        began = time.monotonic()
        try:
            policy.call(work)
        except CircuitOpenError:
            gevent.sleep(0.002)
        except Exception as error:
            wrong.append(repr(error))
        calls[0] += 1
        waits.append(time.monotonic() - began)
        waits[:] = [max(waits)]
greenlets = [gevent.spawn(load) for _ in range(5)]
"""
_SEEN = """
gevent.killall(greenlets)
result = [wrong, len(changes), logs, waits[0], calls[0]]
"""


@pytest.mark.claim(
    "Redis killed, frozen, restarted empty, cut off from one host, under load: no call fails for "
    "it, at most one log line for each change of the link, shared again within 5 s after it "
    "returns, and then all agree"
)
def test_outages(server, proxy, workers, fleet, prove):
    """Breakers open and are forced during the outage; who knows what afterwards is compared."""
    # The usual budget, where it is measured.
    urls = [server.url, server.url, proxy.url]
    team = workers(*urls, REDIS_BUDGET=0.05) if prove.full else fleet
    make(team, "outage")
    for worker in team:
        worker.run(_LOAD)
    client = GuardedRedis(server.url, budget_s=5)
    ways = ["killed", "frozen", "emptied", "cut off"] if prove.full else ["killed", "cut off"]
    longest = dict.fromkeys(ways, 0.0)
    for way in ways:
        for number in range(3 if prove.full else 1):
            away = outage(way, server, proxy, client, team)
            away[-1].run("breaker.force_open()" if number == 2 else "trip()")
            time.sleep(1.0 if prove.full else 0.1)
            end_outage(way, server, proxy)
            ended_at = time.monotonic()
            until(lambda: agree(team), 30)
            longest[way] = max(longest[way], time.monotonic() - ended_at)
            team[0].run("force(app, 'outage', 'auto')")
            until(lambda: all(worker.state == "closed" for worker in team))
    seen = [worker.run(_SEEN) for worker in team]
    client.close()
    took = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in longest.items())
    calls, failed = sum(one[4] for one in seen), sum(len(one[0]) for one in seen)
    lines, changes = sum(len(one[2]) for one in seen), sum(one[1] for one in seen)
    slowest_s = max(one[3] for one in seen)
    prove.figure(
        f"{calls} calls, {failed} failed, the slowest took {slowest_s * 1e3:.0f} ms; {lines} log "
        f"lines for {changes} changes; agreed again after: {took}"
    )
    for wrong, changes, logs, *_ in seen:
        assert wrong == []
        assert len(logs) <= changes
        assert all("the link to" in line for line in logs)
    assert max(longest.values()) < (5 if prove.full else 30)


def outage(way, server, proxy, client, team):
    """Begin one; the workers that are affected, once they know it."""
    away = team[2:] if way == "cut off" else team
    if way == "cut off":
        proxy.hold()
    elif way == "frozen":
        server.freeze()
    else:
        if way == "killed":
            client.execute("SAVE")
        server.kill()
        if way == "emptied":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{server.folder}/dump.rdb")
    until(lambda: all(worker.sharing == "local" for worker in away))
    return away


def end_outage(way, server, proxy):
    """End it."""
    if way == "cut off":
        proxy.let_go()
    elif way == "frozen":
        server.thaw()
    else:
        server.start()


def agree(team):
    """Whether all share one state of one version, which is not closed."""
    seen = [worker.run("result = [*look(), breaker.version]") for worker in team]
    states = {(state, version) for state, _, version in seen}
    return len(states) == 1 and seen[0][0] != "closed" and all(one[1] == "shared" for one in seen)
