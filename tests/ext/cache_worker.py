"""A process of its own with a Flask app and its cache, as a gunicorn worker has them."""

import json

from code_worker import CodeWorker

_SETUP = """
from flask import Flask
from flask_muset import CacheStrategies
from flask_muset.clock import SYSTEM

app = Flask("worker")
app.config.update(json.loads(sys.argv[1]))
cache = CacheStrategies(app)
state = app.extensions["cache_strategies"]
app.app_context().push()

def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        gevent.sleep(0.005)

if state.redis is not None:
    cache.get("anything")  # begins to listen
    if state.redis.state == "up":
        store = getattr(state.store, "of", lambda _key: state.store)("anything")
        until(lambda: store._feed is not None and store._feed.is_linked)
"""


class CacheWorker(CodeWorker):
    """Runs code, line by line, in an app context; the names that it sets stay.

    Args:
        redis_url: Of the second level; None for a memory alone.
        **config: Further configuration, without its prefix.
    """

    def __init__(self, redis_url, **config):
        # A machine that is busy with other tests is no Redis that is away.
        values = {"CACHE_STRATEGIES_REDIS_URL": redis_url, "CACHE_STRATEGIES_REDIS_BUDGET": 2.0}
        values.update({f"CACHE_STRATEGIES_{name}": value for name, value in config.items()})
        super().__init__(_SETUP, json.dumps(values))
        self.ready()

    def get(self, key):
        """The value of a key."""
        return self.run(f"result = cache.get({key!r})")
