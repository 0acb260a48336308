"""Real processes: the service as a user starts it, ended by its own process id."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from hosts import Host
from nginx_server import Nginx
from postgres_server import PostgresServer
from redis_server import RedisServer, free_port

ROOT = Path(__file__).parents[2]
HERE = Host()


class Service:
    """`muset serve` in a process group of its own.

    Args:
        data_dir: Where it keeps what it keeps, and its output.
        host: Where it runs.
        **environ: Further variables.
    """

    def __init__(self, data_dir, host=HERE, **environ):
        self.environ = environ
        self.host = host
        self.port = free_port()
        self.address = f"{host.address}:{self.port}"
        self.url = f"http://{self.address}"
        self.data_dir = data_dir
        self.key = environ.get("MUSET_ADMIN_KEY")
        self.process = None
        self._output = None

    def start(self):
        began = time.monotonic()
        if self._output is not None:
            self._output.close()
        self._output = open(self.data_dir / "output.txt", "wb")  # noqa: SIM115 - closed in stop
        env = os.environ | {
            "MUSET_DATA_DIR": str(self.data_dir / "data"),
            "MUSET_HOST": self.host.address,
            "PORT": str(self.port),
            "RATE_LIMIT_REQUESTS_PER_MINUTE": "0",
            "METRICS_PORT": "0",
            **self.environ,
        }
        self.process = subprocess.Popen(
            [*self.host.command, sys.executable, "-m", "muset.cli", "serve"],
            env=env,
            cwd=ROOT,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while time.monotonic() - began < 90:
            assert self.process.poll() is None, self.output()
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{self.url}/health/ready", timeout=5).ok:
                    break
            time.sleep(0.02)
        else:
            pytest.fail(f"not ready in 90 s: {self.output()}")
        found = re.search(r"^Admin key: (msk_\S+)$", self.output(), re.MULTILINE)
        self.key = found[1] if found else self.key
        return time.monotonic() - began

    def start_again(self):
        """As a supervisor does, until those that were there before have let go of the port."""
        for _ in range(20):
            with contextlib.suppress(AssertionError):
                return self.start()
            time.sleep(0.2)
        pytest.fail(f"it does not start again: {self.output()}")

    def output(self):
        return (self.data_dir / "output.txt").read_text(errors="replace")

    @property
    def headers(self):
        return {"Authorization": f"Bearer {self.key}"}

    def workers(self):
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children]

    @contextlib.contextmanager
    def frozen(self):
        """The worker processes stop within the block, as in a long pause of the machine."""
        workers = self.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)

    def kill_group(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self._output.close()

    def stop(self, sig=signal.SIGTERM, *, group=False):
        if group:
            os.killpg(self.process.pid, sig)
        else:
            self.process.send_signal(sig)
        return self.wait()

    def wait(self):
        """Wait for its end; gives the exit code."""
        code = self.process.wait(90)
        self._output.close()
        return code


class Stack:
    """Two services of some workers each behind nginx, over one Redis and one PostgreSQL.

    Args:
        folder: An empty one.
        hosts: Of the services.
        **environ: Further variables of both services.
    """

    KEY = "msk_" + "k" * 43

    def __init__(self, folder, *, hosts=(HERE, HERE), **environ):
        addresses = sorted({host.stores for host in (HERE, *hosts)})
        self.redis = RedisServer(
            folder, "--appendonly", "yes", "--appendfsync", "always",
            "--bind", *addresses, "--protected-mode", "no",
        )  # fmt: skip
        self.postgres = PostgresServer(durable=True, addresses=addresses)
        self._environ = {"WEB_CONCURRENCY": "2", "MUSET_ADMIN_KEY": self.KEY, **environ}
        self._folder = folder
        self._hosts = hosts
        self.services = []
        self.nginx = None

    def start(self):
        self.redis.start()
        self.postgres.start()
        stores = {"REDIS_URL": self.redis.url, "DATABASE_URL": self.postgres.database()}
        for name, host in zip(("one", "two"), self._hosts, strict=True):
            folder = self._folder / name
            folder.mkdir()
            mine = {key: url.replace(HERE.stores, host.stores) for key, url in stores.items()}
            self.services.append(Service(folder, host, **mine, **self._environ))
            self.services[-1].start()
        folder = self._folder / "nginx"
        folder.mkdir()
        self.nginx = Nginx(folder, [service.address for service in self.services]).start()
        return self

    @property
    def url(self):
        return f"{self.nginx.url}/api/v1"

    @property
    def headers(self):
        return self.services[0].headers

    def stop(self):
        """End all of it, whichever part does not end as it should."""
        with contextlib.ExitStack() as parts:
            parts.callback(self.postgres.remove)
            parts.callback(self.redis.kill)
            for service in self.services:
                if service.process is not None and service.process.poll() is None:
                    parts.callback(service.kill_group)
            if self.nginx is not None:
                parts.callback(self.nginx.stop)
