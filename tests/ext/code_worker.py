"""A process of its own, patched by gevent as gunicorn's workers are, that runs code it is sent."""

import json
import subprocess
import sys

_BEGIN = """
from gevent import monkey; monkey.patch_all()
import json, sys, time
import gevent
names = globals()
"""
_LOOP = """
print("ready", flush=True)
while True:
    line = gevent.get_hub().threadpool.apply(sys.stdin.readline)
    if not line:
        break
    names["result"] = None
    exec(json.loads(line), names)
    print("result:" + json.dumps(names["result"]), flush=True)
"""


class CodeWorker:
    """Runs code, line by line; the names that it sets stay.

    Args:
        setup: Code that it begins with.
        *args: In `sys.argv`, from the second on.
    """

    def __init__(self, setup, *args):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _BEGIN + setup + _LOOP, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def ready(self):
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
