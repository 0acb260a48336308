"""PostgreSQL as a dependency: waiting, time limits, lost connections, races, several starts."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from click.testing import CliRunner
from patched import run_patched
from redis_server import free_port
from sqlalchemy import text

from flask_muset import Resilience
from flask_muset.deadline import deadline
from flask_muset.errors import DatabaseError, OperationTimeoutError
from flask_muset.resilience import Policy, RetryStrategy
from flask_muset.translate import translate
from muset import migrations
from muset.adapters import database as adapter
from muset.adapters import postgresql
from muset.adapters.database import OutcomeUnknownError, may_repeat
from muset.app import make_services
from muset.cli import main
from muset.settings import load_settings

ADD = text("INSERT INTO users (email, created_at) VALUES (:email, '2030-01-01')")
COUNT = text("SELECT count(*) FROM users")


def add_user(email):
    return lambda connection: connection.execute(ADD, {"email": email})


def users(url):
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT count(*) FROM users").fetchone()[0]


@pytest.fixture
def make(postgres_url):
    """Make a database under a policy that retries, or under none."""
    made = []

    def make(url=postgres_url, *, retries=0, **options):
        parts = [RetryStrategy(retries, initial_delay=0.01, retry_on=may_repeat)] if retries else []
        url = url.replace("postgresql://", "postgresql+psycopg://")
        made.append(postgresql.Database(url, Policy("database", parts), **options))
        return made[-1]

    yield make
    for database in made:
        database.close()


GEVENT = """
import sys, time
from flask_muset.deadline import deadline
from flask_muset.errors import OperationTimeoutError
from flask_muset.resilience import Policy
from muset.adapters.database import OutcomeUnknownError, finish, outcome
from muset.adapters.postgresql import Database
from sqlalchemy import text
database = Database(sys.argv[1], Policy("database", []))
def run(statement):
    return lambda connection: connection.execute(text(statement)).scalar()
def add(email, more="SELECT 1"):
    def work(connection):
        connection.execute(text(f"INSERT INTO users (email, created_at) VALUES ('{email}', now())"))
        connection.execute(text(more))
    return work
def late(call):
    try:
        call()
    except OperationTimeoutError:
        return True
def busy():
    return database.read(run(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND state <> 'idle' AND pid <> pg_backend_pid()"))
database.read(run("SELECT 1"))

ticks, over = [0], []
def tick():
    while not over:
        gevent.sleep(0.01); ticks[0] += 1
ticker = gevent.spawn(tick)
began = time.monotonic()
sleepers = [gevent.spawn(database.read, run("SELECT pg_sleep(2)")) for _ in range(8)]
gevent.joinall(sleepers, raise_error=True)
assert time.monotonic() - began < 10, "they wait one after the other"
assert ticks[0] > 10, "the hub stood still"

# Cut off by a time limit of somebody else's: not even the connection is used again.
def slow_write():
    with gevent.Timeout(0.2, False):
        database.write(add("cut", "SELECT pg_sleep(5)"))
        raise AssertionError("not cut off")
slow_write()
assert database._engine.pool.checkedout() == 0
assert database.read(run("SELECT 42")) == 42

# The server itself ends what the time of its request is up for.
def blocked():
    with deadline(0.3):
        database.write(add("late", "SELECT pg_sleep(30)"))
assert late(blocked)
end = time.monotonic() + 20
while busy():
    assert time.monotonic() < end, "a statement goes on after its deadline"
    gevent.sleep(0.05)
assert database.read(run("SELECT count(*) FROM users")) == 0

# Cut off while it is being kept: it is known to be kept, and nobody is told that it was late.
database.write(lambda c: [
    c.exec_driver_sql("CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_sleep(3); RETURN NULL; END'"),
    c.exec_driver_sql("CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON users DEFERRABLE "
        "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()")])
with gevent.Timeout(1.5):
    database.write(add("kept"))
assert database.read(run("SELECT count(*) FROM users")) == 1
database.write(lambda c: c.exec_driver_sql("DROP TRIGGER slow ON users"))

# And if nobody knows, he is told that, not that it was late.
def unknown():
    gevent.sleep(0.2)
    raise OutcomeUnknownError("the connection broke")
try:
    with gevent.Timeout(0.05):
        finish(gevent.spawn(outcome, unknown), lambda: None)
    raise AssertionError("not told")
except OutcomeUnknownError:
    pass

# A pool that is in use says nothing of the database.
sleepers = [gevent.spawn(database.read, run("SELECT pg_sleep(0.5)")) for _ in range(8)]
gevent.sleep(0.05)
database.check(10)
gevent.joinall(sleepers, raise_error=True)
assert database._engine.pool.checkedout() == 0
over.append(1); ticker.join()
result = "fine"
"""


def test_under_gevent(postgres_url):
    """Waits side by side; what is cut off is never kept, and its connection never used again."""
    url = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    assert run_patched(GEVENT, url, timeout=90) == "fine"


def test_a_statement_ends_with_the_time_of_its_request(make):
    """Also where nothing can be cut off here: the server does it, and the connection lives on."""
    database = make()
    for _ in range(8):
        with deadline(0.2), pytest.raises(Exception, match="statement timeout") as caught:
            database.read(lambda c: c.execute(text("SELECT pg_sleep(30)")))
        assert isinstance(translate(caught.value, {}), OperationTimeoutError)
    assert database.read(lambda c: c.execute(COUNT).scalar_one()) == 0
    assert database._engine.pool.checkedin() == 1


def test_who_is_gone_keeps_no_locks(make, postgres_url, monkeypatch):
    """A transaction of which the server hears nothing more ends, and others go on; 503 if late."""
    monkeypatch.setattr(postgresql, "_GONE_MS", 2000)
    one, two = make(), make()
    one.write(add_user("a@example.org"))
    rename = text("UPDATE users SET email = :email")

    def work(connection):
        connection.execute(rename, {"email": "one@example.org"})
        with deadline(20):
            two.write(lambda c: c.execute(rename, {"email": "two@example.org"}))
        connection.execute(COUNT)

    with pytest.raises(Exception, match="idle-in-transaction timeout") as caught:
        one.write(work)
    error = translate(caught.value, {})
    assert (error.status, error.retryable) == (503, True)
    emails = text("SELECT email FROM users")
    assert one.read(lambda c: c.execute(emails).scalars().all()) == ["two@example.org"]


def test_idle_connections_that_are_gone_are_replaced(make, postgres_url):
    """Nobody notices that the server has closed them: not even a retry is needed."""
    database = make()
    barrier = threading.Barrier(4)

    def read(connection):
        barrier.wait(20)
        return connection.execute(COUNT).scalar_one()

    with ThreadPoolExecutor(4) as pool:
        assert [f.result() for f in [pool.submit(database.read, read) for _ in range(4)]] == [0] * 4
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            closed = connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        assert closed == [(True,)] * 4
        assert [f.result() for f in [pool.submit(database.read, read) for _ in range(4)]] == [0] * 4


def test_a_server_that_is_away_is_an_outage(make, postgres_server):
    """503 with Retry-After, whether it refuses connections or has no more of them."""
    port = postgres_server.port
    away = make(f"postgresql://muset@127.0.0.1:{free_port()}/d")
    missing = make(f"postgresql://muset@127.0.0.1:{port}/nowhere")
    for database in (away, missing):
        with pytest.raises(Exception, match="connection") as caught:
            database.read(lambda c: c.execute(COUNT))
        error = translate(caught.value, {})
        assert isinstance(error, DatabaseError)
        assert (error.status, error.retryable) == (503, True)
        assert error.retry_after >= 1
        with pytest.raises(Exception, match="connection"):
            database.check(0.25)


def test_options_of_the_url_hold(make, postgres_url):
    """They win over what is set here."""
    query = text("SELECT current_setting('application_name') AS name, current_setting('work_mem')")
    plain, chosen = make(), make(f"{postgres_url}?application_name=other&options=-cwork_mem%3D1MB")
    assert plain.read(lambda c: c.execute(query).one().name) == "muset"
    assert tuple(chosen.read(lambda c: c.execute(query).one())) == ("other", "1MB")


def test_a_full_pool_says_that_the_service_is_busy(make, monkeypatch):
    """503 with Retry-After, and no failure of the database's."""
    monkeypatch.setattr(adapter, "_PLACE_WAIT_S", 0.1)
    database = make(pool_size=1)

    def nested(_connection):
        with pytest.raises(Exception, match="database_connections: 1 calls run") as caught:
            database.read(lambda c: c.execute(COUNT))
        return translate(caught.value, {})

    error = database.read(nested)
    assert (error.status, type(error).__name__) == (503, "OverloadedError")
    assert error.retry_after >= 1
    assert not may_repeat(error)


FULL = """
import sys
from flask import Flask
from flask_muset import Resilience
from flask_muset.deadline import deadline
from flask_muset.errors import MusetError
from muset.adapters.postgresql import Database
from muset.app import _database_policy
from sqlalchemy import text
from gevent.event import Event
app, resilience = Flask("app"), Resilience()
policy = _database_policy(resilience)
resilience.init_app(app)
database = Database(sys.argv[1], policy, pool_size=1)

held, free = Event(), Event()
def hold(connection):
    held.set()
    free.wait()

def one(seconds):
    with deadline(seconds):
        return database.read(lambda c: c.execute(text("SELECT 1")).scalar())

def refused():
    try:
        one(0.3)
    except MusetError as error:
        return error.status, error.retry_after

with app.app_context():
    database.read(lambda c: None)
    holder = gevent.spawn(database.read, hold)
    held.wait()
    burst = [gevent.spawn(refused) for _ in range(100)]
    gevent.joinall(burst, raise_error=True)
    # On a machine that stands still some may learn it too late: 504.
    assert {each.value for each in burst} - {(504, None)} == {(503, 1)}
    free.set()
    holder.get()
    assert one(10) == 1, "the place is lost"
    assert policy.breaker.snapshot()["failures"] == 0
    assert policy.breaker.snapshot()["state"] == "closed"
    # A database that does not answer in time is one that fails: a place was there.
    for _ in range(50):
        try:
            with deadline(0.02):
                database.read(lambda c: c.execute(text("SELECT pg_sleep(1)")))
        except MusetError:
            pass
    assert policy.breaker.snapshot()["state"] == "open"
database.close()
result = "fine"
"""


def test_a_burst_that_fills_the_pool_opens_no_breaker(postgres_url):
    """A hundred that wait for the one connection until their time is up are refused as busy."""
    url = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    assert run_patched(FULL, url, timeout=60) == "fine"


def test_a_lost_race_is_tried_again(make, postgres_url):
    """What PostgreSQL has rolled back because of another transaction is done once in the end."""
    database = make(retries=3)
    calls = []

    def work(connection):
        calls.append(1)
        add_user("a@example.org")(connection)
        if len(calls) < 3:
            connection.exec_driver_sql("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

    database.write(work)
    assert (len(calls), users(postgres_url)) == (3, 1)


def test_a_unit_that_passed_over_an_error_is_not_taken_for_kept(make, postgres_url):
    """PostgreSQL would roll back and say nothing."""
    database = make()

    def work(connection):
        add_user("a@example.org")(connection)
        with contextlib.suppress(Exception):
            connection.exec_driver_sql("SELECT * FROM nowhere")

    with pytest.raises(DatabaseError, match="has gone on"):
        database.write(work)
    assert users(postgres_url) == 0


class CutAtCommit:
    """A TCP proxy that hands COMMIT on, and then hangs up on the client without an answer."""

    def __init__(self, port):
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for pump in (self._up, self._down):
                    threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _up(self, client, server):
        with contextlib.suppress(OSError), client, server:
            while data := client.recv(65536):
                if b"COMMIT\0" in data:
                    self.cuts += 1
                    client.shutdown(socket.SHUT_RDWR)
                    server.sendall(data)
                    time.sleep(0.3)
                    return
                server.sendall(data)

    def _down(self, client, server):
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)


def test_a_commit_whose_answer_is_lost_is_not_repeated(make, postgres_url):
    """The caller is told that nobody knows; it was done once, whatever else is retried."""
    address, _, name = postgres_url.rpartition("/")
    proxy = CutAtCommit(int(address.rpartition(":")[2]))
    try:
        database = make(f"postgresql://muset@127.0.0.1:{proxy.port}/{name}", retries=5)
        with pytest.raises(OutcomeUnknownError) as caught:
            database.write(add_user("a@example.org"))
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        assert proxy.cuts == 1
        end = time.monotonic() + 10
        while not users(postgres_url) and time.monotonic() < end:
            time.sleep(0.05)
        assert users(postgres_url) == 1
    finally:
        proxy.close()


@pytest.fixture
def empty_url(postgres_server):
    """A database without any schema."""
    url = postgres_server.database()
    yield url
    postgres_server.drop(url)


def test_several_that_start_at_once_migrate_once(empty_url):
    """Each gets the newest schema, and none an error."""
    settings = load_settings({"DATABASE_URL": empty_url})
    starts = [make_services(settings, Resilience()).database for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(start.write, migrations.upgrade) for start in starts]:
            done.result(60)
    for start in starts:
        assert start.read(migrations.is_newest)
        start.close()
    assert users(empty_url) == 0


def test_a_database_of_another_encoding_is_refused(postgres_server):
    """With the cure: some texts could not be stored there."""
    postgres_server.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    url = postgres_server.url("latin")
    try:
        result = CliRunner().invoke(main, ["db", "upgrade"], env={"DATABASE_URL": url})
        assert result.exit_code == 1
        assert "must be UTF8; make another one with CREATE DATABASE" in result.output
    finally:
        postgres_server.drop(url)


def test_the_commands(empty_url, tmp_path):
    """Schema, key, documents and answers; a server that is away is one line, and no secret."""
    environ = {"DATABASE_URL": empty_url, "MUSET_DATA_DIR": str(tmp_path)}

    def run(*args, **more):
        return CliRunner().invoke(main, args, env=environ | more)

    assert run("db", "upgrade").output == "The database has the newest schema.\n"
    assert run("db", "upgrade").exit_code == 0
    made = run("keys", "create", "--user", "a@example.org", "--role", "admin")
    assert made.output.splitlines()[-1].startswith("msk_")
    note = tmp_path / "bees.md"
    note.write_text("A bee colony has one queen, who lays 2,000 eggs a day.")
    assert "1 stored, 0 known already, 0 failed." in run("ingest", str(note)).output
    assert "2,000 eggs" in run("ask", "How many eggs does the queen lay?").output
    away = f"postgresql://muset:hunter2@127.0.0.1:{free_port()}/d"
    failed = run("keys", "list", DATABASE_URL=away)
    assert (failed.exit_code, failed.output.count("\n")) == (1, 1)
    assert "the database refused" in failed.output
    assert "hunter2" not in failed.output
