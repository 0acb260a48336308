"""Our cache, for benchmarks/cache.py and benchmarks/stampede.py."""

from flask import Flask

from flask_muset import CacheStrategies


def _made(redis_url, l1_max_bytes=32 << 20):
    app = Flask("bench")
    app.config["CACHE_STRATEGIES_REDIS_URL"] = redis_url
    app.config["CACHE_STRATEGIES_L1_MAX_BYTES"] = l1_max_bytes
    # Under valgrind everything takes fifty times as long.
    app.config["CACHE_STRATEGIES_REDIS_BUDGET"] = 10.0
    return CacheStrategies(app)


def make_memory(redis_url):
    """A hit in the memory, with the second level behind it."""
    cache = _made(redis_url)
    return (lambda key, value: cache.set(key, value, 600)), cache.get


def make_l2(redis_url):
    """A hit in Redis, without a memory."""
    cache = _made(redis_url, 0)
    return (lambda key, value: cache.set(key, value, 600)), cache.get


def make_cached(redis_url):
    """A hit under the decorator: (set, get), of which get calls the decorated function."""
    cache, values = _made(redis_url), {}

    @cache.cached("bench", 600)
    def load(key):
        return values[key]

    def put(key, value):
        values[key] = value
        load.invalidate(key)
        load(key)

    return put, load


def make_flight(redis_url):
    """get(key, loader), as cache-aside."""
    cache = _made(redis_url)
    return lambda key, loader: cache.cache_aside(key, loader, 60)
