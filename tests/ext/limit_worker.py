"""Processes of their own that share limits, patched by gevent as gunicorn's workers are."""

import json
import subprocess
import sys

_LOOP = """
from gevent import monkey; monkey.patch_all()
import json, sys, time
import gevent
from flask_muset.redis import GuardedRedis
from flask_muset.resilience import RateLimit

names = globals()
print("ready", flush=True)
while True:
    line = gevent.get_hub().threadpool.apply(sys.stdin.readline)
    if not line:
        break
    names["result"] = None
    exec(json.loads(line), names)
    print("result:" + json.dumps(names["result"]), flush=True)
"""


class LimitWorker:
    """Runs code, line by line; the names that it sets stay."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self):
        """Wait until it takes code."""
        assert self._process.stdout.readline().strip() == "ready"
        return self

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

    def kill(self):
        """kill -9."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def run_all(workers, code):
    """Run code in all at once; their results."""
    for worker in workers:
        worker.start(code)
    return [worker.end() for worker in workers]
