"""The guarded client of Redis, with a real server that is refused, frozen, slow and killed."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import pytest
import redis.exceptions
from patched import run_patched
from redis_server import RedisServer, SlowWay, free_port
from redis_server import redis_server as redis_server
from waiting import until

from flask_muset import signals
from flask_muset.deadline import deadline
from flask_muset.errors import (
    CircuitOpenError,
    ExternalServiceError,
    NetworkError,
    OperationTimeoutError,
    OverloadedError,
)
from flask_muset.redis import GuardedRedis, Script

# A budget that a busy machine keeps, for tests that are not about it.
EASY = 5.0


@pytest.fixture
def mine():
    """The name of the links of this test; those of tests before it may still have news."""
    return f"redis of {uuid.uuid4()}"


@pytest.fixture
def make(mine):
    """GuardedRedis, closed afterwards."""
    with contextlib.ExitStack() as stack:

        def make(url, **options):
            client = GuardedRedis(url, name=mine, **options)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def states(mine):
    """The states of this test's LinkEvents."""
    seen = []

    def note(_sender, event):
        if event.name == mine:
            seen.append(event.state)

    with signals.redis_link_changed.connected_to(note):
        yield seen


# --- What it does ---------------------------------------------------------------------------------


def test_replies_are_raw(redis_server, make):
    """One command, several at once and a key's prefix; replies come as Redis sends them."""
    client = make(redis_server.url, budget_s=EASY, prefix="muset:test:")
    assert client.key("a") == "muset:test:a"
    assert client.execute("SET", client.key("a"), b"\x00\xff") == b"OK"
    assert client.execute("GET", client.key("a")) == b"\x00\xff"
    assert client.execute("GET", client.key("b")) is None
    assert client.pipeline([("INCR", "n"), ("INCRBY", "n", 5), ("MGET", "n", "x")]) == [
        1, 6, [b"6", None]
    ]  # fmt: skip
    assert client.pipeline([]) == []
    client.check(EASY)
    assert client.state == "up"
    assert client.in_use == 0


def test_nothing_is_opened_before_first_use(redis_server, make):
    """Making a client and asking for its state connect to nothing."""
    idle = make(redis_server.url)
    assert idle.state == "up"
    asking = make(redis_server.url, budget_s=EASY)
    # Redis may not have seen yet that the one of the fixture has ended.
    until(lambda: len(asking.execute("CLIENT", "LIST").splitlines()) == 1)


def test_scripts_fall_back_to_their_text(redis_server, make):
    """EVALSHA where Redis knows the script, EVAL where it does not, after a flush too."""
    client = make(redis_server.url, budget_s=EASY)
    script = Script("return {KEYS[1], ARGV[1]}")
    assert len(script.sha) == 40
    for _ in range(2):
        assert client.script(script, ["k"], ["v"]) == [b"k", b"v"]
    stats = client.execute("INFO", "commandstats")
    assert b"cmdstat_eval:calls=1" in stats
    client.execute("SCRIPT FLUSH")
    assert client.script(script.source, ["k"], [2]) == [b"k", b"2"]


def test_error_replies_keep_the_link_up(redis_server, make, states):
    """Redis answered, so it is there; in a pipeline an error stands in its place."""
    client = make(redis_server.url, budget_s=EASY)
    client.execute("SET", "text", "x")
    with pytest.raises(ExternalServiceError, match="wrong kind") as caught:
        client.execute("LPUSH", "text", "y")
    assert isinstance(caught.value.__cause__, redis.exceptions.ResponseError)
    with pytest.raises(ExternalServiceError):
        client.script("return redis.error_reply('ERR no')", [])
    replies = client.pipeline([("GET", "text"), ("LPUSH", "text", "y"), ("GET", "text")])
    assert replies[0] == replies[2] == b"x"
    assert isinstance(replies[1], ExternalServiceError)
    assert isinstance(replies[1].__cause__, redis.exceptions.ResponseError)
    assert (client.state, states, client.in_use) == ("up", [], 0)
    assert client.execute("CLIENT", "ID") == client.execute("CLIENT", "ID")  # no new connection


def test_a_wrong_word_is_the_callers_fault(redis_server, make):
    """A value that cannot be sent raises redis-py's DataError before anything is sent."""
    client = make(redis_server.url, budget_s=EASY)
    with pytest.raises(redis.exceptions.DataError):
        client.execute("SET", "k", {"a": 1})
    assert client.state == "up"


def test_a_dedicated_connection_waits_longer_than_the_budget(redis_server, make):
    """A reader of its own is not bounded by the budget and takes nothing from the pool."""
    client = make(redis_server.url, budget_s=0.05, max_connections=1)
    reader = client.dedicated()
    reader.send_command("BLPOP", "nothing", "0.2")
    assert client.in_use == 0
    assert reader.read_response() is None
    reader.disconnect()


def test_unix_sockets_databases_and_passwords(tmp_path, make):
    """What a URL says about socket, database and password holds."""
    server = RedisServer(tmp_path, "--requirepass", "p@ss").start()
    try:
        unix = make(f"unix://:p%40ss@{server.socket_path}?db=3", budget_s=EASY)
        tcp = make(f"redis://:p%40ss@127.0.0.1:{server.port}/3", budget_s=EASY)
        unix.execute("SET", "k", 1)
        assert tcp.execute("GET", "k") == b"1"
    finally:
        server.kill()


def test_a_closed_client_begins_anew(redis_server, make):
    """close() closes its connections; the next call opens new ones."""
    client, other = (make(redis_server.url, budget_s=EASY) for _ in range(2))
    first = client.execute("CLIENT", "ID")
    client.close()
    until(lambda: len(other.execute("CLIENT", "LIST").splitlines()) == 1)
    assert client.execute("CLIENT", "ID") != first


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://127.0.0.1", {}),
        ("redis://user:se/cret@127.0.0.1", {}),
        ("redis://:secret@127.0.0.1/0?colour=red", {}),
        ("redis://127.0.0.1", {"max_connections": 0}),
        ("redis://127.0.0.1", {"budget_s": 0}),
    ],
)
def test_bad_arguments_are_refused(url, options):
    """A value that cannot work raises at once; no secret of the URL is in the text."""
    with pytest.raises(ValueError, match=r"must be|option") as caught:
        GuardedRedis(url, **options)
    text = f"{caught.value!r}"
    assert "cret" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_secrets_stay_secret(tmp_path, make, states, caplog):
    """A refused password is a failure of the link; it is in no message, log line or repr."""
    server = RedisServer(tmp_path, "--requirepass", "right").start()
    try:
        client = make(f"redis://someone:hunter2@127.0.0.1:{server.port}/0", budget_s=EASY)
        with pytest.raises(ExternalServiceError) as caught:
            client.execute("GET", "k")
        assert caught.value.unavailable
        assert not caught.value.retryable
        until(lambda: client.state == "down")
        texts = [str(caught.value), repr(caught.value.__cause__), repr(client), caplog.text]
        assert states == ["doubt", "down"]
        assert caplog.text
        assert not any("hunter2" in text or "someone" in text for text in texts)
    finally:
        server.kill()


def test_a_client_that_is_closed_hears_no_more_of_its_link(tmp_path, make, mine):
    """A probe may fail in the moment of the close; the client then begins anew and is up."""
    client, told = make(RedisServer(tmp_path).url), []
    client.on_change = told.append

    def close(_sender, event):
        if (event.name, event.state) == (mine, "down"):
            client.close()

    with signals.redis_link_changed.connected_to(close):
        with pytest.raises(NetworkError):
            client.execute("GET", "k")
        until(lambda: client.state == "up")
    assert told == ["doubt"]


# --- Redis that is away, under threads ------------------------------------------------------------


def test_a_refused_port_costs_little(tmp_path, make, states):
    """Nobody listens: the first call fails quickly, the next are refused, and it recovers."""
    server = RedisServer(tmp_path)
    client = make(server.url, budget_s=EASY)
    began = time.monotonic()
    with pytest.raises(NetworkError) as caught:
        client.execute("GET", "k")
    assert time.monotonic() - began < 4
    assert isinstance(caught.value.__cause__, redis.exceptions.ConnectionError)
    with pytest.raises(CircuitOpenError) as refused:
        client.execute("GET", "k")
    assert 0 < refused.value.retry_after_s < EASY + 3
    with pytest.raises(CircuitOpenError):
        client.check(0.25)
    until(lambda: client.state == "down")
    server.start()
    try:
        until(lambda: client.state == "up")
        assert client.execute("GET", "k") is None
        assert states == ["doubt", "down", "up"]
    finally:
        server.kill()


def test_frozen_under_threads(redis_server, make, mine, states, caplog):
    """A frozen Redis costs one budget; the events and log lines are doubt, down and up."""
    caplog.set_level(logging.INFO, "flask_muset.redis")
    client = make(redis_server.url, budget_s=0.5)
    client.execute("SET", "k", "v")
    redis_server.freeze()
    began = time.monotonic()
    with pytest.raises(OperationTimeoutError) as caught:
        client.execute("GET", "k")
    assert 0.4 < time.monotonic() - began < 5
    assert isinstance(caught.value.__cause__, redis.exceptions.TimeoutError)
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(CircuitOpenError):
            client.execute("GET", "k")
    assert time.monotonic() - began < 5
    until(lambda: client.state == "down")
    time.sleep(1.3)  # several probes fail meanwhile
    redis_server.thaw()
    until(lambda: client.state == "up")
    assert client.execute("GET", "k") == b"v"
    assert states == ["doubt", "down", "up"]
    told = [record.getMessage() for record in caplog.records]
    lines = [line for line in told if line.startswith(f"the link to {mine} is ")]
    assert [line.split(" is ")[1].split(":")[0] for line in lines] == states


def test_a_late_reply_is_read_by_nobody(redis_server, make):
    """A reply that comes after its call was given up is not the next call's."""
    way = SlowWay(redis_server.port)
    client = make(way.url, max_connections=1, budget_s=0.5)
    client.execute("ECHO", "warm")
    way.delay_s, way.fixed = 2, True
    with pytest.raises(OperationTimeoutError):
        client.execute("ECHO", "late")
    way.delay_s = 0
    until(lambda: client.state == "up")
    assert client.execute("ECHO", "mine") == b"mine"
    way.close()


def test_a_restart_is_survived(redis_server, make, states):
    """kill -9 and a new start on the same port, once unseen between calls and once while asked."""
    client = make(redis_server.url, budget_s=EASY)
    client.execute("SET", "k", "v")
    redis_server.kill()
    redis_server.start()
    assert client.execute("GET", "k") is None
    assert states == []
    redis_server.kill()
    with pytest.raises(NetworkError):
        client.execute("GET", "k")
    redis_server.start()
    until(lambda: client.state == "up")
    assert client.execute("GET", "k") is None


READ_ONLY_BEFORE_7 = (
    'return redis.error_reply("ERR Error running script (call to f_0): @user_script:1: '
    "-READONLY You can't write against a read only replica.\")"
)


@pytest.mark.parametrize(
    "write",
    [
        lambda client: client.execute("SET", "k", "new"),
        lambda client: client.script("return redis.call('SET', 'k', 'new')", []),
        lambda client: raise_one(client.pipeline([("GET", "k"), ("SET", "k", "new")])),
    ],
    ids=["command", "script", "pipeline"],
)
def test_a_master_that_became_a_replica(redis_server, make, states, write):
    """The link is down until Redis takes writes, though it answers PING; then all is made anew."""
    client, beside = make(redis_server.url, budget_s=EASY), make(redis_server.url, budget_s=EASY)
    client.execute("SET", "k", "old")
    before = client.execute("CLIENT", "ID")
    beside.execute("CONFIG", "SET", "replica-read-only", "yes")
    beside.execute("REPLICAOF", "127.0.0.1", free_port())
    with pytest.raises(ExternalServiceError, match="read only") as caught:
        write(client)
    assert caught.value.unavailable
    until(lambda: client.state == "down")
    with pytest.raises(CircuitOpenError):
        client.execute("GET", "k")
    assert beside.execute("PING") == b"PONG"
    beside.execute("REPLICAOF", "NO", "ONE")
    until(lambda: client.state == "up")
    assert states == ["doubt", "down", "up"]
    assert client.execute("GET", "k") == b"old"
    assert client.execute("CLIENT", "ID") != before
    write(client)
    assert client.execute("GET", "k") == b"new"


def raise_one(replies):
    """Raise what one of several replies is."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def test_a_new_master_behind_the_same_address(redis_server, tmp_path_factory, make):
    """After one refused write each connection leads to the new master, an idle one too."""
    other = RedisServer(tmp_path_factory.mktemp("other")).start()
    way = SlowWay(redis_server.port)
    try:
        client, beside = make(way.url, budget_s=EASY), make(redis_server.url, budget_s=EASY)
        assert ports(client) == [redis_server.port] * 2
        beside.execute("REPLICAOF", "127.0.0.1", other.port)
        way._target = ("127.0.0.1", other.port)
        with pytest.raises(ExternalServiceError, match="read only"):
            client.execute("SET", "k", "v")
        until(lambda: client.state == "up")
        assert ports(client) == [other.port] * 2
        assert client.execute("SET", "k", "v") == b"OK"
    finally:
        way.close()
        other.kill()


def ports(client):
    """Which servers two connections lead to."""
    busy = threading.Thread(target=client.execute, args=("BLPOP", "nothing", "0.2"))
    busy.start()
    until(lambda: client.in_use == 1)
    one = client.execute("CONFIG", "GET", "port")
    busy.join()
    two = client.execute("CONFIG", "GET", "port")
    return [int(one[1]), int(two[1])]


def test_a_replica_before_version_7(redis_server, make, states):
    """What is answered to its scripts is told from other errors of scripts."""
    client = make(redis_server.url, budget_s=EASY)
    with pytest.raises(ExternalServiceError, match="READONLY") as caught:
        client.script(READ_ONLY_BEFORE_7, [])
    assert caught.value.unavailable
    until(lambda: client.state == "up")
    assert states == ["doubt", "up"]


def test_a_probe_that_may_not_write(redis_server, make):
    """Where another error is the answer to the probe, Redis is there."""
    beside = make(redis_server.url, budget_s=EASY)
    beside.execute("ACL", "SETUSER", "limited", "on", ">secret", "~*", "&*", "+@all", "-del")
    client = make(redis_server.url.replace("//", "//limited:secret@"), budget_s=EASY)
    with pytest.raises(ExternalServiceError, match="READONLY"):
        client.script(READ_ONLY_BEFORE_7, [])
    until(lambda: client.state == "up")
    assert client.execute("SET", "k", "v") == b"OK"


def test_saturation_keeps_the_link_up(redis_server, make, states):
    """All connections in use: who waits too long is refused, who comes in time is served."""
    client = make(redis_server.url, budget_s=EASY, max_connections=1)
    busy = threading.Thread(target=client.execute, args=("BLPOP", "nothing", "1.5"))
    busy.start()
    until(lambda: client.in_use == 1)
    with pytest.raises(OverloadedError):
        client.check(0.05)
    assert client.execute("ECHO", "x") == b"x"
    busy.join()
    assert (client.state, states, client.in_use) == ("up", [], 0)


def test_a_callers_deadline_is_not_the_links_failure(redis_server, make, states):
    """A deadline that is shorter than the budget holds and leaves the link up."""
    client = make(redis_server.url, budget_s=EASY)
    client.execute("ECHO", "warm")
    began = time.monotonic()
    with pytest.raises(OperationTimeoutError, match=r"0\.05"), deadline(0.05):
        client.execute("BLPOP", "nothing", "5")
    assert time.monotonic() - began < 4
    with pytest.raises(OperationTimeoutError), deadline(0):
        client.execute("ECHO", "never")
    assert (client.state, states, client.in_use) == ("up", [], 0)


def test_threads_share_the_pool(redis_server, make, states):
    """Twenty threads on three connections: each gets its own replies, nobody is refused."""
    client = make(redis_server.url, budget_s=5.0, max_connections=3)
    wrong = []

    def work(number):
        for i in range(50):
            token = f"{number}-{i}".encode()
            reply = client.execute("ECHO", token)
            if reply != token:
                wrong.append((token, reply))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, states, client.in_use) == ([], [], 0)
    assert len(client.execute("CLIENT", "LIST").splitlines()) <= 3


def test_a_lost_prober_is_replaced(make, mine, tmp_path):
    """A prober that is long overdue is started again by the next call, which is refused."""
    server = RedisServer(tmp_path)
    client = make(server.url, budget_s=EASY)
    with pytest.raises(NetworkError):
        client.execute("GET", "k")
    until(lambda: client.state == "down")
    client._link._prober = object()  # nobody has this one: the prober ends
    until(lambda: f"{mine}-prober" not in [thread.name for thread in threading.enumerate()])
    server.start()
    try:
        assert client.state == "down"
        client._link._due -= 60
        with pytest.raises(CircuitOpenError):
            client.execute("GET", "k")
        until(lambda: client.state == "up")
    finally:
        server.kill()


def test_a_fork_shares_no_socket(redis_server):
    """A child opens connections of its own, also when its parent was in doubt; both go on."""
    code = """
    import json, os, sys
    from flask_muset.redis import GuardedRedis
    client = GuardedRedis(sys.argv[1], budget_s=5)
    refused = GuardedRedis(sys.argv[2], budget_s=5)
    mine = client.execute("CLIENT", "ID")
    try:
        refused.execute("PING")
    except Exception as error:
        first = type(error).__name__
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            refused.execute("PING")
        except Exception as error:
            own = type(error).__name__
        ids = [client.execute("CLIENT", "ID"), client.execute("CLIENT", "ID"), own]
        os.write(writer, json.dumps(ids).encode())
        os._exit(0)
    os.wait()
    child = json.loads(os.read(reader, 1000))
    print(json.dumps([mine, client.execute("CLIENT", "ID"), first, child]))
    """
    urls = [redis_server.url, f"redis://127.0.0.1:{free_port()}"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *urls],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    mine, again, first, child = json.loads(done.stdout)
    assert mine == again
    assert first == child[2] == "NetworkError"  # not refused for what its parent has seen
    assert child[0] == child[1] != mine


# --- Under gevent ---------------------------------------------------------------------------------

COMMON = """
import gc, os, random, signal, sys, time
from flask_muset import signals
from flask_muset.deadline import deadline
from flask_muset.errors import *
from flask_muset.redis import GuardedRedis

states = []
note = lambda sender, event: states.append(event.state)
signals.redis_link_changed.connect(note)

def outcome(fn, *args):
    began = time.perf_counter()
    try:
        fn(*args)
        name = "ok"
    except Exception as error:
        name = type(error).__name__
    return name, time.perf_counter() - began

def wait_up(client, seconds=10):
    began = time.perf_counter()
    while client.state != "up" and time.perf_counter() - began < seconds:
        gevent.sleep(0.002)
    return time.perf_counter() - began
"""


def patched(code, *args):
    return run_patched(COMMON + textwrap.dedent(code), *args)


@pytest.mark.claim(
    "Frozen Redis: the first request costs at most 60 ms more, later ones under 1 ms more, "
    "recovery within 5 s of SIGCONT"
)
def test_frozen(redis_server, prove):
    """Stops a real Redis, asks it 201 times, lets it go on; under gevent."""
    result = patched(
        """
        url, pid, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        client = GuardedRedis(url, budget_s=float(sys.argv[4]))
        result = []
        for _ in range(rounds):
            healthy = sorted(outcome(client.execute, "GET", "k")[1] for _ in range(200))
            del states[:]
            os.kill(pid, signal.SIGSTOP)
            first = outcome(client.execute, "GET", "k")
            later = []
            for _ in range(200):
                later.append(outcome(client.execute, "GET", "k"))
                gevent.sleep(0.005)
            os.kill(pid, signal.SIGCONT)
            recovery = wait_up(client)
            result.append([healthy[100], first, later, recovery, list(states),
                           outcome(client.execute, "GET", "k")[0]])
        """,
        redis_server.url,
        redis_server.pid,
        3 if prove.full else 1,
        0.05 if prove.full else 0.5,
    )
    first = max(entry[1][1] - entry[0] for entry in result)
    later = max(sorted(cost for _, cost in entry[2])[197] - entry[0] for entry in result)
    recovery = max(entry[3] for entry in result)
    prove.figure(
        f"first {first * 1e3:.1f} ms, later p99 {later * 1e3:.3f} ms, recovery {recovery:.2f} s, "
        f"the worst of {len(result)}"
    )
    for _, (name, _), refusals, _, states, after in result:
        assert name == "OperationTimeoutError"
        assert {name for name, _ in refusals} == {"CircuitOpenError"}
        assert states == ["doubt", "down", "up"]
        assert after == "ok"
    assert first <= (0.06 if prove.full else 5)
    assert later < (0.001 if prove.full else 0.4)
    assert recovery < (5 if prove.full else 9)


@pytest.mark.claim("10,000 calls under random timeouts never get another call's reply")
def test_nobody_gets_anothers_reply(redis_server, prove):
    """ECHOs of unique tokens over a slow way, cut by random deadlines and foreign Timeouts."""
    way = SlowWay(redis_server.port, 0.002, halves=True)
    result = patched(
        """
        client, calls = GuardedRedis(sys.argv[1], budget_s=5.0), int(sys.argv[2])
        counts = {"replies": 0, "wrong": 0, "deadline": 0, "timeout": 0, "other": []}
        numbers = iter(range(calls))
        # A good part shall be cut and a good part not, however busy this machine is or becomes. A
        # call that is cut costs the next one a connection, so it takes longer than usual.
        for _ in range(2):
            warm = [gevent.spawn(outcome, client.execute, "ECHO", "x") for _ in range(30)]
            gevent.joinall(warm)
        usual = [sorted(greenlet.value[1] for greenlet in warm)[15]]

        def one(number):
            token = f"{number}:".encode() + b"x" * random.choice([1, 200, 20000])
            seconds = random.uniform(0, 5 * usual[0])
            if number % 2:
                with deadline(seconds):
                    return client.execute("ECHO", token), token
            with gevent.Timeout(seconds):
                return client.execute("ECHO", token), token

        def work():
            for number in numbers:
                try:
                    reply, token = one(number)
                    counts["replies"] += 1
                    counts["wrong"] += reply != token
                    usual[0] *= 0.97
                except (OperationTimeoutError, gevent.Timeout) as error:
                    is_ours = isinstance(error, OperationTimeoutError)
                    counts["deadline" if is_ours else "timeout"] += 1
                    usual[0] *= 1.03
                except Exception as error:
                    counts["other"].append(repr(error))

        gevent.joinall([gevent.spawn(work) for _ in range(30)])
        in_use = client.in_use
        last = [gevent.spawn(client.execute, "ECHO", str(n)) for n in range(10)]
        gevent.joinall(last)
        result = {**counts, "in_use": in_use, "states": states,
                  "last": [greenlet.value.decode() for greenlet in last]}
        """,
        way.url,
        10_000 if prove.full else 1_000,
    )
    way.close()
    prove.figure(
        f"{result['replies']} replies, {result['deadline']} cut by a deadline, "
        f"{result['timeout']} by gevent.Timeout, {result['wrong']} wrong"
    )
    assert result["wrong"] == 0
    assert result["other"] == []
    assert result["in_use"] == 0
    assert result["states"] == []
    assert result["last"] == [str(n) for n in range(10)]
    assert min(result["replies"], result["deadline"], result["timeout"]) > 20


@pytest.mark.claim("200 greenlets on 10 connections trip nothing")
def test_many_greenlets(redis_server, prove):
    """All at once set and get keys of their own, with the budget of 50 ms, connections open."""
    result = patched(
        """
        client, each = GuardedRedis(sys.argv[1], budget_s=float(sys.argv[3])), int(sys.argv[2])
        errors, longest = [], [0.0]
        gevent.joinall([gevent.spawn(outcome, client.execute, "ECHO", "x") for _ in range(10)])

        def work(number):
            for i in range(each):
                key, value = client.key(f"{number}:{i % 3}"), f"{number}-{i}".encode()
                for command in (("SET", key, value), ("GET", key)):
                    began = time.perf_counter()
                    try:
                        reply = client.execute(*command)
                        if command[0] == "GET" and reply != value:
                            errors.append("wrong")
                    except Exception as error:
                        errors.append(repr(error))
                    longest[0] = max(longest[0], time.perf_counter() - began)

        gevent.joinall([gevent.spawn(work, number) for number in range(200)])
        probe = GuardedRedis(sys.argv[1], budget_s=5)
        connections = len(probe.execute("CLIENT", "LIST").splitlines()) - 1
        result = {"errors": errors, "states": states, "in_use": client.in_use,
                  "connections": connections, "longest": longest[0]}
        """,
        redis_server.url,
        50 if prove.full else 5,
        0.05 if prove.full else EASY,
    )
    prove.figure(
        f"{200 * 2 * (50 if prove.full else 5)} calls, {len(result['errors'])} errors, "
        f"the longest {result['longest'] * 1e3:.1f} ms"
    )
    assert result["errors"] == []
    assert result["states"] == []
    assert result["in_use"] == 0
    assert result["connections"] == 10


def test_a_busy_process_does_not_blame_redis(redis_server):
    """A reply that came while this process computed is read, however late; the link stays up."""
    result = patched(
        """
        client = GuardedRedis(sys.argv[1], budget_s=0.4)
        client.execute("ECHO", "warm")

        def compute():
            end = time.perf_counter() + 0.8
            while time.perf_counter() < end:
                pass

        def ask():
            return client.execute("BLPOP", "nothing", "0.01"), client.state

        def script():
            return client.script("return 7", []), client.state

        result = []
        for _ in range(3):
            greenlet = gevent.spawn(ask)
            gevent.sleep(0)
            compute()
            result.append(greenlet.get())
        # New connections need several steps, and there is no time for them; one pause of this
        # process is one, however many calls it has held up.
        other = GuardedRedis(sys.argv[1].replace("/0", "/1"), budget_s=0.4)
        for _ in range(2):
            line = [gevent.spawn(outcome, other.execute, "ECHO", "x") for _ in range(15)]
            gevent.sleep(0)
            compute()
            gevent.joinall(line)
            result.append(sorted({greenlet.value[0] for greenlet in line} - {"ok"}))
        result.append([other.state, states])
        """,
        redis_server.url,
    )
    assert result[:3] == [[None, "up"]] * 3
    assert {name for names in result[3:5] for name in names} <= {
        "OperationTimeoutError",
        "OverloadedError",
    }
    assert result[5] == ["up", []]


def test_slow_steps_do_count_in_the_end(redis_server):
    """Where every call needs a step more than its budget has, the third time-out is believed."""
    way = SlowWay(redis_server.port, 0.9, fixed=True)
    result = patched(
        """
        client = GuardedRedis(sys.argv[1], budget_s=1.2)
        result = []
        for _ in range(4):  # NOSCRIPT comes in time, the answer to EVAL does not
            result.append(outcome(client.script, "return 7", [])[0])
            gevent.sleep(0)
            if client.state == "up":
                GuardedRedis(sys.argv[2], budget_s=5).execute("SCRIPT FLUSH")
        result.append(states[:1])
        """,
        way.url,
        redis_server.url,
    )
    way.close()
    assert result == [*["OperationTimeoutError"] * 3, "CircuitOpenError", ["doubt"]]


def test_who_waits_in_line_is_sent_away(redis_server):
    """When the link falls into doubt, calls in line are refused at once, not at their own time."""
    result = patched(
        """
        client = GuardedRedis(sys.argv[1], max_connections=1, budget_s=2)
        client.execute("ECHO", "warm")
        os.kill(int(sys.argv[2]), signal.SIGSTOP)
        first = gevent.spawn(outcome, client.execute, "GET", "k")
        gevent.sleep(1)
        line = [gevent.spawn(outcome, client.execute, "GET", "k") for _ in range(5)]
        gevent.joinall([first, *line])
        os.kill(int(sys.argv[2]), signal.SIGCONT)
        refused = [greenlet.value for greenlet in line]
        result = [first.value, refused, client.in_use, wait_up(client)]
        """,
        redis_server.url,
        redis_server.pid,
    )
    assert result[0][0] == "OperationTimeoutError"
    assert {name for name, _ in result[1]} == {"CircuitOpenError"}
    assert max(cost for _, cost in result[1]) < 1.9
    assert result[2] == 0
    assert result[3] < 9


def test_saturation_and_foreign_cuts(redis_server):
    """Saturation is refused in time; a caller's deadline, a Timeout and a kill leave no trace."""
    result = patched(
        """
        client = GuardedRedis(sys.argv[1], max_connections=1, budget_s=5)
        busy = gevent.spawn(client.execute, "BLPOP", "nothing", "1.5")
        gevent.sleep(0.05)
        result = {"saturated": outcome(client.check, 0.05)[0]}
        busy.join()

        def in_deadline():
            with deadline(0.05):
                client.execute("BLPOP", "nothing", "4")

        result["deadline"] = outcome(in_deadline)
        mine, got = gevent.Timeout(0.05), None
        try:
            with mine:
                client.execute("BLPOP", "nothing", "4")
        except gevent.Timeout as error:
            got = error
        result["timeout"] = got is mine
        killed = gevent.spawn(client.execute, "BLPOP", "nothing", "4")
        gevent.sleep(0.05)
        killed.kill()
        result["killed"] = isinstance(killed.value, gevent.GreenletExit)
        result["after"] = client.execute("ECHO", "x").decode()
        result["state"] = [client.state, states, client.in_use]
        """,
        redis_server.url,
    )
    name, cost = result.pop("deadline")
    assert name == "OperationTimeoutError"
    assert cost < 3
    assert result == {
        "saturated": "OverloadedError",
        "timeout": True,
        "killed": True,
        "after": "x",
        "state": ["up", [], 0],
    }


def test_a_fork_under_gevent(redis_server):
    """Greenlets live on in a child; one that waits for a reply there cannot take the parent's."""
    result = patched(
        """
        import json
        client = GuardedRedis(sys.argv[1], budget_s=8)
        mine = client.execute("CLIENT", "ID")
        waiting = gevent.spawn(client.execute, "BLPOP", "list", "9")
        gevent.sleep(0.05)
        reader, writer = os.pipe()
        child_pid = os.fork()
        if child_pid == 0:
            name, cost = outcome(waiting.get)
            ids = [client.execute("CLIENT", "ID") for _ in range(2)]
            os.write(writer, json.dumps([name, cost, *ids]).encode())
            os._exit(0)
        gevent.sleep(0.2)
        client.execute("RPUSH", "list", "for the parent")
        value = waiting.get()
        child = json.loads(os.read(reader, 1000))
        os.waitpid(child_pid, 0)
        result = [mine, child, value[1].decode(), client.execute("CLIENT", "ID"), states]
        """,
        redis_server.url,
    )
    mine, (name, cost, first, second), value, again, states = result
    assert value == "for the parent"
    assert name == "NetworkError"
    assert cost < 4  # at once, not when its time is up
    assert first == second
    assert first not in (mine, again)
    assert states == []


def test_another_thread_is_told(redis_server):
    """Connections belong to one hub; a native thread gets an error that says what to do."""
    result = patched(
        """
        client = GuardedRedis(sys.argv[1], budget_s=5)
        client.execute("ECHO", "x")
        try:
            gevent.get_hub().threadpool.apply(client.execute, ("ECHO", "x"))
        except RuntimeError as error:
            result = str(error)
        """,
        redis_server.url,
    )
    assert "make a GuardedRedis in this thread" in result


def test_the_import_needs_no_gevent():
    """The module works where gevent is not imported, and imports no extension."""
    code = "import sys, flask_muset.redis; print([m for m in sys.modules if 'gevent' in m or 'resilience' in m])"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
