"""What `make dist` has built: the wheels are complete, and what is installed from them works.

Not among the tests of `make test`, because it needs the files in dist/.
"""

import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest
from redis_server import free_port

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
#: Distribution -> the folder of its package.
PACKAGES = {"flask_muset": ROOT / "extensions" / "flask_muset", "muset": ROOT / "muset"}


def built(name, suffix):
    """The one file of a distribution in dist/."""
    (path,) = DIST.glob(f"{name}-*{suffix}")
    return path


def run(*command, cwd):
    """What a command prints, in an environment that says nothing of this one."""
    return subprocess.run(
        command, cwd=cwd, env={"PATH": os.defpath}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of a new environment that has both wheels.

    What they need is read from the environment that runs this. That one has both packages as well,
    but by path files, which are read in an environment's own folder alone.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    wheels = [built(name, ".whl") for name in PACKAGES]
    options = ["-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(*pip, "install", *options, *wheels, cwd=folder)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_is_complete(name):
    """A wheel has each file of its package, and nothing beside it."""
    package = PACKAGES[name]
    wanted = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {n for n in zipfile.ZipFile(built(name, ".whl")).namelist() if ".dist-info/" not in n}
    assert found == wanted


@pytest.mark.parametrize("name", PACKAGES)
def test_sdist(name):
    """An sdist has the licence and what a wheel is built from, but no test."""
    with tarfile.open(built(name, ".tar.gz")) as archive:
        names = {path.partition("/")[2] for path in archive.getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= names
    assert [path for path in names if path.startswith("tests")] == []


def test_installed(installed, tmp_path):
    """The installed packages are those of the wheels, and have one version."""
    command = (
        "import flask_muset, muset; from importlib.metadata import requires, version\n"
        "print(flask_muset.__file__, muset.__file__, version('flask-muset'), requires('muset')[0])"
    )
    extensions, service, version, *needs = run(
        installed / "python", "-c", command, cwd=tmp_path
    ).split()
    for file in (extensions, service):
        assert Path(file).is_relative_to(installed.parent)
    assert "".join(needs) == f"flask-muset[all]=={version}"
    assert run(installed / "muset", "--version", cwd=tmp_path) == f"muset, version {version}\n"


def test_serve_in_an_empty_folder(installed, tmp_path):
    """`muset serve` of the wheel needs no file beside it, serves its page, and ends with 0."""
    port = free_port()
    folder = tmp_path / "empty"
    folder.mkdir()
    log = tmp_path / "output.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [installed / "muset", "serve"], cwd=folder, stdout=output, stderr=output,
            env={"PATH": os.defpath, "PORT": str(port)}, start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while "Listening at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        for path in ("health/ready", "docs/", "docs/swagger-ui-bundle.js", "api/v1/openapi.json"):
            with urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
                assert answer.status == 200, path
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert [path.name for path in folder.iterdir()] == ["data"]
