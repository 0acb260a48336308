"""A real nginx with the shipped configuration, which a test may ask of."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from redis_server import free_port

SHIPPED = Path(__file__).parents[1] / "deploy" / "nginx"
#: Of Debian's package, which is not in everybody's path.
_PLACES = ["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"]


def find_nginx():
    """Path of the program, None where it is missing."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


class Nginx:
    """The shipped files as they are, but for the two that say where it listens and passes on to.

    Args:
        folder: An empty one, for its files.
        servers: Addresses with ports that it passes requests to.
    """

    def __init__(self, folder, servers):
        self.program = find_nginx()
        if self.program is None:
            pytest.skip("nginx is not installed")
        self.folder = Path(folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = None
        self.conf = self.folder / "conf"
        shutil.copytree(SHIPPED, self.conf)
        self.run = self.folder / "run"
        self.run.mkdir()
        listen = (SHIPPED / "listen.conf").read_text().replace("8080", f"127.0.0.1:{self.port}")
        (self.conf / "listen.conf").write_text(listen)
        options = "max_fails=3 fail_timeout=2s"
        lines = [f"server {address} {options};\n" for address in servers]
        (self.conf / "servers.conf").write_text("".join(lines))

    def command(self, *options):
        """The command line that runs it."""
        main = ["-p", f"{self.run}/", "-c", str(self.conf / "nginx.conf")]
        return [self.program, *main, *options]

    def start(self):
        """Start it; returns when it accepts connections."""
        with (
            open(self.folder / "access.log", "wb") as out,
            open(self.folder / "error.log", "wb") as e,
        ):
            self._process = subprocess.Popen(
                self.command("-g", "daemon off;"), stdout=out, stderr=e, start_new_session=True
            )
        until = time.monotonic() + 30
        while time.monotonic() < until:
            assert self._process.poll() is None, self.errors()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            time.sleep(0.02)
        raise AssertionError(f"nginx does not listen: {self.errors()}")

    def errors(self):
        """What it has written about what went wrong."""
        return (self.folder / "error.log").read_text(errors="replace")

    def access_log(self):
        """Lines of its access log; they come within a second."""
        return (self.folder / "access.log").read_text(errors="replace").splitlines()

    def stop(self):
        """End it at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)
