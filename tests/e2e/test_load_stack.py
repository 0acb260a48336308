"""The stack of a load run is its own, and nothing of it is left."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parents[2] / "locust"))

import stack

ROOT = stack.ROOT


def test_settings_of_another_deployment_stay_out(tmp_path, monkeypatch):
    """Whoever has exported a DATABASE_URL does not find the load in that database."""
    given = {}
    monkeypatch.setattr(stack, "_start", lambda _command, _output, env: given.update(env))
    for name in ("DATABASE_URL", "REDIS_URL", "REQUEST_TIMEOUT", "MUSET_DEPLOYMENT", "LOG_FILE"):
        monkeypatch.setenv(name, "of another deployment")
    monkeypatch.setenv("RATE_LIMIT_REQUESTS_PER_MINUTE", "1")
    made = stack.Stack(tmp_path, {"MAX_RETRIES": "2"})
    made.upstream = SimpleNamespace(base_url="http://127.0.0.1:1/v1")
    made.service(6379)
    assert "of another deployment" not in given.values()
    assert given["RATE_LIMIT_REQUESTS_PER_MINUTE"] == "600000"
    assert (given["MAX_RETRIES"], given["REDIS_URL"]) == ("2", "redis://127.0.0.1:6379/0")
    assert given["PATH"]


def locust_python(code):
    """Run some code where the files of a load run are."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT / "locust",
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "extensions")])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


LEFT = """
import subprocess, sys
import run
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
stubborn = "import signal, time; signal.signal(15, 1); print(flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE).stdout.readline()
subprocess.Popen([sys.executable, "-c", ""])
before = run._children()
run._END_S = 1.0
run.end_what_is_left()
print(len(before), run._children())
"""


def test_what_nobody_has_the_number_of_ends():
    """A process that a signal has cut off from whoever started it, a stubborn one, a dead one."""
    done = locust_python(LEFT)
    assert done.stdout.split(maxsplit=1) == ["3", "set()\n"], done.stderr


STUBBORN = """
import contextlib, subprocess, sys
import run
run.LIMIT_S, run.ENDING_S, run._END_S = 2.0, 1.5, 0.5
stubborn = "import signal, time; signal.signal(15, 1); print(flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
process.stdout.readline()

@contextlib.contextmanager
def running(folder):
    try:
        process.wait()
        yield
    finally:
        process.terminate()
        print(process.wait())

run.running = running
sys.argv = ["run.py"]
sys.exit(run.main())
"""


def test_what_takes_too_long_is_cut_short():
    """A part that does not end is said and fails the run; what does not end then is killed."""
    done = locust_python(STUBBORN)
    assert (done.returncode, done.stdout) == (1, "-9\n"), done.stderr
    assert re.fullmatch(r"Cut short \d+ s after the start: the start\.\n", done.stderr)


PARTS = """
import time
import run
bounds = run.Bounds(600.0)
for title, limit_s in (("the first", 60.0), ("the second", 0.1), ("the third", 60.0)):
    with bounds.part(title, limit_s):
        time.sleep(0.2)
"""


def test_each_part_has_its_own_time():
    """The one that takes too long is named, and none that is in time is cut."""
    done = locust_python(PARTS)
    assert done.returncode == 1
    assert re.search(r"CutShortError: Cut short \d+ s after the start: the second\.$", done.stderr)
