"""The Dockerfile, done step by step in a folder of its own, and what it makes."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import requests
from dockerfile import Image, instructions
from redis_server import free_port
from test_quickstart import clone, newcomer

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


def test_what_the_image_is_made_of():
    """Exact versions, two stages, a user by number, nothing that needs root, paths below PREFIX."""
    steps = instructions(DOCKERFILE)
    bases = [rest.split()[0] for name, rest in steps if name == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) for base in bases)
    assert [rest for name, rest in steps if name == "USER"] == ["10001:10001"]
    assert [name for name, _ in steps].index("USER") > [name for name, _ in steps].index("RUN")
    for name, rest in steps:
        assert not re.search(r"apt|useradd|adduser|sudo|curl|wget", rest), rest
        if name in ("RUN", "COPY", "WORKDIR", "ENV", "VOLUME"):
            # Each path that begins at the root does so behind the prefix.
            assert not re.search(r"(?<![\w}./:])/\w", rest), rest
    names = {name for name, _ in steps}
    assert names >= {"HEALTHCHECK", "STOPSIGNAL", "EXPOSE", "CMD"}
    assert ("STOPSIGNAL", "SIGTERM") in steps


@pytest.mark.full_only
@pytest.mark.claim(
    "The Dockerfile's own steps, done without root in an empty folder: what they make serves with "
    "nothing but its data folder to write to, its health check passes, SIGTERM ends it with 0"
)
def test_image(tmp_path, prove):
    """Each RUN and COPY line runs as it stands there; then CMD and HEALTHCHECK do."""
    user = newcomer(tmp_path)
    own = user.pop("env")
    context, prefix = tmp_path / "context", tmp_path / "image"
    clone(context, user)
    prefix.mkdir()
    if "user" in user:
        os.chown(prefix, user["user"], user["group"])
    began = time.monotonic()
    script = [context / "tests" / "dockerfile.py", context / "Dockerfile", prefix]
    built = subprocess.run(
        ["python3", *script], env=own, stdout=subprocess.PIPE, check=True, text=True, **user
    )
    image = Image(**json.loads(built.stdout.splitlines()[-1]))
    built_s = time.monotonic() - began
    port = free_port()
    environ = {
        "HOME": "/nowhere",
        **image.environ,
        "PORT": str(port),
        "MUSET_HOST": "127.0.0.1",
        "METRICS_PORT": "0",
    }
    # Read-only but for the volume.
    data = Path(image.noted["VOLUME"])
    shutil.rmtree(context)
    for each in [prefix, *prefix.rglob("*")]:
        if not each.is_symlink() and each != data and data not in each.parents:
            each.chmod(each.stat().st_mode & ~0o222)
    log = tmp_path / "output.txt"
    words = [shutil.which(image.command[0], path=environ["PATH"]), *image.command[1:]]
    assert words[0].startswith(str(prefix))
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=image.workdir, env=environ, stdout=output, stderr=output, **user
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                assert requests.get(f"{url}/health/ready", timeout=5).json()["status"] == "ready"
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        health = subprocess.run(image.health_command, env=environ, check=False)
        assert health.returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert subprocess.run(image.health_command, env=environ, check=False).returncode != 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    written = [each for each in data.rglob("*") if each.is_file()]
    assert written
    installed = [each for each in (prefix / "opt").rglob("*") if each.is_file()]
    megabytes = sum(each.stat().st_size for each in installed) / 1e6
    prove.figure(f"built in {built_s:.0f} s, {megabytes:.0f} MB beside Python itself")
