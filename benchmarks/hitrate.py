"""How many of the requests each cache answers: Zipf over 100k keys, room for 1 % and 10 % of them.

Deterministic but for theine's own chance, so noise plays no part. Upper bounds: MIN (Belady, may
bypass: knows the future) and the ideal static top-k (knows the distribution). Flask-Caching's
SimpleCache drops the entry that expires first; with one timeout that is FIFO, and it sorts the
whole cache on each insertion into a full one, so it is simulated as FIFO and that model is checked
against the real class. Ours is bounded in bytes and gets entries of equal weight. cachetools'
TTLCache gets a time-to-live that never ends within the run, so it is an LRU; only with --ttl,
because it is slow.

With --instructions, as JSON only: exact instructions under valgrind of a hit, beside cachetools and
theine, and of an insertion into a full cache of ours (30 s).

Another cache beside them: --extra name=package.module:make, where make(capacity) gives
(get(key) -> value or None, set(key, value)).
"""

import argparse
import heapq
import json
import multiprocessing as mp
import random
import shutil
import time
from collections import OrderedDict
from functools import partial
from itertools import accumulate

import common as c

KEYS, ALPHAS, PARTS = 100_000, (0.7, 0.9, 1.0, 1.2), (0.01, 0.10)
CHECKED = 30_000
SIZES = (100, 1000, 10_000)
OURS = "flask-muset"
NEVER_S = 1e9
_traces = {}


def trace(alpha, requests):
    """The keys that are asked for; only the latest trace is kept."""
    if (alpha, requests) not in _traces:
        weights = accumulate(1 / i**alpha for i in range(1, KEYS + 1))
        rnd = random.Random(42)
        keys = list(range(KEYS))
        rnd.shuffle(keys)  # rank says nothing about the key
        _traces.clear()
        _traces[alpha, requests] = rnd.choices(keys, cum_weights=list(weights), k=requests)
    return _traces[alpha, requests]


def run(get, put, requests):
    """How many of the requests are hits."""
    hits = 0
    for key in requests:
        if get(key) is None:
            put(key, key + 1)
        else:
            hits += 1
    return hits


# --- Caches: room for so many entries -> (get, put) -----------------------------------------------


def make_cachetools(kind):
    def make(capacity):
        import cachetools

        more = (NEVER_S,) if kind == "TTLCache" else ()
        cache = getattr(cachetools, kind)(capacity, *more)
        return cache.get, cache.__setitem__

    return make


def make_theine(capacity):
    import theine

    cache = theine.Cache(capacity)
    return (lambda key: cache.get(key)[0]), cache.set


def our_memory(capacity):
    """A memory with room for so many entries, and what puts one in by its key."""
    from flask_muset.cache_strategies.entry import Entry
    from flask_muset.cache_strategies.memory import Memory

    def put_into(memory, name):
        memory.put(name, Entry(b"12345678", created_at=0.0), memory.mark)

    one = Memory(1 << 20)
    put_into(one, f"{0:06}")
    memory = Memory(capacity * one.bytes)
    return memory, lambda name: put_into(memory, name)


def make_ours(capacity):
    memory, put = our_memory(capacity)
    get, names = memory.get, [f"{key:06}" for key in range(KEYS)]
    return (lambda key: get(names[key])), (lambda key, _: put(names[key]))


def make_fifo(capacity):
    cache = OrderedDict()

    def put(key, value):
        if len(cache) > capacity:  # SimpleCache keeps threshold + 1 entries
            cache.popitem(last=False)
        cache[key] = value

    return cache.get, put


def make_simple(capacity):
    from cachelib.simple import SimpleCache

    cache = SimpleCache(threshold=capacity, default_timeout=10**6)
    return (lambda key: cache.get(str(key))), (lambda key, value: cache.set(str(key), value))


POLICIES = {
    "cachetools LRU": make_cachetools("LRUCache"),
    "cachetools LFU": make_cachetools("LFUCache"),
    "cachetools TTL": make_cachetools("TTLCache"),
    "theine (W-TinyLFU)": make_theine,
    "Flask-Caching SimpleCache (FIFO model)": make_fifo,
    OURS: make_ours,
}


# --- Upper bounds ---------------------------------------------------------------------------------


def belady(_alpha, capacity, requests):
    after, last = [0] * len(requests), {}
    for at in range(len(requests) - 1, -1, -1):
        after[at] = last.get(requests[at], len(requests) + at)
        last[requests[at]] = at
    hits, kept, heap = 0, {}, []
    for at, key in enumerate(requests):
        if key in kept:
            hits += 1
        kept[key] = after[at]
        heapq.heappush(heap, (-after[at], key))
        while len(kept) > capacity:
            latest, victim = heapq.heappop(heap)
            if kept.get(victim) == -latest:
                del kept[victim]
    return hits


def static_top(alpha, capacity, requests):
    weights = [1 / i**alpha for i in range(1, KEYS + 1)]
    return sum(weights[:capacity]) / sum(weights) * len(requests)


BOUNDS = {"MIN (Belady)": belady, "ideal static top-k": static_top}


# --- Measuring ------------------------------------------------------------------------------------


def job(args):
    name, alpha, part, total, extra = args
    requests, capacity = trace(alpha, total), int(KEYS * part)
    began = time.process_time()
    if name in BOUNDS:
        hits = BOUNDS[name](alpha, capacity, requests)
    else:
        make = (POLICIES | dict(c.extras(extra)))[name]
        hits = run(*make(capacity), requests)
    return name, alpha, part, 100 * hits / total, (time.process_time() - began) / total * 1e6


def simple_is_fifo():
    """Whether the model does what the real SimpleCache does."""
    requests = trace(0.9, CHECKED)
    return run(*make_simple(200), requests) == run(*make_fifo(200), requests)


def full_insert_us(make):
    """CPU time of an insertion by the number of entries of a full cache."""
    cost = {}
    for capacity in SIZES:
        _, put = make(capacity)
        for number in range(2 * capacity):
            put(KEYS - 1 - number, number)
        began = time.process_time()
        for number in range(200):
            put(number, number)
        cost[capacity] = (time.process_time() - began) / 200 * 1e6
    return cost


def instructions():
    """Instructions by name, nothing without valgrind."""
    if shutil.which("valgrind") is None:
        return {}
    return json.loads(c.under_valgrind([__file__, "--child"]))


def child():
    cases = {
        f"{name}, hit": partial(hit, POLICIES[name])
        for name in ("cachetools LRU", "cachetools TTL", "theine (W-TinyLFU)")
    }
    cases["floor: dict, hit"] = partial(hit, lambda _: ((d := {}).get, d.__setitem__))
    cases[f"{OURS}, hit"] = our_hit
    for size in SIZES:
        cases[f"{OURS}, insertion at {size}"] = partial(our_insertion, size)
    print(json.dumps(c.instructions(cases, 500, 1500)))


def hit(make):
    get, put = make(1000)
    for key in range(500):
        put(key, key + 1)
    return lambda: get(5)


def our_hit():
    """Of the memory itself, which is asked by name."""
    memory, put = our_memory(1000)
    for key in range(500):
        put(f"{key:06}")
    return lambda: memory.get("000005")


def our_insertion(size):
    _, put = our_memory(size)
    names = [f"{key:06}" for key in range(2 * size + 2000)]
    for _ in range(2 * size):
        put(names.pop())
    return lambda: put(names.pop())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--ttl", action="store_true", help="TTLCache too (slow; the LRU's figures)")
    parser.add_argument("--instructions", action="store_true", help="only these, as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--extra", action="append", default=[])
    a = parser.parse_args()
    if a.child:
        return child()
    if a.instructions:
        return print(json.dumps(instructions()))
    policies = [name for name in POLICIES if a.ttl or "TTL" not in name]
    names = [*BOUNDS, *policies, *(pair.split("=")[0] for pair in a.extra)]
    rows, times = measured(names, a.requests, a.extra)
    inserts = {"SimpleCache": full_insert_us(make_simple), OURS: full_insert_us(make_ours)}
    is_fifo = simple_is_fifo()
    print(f"## Hit rate in percent, Zipf over {KEYS} keys, {a.requests} requests\n")
    c.table(rows)
    c.table(times)
    print(f"SimpleCache equals the FIFO model on {CHECKED} requests: {is_fifo}.\n")
    print("## CPU us of an insertion into a full cache, by the number of its entries\n")
    c.table([{"cache": name, **{str(k): t[k] for k in t}} for name, t in inserts.items()])
    c.finish(
        "hitrate",
        rows,
        c.environment("cachetools", "theine", "theine_core", "cachelib"),
        cpu=times,
        simple_is_fifo=is_fifo,
        full_insert_us=inserts,
    )


def measured(names, requests, extra):
    """Rows of hit rates and of CPU times."""
    columns = [(alpha, part) for part in PARTS for alpha in ALPHAS]
    # By alpha, so that a trace is drawn once.
    jobs = [(name, *at, requests, extra) for at in sorted(columns) for name in names]
    with mp.Pool(mp.cpu_count()) as pool:
        found = {done[:3]: done[3:] for done in pool.imap(job, jobs, chunksize=1)}
    rates = [{f"a={a} {p:.0%}": found[name, a, p][0] for a, p in columns} for name in names]
    times = [{f"us/request a=0.9 {p:.0%}": found[name, 0.9, p][1] for p in PARTS} for name in names]
    return tuple(
        [{"policy": name, **row} for name, row in zip(names, some, strict=True)]
        for some in (rates, times)
    )


if __name__ == "__main__":
    main()
