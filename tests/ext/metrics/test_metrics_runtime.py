"""The process itself: gevent's hub and what holds it up."""

import subprocess
import sys
import textwrap

from patched import run_patched

from flask_muset.metrics.runtime import HubWatch, Sampled, resident_bytes

_BLOCKED = """
import logging, time, threading
from flask import Flask
from flask_muset.metrics import Metrics
told = []
class Keep(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())
logging.getLogger("flask_muset.metrics").addHandler(Keep())
app = Flask("x")
Metrics(app)
before = threading.active_count()

@app.get("/block")
def compute_for_long():
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        pass
    return "done"

client = app.test_client()
client.get("/metrics").close()
gevent.sleep(0.2)
quiet = app.extensions["metrics"].families["hub_delay_seconds"].get().value
for _ in range(2):
    client.get("/block").close()
    gevent.sleep(0.2)
text = client.get("/metrics").text
result = {"told": told, "quiet": quiet, "threads": before,
    "delay": [float(l.split()[1]) for l in text.splitlines() if l.startswith("muset_hub_delay")]}
"""


def test_what_blocks_the_hub_is_named_once():
    """The gauge shows the delay, and one log line the function that caused it."""
    for _ in range(5):
        result = run_patched(_BLOCKED)
        if result["quiet"] < 0.2:
            break  # else the machine stood still, which may have been told in place of the function
    assert result["quiet"] < 0.2
    assert 0.4 < result["delay"][0] < 10
    (line,) = result["told"]
    assert "compute_for_long" in line
    assert "held up for" in line


def test_delays_are_shown_for_a_while():
    """The longest of the last half to one minute, then it is forgotten."""
    watch = HubWatch(log=lambda late_s, stack: None)
    began = watch._window_ends
    watch.note(0.5, began - 1)
    assert watch.longest_s == 0.5
    watch.note(0.1, began + 1)
    assert watch.longest_s == 0.5
    watch.note(0.2, began + 32)
    assert watch.longest_s == 0.2


def test_a_stack_is_logged_at_most_every_ten_seconds():
    """A hub that is blocked all the time does not fill the log."""
    told = []
    watch = HubWatch(log=lambda late_s, stack: told.append((late_s, stack)))
    for now in (100.0, 105.0, 111.0):
        watch._seen = "here"
        watch.note(0.4, now)
    assert [late for late, _ in told] == [0.4, 0.4]


def test_a_virtual_clock_does_not_stop_the_hub():
    """The watch sleeps in real time, so others go on, and what a test does to time is no delay."""
    result = run_patched(
        """
        import time
        from flask import Flask
        from flask_muset.metrics import Metrics
        from flask_muset.testing import virtual_clock

        app = Flask("x")
        Metrics(app)
        with virtual_clock() as clock:
            app.test_client().get("/metrics").close()
            time.sleep(0.2)
            clock.advance(100)
            time.sleep(0.2)
            now = clock.now
        time.sleep(0.2)
        delay = app.extensions["metrics"].families["hub_delay_seconds"].get().value
        result = {"now": now, "delay": delay}
        """,
        timeout=30,
    )
    assert result["now"] == 1_100
    assert result["delay"] < 10


def test_nothing_starts_before_a_fork():
    """Neither a thread nor a hub exists before the first request; a forked worker has its own."""
    code = """
    from gevent import monkey; monkey.patch_all()
    import os, gevent
    from flask import Flask
    from flask_muset.metrics import Metrics
    from flask_muset.metrics import runtime
    app = Flask("x")
    Metrics(app)
    assert runtime._watch is None
    app.test_client().get("/metrics").close()
    mine = runtime._watch
    pid = os.fork()
    if not pid:
        gevent.sleep(1.1)
        app.test_client().get("/metrics").close()
        ok = runtime._watch is not mine and runtime._watch.pid == os.getpid()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_without_gevent_there_is_no_hub():
    """A sample is taken without one, and memory is known."""
    seen = []
    Sampled(seen.append).take()
    assert seen == [None]
    assert resident_bytes() > 1e6
