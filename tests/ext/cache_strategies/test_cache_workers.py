"""The cache in an app that gunicorn serves with several gevent workers."""

import threading
import urllib.request

import pytest
from gunicorn_app import serve
from waiting import until

from flask_muset.redis import GuardedRedis

_APP = """
import os
import time
from flask import Flask, jsonify
from flask_muset import CacheStrategies
from flask_muset.redis import GuardedRedis

app = Flask(__name__)
app.config["CACHE_STRATEGIES_REDIS_URL"] = {url!r}
# A machine that is busy with other tests is no Redis that is away.
app.config["CACHE_STRATEGIES_REDIS_BUDGET"] = 2.0
cache = CacheStrategies(app)
counter = GuardedRedis({url!r}, budget_s=5)

@app.get("/load/<key>")
def load(key):
    def fetch():
        counter.execute("INCR", "loads:" + key)
        time.sleep(0.1)
        return {{"key": key}}
    return jsonify(cache.cache_aside(key, fetch, 60), os.getpid())

@app.get("/get/<key>")
def get(key):
    return jsonify(cache.get(key), os.getpid())

@app.get("/set/<key>/<value>")
def set_(key, value):
    return jsonify(cache.set(key, value), os.getpid())
"""


def fetch(port, path):
    """A JSON answer."""
    import json

    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return json.load(answer), answer.headers


@pytest.mark.claim("Over HTTP with 4 gunicorn workers: exactly 1 load of a cold key")
@pytest.mark.parametrize("preload", [False, True])
def test_one_load_for_all_workers(redis_server, tmp_path, preload, prove):
    """100 clients at once, 4 worker processes, preloaded or not: the source is asked once."""
    options = ["--workers", "4", *(["--preload"] if preload else [])]
    client = GuardedRedis(redis_server.url, budget_s=2)
    with serve(tmp_path, _APP.format(url=redis_server.url), *options) as (_, port):
        pids = {fetch(port, "/get/warm")[0][1] for _ in range(60)}
        rounds = 5 if prove.full else 2
        for number in range(rounds):
            barrier, answers = threading.Barrier(100), []

            def call(barrier=barrier, answers=answers, number=number):
                barrier.wait()
                answers.append(fetch(port, f"/load/hot{number}"))

            threads = [threading.Thread(target=call) for _ in range(100)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [value for (value, _), _ in answers] == [{"key": f"hot{number}"}] * 100
            assert client.execute("GET", f"loads:hot{number}") == b"1"
            outcomes = {headers["X-Cache"] for _, headers in answers}
            assert outcomes <= {"MISS", "HIT"}
            pids |= {pid for (_, pid), _ in answers}
    # Which workers take the connections is up to the kernel.
    assert len(pids) > 1
    prove.figure(f"{rounds} rounds of 100 clients on {len(pids)} workers, 1 load each")


def test_a_write_in_one_worker_is_seen_by_all(redis_server, tmp_path):
    """Whichever worker a client meets a moment after a write, it has the new value."""
    with serve(tmp_path, _APP.format(url=redis_server.url), "--workers", "3") as (_, port):
        pids = set()

        def get():
            (value, pid), _headers = fetch(port, "/get/k")
            pids.add(pid)
            return value

        def are_several():
            get()
            return len(pids) > 1

        until(are_several)
        for number in range(5):
            fetch(port, f"/set/k/{number}")
            until(lambda: all(get() == str(number) for _ in range(20)))  # noqa: B023
