"""A process of its own with a Flask app and its circuit breakers, as a gunicorn worker has them."""

import json

from code_worker import CodeWorker

_SETUP = """
import logging
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

"""


class BreakerWorker(CodeWorker):
    """Runs code, line by line, in an app context; the names that it sets stay.

    Args:
        redis_url: Of the Redis that all workers share; None for none.
        **config: Of Resilience, without its prefix.
    """

    def __init__(self, redis_url, **config):
        values = {"REDIS_URL": redis_url, "REDIS_BUDGET": 1.0, **config}
        values = {f"RESILIENCE_{name}": value for name, value in values.items()}
        super().__init__(_SETUP, json.dumps(values))

    @property
    def state(self):
        """Of its breaker, as it is."""
        return self.run("result = str(breaker.state)")

    @property
    def sharing(self):
        """What it knows of the others."""
        return self.run("result = sharing_state(app)")
