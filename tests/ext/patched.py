"""Code in a process of its own that gevent has patched, as in a gunicorn worker."""

import json
import subprocess
import sys
import textwrap

_FIRST = "from gevent import monkey; monkey.patch_all()\nimport gevent, json\n"


def run_patched(code, *args, timeout=120):
    """Run code that sets `result`; return it, as JSON can carry it."""
    script = f"{_FIRST}{textwrap.dedent(code)}\nprint('result:' + json.dumps(result))\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("result:"), done.stdout
    return json.loads(last.removeprefix("result:"))
