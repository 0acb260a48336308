"""What does a cache hit cost, in this process and on Redis over loopback, and a decorated function?

For a small dict (some 200 bytes as JSON) and a 10 kB value; and what encoding them costs. Mean and
best are the median and minimum of 7 interleaved batches; p50, p95 and p99 are of calls that were
timed one by one (the clock's own cost is the row "floor: empty call"). With --valgrind also exact
instructions per hit in this process, the figure to compare between days (90 s). "own copy": whether
callers get an object that they may change freely.

Another cache beside them: --extra name=package.module:make, where make(redis_url) gives
(set(key, value), get(key)).
"""

import argparse
import asyncio
import functools
import json
import pickle
import shutil
import socket
import statistics as st
import tempfile
import time

import common as c
import msgspec
import orjson

SMALL = {
    "id": 12345,
    "name": "Ada Lovelace",
    "email": "ada@example.org",
    "active": True,
    "roles": ["admin", "editor"],
    "score": 98.75,
    "created": "2026-01-02T03:04:05Z",
    "note": "x" * 40,
}
# By way of JSON: nothing in it is shared.
BIG = json.loads(json.dumps({"items": [dict(SMALL, id=i) for i in range(50)]}))
VALUES = {"small": SMALL, "10 kB": BIG}
REPEATS = 7
OURS_ON_REDIS, OURS_DECORATED = "flask-muset Redis alone", "flask-muset cached"
OURS = [
    "flask-muset memory=ours_cache:make_memory",
    f"{OURS_ON_REDIS}=ours_cache:make_l2",
    f"{OURS_DECORATED}=ours_cache:make_cached",
]
TTL_CACHE, SIMPLE = "cachetools TTLCache", "Flask-Caching SimpleCache"
REDIS_CACHE, RAW_GET = "Flask-Caching RedisCache", "floor: raw socket GET"
MEMOIZE = "Flask-Caching memoize, SimpleCache"
now = time.perf_counter_ns


# --- Caches: (name, set or None, get) -------------------------------------------------------------


def local_caches(tmp):
    import cachetools
    import diskcache
    import theine
    from cachelib.simple import SimpleCache
    from dogpile.cache import make_region

    plain = {}
    yield "floor: empty call", None, lambda k: None
    yield "floor: dict.get", plain.__setitem__, plain.get
    lru, ttl = cachetools.LRUCache(1000), cachetools.TTLCache(1000, 600)
    yield "cachetools LRUCache", lru.__setitem__, lru.get
    yield TTL_CACHE, ttl.__setitem__, ttl.get
    tiny = theine.Cache(1000)
    yield "theine (W-TinyLFU)", tiny.set, lambda k: tiny.get(k)[0]
    simple = SimpleCache(default_timeout=600)
    yield SIMPLE, simple.set, simple.get
    for kind in ("memory", "memory_pickle"):
        region = make_region().configure(f"dogpile.cache.{kind}", expiration_time=600)
        yield f"dogpile {kind}", region.set, region.get
    disk = diskcache.Cache(tmp)
    yield "diskcache (sqlite file)", disk.set, disk.get


def _socket_get(port):
    """The least that a GET can cost in Python."""
    s = socket.create_connection(("127.0.0.1", port))
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(k):
        s.sendall(b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n")
        head = s.recv(65536)
        need = head.index(b"\r\n") + 4 + int(head[1 : head.index(b"\r\n")])
        while len(head) < need:
            head += s.recv(65536)
        return head

    return get


def redis_caches(port):
    import redis
    from cachelib.redis import RedisCache
    from dogpile.cache import make_region
    from redis._parsers import _RESP2Parser, _RESP3Parser
    from redis.cache import CacheConfig

    raw = redis.Redis(port=port)

    def put(k, v):
        raw.set(k, pickle.dumps(v, 5))

    yield RAW_GET, put, _socket_get(port)
    for proto, parser in ((2, _RESP2Parser), (3, _RESP3Parser)):
        pool = redis.ConnectionPool(port=port, protocol=proto, parser_class=parser)
        yield f"redis-py GET RESP{proto}, python parser", put, redis.Redis(connection_pool=pool).get
        yield f"redis-py GET RESP{proto}, hiredis", put, redis.Redis(port=port, protocol=proto).get
    one = redis.Redis(port=port, protocol=3, single_connection_client=True)
    yield "redis-py GET RESP3, hiredis, one connection", put, one.get
    try:
        csc = redis.Redis(port=port, protocol=3, cache_config=CacheConfig())
        yield "redis-py client-side cache hit", put, csc.get
    except redis.RedisError:
        pass  # it needs a newer server
    pickled = redis.Redis(port=port)
    yield "redis-py GET + pickle.loads", put, lambda k: pickle.loads(pickled.get(k))
    # Other formats: other databases.
    packed = redis.Redis(port=port, db=5)
    yield (
        "redis-py GET + msgspec decode",
        lambda k, v: packed.set(k, msgspec.msgpack.encode(v)),
        lambda k: msgspec.msgpack.decode(packed.get(k)),
    )
    flask = RedisCache(host="127.0.0.1", port=port, default_timeout=600, db=4)
    yield REDIS_CACHE, flask.set, flask.get
    where = {"url": f"redis://127.0.0.1:{port}/1"}
    region = make_region().configure("dogpile.cache.redis", expiration_time=600, arguments=where)
    yield "dogpile redis", region.set, region.get


def async_makers(port, n_mem, n_redis):
    url = f"redis://127.0.0.1:{port}/2"

    async def cashews(u, **kw):
        from cashews import Cache

        k = Cache()
        k.setup(u, **kw)
        await k.init()
        return (lambda a, b: k.set(a, b, expire=600)), k.get

    async def aiocache(kind):
        from aiocache import Cache
        from aiocache.serializers import PickleSerializer

        if kind == "mem":
            k = Cache(Cache.MEMORY)
        else:
            k = Cache(Cache.REDIS, endpoint="127.0.0.1", port=port, serializer=PickleSerializer())
        return k.set, k.get

    return {
        "cashews mem (asyncio)": (lambda: cashews("mem://"), n_mem),
        "cashews redis (asyncio)": (lambda: cashews(url), n_redis),
        "cashews redis client_side (asyncio)": (lambda: cashews(url, client_side=True), n_mem),
        "aiocache memory (asyncio)": (lambda: aiocache("mem"), n_mem),
        "aiocache redis (asyncio)": (lambda: aiocache("redis"), n_redis),
    }


# --- Decorators: name -> what decorates a function of one argument --------------------------------


def _memoize():
    return _flask_cache().memoize(600)


def _cached():
    return _flask_cache().cached(600, key_prefix="k")


def _flask_cache():
    from flask import Flask
    from flask_caching import Cache

    return Cache(Flask("bench"), config={"CACHE_TYPE": "SimpleCache"})


def _cachetools(lock=None):
    import cachetools

    return cachetools.cached(cachetools.TTLCache(1000, 600), lock=lock)


def _cachetools_locked():
    import threading

    return _cachetools(threading.Lock())


def _theine():
    import theine

    return theine.Memoize(1000, None)


def _dogpile():
    from dogpile.cache import make_region

    region = make_region().configure("dogpile.cache.memory", expiration_time=600)
    return region.cache_on_arguments()


DECORATORS = {
    "floor: the bare function": lambda: lambda f: f,
    "functools.lru_cache": lambda: functools.lru_cache(1000),
    "cachetools cached, TTLCache": _cachetools,
    "cachetools cached, TTLCache, lock": _cachetools_locked,
    "theine Memoize": _theine,
    "dogpile cache_on_arguments, memory": _dogpile,
    "Flask-Caching cached, SimpleCache": _cached,
    MEMOIZE: _memoize,
}


def decorated(decorators):
    """As caches: `set` sets what the decorated function returns, `get` calls it."""
    for name, make in decorators.items():
        source = {}
        yield name, source.__setitem__, make()(_reader(source))


def _reader(source):
    def read(key):
        return source[key]

    return read


# --- Times ----------------------------------------------------------------------------------------


def timed(get, n):
    """One repeat: n calls in a batch, then n/2 timed singly."""
    get("k")
    t = now()
    for _ in range(n):
        get("k")
    batch = (now() - t) / n
    singles = []
    for _ in range(n // 2):
        t = now()
        get("k")
        singles.append(now() - t)
    return batch, singles


async def atimed(get, n):
    await get("k")
    t = now()
    for _ in range(n):
        await get("k")
    batch = (now() - t) / n
    singles = []
    for _ in range(n // 2):
        t = now()
        await get("k")
        singles.append(now() - t)
    return batch, singles


def row(name, got, own):
    batch, singles = [b for b, _ in got], [x for _, s in got for x in s]
    return {
        "cache": name,
        "mean us": st.median(batch) / 1e3,
        "best us": min(batch) / 1e3,
        "p50 us": c.pct(singles, 50) / 1e3,
        "p95 us": c.pct(singles, 95) / 1e3,
        "p99 us": c.pct(singles, 99) / 1e3,
        "spread %": c.spread(batch),
        "own copy": own,
    }


def failed(name, error):
    return {"cache": name, "error": f"{type(error).__name__}: {error}"[:80]}


def sync_rows(caches, value, n):
    rows, ready = [], {}
    for name, put, get in caches:
        try:
            if put:
                put("k", value)
                assert get("k") is not None
            ready[name] = (get, put and get("k") is not get("k"), [])
        except Exception as e:
            rows.append(failed(name, e))
    for _ in range(REPEATS):
        c.quiet()
        for get, _own, got in ready.values():
            got.append(timed(get, n))
    return [row(k, got, own) for k, (get, own, got) in ready.items()] + rows


async def async_rows(makers, value):
    rows, ready = [], {}
    for name, (make, n) in makers.items():
        try:
            put, get = await make()
            await put("k", value)
            assert await get("k") == value, "returned something else"
            ready[name] = (get, n, (await get("k")) is not (await get("k")), [])
        except Exception as e:
            rows.append(failed(name, e))
    for _ in range(REPEATS):
        for get, n, _own, got in ready.values():
            got.append(await atimed(get, n))
    return [row(k, got, own) for k, (_, _, own, got) in ready.items()] + rows


def codecs(value):
    pairs = {
        "pickle 5": (lambda v: pickle.dumps(v, 5), pickle.loads),
        "msgspec msgpack": (msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode),
        "msgspec json": (msgspec.json.encode, msgspec.json.decode),
        "orjson": (orjson.dumps, orjson.loads),
        "json (stdlib)": (lambda v: json.dumps(v).encode(), json.loads),
    }
    blob = {k: e(value) for k, (e, _) in pairs.items()}
    res = {k: ([], []) for k in pairs}
    for _ in range(REPEATS):
        for k, (e, d) in pairs.items():
            for i, (f, x) in enumerate(((e, value), (d, blob[k]))):
                n = 2000 if len(blob[k]) < 1000 else 200
                t = time.process_time_ns()
                for _ in range(n):
                    f(x)
                res[k][i].append((time.process_time_ns() - t) / n / 1e3)
    return [
        {
            "codec": k,
            "bytes": len(blob[k]),
            "encode us": st.median(e),
            "decode us": st.median(d),
            "spread %": max(c.spread(e), c.spread(d)),
        }
        for k, (e, d) in res.items()
    ]


# --- Instructions ---------------------------------------------------------------------------------


def _hit(put, get, value):
    if put:
        put("k", value)
    return lambda: get("k")


def _late(make, value):
    """A case that is set up in the forked child: no connection and no thread is inherited."""
    return lambda: _hit(*make(), value)


def child(port, ours):
    """Instructions per hit, by value, as JSON.

    Of in-process caches and decorators with both values, of clients of Redis with the small one.
    Neither the kernel nor the server is counted.
    """
    out = {}
    with tempfile.TemporaryDirectory() as tmp:
        for label, value in VALUES.items():
            caches = [*local_caches(tmp), *decorated(DECORATORS)]
            cases = {n: lambda p=p, g=g, v=value: _hit(p, g, v) for n, p, g in caches}
            cases |= {n: _late(make, value) for n, make in ours.items()}
            out[label] = c.instructions(cases, 500, 1500)
    names = [n for n, _, _ in redis_caches(port) if "client-side" not in n]
    cases = {n: _late(lambda n=n: _one_of_redis(port, n), SMALL) for n in names}
    out["small"] |= c.instructions(cases, 100, 300)
    print(json.dumps(out))


def _one_of_redis(port, name):
    return next((p, g) for n, p, g in redis_caches(port) if n == name)


def instructions(port, extra=()):
    """Instructions per hit by value and name, nothing without valgrind."""
    if shutil.which("valgrind") is None:
        return {}
    args = [__file__, "--child", str(port), *(x for e in extra for x in ("--extra", e))]
    return json.loads(c.under_valgrind(args, timeout=900))


# --- All of it ------------------------------------------------------------------------------------


def bound(pairs, url):
    """What is made with the address of Redis, by name, not made yet."""
    return {name: functools.partial(make, url) for name, make in c.extras(pairs)}


def measured(label, value, port, ours):
    """Rows of one value: those of caches and those of decorators."""
    n = 5000 if label == "small" else 1500
    below, wrapped = ours.pop(OURS_ON_REDIS), ours.pop(OURS_DECORATED)
    with tempfile.TemporaryDirectory() as tmp:
        caches = [*local_caches(tmp), *((k, *make()) for k, make in ours.items())]
        rows = sync_rows(caches, value, n)
    caches = [*redis_caches(port), (OURS_ON_REDIS, *below())]
    rows += sync_rows(caches, value, 600)
    rows += asyncio.run(async_rows(async_makers(port, 3000, 400), value))
    caches = [*decorated(DECORATORS), (OURS_DECORATED, *wrapped())]
    return rows, sync_rows(caches, value, n // 5)


def with_ratios(rows, ins, times_of, instructions_of):
    """Add instructions, and the ratios to the rows that are named."""
    best = {r["cache"]: r.get("best us") for r in rows}
    for r in rows:
        name = r["cache"]
        for base in times_of:
            r[f"x {base}"] = best[name] / best[base] if best[name] else None
        r["instr/hit"] = ins.get(name)
        for base in instructions_of:
            known = ins.get(name) and ins.get(base)
            r[f"instr x {base}"] = ins[name] / ins[base] if known else None


def shown(rows):
    columns = dict.fromkeys(k for r in rows for k in r)
    c.table(rows, [k for k in columns if any(r.get(k) is not None for r in rows)])


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--extra", action="append", default=[])
    ap.add_argument("--valgrind", action="store_true")
    ap.add_argument("--instructions", action="store_true", help="only these, as JSON")
    ap.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    a = ap.parse_args()
    port = a.child or c.start_redis()[0]
    url = f"redis://127.0.0.1:{port}/3"
    if a.instructions:
        return print(json.dumps(instructions(port, a.extra)))
    ours = bound([*OURS, *a.extra], url)
    if a.child:
        return child(port, ours)
    ins = instructions(port, a.extra) if a.valgrind else {}
    out = []
    for label, value in VALUES.items():
        counted = ins.get(label, {})
        rows, wrapped = measured(label, value, port, dict(ours))
        with_ratios(rows, counted, [TTL_CACHE, RAW_GET], [TTL_CACHE, SIMPLE, REDIS_CACHE])
        with_ratios(wrapped, counted, [MEMOIZE], [MEMOIZE])
        print(f"## Cache hit, {label} value ({len(json.dumps(value))} bytes as JSON)\n")
        shown(rows)
        print(f"## Hit of a decorated function, {label} value\n")
        shown(wrapped)
        print(f"## Codecs, {label} value\n")
        coded = codecs(value)
        c.table(coded)
        out.append({"value": label, "caches": rows, "decorated": wrapped, "codecs": coded})
    env = c.environment(
        "redis", "hiredis", "flask-caching", "cachelib", "cachetools", "theine", "dogpile.cache",
        "diskcache", "cashews", "aiocache", "msgspec", "orjson",
    )  # fmt: skip
    return c.finish("cache", out, env)


if __name__ == "__main__":
    main()
