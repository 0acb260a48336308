"""The command line."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from made_files import page, pdf
from patched import run_patched

from flask_muset.errors import AuthenticationError
from muset.cli import main
from muset.ports import Role
from muset.services.keys import KeyService


@pytest.fixture
def run(tmp_path):
    def invoke(*args):
        environ = {"MUSET_DATA_DIR": str(tmp_path / "data")}
        return CliRunner().invoke(main, args, env=environ)

    return invoke


def test_keys(run):
    """A key is printed alone on the last line, listed by its first letters, rotated, withdrawn."""
    made = run("keys", "create", "--user", "a@example.org", "--role", "member", "--expires", "90d")
    key = made.output.splitlines()[-1]
    assert key.startswith("msk_")
    listed = run("keys", "list").output
    assert f"msk_{key[4:12]}..." in listed
    assert key not in listed
    assert run("keys", "rotate", "1").output.splitlines()[-1].startswith("msk_")
    assert "withdrawn" in run("keys", "list").output
    again = run("keys", "revoke", "1")
    assert (again.exit_code, again.output) == (1, "Error: no valid key has the id 1\n")
    assert run("keys", "create", "--user", "nobody", "--role", "admin").exit_code == 1
    bad = run("keys", "create", "--user", "a@b.c", "--role", "admin", "--expires", "soon")
    assert bad.exit_code == 2


def test_the_database_of_a_newer_version_is_left_alone(run, tmp_path):
    """One line that says so, and the schema is what it was."""
    assert run("db", "upgrade").exit_code == 0
    with closing(sqlite3.connect(tmp_path / "data" / "muset.db", isolation_level=None)) as there:
        there.execute("UPDATE alembic_version SET version_num = '9999'")
        for command in (("db", "upgrade"), ("keys", "list"), ("cache", "flush"), ("serve",)):
            refused = run(*command)
            assert (refused.exit_code, refused.output.count("\n")) == (1, 1), command
            assert "9999" in refused.output
            assert "newer Muset" in refused.output
        assert there.execute("SELECT * FROM alembic_version").fetchall() == [("9999",)]


def test_ingest_and_ask(run, tmp_path):
    """Folders and files go in, what cannot is named; an answer is 0, no answer is 3."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "bees.md").write_text("A bee colony has one queen, who lays 2,000 eggs a day.")
    (folder / "ignored.bin").write_bytes(b"\xff")
    assert "1 stored, 0 known already, 0 failed." in run("ingest", str(folder)).output
    assert "0 stored, 1 known already" in run("ingest", str(folder)).output
    failed = run("ingest", str(folder / "ignored.bin"))
    assert failed.exit_code == 1
    assert ".bin is not read; only .txt" in failed.output
    answer = run("ask", "How many eggs does the queen lay?", "--json")
    assert (answer.exit_code, json.loads(answer.output)["status"]) == (0, "answered")
    unsure = run("ask", "What is the capital of Australia?")
    assert unsure.exit_code == 3


def test_ingest_goes_through_folders(run, tmp_path):
    """All kinds and levels, nothing hidden, no link for ever; bad ones are named, others go in."""
    folder = tmp_path / "library"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "deep" / "er" / "a.pdf").write_bytes(pdf([page("Bees make honey.")]))
    (folder / "b.HTM").write_text("<title>Wasps</title><p>Wasps make paper.")
    (folder / "c.markdown").write_text("Ants make hills.")
    for hidden in (folder / ".secret.txt", folder / ".git" / "d.txt"):
        hidden.write_text("Hidden.")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    (folder / "bad.pdf").write_bytes(b"%PDF-1.4")
    (folder / "large.txt").write_bytes(b"x" * (10 * 1024 * 1024 + 1))
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    os.mkfifo(folder / "pipe.txt")
    result = run("ingest", str(folder))
    assert result.exit_code == 1
    assert "3 stored, 0 known already, 5 failed." in result.output
    for name, reason in (
        ("bad.pdf", "damaged"),
        ("large.txt", "more than 10485760 bytes"),
        ("latin.txt", "byte 2"),
        ("pipe.txt", "is no file"),
        ("self.txt", "is no file"),
    ):
        assert re.search(rf"library/{name}: .*{reason}", result.output), name
    answer = json.loads(run("ask", "What do wasps make?", "--json").output)
    assert answer["citations"][0]["title"] == "Wasps"
    assert run("ingest", str(folder / ".secret.txt")).exit_code == 0


def test_bad_settings_are_exit_code_2(tmp_path):
    """A bad variable ends every command with 2 and one line."""
    result = CliRunner().invoke(main, ["settings"], env={"PORT": "x"})
    assert result.exit_code == 2
    assert "PORT must be" in result.output


def test_settings_are_printed_without_secrets(run, monkeypatch):
    """Each setting with value, source and meaning."""
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@h/0")
    output = run("settings").output
    assert "hunter2" not in output
    assert "PORT=8000\n    default; Port that the service listens on." in output


def test_port_in_use_is_said_before_a_key_is_made(tmp_path):
    """`serve` on a used port: exit 1, one line with the cure, no key."""
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-m", "muset.cli", "serve"],
            env={"PORT": port, "MUSET_DATA_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert "set PORT" in result.stderr
    assert "Admin key" not in result.stdout


def test_key_rules(services):
    """Expired, withdrawn and changed keys are refused; the first key is made once."""
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    keys = KeyService(services.keys._store, now=lambda: now[0])
    shown = []
    first = keys.first_admin_key("a@example.org", shown.append)
    assert shown == [first]
    assert keys.first_admin_key("a@example.org", shown.append) is None
    assert keys.authenticate(first).role is Role.ADMIN
    short = keys.create("b@example.org", Role.MEMBER, timedelta(days=1))
    keys.authenticate(short)
    now[0] += timedelta(days=1)
    for bad in (short, first[:-1], first + "x", "msk_", "", None, "x" * 300):
        with pytest.raises(AuthenticationError):
            keys.authenticate(bad)
    keys.revoke(1)
    with pytest.raises(AuthenticationError):
        keys.authenticate(first)


def test_a_key_that_nobody_saw_does_not_hold(services):
    """If printing fails the key is withdrawn and the next start makes another."""

    def broken(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        services.keys.first_admin_key("a@example.org", broken)
    assert services.keys.first_admin_key("a@example.org", lambda _: None) is not None


GEVENT = """
import sys, time
from muset import migrations
from flask_muset.deadline import deadline
from flask_muset.errors import OperationTimeoutError, OverloadedError
from flask_muset.resilience import Policy
from muset.adapters.sqlite import Database
from sqlalchemy import text
database = Database("sqlite:///" + sys.argv[1], Policy("database", []))
database.write(migrations.upgrade)
slow = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 3000000) " \\
       "SELECT count(*) FROM c"
gaps, over, done_late = [], [], []
def tick():
    last = time.monotonic()
    while not over:
        gevent.sleep(0.005)
        now = time.monotonic(); gaps.append(now - last); last = now
ticker = gevent.spawn(tick)
readers = [gevent.spawn(database.read, lambda c: c.execute(text(slow)).scalar_one()) for _ in "ab"]
gevent.joinall(readers, raise_error=True)
# Whoever blocks the hub does so for a whole query, so there would be a gap or two for each.
assert len(gaps) > 20, gaps
for number in range(20):
    with gevent.Timeout(0.02, False):
        database.read(lambda c: c.execute(text(slow)).scalar_one())
def inserts(connection):
    for number in range(500):
        values = f"('{number}', '2030-01-01')"
        connection.execute(text("INSERT INTO users (email, created_at) VALUES " + values))
        original_sleep(0.02)  # between two statements, where an interrupt is lost
from gevent.monkey import get_original
original_sleep = get_original("time", "sleep")
began = time.monotonic()
try:
    with deadline(0.1):
        database.write(inserts)
except OperationTimeoutError:
    pass
assert time.monotonic() - began < 8, "a unit goes on after its deadline"
assert database.read(lambda c: c.execute(text("SELECT count(*) FROM users")).scalar_one()) == 0
endless = slow.replace("3000000", "3000000000")
def compute(connection):
    return connection.execute(text(endless)).scalar_one()
busy = [gevent.spawn(database.read, compute) for _ in range(8)]
gevent.sleep(0.05)
for _ in range(5):
    database.check(5)
try:
    with deadline(0.5):
        database.read(done_late.append)
except OperationTimeoutError as error:
    # What the breaker within the deadline has seen; the turn itself would never come.
    assert isinstance(error.__cause__, OverloadedError)
else:
    raise AssertionError("there was a turn")
gevent.killall(busy)
assert not done_late
began = time.monotonic()
try:
    with deadline(0.1):
        database.read(compute)
except OperationTimeoutError:
    pass
assert time.monotonic() - began < 20, "a statement goes on after its deadline"
assert database.read(lambda c: c.execute(text("SELECT 41 + 1")).scalar_one()) == 42
done = []
waiting = [gevent.spawn(database.read, done.append) for _ in range(100)]
gevent.sleep(0.05)
for _ in range(1000):  # the hub looks at nothing meanwhile
    if len(done) < 100:
        original_sleep(0.01)
assert len(done) == 100, "a unit waits for the hub to see the end of another"
gevent.joinall(waiting, raise_error=True)
assert database._threads._threads <= 8, "each thread has a connection"
database.close()
assert database.read(lambda c: c.execute(text("SELECT 41 + 1")).scalar_one()) == 42
def fails(connection):
    raise ValueError("inside")
try:
    database.write(fails)
except ValueError as error:
    assert str(error) == "inside"
else:
    raise AssertionError
over.append(1); ticker.join()
result = "fine"
"""


def test_database_under_gevent(tmp_path):
    """A slow query blocks no other greenlet, a cut one ends, and none waits for a busy hub."""
    assert run_patched(GEVENT, tmp_path / "x.db") == "fine"


NO_THREAD = """
import sys
from flask_muset.resilience import Policy
from muset.adapters import sqlite
from sqlalchemy import text
database = sqlite.Database("sqlite:///" + sys.argv[1], Policy("database", []))
real = sqlite.original
def refuses():
    raise RuntimeError("can't start new thread")
def lacks_threads(module, name):
    return (lambda *_: refuses()) if name == "start_new_thread" else real(module, name)
def one(connection):
    return connection.execute(text("SELECT 1")).scalar_one()
for lacks in (True, False):
    sqlite.original = lacks_threads if lacks else real
    try:
        assert database.read(one) == 1 and not lacks
    except RuntimeError:
        assert lacks
assert gevent.get_hub().join(timeout=5), "the hub waits for what nobody does"
result = "fine"
"""


def test_a_thread_that_cannot_be_started(tmp_path):
    """Whoever wanted it gets the error, and nothing is left behind that keeps the hub running."""
    assert run_patched(NO_THREAD, tmp_path / "x.db", timeout=60) == "fine"


def test_backup_and_restore(run, tmp_path):
    """Documents come back; no copy is written over, and none is left in half."""
    page, data, copies = tmp_path / "oak.md", tmp_path / "data", tmp_path / "copies"
    page.write_text("An oak lives for five hundred years.")
    missing = run("backup", str(copies))
    assert (missing.exit_code, missing.output.count("\n")) == (1, 1)
    assert run("ingest", str(page)).exit_code == 0
    with closing(sqlite3.connect(data / "muset.db")) as user:
        user.execute("BEGIN IMMEDIATE")  # somebody writes, and is not done
        user.execute("UPDATE documents SET title = 'not committed'")
        assert run("backup", str(copies)).exit_code == 0
    assert (copies / "muset.db").stat().st_mode & 0o077 == 0
    again = run("backup", str(copies))
    assert again.exit_code == 1
    assert "is there already" in again.output
    data.rename(tmp_path / "before")
    data.mkdir()
    (copies / "muset.db").rename(data / "muset.db")
    assert "five hundred years" in run("ask", "How many years does an oak live?").output
    (data / "muset.db").write_bytes(b"\0" * 8192)
    broken = run("backup", str(copies))
    assert (broken.exit_code, broken.output.count("\n")) == (1, 1)
    assert list(copies.iterdir()) == []
