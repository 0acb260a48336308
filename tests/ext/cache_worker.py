"""A process of its own with a Flask app and its cache, as a gunicorn worker has them."""

import json
import subprocess
import sys

_LOOP = """
from gevent import monkey; monkey.patch_all()
import json, sys, time
import gevent
from flask import Flask
from flask_muset import CacheStrategies
from flask_muset.clock import SYSTEM

app = Flask("worker")
app.config.update(json.loads(sys.argv[1]))
cache = CacheStrategies(app)
state = app.extensions["cache_strategies"]
names = globals()
app.app_context().push()

def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        gevent.sleep(0.005)

if state.redis is not None:
    cache.get("anything")  # begins to listen
    if state.redis.state == "up":
        until(lambda: state.store._feed is not None and state.store._feed.is_linked)
print("ready", flush=True)
while True:
    line = gevent.get_hub().threadpool.apply(sys.stdin.readline)
    if not line:
        break
    names["result"] = None
    exec(json.loads(line), names)
    print("result:" + json.dumps(names["result"]), flush=True)
"""


class CacheWorker:
    """Runs code, line by line, in an app context; the names that it sets stay.

    Args:
        redis_url: Of the second level; None for a memory alone.
        **config: Further configuration, without its prefix.
    """

    def __init__(self, redis_url, **config):
        values = {"CACHE_STRATEGIES_REDIS_URL": redis_url}
        values.update({f"CACHE_STRATEGIES_{name}": value for name, value in config.items()})
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _LOOP, json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout.readline().strip() == "ready"

    def start(self, code):
        """Begin to run code."""
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()

    def end(self):
        """What the code that was begun has set `result` to."""
        line = self._process.stdout.readline()
        assert line.startswith("result:"), f"the worker says {line!r}"
        return json.loads(line.removeprefix("result:"))

    def run(self, code):
        """Run code and return what it has set `result` to."""
        self.start(code)
        return self.end()

    def get(self, key):
        """The value of a key."""
        return self.run(f"result = cache.get({key!r})")

    def kill(self):
        """kill -9."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
