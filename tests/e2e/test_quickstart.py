"""A newcomer's first minutes: an empty folder, two commands, no root."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from redis_server import free_port

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
NOBODY = 65534


def newcomer(tmp_path):
    """Arguments for a process with an empty home and, where this is root, without its rights."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MUSET", "PYENV", "PYTHON"))}
    env |= {"HOME": str(home)}
    options = {"env": env}
    if os.geteuid() == 0:
        env["PATH"] = "/usr/local/bin:/usr/bin:/bin"
        for folder in (tmp_path, *list(tmp_path.parents)[:2]):
            folder.chmod(0o755)
        os.chown(home, NOBODY, NOBODY)
        options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return options


def clone(folder, options):
    """A fresh clone of the last commit, owned by the newcomer."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    if "user" in options:
        subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(folder)], check=True)


def shell(command, folder, options):
    """Paste a command into a shell and return what it prints."""
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, **options
    )
    return done.stdout


@pytest.mark.full_only
@pytest.mark.claim(
    "In an empty folder, as a new user without root: clone, make run, paste the printed commands, "
    "upload a real document, ask about it"
)
def test_make_run(tmp_path, prove):
    """Clones, runs, pastes what is printed, and reads the answers."""
    options = newcomer(tmp_path)
    folder = tmp_path / "muset"
    clone(folder, options)
    port = str(free_port())
    options["env"]["PORT"] = port
    log = tmp_path / "output.txt"
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["make", "run"], cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, **options,
        )  # fmt: skip
        try:
            while "Listening at" not in (text := log.read_text()):
                assert process.poll() is None, text
                assert time.monotonic() - began < 600, text
                time.sleep(0.2)
            seconds = time.monotonic() - began
            time.sleep(2)
            commands = re.findall(r"^  (curl .*)$", text, re.MULTILINE)
            assert len(commands) == 2
            outputs = [shell(command, folder, options) for command in commands]
            assert '"sha256"' in outputs[0]
            assert '"status":"answered"' in outputs[1], outputs[1]
            upload = commands[0].replace("README.md", str(folder / "tests/data/constitution.md"))
            assert '"passages"' in shell(upload, folder, options)
            ask = commands[1].replace(
                "What does Muset do?", "Who has the sole power to try impeachments?"
            )
            answer = shell(ask, folder, options)
            assert "sole Power to try all Impeachments" in answer
            assert text.count("Admin key: msk_") == 1
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
    prove.figure(f"answered; serving {seconds:.0f} s after `make run`")


@pytest.mark.full_only
@pytest.mark.claim("In an empty folder, as a new user without root: clone and make test pass")
def test_make_test(tmp_path, prove):
    """Clones and runs the tests."""
    options = newcomer(tmp_path)
    folder = tmp_path / "muset"
    clone(folder, options)
    began = time.monotonic()
    done = subprocess.run(
        ["make", "test"], cwd=folder, capture_output=True, text=True, timeout=1500, **options
    )
    lines = re.findall(r"^\d+ passed.*$", done.stdout, re.MULTILINE)
    prove.figure(f"{'; '.join(lines)}; {time.monotonic() - began:.0f} s with the installation")
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(lines) == 2
