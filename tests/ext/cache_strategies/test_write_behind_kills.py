"""Writes that were accepted outlive the processes, the Redis and the workers that have them."""

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from flask import Flask
from gunicorn_app import serve
from redis_server import RedisServer
from waiting import until
from write_behind_worker import Killing, Log, declare_writers

from flask_muset import CacheStrategies
from flask_muset.errors import MusetError
from flask_muset.redis import GuardedRedis

_HELPERS = str(Path(__file__).parents[1])
_FAIR = "flask_muset.worker.FairGeventWorker"
_ALWAYS = ["--appendonly", "yes", "--appendfsync", "always"]
_full_only = pytest.mark.full_only

_APP = """
import atexit
import os
import sys
import gevent.pool
from flask import Flask, jsonify

sys.path.insert(0, {helpers!r})
from flask_muset import CacheStrategies
from write_behind_worker import Log, declare_writers, set_lease

set_lease(0.5)
app = Flask(__name__)
app.config.update({config!r})
cache = CacheStrategies(app)
source = Log("source")
functions = declare_writers(cache, source, pause_s={pause_s})
# Registered first, it runs last.
atexit.register(Log("ended").add, os.getpid())

@app.post("/many/<int:first>/<int:end>")
def many(first, end):
    def write(number):
        with app.app_context():
            name = ("value", "ledger", "batch")[number % 3]
            key = f"{{name}}:{{number if name == 'value' else number % 50}}"
            return cache.write_behind(key, str(number), functions[name], 60)
    return jsonify(sum(gevent.pool.Pool(64).imap_unordered(write, range(first, end))))

@app.put("/value/<key>/<int:number>")
def put(key, number):
    return jsonify(cache.write_behind(f"value:{{key}}", number, functions["value"], 60))

@app.get("/value/<key>")
def get(key):
    def load():
        lines = [line for line in source.read() if line[1] == f"value:{{key}}"]
        return max(lines, key=lambda line: line[2])[4] if lines else -1
    return jsonify(cache.cache_aside(f"value:{{key}}", load, 60), os.getpid())
"""


def ask(port, method, path):
    """The JSON answer to a request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return json.loads(answer.read())


def flush(folder):
    """Write in this process what is left in a folder's journal; how much that was."""
    app = Flask("later")
    app.config["CACHE_STRATEGIES_JOURNAL_PATH"] = folder / "journal.db"
    cache = CacheStrategies(app)
    declare_writers(cache, Log(folder / "source"))
    with app.app_context():
        left = cache.pending()["pending"]
        assert cache.flush(30)
        assert cache.pending()["pending"] == 0
        assert cache.dead_letters() == []
    return left


def until_accepted(folder):
    """Until the first write is accepted: what is killed before would only refuse all of them."""
    events = Log(folder / "events")
    until(lambda: any(answer == "accepted" for answer, *_ in events.read()))


def report(prove, outcome, kills):
    """Say what has happened; call it before the assertions."""
    accepted, open_ = outcome.answers["accepted"], outcome.answers["began"]
    others = sum(outcome.answers.values()) - accepted - open_
    prove.figure(
        f"{kills} kills, {accepted} writes accepted, {len(outcome.lost)} lost, "
        f"{outcome.repeated} repeated, {open_} unanswered, {others} refused"
    )


def assert_nothing_is_lost(outcome):
    """All is written, nothing waits, nothing was given up."""
    assert not outcome.lost
    assert not outcome.wrong
    assert outcome.dead == []
    assert outcome.is_all
    assert outcome.pending["pending"] == 0
    assert outcome.answers["accepted"] > 0


@pytest.mark.claim("kill -9 of processes that write behind, SQLite journal: no accepted write lost")
@pytest.mark.parametrize("most", [10_000, 30])
def test_kills_with_sqlite(tmp_path, prove, most):
    """Processes that accept and that write are killed at random moments: the source has all."""
    kills = 1000 if prove.full else 15
    config = {
        "CACHE_STRATEGIES_JOURNAL_PATH": str(tmp_path / "journal.db"),
        "CACHE_STRATEGIES_MAX_PENDING": most,
        "CACHE_STRATEGIES_WRITE_DELAY": 0.02,
    }
    with Killing(tmp_path, config, kills=kills, seed=1) as killing:
        killing.wait()
        outcome = killing.write_the_rest()
    report(prove, outcome, kills)
    prove.figure(f"{most} may wait")
    assert_nothing_is_lost(outcome)


@pytest.mark.claim("kill -9 of processes and of Redis, appendfsync always: no accepted write lost")
@pytest.mark.parametrize(
    ("most", "restarts"),
    [
        (10_000, True),
        pytest.param(10_000, False, marks=_full_only),
        pytest.param(100, True, marks=_full_only),
    ],
)
def test_kills_with_redis(tmp_path, prove, most, restarts):
    """The same with Redis, also while Redis itself is killed and comes back several times."""
    kills, seed = (1000 if prove.full else 60), 2
    server = RedisServer(tmp_path, *_ALWAYS).start()
    config = {
        "CACHE_STRATEGIES_REDIS_URL": server.url,
        "CACHE_STRATEGIES_MAX_PENDING": most,
        "CACHE_STRATEGIES_WRITE_DELAY": 0.02,
    }
    times = 0
    try:
        with Killing(tmp_path, config, kills=kills, seed=seed) as killing:
            until_accepted(tmp_path)
            with killing_too(server, seed) if restarts else contextlib.nullcontext([]) as again:
                killing.wait()
            until_loaded(server)
            times = len(again)
            outcome = killing.write_the_rest()
    finally:
        server.kill()
    report(prove, outcome, kills)
    prove.figure(f"{times} kills of Redis; {most} may wait")
    assert_nothing_is_lost(outcome)
    assert bool(times) == restarts


@pytest.mark.claim("kill -9 of processes and of both of two Redis: no accepted write lost")
def test_kills_with_two_redis(tmp_path, tmp_path_factory, prove):
    """The same where the cache has a Redis of its own, which comes back empty each time."""
    kills, seed = (1000 if prove.full else 60), 5
    server = RedisServer(tmp_path, *_ALWAYS).start()
    cache_server = RedisServer(tmp_path_factory.mktemp("cache")).start()
    config = {
        "CACHE_STRATEGIES_REDIS_URL": cache_server.url,
        "CACHE_STRATEGIES_JOURNAL_REDIS_URL": server.url,
        "CACHE_STRATEGIES_REDIS_BUDGET": 2.0,
        "CACHE_STRATEGIES_WRITE_DELAY": 0.02,
    }
    try:
        with Killing(tmp_path, config, kills=kills, seed=seed) as killing:
            until_accepted(tmp_path)
            with killing_too(server, seed) as times, killing_too(cache_server, 6) as cache_times:
                killing.wait()
            until_loaded(server)
            outcome = killing.write_the_rest()
    finally:
        server.kill()
        cache_server.kill()
    report(prove, outcome, kills)
    prove.figure(f"{len(times)} kills of the journal's Redis, {len(cache_times)} of the cache's")
    assert_nothing_is_lost(outcome)
    assert times
    assert cache_times


@contextlib.contextmanager
def killing_too(server, seed):
    """Kill a Redis at random moments and start it again; yields a list that has one for each."""
    chance, is_over, times = random.Random(seed), threading.Event(), []

    def run():
        while not is_over.wait(chance.uniform(0.1, 0.8)):
            server.kill()
            times.append(1)
            is_over.wait(chance.uniform(0, 0.2))
            server.start()

    killer = threading.Thread(target=run)
    killer.start()
    try:
        yield times
    finally:
        is_over.set()
        killer.join()


# --- What the machine of Redis has when it fails --------------------------------------------------

_CALL = re.compile(
    r"(?P<thread>\d+) +[\d.]+ "
    r"(?:<\.\.\. \w+ resumed>.*|(?P<name>\w+)\((?P<file>\d+).*?)"
    r"(?:<unfinished \.\.\.>|= (?P<result>-?\d+).*)$"
)


class Watched:
    """A Redis of whose AOF is known what is on the disk, beyond what the kernel has taken.

    Args:
        server: It runs.
        folder: Where the trace of its system calls is kept.
    """

    def __init__(self, server, folder):
        self._server, self._trace = server, folder / "trace"
        files = f"/proc/{server.pid}/fd"
        (self._file,) = [
            name for name in os.listdir(files) if _path(files, name).endswith(".incr.aof")
        ]
        self._aof = _path(files, self._file)
        self._length = os.path.getsize(self._aof)
        self._strace = subprocess.Popen(
            ["strace", "-f", "-ttt", "-s", "0", "-e", "trace=write,fdatasync,fsync",
             "-o", self._trace, "-p", str(server.pid)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert "attached" in self._strace.stderr.readline()

    def lose_power(self):
        """Kill it, and take from its AOF what was not synced."""
        self._server.kill()
        self._strace.communicate()
        length, synced, began = self._length, self._length, {}
        for line in self._trace.read_text().splitlines():
            call = _CALL.match(line)
            if call is None:
                continue
            if call["name"]:
                began[call["thread"]] = call["name"], call["file"], length
            if call["result"] is None or call["thread"] not in began:
                continue
            name, file, at = began.pop(call["thread"])
            if file == self._file and name == "write":
                length += max(0, int(call["result"]))
            elif file == self._file and call["result"] == "0":
                synced = max(synced, at)
        assert length == os.path.getsize(self._aof)
        os.truncate(self._aof, synced)


def _path(files, name):
    try:
        return os.readlink(f"{files}/{name}")
    except OSError:  # closed meanwhile
        return ""


def until_loaded(server):
    """Until a Redis has read what it had."""
    client = GuardedRedis(server.url, budget_s=5)
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(MusetError):
            client.execute("PING")
            break
        assert time.monotonic() < end, "Redis does not answer"
        time.sleep(0.02)
    client.close()


def accepting(server):
    """An app of its own that only accepts, its cache, a writer, and the journal."""
    app = Flask("accepting")
    app.config.update(
        CACHE_STRATEGIES_REDIS_URL=server.url,
        CACHE_STRATEGIES_REDIS_BUDGET=5.0,
        CACHE_STRATEGIES_DRAIN=False,
        CACHE_STRATEGIES_MAX_PENDING=1_000_000,
    )
    cache = CacheStrategies(app)
    write = cache.writer("write")(lambda value: None)
    return app, cache, write, app.extensions["cache_strategies"].cache.behind.journal


@_full_only
@pytest.mark.claim("the machine of Redis fails: always loses nothing, everysec what is warned of")
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_machine_of_redis_fails(tmp_path, prove, fsync):
    """Of its AOF only that is left which was synced: what was accepted is there, or as warned."""
    if shutil.which("strace") is None:
        prove.missing("strace")
    server, lost_s, lost, accepted = RedisServer(tmp_path, *_ALWAYS[:3], fsync), 0.0, 0, {}
    chance = random.Random(3)
    try:
        for number in range(5):
            until_loaded(server.start())
            watched = Watched(server, tmp_path)
            app, cache, write, journal = accepting(server)
            with app.app_context():
                accepted = accept_for(cache, write, chance.uniform(1.2, 3.0), number)
            watched.lose_power()
            failed_at = time.monotonic()
            until_loaded(server.start())
            _, _, _, journal = accepting(server)
            gone = [at for key, at in accepted.items() if journal.newest(key) is None]
            lost, lost_s = lost + len(gone), max([lost_s, *(failed_at - at for at in gone)])
            risks = journal.risks()
            server.kill()
    finally:
        server.kill()
    prove.figure(f"appendfsync {fsync}: {lost} lost in 5 failures, of the last {lost_s:.1f} s")
    assert accepted
    assert bool(lost) == (fsync == "everysec")
    assert any("everysec" in risk for risk in risks) == (fsync == "everysec")


def accept_for(cache, write, seconds, prefix):
    """Write behind for some seconds; the keys of what was accepted, and when."""
    numbers, end, accepted = itertools.count(), time.monotonic() + seconds, {}
    while time.monotonic() < end:
        key = f"{prefix}:{next(numbers)}"
        if cache.write_behind(key, "value", write, 60):
            accepted[key] = time.monotonic()
    return accepted


# --- gunicorn -------------------------------------------------------------------------------------


@pytest.mark.claim("gunicorn is stopped while writes wait: written or kept, none lost, exit 0")
@pytest.mark.parametrize(
    ("worker", "pause_s"),
    [
        (_FAIR, 0.2),
        ("gevent", 0.0),
        pytest.param(_FAIR, 0.0, marks=_full_only),
        pytest.param("gevent", 0.2, marks=_full_only),
    ],
)
def test_stop_of_gunicorn(tmp_path, prove, worker, pause_s):
    """A stop writes what there is time for; what the source has not got, the journal has."""
    count = 5000 if prove.full else 400
    config = {
        "CACHE_STRATEGIES_JOURNAL_PATH": "journal.db",
        "CACHE_STRATEGIES_WRITE_DELAY": 3600.0,
        "CACHE_STRATEGIES_DRAIN_AT_EXIT": 5.0 if prove.full or not pause_s else 1.0,
    }
    app = _APP.format(helpers=_HELPERS, config=config, pause_s=pause_s)
    options = ["--graceful-timeout", "10"]
    with serve(tmp_path, app, *options, worker=worker) as (process, port):
        accepted = ask(port, "POST", f"/many/0/{count}")
        before = len(Log(tmp_path / "source").read())
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
    at_stop = values_of(tmp_path)
    left = flush(tmp_path)
    prove.figure(f"{worker}: {len(at_stop)} written, {left} left of {accepted}")
    assert status == 0
    assert (accepted, before) == (count, 0)
    # The worker came to its end, and was not killed for its time being over.
    assert len(Log(tmp_path / "ended").read()) == 1
    assert left or not pause_s
    assert len(at_stop) + left >= count
    assert values_of(tmp_path) == set(map(str, range(count)))


def values_of(folder):
    """What the source has."""
    return {value for _, _, _, _, value in Log(folder / "source").read()}


@pytest.mark.claim("4 workers, one SQLite journal, kill -9: what was accepted is read at once")
def test_reads_of_all_workers(tmp_path, prove):
    """A value that one worker has accepted is what every other answers, workers killed or not."""
    rounds = 300 if prove.full else 6
    config = {
        "CACHE_STRATEGIES_ENABLED": False,
        "CACHE_STRATEGIES_JOURNAL_PATH": "journal.db",
        "CACHE_STRATEGIES_WRITE_DELAY": 0.05,
    }
    app = _APP.format(helpers=_HELPERS, config=config, pause_s=0.005)
    with serve(tmp_path, app, "--workers", "4") as (process, port):
        clients = [Client(port, f"client{number}", rounds) for number in range(4)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        killed = set()
        for client, thread in itertools.cycle(zip(clients, threads, strict=True)):
            thread.join(0.4)
            kill_worker(client, killed)
            if not any(thread.is_alive() for thread in threads):
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    flush(tmp_path)
    written = {}
    for _, key, seq, _, value in Log(tmp_path / "source").read():
        written[key] = max(written.get(key, (0, 0)), (seq, value))
    pids = [pid for client in clients for pid in client.pids]
    wrong = [read for client in clients for read in client.wrong]
    prove.figure(
        f"{len(pids)} reads by {len(set(pids))} workers, {len(killed)} of them killed, "
        f"{len(wrong)} were old"
    )
    assert wrong == []
    assert killed
    for client in clients:
        assert client.accepted <= written[f"value:{client.key}"][1] <= client.asked


class Client:
    """Writes growing numbers to its key, and reads it after each."""

    def __init__(self, port, key, rounds):
        self.key = key
        self.accepted, self.asked = -1, -1
        self.pids, self.wrong = [], []
        self._port, self._rounds = port, rounds

    def run(self):
        """Until all rounds are over."""
        for number in range(self._rounds):
            self.asked = number
            # A worker that is killed answers nothing: it may have accepted it.
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(self._port, "PUT", f"/value/{self.key}/{number}"):
                    self.accepted = number
            for _ in range(4):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    self._read()

    def _read(self):
        value, pid = ask(self._port, "GET", f"/value/{self.key}")
        self.pids.append(pid)
        if not self.accepted <= value <= self.asked:
            self.wrong.append((value, self.accepted, self.asked))


def kill_worker(client, killed):
    """kill -9 of the worker that has answered a client last, once."""
    last = client.pids[-1] if client.pids else None
    if last is not None and last not in killed:
        os.kill(last, signal.SIGKILL)
        killed.add(last)
