"""The kept errors of several processes in one Redis; an app here stands for a process each."""

import json
import logging
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask import Flask, request
from gunicorn_app import serve
from patched import run_patched
from redis_server import redis_server  # noqa: F401 - a fixture
from waiting import until

from flask_muset import ErrorHandler
from flask_muset.error_handler import recent_errors
from flask_muset.error_handler.journal import Occurrence, RecentErrors
from flask_muset.error_handler.shared import SharedErrors
from flask_muset.errors import MusetError, NetworkError
from flask_muset.redis import GuardedRedis


class OtherError(Exception):
    """A second fault."""


FAULTS = {"/value": ValueError, "/other": OtherError, "/key": KeyError}


def make_app(server, **config):
    app = Flask("one of several")
    app.logger.disabled = True  # hundreds of lines that nobody reads
    app.config["ERROR_HANDLER_REDIS_URL"] = server.url
    # Far more than Redis needs, but not than a machine that is busy.
    app.config["ERROR_HANDLER_REDIS_BUDGET"] = 5
    app.config.update({f"ERROR_HANDLER_{key}": value for key, value in config.items()})
    ErrorHandler(app)
    for path, error in FAULTS.items():
        app.add_url_rule(path, path, lambda error=error: throw(error()))
    return app


def throw(error):
    raise error


def fail(app, path="/value", times=1):
    for _ in range(times):
        assert app.test_client().get(path).status_code == 500


def counts(app, *, is_shared=True):
    errors = recent_errors(app)
    assert errors.is_shared is is_shared
    return {error["type"].rpartition(".")[2]: error["count"] for error in errors}


def shared_of(app):
    return app.extensions["error_handler"].shared


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """What a test has begun to send ends with it, and says nothing in the next one."""
    made, begin = weakref.WeakSet(), SharedErrors.__init__

    def remember(shared, *args):
        begin(shared, *args)
        made.add(shared)

    monkeypatch.setattr(SharedErrors, "__init__", remember)
    yield
    for shared in list(made):
        if shared._closing is not None:  # its loop has begun
            shared.close()
        shared._redis.close()


@pytest.fixture
def raw(redis_server):  # noqa: F811
    """A client for looking at what is really there."""
    client = GuardedRedis(redis_server.url, budget_s=5)
    yield client
    client.close()


def everything(raw):
    """All keys and what they have."""
    found = {}
    for key in raw.execute("KEYS", "*"):
        kind = raw.execute("TYPE", key)
        if kind == b"hash":
            found[key] = raw.execute("HGETALL", key)
        elif kind == b"zset":
            found[key] = raw.execute("ZRANGE", key, 0, -1, "WITHSCORES")
        else:
            found[key] = raw.execute("GET", key)
    return found


def test_counts_of_four_add_up(redis_server):  # noqa: F811
    """Four report the same and different faults at once: each lists the same, exactly."""
    apps = [make_app(redis_server) for _ in range(4)]

    def work(number):
        for path in (*FAULTS, "/value"):
            fail(apps[number], path, times=number + 1)
            recent_errors(apps[number])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    fail(apps[2], "/other")
    for app in apps:
        recent_errors(app)
    lists = [recent_errors(app) for app in apps]
    assert all(errors == lists[0] for errors in lists)
    assert counts(apps[0]) == {"OtherError": 11, "ValueError": 20, "KeyError": 10}
    first = lists[0][0]
    assert first["type"].endswith("OtherError"), "what happened last is first"
    assert first["last_seen"] == first["newest"][0]["at"]


def test_the_newest_of_all_are_kept(redis_server):  # noqa: F811
    """Of each fault the newest five of all processes, and of the faults as many as KEEP says."""
    one, two = make_app(redis_server, KEEP=2), make_app(redis_server, KEEP=2)
    for number in range(8):
        app = (one, two)[number % 2]
        with app.test_client().get("/value", headers={"X-Request-ID": f"request-{number}"}):
            pass
    recent_errors(one)
    newest = recent_errors(two)[0]["newest"]
    assert [one["request_id"] for one in newest] == [f"request-{n}" for n in (7, 6, 5, 4, 3)]
    fail(one, "/other")
    recent_errors(one)
    fail(two, "/key")
    assert counts(two) == {"KeyError": 1, "OtherError": 1}
    assert counts(one) == {"KeyError": 1, "OtherError": 1}


def test_local_without_redis():
    """Without a Redis the list is of this process and says so, and redis-py is not needed."""
    app = Flask("local")
    ErrorHandler(app)
    app.add_url_rule("/value", "value", lambda: throw(ValueError()))
    fail(app)
    assert counts(app, is_shared=False) == {"ValueError": 1}
    assert shared_of(app) is None


def test_a_loop_shares_beside_the_requests(redis_server, raw):  # noqa: F811
    """What happened is in Redis soon, though nobody asks, and no request has called Redis."""
    redis = GuardedRedis(redis_server.url, budget_s=5)
    callers = set()
    redis.on_call = lambda *_: callers.add(threading.get_ident())
    app = Flask("beside")
    ErrorHandler(app, redis=redis)
    app.add_url_rule("/value", "value", lambda: throw(ValueError()))
    fail(app, times=3)
    until(lambda: raw.execute("EXISTS", raw.key("f1:seen")))
    fail(app, times=2)
    key = raw.key(f"f1:f:{app.extensions['error_handler'].recent.newest()[0]['fingerprint']}")
    until(lambda: raw.execute("HGET", key, "count") == b"5")
    assert callers
    assert threading.get_ident() not in callers
    assert all(0 < raw.execute("TTL", key) <= 7 * 86_400 for key in everything(raw))


def test_outage_and_data_lost(redis_server):  # noqa: F811
    """Redis is killed and comes back with nothing: until then each shows its own, then all."""
    one, two = make_app(redis_server), make_app(redis_server)
    fail(one, times=3)
    fail(two, times=4)
    recent_errors(one)
    assert counts(two) == {"ValueError": 7}
    redis_server.kill()
    fail(one, times=2)
    fail(two, "/other")
    assert counts(one, is_shared=False) == {"ValueError": 5}
    assert counts(two, is_shared=False) == {"ValueError": 4, "OtherError": 1}
    redis_server.start()
    until(lambda: recent_errors(one).is_shared and recent_errors(two).is_shared)
    for app in (one, two):
        assert counts(app) == {"ValueError": 9, "OtherError": 1}


def test_what_was_sent_is_sent_anew_though_nothing_is_new(
    redis_server,  # noqa: F811
    raw,
    monkeypatch,
):
    """The loop finds out by itself that Redis has lost what it had."""
    monkeypatch.setattr("flask_muset.error_handler.shared._LOOK_S", 0.01)
    app = make_app(redis_server)
    fail(app, times=3)
    assert counts(app) == {"ValueError": 3}
    raw.execute("FLUSHALL")
    until(lambda: raw.execute("EXISTS", raw.key("f1:seen")))
    assert counts(app) == {"ValueError": 3}


@pytest.mark.parametrize("loses", ["reply", "request"])
def test_a_batch_of_unknown_fate_counts_once(redis_server, loses):  # noqa: F811
    """A batch that may have arrived is sent again as it was, and is counted once."""
    app = make_app(redis_server)
    shared = shared_of(app)
    shared.is_started = True  # no loop in this test
    script = shared._redis.script

    def lossy(*args):
        if loses == "reply":
            script(*args)
        raise NetworkError("gone")

    fail(app, times=2)
    shared._redis.script = lossy
    with pytest.raises(MusetError):
        shared.push()
    fail(app, times=3)
    with pytest.raises(MusetError):
        shared.push()
    shared._redis.script = script
    assert counts(app) == {"ValueError": 5}
    assert counts(make_app(redis_server)) == {"ValueError": 5}


def test_no_secret_is_in_redis(redis_server, raw):  # noqa: F811
    """Secrets in messages, details, causes, headers and arguments are in no key of Redis."""
    app = make_app(redis_server)

    def leak():
        cause = OSError('cannot connect: {"secret": "hunter2-in-cause"}')
        raise MusetError(
            f"password=hunter2-in-message redis://u:hunter2-in-url@host/0 {request.args['token']}",
            details={"password": "hunter2", "deep": [{"apiKey": "hunter2"}], "copied": str(cause)},
        ) from cause

    app.add_url_rule("/leak/<name>", "leak", lambda name: leak())
    headers = {"Authorization": "Bearer hunter2-in-header"}
    for number in range(7):
        url = f"/leak/hunter2-in-header?token=hunter2-in-query-{number}"
        assert app.test_client().get(url, headers=headers).status_code == 500
    assert recent_errors(app)[0]["count"] == 7
    there = str(everything(raw))
    assert "[redacted]" in there
    assert "MusetError" in there
    assert "hunter2" not in there


def test_long_texts_are_cut(redis_server, raw):  # noqa: F811
    """What is stored of an error is bounded, whatever its message and its details are."""
    app = make_app(redis_server)
    error = MusetError("ü" * 100_000, details={str(n): "x" * 9_000 for n in range(300)})
    app.add_url_rule("/long", "long", lambda: throw(error))
    fail(app, "/long", times=9)
    kept = recent_errors(app)[0]
    assert kept["message"].startswith("üüü")
    assert kept["newest"][0]["details"].keys() == {"…"}
    assert len(str(everything(raw))) < 100_000


_APP = """
import sys, time
from flask import Flask
from flask_muset import ErrorHandler
from flask_muset.error_handler import recent_errors

app = Flask("another")
app.config.update(ERROR_HANDLER_REDIS_URL=sys.argv[1], ERROR_HANDLER_REDIS_BUDGET=5)
ErrorHandler(app)
app.add_url_rule("/", "view", lambda: 1 / 0)
shared, client = app.extensions["error_handler"].shared, app.test_client()

def fail(times):
    for _ in range(times):
        client.get("/")

def count():
    return [(one["count"], len(one["newest"])) for one in recent_errors(app)]

def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
"""


def test_a_forked_child_shares_its_own(redis_server):  # noqa: F811
    """What a parent has not sent yet is sent by the parent alone, a child's by the child."""
    result = run_patched(
        _APP
        + """
import os, gevent.os
fail(1)
first = count()
shared._turns.acquire()  # the loop sends nothing now
fail(2)
child = gevent.os.fork()
if child == 0:
    fail(1)
    os._exit(0 if count() == [(2, 2)] and shared.is_started else 1)
code = os.waitstatus_to_exitcode(gevent.os.waitpid(child, 0)[1])
shared._turns.release()
result = [first, code, count()]
""",
        redis_server.url,
    )
    assert result == [[[1, 1]], 0, [[4, 4]]]


def test_a_loop_that_was_cut_off_begins_anew(redis_server):  # noqa: F811
    """Whatever ends the loop, the next error starts another one, which shares all."""
    result = run_patched(
        _APP
        + """
import gc
fail(1)
gevent.sleep(0)
loops = [one for one in gc.get_objects() if isinstance(one, gevent.Greenlet) and not one.dead]
gevent.killall(loops)
was_started = shared.is_started
fail(1)
until(lambda: shared._redis.execute("EXISTS", shared._place + "seen"))
until(lambda: not shared._recent.untaken() and not shared._batch)
result = [len(loops), was_started, shared.is_started, count()]
""",
        redis_server.url,
    )
    assert result == [1, False, True, [[2, 2]]]


def test_two_apps_apart(redis_server):  # noqa: F811
    """One instance on two apps with namespaces of their own: neither sees the other's errors."""
    handler, apps = ErrorHandler(), []
    for name in ("one", "two"):
        app = Flask(name)
        app.config["ERROR_HANDLER_REDIS_URL"] = redis_server.url
        app.config["ERROR_HANDLER_REDIS_BUDGET"] = 5
        app.config["ERROR_HANDLER_NAMESPACE"] = name
        handler.init_app(app)
        app.add_url_rule("/value", "value", lambda: throw(ValueError()))
        apps.append(app)
    fail(apps[0])
    assert [counts(app) for app in apps] == [{"ValueError": 1}, {}]


def good(fingerprint, **other):
    """A description and an occurrence that can be read, but for what is given."""
    texts = ("type", "error", "category", "severity", "place", "message")
    fault = dict.fromkeys(texts, "x") | {"fingerprint": fingerprint, "status": 500}
    return json.dumps(fault | {"traceback": None} | other)


OCCURRENCE = {"request_id": "", "method": "", "path": "", "message": "", "details": {}, "at": ""}


def foreign(fingerprint):
    """Descriptions, counts and occurrences of which one each is of somebody else's making."""
    fine, once = good(fingerprint), json.dumps(OCCURRENCE)
    return [
        (b"\xff\xfe\x00", "1", once),
        ("[1, 2]", "1", once),
        ("{}", "1", once),
        ("[" * 100_000, "1", once),
        ("x" * 1_000_000, "1", once),
        (good(fingerprint, status="500"), "1", once),
        (good("other"), "1", once),
        (fine, "many", once),
        (fine, "-3", once),
        (fine, "1", "null"),
        (fine, "1", json.dumps(OCCURRENCE | {"details": []})),
    ]


def test_what_others_have_written_is_left_out(redis_server, raw, caplog):  # noqa: F811
    """Entries that cannot be read are skipped with one line, and are no error for who asks."""
    app = make_app(redis_server)
    fail(app)
    assert counts(app) == {"ValueError": 1}
    names = [f"foreign-{number}" for number in range(len(foreign("")))]
    for number, name in enumerate(names):
        fault, count, newest = foreign(name)[number]
        raw.execute("HSET", raw.key(f"f1:f:{name}"), "fault", fault, "count", count)
        raw.execute("ZADD", raw.key(f"f1:n:{name}"), 1, newest)
    for name in ("without-occurrences", "fine"):
        raw.execute("HSET", raw.key(f"f1:f:{name}"), "fault", good(name), "count", 1)
    raw.execute("ZADD", raw.key("f1:n:fine"), 1, json.dumps(OCCURRENCE))
    for name in (*names, "without-occurrences", "without-anything", "fine"):
        raw.execute("ZADD", raw.key("f1:seen"), "3000000000000000", name)
    raw.execute("ZADD", raw.key("f1:seen"), "+inf", "foreign-0")
    with caplog.at_level(logging.WARNING, "flask_muset.error_handler"):
        assert counts(app) == {"ValueError": 1, "x": 1}
    lines = [record.getMessage() for record in caplog.records if "cannot be read" in record.msg]
    assert [line.split()[0] for line in lines] == ["13"]


def test_keys_of_another_kind_give_way(redis_server, raw):  # noqa: F811
    """What stands where entries belong is replaced, and errors are shared all the same."""
    app = make_app(redis_server)
    fail(app)
    recent_errors(app)
    for key in raw.execute("KEYS", "*"):
        raw.execute("DEL", key)
        raw.execute("RPUSH", key, "foreign")
    fail(app)
    assert counts(app) == {"ValueError": 2}
    fault = next(key for key in raw.execute("KEYS", "*") if b":f:" in key)
    raw.execute("HSET", fault, "count", "many", "fault", "none")
    fail(app, times=3)
    assert counts(app) == {"ValueError": 3}


def test_what_is_old_is_forgotten(redis_server, raw):  # noqa: F811
    """A fault that has not happened for a week is not listed."""
    app = make_app(redis_server)
    fail(app)
    fail(app, "/other")
    errors = {error["type"]: error["fingerprint"] for error in recent_errors(app)}
    week_ago = (time.time() - 7 * 86_400 - 60) * 1_000_000
    raw.execute("ZADD", raw.key("f1:seen"), week_ago, errors["ValueError"])
    assert list(counts(app)) == ["OtherError"]
    fail(app, "/other")
    recent_errors(app)
    assert raw.execute("ZCARD", raw.key("f1:seen")) == 1


def note(recent, fingerprint, times=1):
    fault = json.loads(good(fingerprint)) | {"traceback": "x" * 8_000}
    occurrence = Occurrence("id", "GET", "/", "message", {}, ())
    for _ in range(times):
        recent.first(fingerprint, fault, occurrence)


def test_a_burst_of_different_faults_stays_small(redis_server, raw):  # noqa: F811
    """10,000 different faults at once: few commands, and no more kept than KEEP."""
    recent = RecentErrors(100)
    redis = GuardedRedis(redis_server.url, budget_s=5)
    shared = SharedErrors(recent, redis, 100)
    for number in range(10_000):
        note(recent, f"{number:012x}")
    calls = []
    redis.on_call = lambda _, outcome: calls.append(outcome)
    shared.push()
    assert set(calls) == {"ok"}
    assert len(calls) <= 20
    listed = shared.newest()
    assert [error["fingerprint"] for error in listed] == [
        f"{number:012x}" for number in range(9_999, 9_899, -1)
    ]
    assert raw.execute("DBSIZE") == 203
    for number in range(100):
        note(recent, f"a{number:011x}")
    shared.push()
    assert raw.execute("DBSIZE") == 203
    redis.close()


_ENDING = """
fail(1)
until(lambda: shared._number == 1 and not shared._batch)
fail(20)
"""


@pytest.mark.parametrize("first", ["", "from gevent import monkey; monkey.patch_all()\n"])
def test_the_end_of_a_process_shares_what_is_new(redis_server, first):  # noqa: F811
    """A process that ends sends what it has noted since its loop looked last."""
    code = [sys.executable, "-W", "error", "-c", first + _APP + _ENDING, redis_server.url]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert counts(make_app(redis_server)) == {"ZeroDivisionError": 21}


def test_settings_of_redis_are_checked():
    """A bad address, and a namespace beside a given client, name the setting and the cure."""
    for key, value in {
        "ERROR_HANDLER_REDIS_URL": "nowhere",
        "ERROR_HANDLER_REDIS_MAX_CONNECTIONS": 0,
        "ERROR_HANDLER_REDIS_BUDGET": 0,
        "ERROR_HANDLER_NAMESPACE": "a:b",
    }.items():
        app = Flask("bad")
        app.config[key] = value
        with pytest.raises(ValueError, match=key):
            ErrorHandler(app)
    app = Flask("bad")
    app.config["ERROR_HANDLER_REDIS_URL"] = "redis://host/0?nobody=1"
    with pytest.raises(ValueError, match="ERROR_HANDLER_REDIS_URL"):
        ErrorHandler(app)
    app = Flask("given")
    app.config["ERROR_HANDLER_NAMESPACE"] = "mine"
    with pytest.raises(ValueError, match="ERROR_HANDLER_NAMESPACE"):
        ErrorHandler(app, redis=GuardedRedis("redis://127.0.0.1/0"))


_SERVED = """
import os
from flask import Flask, jsonify
from flask_muset import ErrorHandler
from flask_muset.error_handler import recent_errors

app = Flask("served")
app.config.update(ERROR_HANDLER_REDIS_URL="{url}", ERROR_HANDLER_REDIS_BUDGET=5)
ErrorHandler(app)

@app.get("/fail/<kind>")
def fail(kind):
    raise {{"value": ValueError, "key": KeyError, "type": TypeError}}[kind](kind)

@app.get("/list")
def list_errors():
    errors = recent_errors(app)
    counts = {{error["type"]: error["count"] for error in errors}}
    newest = [one["request_id"] for error in errors for one in error["newest"]]
    return jsonify(pid=os.getpid(), counts=counts, newest=newest, is_shared=errors.is_shared)
"""


def _get(url, request_id="00000000"):
    wanted = urllib.request.Request(url, headers={"X-Request-ID": request_id})
    try:
        with urllib.request.urlopen(wanted, timeout=20) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def right(answers, expected, newest):
    """How many workers list exactly this."""
    return sum(
        answer["is_shared"]
        and answer["counts"] == expected
        and sorted(answer["newest"]) == sorted(newest)
        for answer in answers.values()
    )


@pytest.mark.claim(
    "The newest errors of all workers are listed with exact counts, whichever worker answers"
)
def test_four_workers(redis_server, tmp_path, prove):  # noqa: F811
    """Four gunicorn workers fail many requests; then every one of them lists the same."""
    times = 500 if prove.full else 20
    app = _SERVED.format(url=redis_server.url)
    with serve(tmp_path, app, "--workers", "4") as (_, port):
        here = f"http://127.0.0.1:{port}"
        wanted = [f"{here}/fail/{('value', 'key', 'type')[n % 3]}" for n in range(3 * times)]
        with ThreadPoolExecutor(8) as pool:
            codes = list(pool.map(_get, wanted))
        assert codes == [500] * len(wanted)
        for number, kind in enumerate(("value", "key", "type")):
            for last in range(5):
                assert _get(f"{here}/fail/{kind}", f"newest-{number}-{last}") == 500
        expected = dict.fromkeys(("ValueError", "KeyError", "TypeError"), times + 5)
        newest = {f"newest-{number}-{last}" for number in range(3) for last in range(5)}
        answers = {}

        end = time.monotonic() + 20
        while right(answers, expected, newest) < 4 and time.monotonic() < end:
            answer = _get(f"{here}/list")
            answers[answer["pid"]] = answer
    exact = right(answers, expected, newest)
    prove.figure(f"{sum(expected.values())} errors of 3 faults: {exact} of 4 workers exact")
    assert exact == 4
