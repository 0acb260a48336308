"""A process of its own with a Flask app and its circuit breakers, as a gunicorn worker has them."""

import json
import subprocess
import sys

_LOOP = """
from gevent import monkey; monkey.patch_all()
import json, logging, sys, time
import gevent
from flask import Flask
from flask_muset import Resilience
from flask_muset.errors import CircuitOpenError, NetworkError
from flask_muset.resilience import CircuitBreaker, force, sharing_state

logs = []
class Keep(logging.Handler):
    def emit(self, record):
        logs.append(record.getMessage())
logging.getLogger("flask_muset").addHandler(Keep())
logging.getLogger("flask_muset").setLevel(logging.INFO)

app = Flask("worker")
app.config.update(json.loads(sys.argv[1]))
resilience = Resilience(app)
names = globals()
app.app_context().push()

def make(name, **options):
    # What all else is about from now on; it opens at the first failure.
    global policy, breaker
    options = {"failure_threshold": 1, **options}
    policy = resilience.policy(name, CircuitBreaker(name, **options))
    breaker = policy.breaker
    until(lambda: look() == ["closed", "shared"])

def fail():
    raise NetworkError("down")

def trip(times=1):
    for _ in range(times):
        try:
            policy.call(fail)
        except (NetworkError, CircuitOpenError):
            pass

def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        gevent.sleep(0.005)

def look():
    return [str(breaker.state), sharing_state(app)]

print("ready", flush=True)
while True:
    line = gevent.get_hub().threadpool.apply(sys.stdin.readline)
    if not line:
        break
    names["result"] = None
    exec(json.loads(line), names)
    print("result:" + json.dumps(names["result"]), flush=True)
"""


class BreakerWorker:
    """Runs code, line by line, in an app context; the names that it sets stay.

    Args:
        redis_url: Of the Redis that all workers share; None for none.
        **config: Of Resilience, without its prefix.
    """

    def __init__(self, redis_url, **config):
        values = {"REDIS_URL": redis_url, "REDIS_BUDGET": 1.0, **config}
        values = {f"RESILIENCE_{name}": value for name, value in values.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _LOOP, json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self):
        """Wait until it has begun."""
        assert self.process.stdout.readline().strip() == "ready"
        return self

    def start(self, code):
        """Begin to run code."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def end(self):
        """What the code that was begun has set `result` to."""
        line = self.process.stdout.readline()
        assert line.startswith("result:"), f"the worker says {line!r}"
        return json.loads(line.removeprefix("result:"))

    def run(self, code):
        """Run code and return what it has set `result` to."""
        self.start(code)
        return self.end()

    @property
    def state(self):
        """Of its breaker, as it is."""
        return self.run("result = str(breaker.state)")

    @property
    def sharing(self):
        """What it knows of the others."""
        return self.run("result = sharing_state(app)")

    def kill(self):
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
