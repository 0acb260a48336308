"""What it costs to accept a write behind: on Redis beside a raw SET, on SQLite by itself.

    python benchmarks/write_behind.py

Redis and its client's process run on this machine, with the same fsync mode for both ways in the
same run, turn by turn. The raw SET is redis-py's, of the same bytes. On SQLite 64 greenlets write
at once with synchronous=FULL, and another one looks how long the hub is kept from it.
"""

from gevent import monkey

monkey.patch_all()

import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402
from common import free_port, stop, wait_port  # noqa: E402
from flask import Flask  # noqa: E402

from flask_muset import CacheStrategies  # noqa: E402

_ROUNDS, _CALLS, _GREENLETS = 60, 20, 64


def _app(**config):
    app = Flask("bench")
    settings = {"DRAIN": False, "MAX_PENDING": 10_000_000, "MAX_PENDING_BYTES": 1 << 40, **config}
    app.config.update({f"CACHE_STRATEGIES_{name}": value for name, value in settings.items()})
    cache = CacheStrategies(app)

    @cache.writer("bench", coalesce=False)
    def save(_value):
        raise AssertionError("nobody drains")

    return app, cache, save


def _timed(call, count):
    took = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return took


def on_redis(fsync):
    """Median microseconds of a raw SET and of an accepted write, and their ratio."""
    import redis

    port, folder = free_port(), tempfile.mkdtemp()
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
         "--appendonly", "yes", "--appendfsync", fsync],
        cwd=folder, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_port(port)
        _kept, cache, save = _app(REDIS_URL=f"redis://127.0.0.1:{port}/0", REDIS_BUDGET=5.0)
        client, numbers, value = redis.Redis(port=port), itertools.count(), os.urandom(200)
        ways = {
            "set": lambda: client.set(f"key:{next(numbers)}", value, px=600_000),
            "accept": lambda: cache.write_behind(f"key:{next(numbers)}", value, save, 600),
        }
        for call in ways.values():
            _timed(call, 200)
        took = {name: [] for name in ways}
        for _ in range(_ROUNDS):
            for name, call in ways.items():
                took[name] += _timed(call, _CALLS)
        found = {name: statistics.median(some) * 1e6 for name, some in took.items()}
        return {**found, "ratio": found["accept"] / found["set"]}
    finally:
        stop(server)
        shutil.rmtree(folder)


def on_sqlite(count=20_000):
    """Writes accepted a second in one process, and the longest stop of its hub, in ms."""
    folder = tempfile.mkdtemp()
    try:
        _kept, cache, save = _app(JOURNAL_PATH=os.path.join(folder, "journal.db"))
        value, delays, is_over = os.urandom(200), [], False

        def look():
            last = time.perf_counter()
            while not is_over:
                gevent.sleep(0.001)
                now = time.perf_counter()
                delays.append(now - last - 0.001)
                last = now

        def write(number):
            for index in range(count // _GREENLETS):
                assert cache.write_behind(f"key:{number}:{index}", value, save, 600)

        write(0)
        looker = gevent.spawn(look)
        began = time.perf_counter()
        gevent.joinall([gevent.spawn(write, n + 1) for n in range(_GREENLETS)], raise_error=True)
        took_s = time.perf_counter() - began
        is_over = True
        looker.join()
        rate = count // _GREENLETS * _GREENLETS / took_s
        return {"per_s": rate, "hub_ms": max(delays) * 1e3}
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    wanted = {"redis", "sqlite"} & set(sys.argv) or {"redis", "sqlite"}
    found = {}
    if "redis" in wanted:
        found.update({fsync: on_redis(fsync) for fsync in ("always", "everysec")})
    if "sqlite" in wanted:
        found["sqlite"] = on_sqlite()
    if "--json" in sys.argv:
        print(json.dumps(found))
        sys.exit()
    for place, row in found.items():
        if place == "sqlite":
            print(f"SQLite: {row['per_s']:.0f} accepted a second, hub kept {row['hub_ms']:.1f} ms")
        else:
            print(
                f"Redis, appendfsync {place}: SET {row['set']:.0f} us, accept "
                f"{row['accept']:.0f} us, ratio {row['ratio']:.2f}"
            )
