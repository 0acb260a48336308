"""Many requests at once want one missing key, in 1 and in 4 processes; its loader takes 100 ms.

How often does the loader run, over all processes, and when is the last caller served? The ideal is
one load and 100 ms. Callers are gevent greenlets for the libraries that block, asyncio tasks for
cashews. redis-py's pool raises beyond 100 connections by default: the rows "stock pool" show that,
all other rows of peers raise the limit to 4000, ours keeps its own. One round by default (60 s);
take --rounds 3 for a report.

Another library beside them: --extra name=package.module:make, where make(redis_url) gives
get(key, loader), called in greenlets.
"""

import sys

if "--child" in sys.argv and "--aio" not in sys.argv:
    from gevent import monkey

    monkey.patch_all()

import argparse
import json
import os
import statistics as st
import subprocess
import time

import common as c

TTL, LOAD = 60, 0.1
OURS = "flask-muset"
OUR_EXTRA = f"{OURS}=ours_cache:make_flight"
PROCESSES = (1, 4)


def counting_loader(url, sleep):
    import redis

    r = redis.Redis.from_url(url)

    def load():
        r.incr("loads")
        sleep(LOAD)
        return {"v": 1}

    return load


# --- Libraries: make(url) -> get(key, loader) -----------------------------------------------------


def naive(url):
    import pickle

    import redis

    r = redis.Redis.from_url(url)

    def get(key, load):
        v = r.get(key)
        if v is None:
            v = pickle.dumps(load())
            r.set(key, v, ex=TTL)
        return pickle.loads(v)

    return get


def _flask_cache(url):
    from flask import Flask
    from flask_caching import Cache

    app = Flask("x")
    return app, Cache(app, config={"CACHE_TYPE": "RedisCache", "CACHE_REDIS_URL": url})


def fc_memoize(url):
    _, cache = _flask_cache(url)
    loaders = []

    @cache.memoize(TTL)
    def value(key):
        return loaders[0]()

    def get(key, load):
        loaders[:] = [load]
        return value(key)

    return get


def fc_cached(url):
    app, cache = _flask_cache(url)
    loaders = []

    @app.get("/<key>")
    @cache.cached(TTL)
    def view(key):
        return loaders[0]()

    def get(key, load):
        loaders[:] = [load]
        return app.test_client().get("/" + key).get_json()

    return get


def _dogpile(url, **kw):
    from dogpile.cache import make_region

    arguments = {"url": url, **kw}
    region = make_region().configure(
        "dogpile.cache.redis", expiration_time=TTL, arguments=arguments
    )
    return lambda key, load: region.get_or_create(key, load)


def dogpile(url):
    return _dogpile(url)


def dogpile_distributed(url):
    return _dogpile(url, distributed_lock=True, thread_local_lock=False)


def reference(url):
    """What is reachable: one flight per process, one holder of a lock over all, 5 ms polls."""
    import pickle

    import gevent
    import redis
    from gevent.event import AsyncResult

    r = redis.Redis.from_url(url)
    flights = {}

    def stored(key, load):
        v = r.get(key)
        while v is None:
            if r.set("lock:" + key, "1", nx=True, px=10000):
                v = pickle.dumps(load())
                r.pipeline().set(key, v, ex=TTL).delete("lock:" + key).execute()
            else:
                gevent.sleep(0.005)
                v = r.get(key)
        return pickle.loads(v)

    def get(key, load):
        flight = flights.get(key)
        if flight is not None:
            return flight.get()
        flight = flights[key] = AsyncResult()
        try:
            v = stored(key, load)
            flight.set(v)
            return v
        except BaseException as e:
            flight.set_exception(e)
            raise
        finally:
            del flights[key]

    return get


SYNC = {
    "naive cache-aside": naive,
    "Flask-Caching cached": fc_cached,
    "Flask-Caching memoize": fc_memoize,
    "dogpile get_or_create": dogpile,
    "dogpile, distributed_lock": dogpile_distributed,
    "reference single flight": reference,
}
ASYNC = {
    "cashews protected=False": {"protected": False},
    "cashews default": {},
    "cashews lock=True": {"lock": True},
    "cashews early": {"early": True},
}
STOCK = {
    f"{name} (stock pool)": SYNC[name]
    for name in (
        "naive cache-aside",
        "Flask-Caching memoize",
        "dogpile get_or_create",
        "reference single flight",
    )
}


# --- One process of callers -----------------------------------------------------------------------


def run_gevent(make, url, n):
    import gevent

    get = make(url)
    load = counting_loader(url, gevent.sleep)

    def warm():
        try:
            get(f"warm{os.getpid()}", lambda: {"v": 1})
        except Exception:
            pass

    gevent.joinall([gevent.spawn(warm) for _ in range(n)])
    done, bad = [], []

    def caller(start):
        gevent.sleep(max(0, start - time.time()))
        try:
            assert get("hot", load) == {"v": 1}
        except Exception as e:
            bad.append(repr(e)[:100])
        done.append(time.time() - start)

    print("ready", flush=True)
    start = float(sys.stdin.readline())
    gevent.joinall([gevent.spawn(caller, start) for _ in range(n)])
    print(json.dumps({"done": done, "bad": bad}), flush=True)


def run_asyncio(opts, url, n):
    import asyncio

    import redis
    from cashews import Cache

    async def main():
        cache = Cache()
        cache.setup(url)
        r = redis.asyncio.Redis.from_url(url)
        options = dict(opts)
        decorate = cache.early if options.pop("early", False) else cache

        @decorate(ttl=TTL, key="k:{key}", **options)
        async def value(key, count=True):
            if count:
                await r.incr("loads")
                await asyncio.sleep(LOAD)
            return {"v": 1}

        await asyncio.gather(*[value(f"warm{os.getpid()}", False) for _ in range(n)])
        done, bad = [], []

        async def caller(start):
            await asyncio.sleep(max(0, start - time.time()))
            try:
                assert await value("hot") == {"v": 1}
            except Exception as e:
                bad.append(repr(e)[:100])
            done.append(time.time() - start)

        print("ready", flush=True)
        start = float(await asyncio.to_thread(sys.stdin.readline))
        await asyncio.gather(*[caller(start) for _ in range(n)])
        print(json.dumps({"done": done, "bad": bad}))

    asyncio.run(main())


def child(a):
    if a.aio:
        return run_asyncio(ASYNC[a.child], a.url, a.n)
    makers = SYNC | STOCK
    if a.child not in makers:
        makers = dict(c.extras([OUR_EXTRA, *a.extra]))
    return run_gevent(makers[a.child], a.url, a.n)


# --- The storm ------------------------------------------------------------------------------------


def storm(name, processes, n, url, extra=()):
    """Loads, seconds until the last and the median caller were served, and the callers' errors."""
    import redis

    r = redis.Redis.from_url(url)
    r.flushall()
    is_as_it_comes = name in ASYNC or name in STOCK or name == OURS
    u = url if is_as_it_comes else url + "?max_connections=4000"
    args = [sys.executable, __file__, "--child", name, "--url", u, "--n", str(n)]
    args += ["--aio"] if name in ASYNC else []
    args += [x for e in extra for x in ("--extra", e)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    ps = [subprocess.Popen(args, text=True, **pipes) for _ in range(processes)]
    try:
        for p in ps:
            if p.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{name}: child did not start")
        start = time.time() + 0.5
        for p in ps:
            p.stdin.write(f"{start}\n")
            p.stdin.flush()
        outs = [p.communicate(timeout=40)[0] for p in ps]
    finally:
        for p in ps:
            c.stop(p)
    res = [json.loads(o.strip().splitlines()[-1]) for o in outs]
    done = [x for o in res for x in o["done"]]
    bad = [x for o in res for x in o["bad"]]
    return int(r.get("loads") or 0), max(done), c.pct(done, 50), bad


def measured(names, processes, a, url):
    """Rows of some libraries; the rounds go through all of them in turn."""
    got = {name: [] for name in names}
    for _ in range(a.rounds):
        c.quiet()
        for name in names:
            got[name].append(storm(name, processes, a.n, url, a.extra))
    for name, rounds in got.items():
        loads, last, median, bad = zip(*rounds, strict=True)
        errors = [error for one in bad for error in one]
        yield {
            "library": name,
            "processes": processes,
            "callers": processes * a.n,
            "loads": st.median(loads),
            "loads max": max(loads),
            "last served ms": st.median(last) * 1e3,
            "median served ms": st.median(median) * 1e3,
            "x loader": st.median(last) / LOAD,
            "errors": len(errors),
            "first error": next(iter(errors), None),
        }


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--n", type=int, default=200, help="callers in each process")
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--ours", action="store_true", help="only ours, as JSON")
    ap.add_argument("--extra", action="append", default=[])
    for name in ("--child", "--url"):
        ap.add_argument(name, help=argparse.SUPPRESS)
    ap.add_argument("--aio", action="store_true", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.child:
        return child(a)
    port, _ = c.start_redis()
    url = f"redis://127.0.0.1:{port}/0"
    if a.ours:
        return print(json.dumps([row for p in PROCESSES for row in measured([OURS], p, a, url)]))
    names = [*SYNC, *ASYNC, OURS, *(e.split("=")[0] for e in a.extra)]
    rows = []
    for processes in PROCESSES:
        rows += measured([*names, *STOCK] if processes == 1 else names, processes, a, url)
    print(f"## Stampede: {a.n} callers a process, loader of {LOAD} s, median of {a.rounds}\n")
    c.table(rows)
    env = c.environment("gevent", "redis", "flask-caching", "dogpile.cache", "cashews")
    return c.finish("stampede", rows, env)


if __name__ == "__main__":
    main()
