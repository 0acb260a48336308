"""Code in a process of its own, also one that gevent has patched, as in a gunicorn worker."""

import json
import subprocess
import sys
import textwrap

_FIRST = "from gevent import monkey; monkey.patch_all()\nimport gevent\n"


def run_patched(code, *args, timeout=120):
    """Run code that sets `result` where gevent has patched; return it, as JSON can carry it."""
    return run_apart(_FIRST + textwrap.dedent(code), *args, timeout=timeout)


def run_apart(code, *args, timeout=120):
    """Run code that sets `result`; return it, as JSON can carry it."""
    script = f"import json\n{textwrap.dedent(code)}\nprint('result:' + json.dumps(result))\n"
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
