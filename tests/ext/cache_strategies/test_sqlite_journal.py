"""The journal in an SQLite file: what all journals do, and what only files have."""

import random
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from patched import run_patched

from flask_muset.cache_strategies import sqlite_file
from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.journal import Failure
from flask_muset.cache_strategies.journal_conformance import JournalSuite
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.cache_strategies.sqlite_journal import SqliteJournal
from flask_muset.clock import SYSTEM
from flask_muset.errors import DatabaseError


class TestSqliteJournal(JournalSuite):
    """All that a journal must do."""

    @pytest.fixture
    def make_journal(self, clock, tmp_path):
        made = []

        def make(**options):
            path = tmp_path / f"journal{len(made)}.db"
            made.append(SqliteJournal(path, LocalStore(2**24), **options))
            return made[-1]

        yield make
        for journal in made:
            journal.close()

    @pytest.fixture
    def journal(self, make_journal):
        return make_journal(lease_s=self.lease_s)

    @pytest.fixture
    def other_journal(self, journal):
        other = SqliteJournal(journal.path, LocalStore(2**24), lease_s=self.lease_s)
        yield other
        other.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "journal.db"


@pytest.fixture
def store():
    return LocalStore(2**24)


@pytest.fixture
def journal(path, store):
    journal = SqliteJournal(path, store)
    yield journal
    journal.close()


def entry(payload=b"value"):
    now = SYSTEM.now()
    return Entry(payload, created_at=now, fresh_until=now + 60, gone_at=now + 60)


def put(journal, key="key", **options):
    return journal.append(key, entry(), writer="w", **options)


def count_transactions(journal):
    """A list that has an item for each transaction from now on."""
    begun = []
    connection = journal._file._connected()
    connection.set_trace_callback(lambda sql: sql.startswith("BEGIN") and begun.append(sql))
    return begun


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "name"),
    [
        ("", {}, "path"),
        ("j.db", {"max_pending": 0}, "max_pending"),
        ("j.db", {"max_pending_bytes": -1}, "max_pending_bytes"),
        ("j.db", {"lease_s": 0}, "lease_s"),
        ("j.db", {"lease_s": float("nan")}, "lease_s"),
    ],
)
def test_arguments_out_of_range(path, options, name):
    """An argument that cannot be is refused by name."""
    with pytest.raises(ValueError, match=name):
        SqliteJournal(path, LocalStore(1), **options)


def test_a_letter_that_cannot_be(journal):
    """A page begins behind a letter, not behind any text."""
    with pytest.raises(ValueError, match="'nobody'"):
        journal.dead_letters(after="nobody")


def test_a_path_holds_where_the_process_goes(tmp_path, monkeypatch, store):
    """A relative path means the same file after the process has changed its folder."""
    monkeypatch.chdir(tmp_path)
    journal = SqliteJournal("journal.db", store)
    monkeypatch.chdir("/")
    assert put(journal)
    journal.close()
    assert (tmp_path / "journal.db").exists()


# --- The file -------------------------------------------------------------------------------------


def test_nothing_is_made_before_it_is_used(path, journal):
    """The first use makes the folder and files that nobody else may read."""
    assert not path.parent.exists()
    put(journal)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["journal.db", "journal.db-shm", "journal.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_link_to_nothing_yet(path, store):
    """What a symbolic link leads to is made for nobody else to read, too."""
    path.parent.mkdir()
    link = path.parent / "link.db"
    link.symlink_to(path)
    journal = SqliteJournal(link, store)
    put(journal)
    assert journal.path == path.resolve()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal.close()


def test_a_log_that_had_to_be_large(path, store, monkeypatch):
    """After a large write the log is cut again."""
    monkeypatch.setattr(sqlite_file, "_LOG_BYTES", 2**16)
    journal = SqliteJournal(path, store)
    log = path.with_name("journal.db-wal")
    journal.append("large", entry(random.Random(1).randbytes(6 * 2**20)), writer="w")
    assert log.stat().st_size > 6 * 2**20
    put(journal, "small")
    assert log.stat().st_size <= 2**16
    journal.close()


def test_a_file_that_had_to_be_large(journal, clock):
    """What is free is given back step by step, but for some that is kept for what comes."""
    journal.append("large", entry(random.Random(1).randbytes(6 * 2**20)), writer="w")

    def pages():
        return journal._file._connected().execute("PRAGMA page_count").fetchone()[0]

    full = pages()
    claim = journal.hold("large")
    assert journal.settle(claim, written=claim.records[0].seq) is True
    assert pages() == full
    steps = []
    for _ in range(4):
        clock.now += 1
        journal.claim(1, home="me")
        steps.append(full - pages())
    assert steps[0] == sqlite_file._SHRINK_PAGES
    assert steps[0] < steps[1] < steps[2] == steps[3]
    assert pages() > sqlite_file._FREE_PAGES - sqlite_file._SHRINK_PAGES
    assert put(journal)


def test_a_file_that_cannot_shrink(journal, clock):
    """What was asked for is done all the same."""
    journal.append("large", entry(random.Random(1).randbytes(6 * 2**20)), writer="w")
    claim = journal.hold("large")
    journal.settle(claim, written=claim.records[0].seq)

    def deny(action, name, *_):
        is_it = (action, name) == (sqlite3.SQLITE_PRAGMA, "incremental_vacuum")
        return sqlite3.SQLITE_DENY if is_it else sqlite3.SQLITE_OK

    journal._file._connection.set_authorizer(deny)
    clock.now += 1
    assert put(journal)
    assert journal.newest("key")


def test_each_write_is_synced(journal):
    """The log is ahead of the file, and synced at each commit."""
    put(journal)
    connection = journal._file._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def make_database(path, *statements):
    path.parent.mkdir(exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_another_program_s_file(path, journal):
    """A database of something else is refused, told why, and left as it is."""
    make_database(path, "CREATE TABLE users (id)")
    for _ in range(2):
        with pytest.raises(
            DatabaseError, match=r"journal\.db is no journal.*another path"
        ) as raised:
            put(journal)
        assert not raised.value.unavailable
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("users",)]
    connection.close()


def test_a_file_of_a_newer_version(path, journal):
    """What a newer flask_muset has written is not touched by an older one."""
    put(journal)
    journal.close()
    make_database(path, "PRAGMA user_version = 2")
    with pytest.raises(DatabaseError, match=r"version 2.*update flask_muset"):
        journal.state()


def test_a_file_that_is_no_database(path, journal):
    """What is damaged is named, and what can be done."""
    path.parent.mkdir()
    path.write_bytes(b"no database, but long enough to be one " * 200)
    with pytest.raises(DatabaseError, match=r"journal\.db is damaged.*move it away") as raised:
        journal.state()
    assert not raised.value.unavailable


def test_a_damaged_file(path, journal):
    """Damage that shows later is told as well, and a new file may be used at once."""
    for number in range(50):
        put(journal, f"key{number}")
    journal.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(DatabaseError, match="is damaged"):
        journal.newest("key1")
    path.unlink()
    assert put(journal)


def test_a_folder_that_cannot_be(tmp_path, store):
    """Where no file can be made the operation fails, and works when one can."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    journal = SqliteJournal(blocked / "journal.db", store)
    store.write("key", entry(b"old"))
    with pytest.raises(DatabaseError, match="cannot be used now") as raised:
        put(journal)
    assert raised.value.unavailable
    assert raised.value.retryable
    assert store.read("key").payload == b"old"
    blocked.unlink()
    assert put(journal)
    journal.close()


def test_a_file_that_is_locked(path, journal, store, monkeypatch):
    """Who waits too long for another program hears of it; nothing has changed."""
    monkeypatch.setattr(sqlite_file, "_BUSY_TIMEOUT_S", 0.02)
    put(journal)
    store.write("other", entry(b"old"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="locked") as raised:
        put(journal, "other")
    assert raised.value.unavailable
    assert store.read("other").payload == b"old"
    assert journal.newest("key")
    other.execute("ROLLBACK")
    other.close()
    assert put(journal, "other")


def test_a_file_that_was_taken_away(path, journal):
    """What is accepted after that is in a file that is there."""
    put(journal, "before")
    for file in path.parent.iterdir():
        file.unlink()
    assert put(journal, "after")
    other = SqliteJournal(path, LocalStore(1))
    assert other.newest("after")
    assert other.newest("before") is None
    other.close()


def test_a_disk_that_is_full(journal, store):
    """Where there is no room for the file nothing is accepted, and what was is still there."""
    put(journal)
    connection = journal._file._connection
    connection.execute("PRAGMA max_page_count = 1")
    large = entry(random.Random(1).randbytes(2**20))
    with pytest.raises(DatabaseError, match="full"):
        journal.append("large", large, writer="w")
    assert store.read("large") is None
    assert journal.state().pending == 1
    # The bound was the connection's, and what has failed is not used again.
    assert journal.append("large", large, writer="w")


def deny_commits(journal):
    """Let the next commit fail, after which there is a new connection."""

    def deny(action, name, *_):
        is_commit = (action, name) == (sqlite3.SQLITE_TRANSACTION, "COMMIT")
        return sqlite3.SQLITE_DENY if is_commit else sqlite3.SQLITE_OK

    journal._file._connection.set_authorizer(deny)


def test_a_commit_that_fails(journal, store):
    """Where nobody knows whether a write is accepted, nothing older than it is served."""
    put(journal)
    deny_commits(journal)
    with pytest.raises(DatabaseError, match="not authorized"):
        put(journal, coalesces=False)
    assert store.read("key") is None
    assert journal.state().pending == 1


def test_somebody_else_while_the_log_is_turned_on(path, journal, clock, monkeypatch):
    """SQLite does not always wait for who uses the file just then, so the journal does."""
    monkeypatch.setattr(sqlite_file, "_BUSY_TIMEOUT_S", 0.02)
    put(journal)
    journal.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN")
    other.execute("SELECT * FROM totals").fetchall()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        other.execute("COMMIT")

    monkeypatch.setattr(sqlite_file, "original", lambda module, name: sleep)
    assert put(journal, "other")
    assert waits == [sqlite_file._NEW_AGAIN_S]
    other.close()


def at_once(pool, journal, calls):
    """Let threads ask for something, in this order, while another works at the file."""
    waiting = []
    with journal._file._lock:
        for call in calls:
            waiting.append(pool.submit(*call))
            while len(journal._file._queue) < len(waiting):
                threading.Event().wait(0.001)
    return waiting


# --- Transactions ---------------------------------------------------------------------------------


def test_threads_share_transactions(journal):
    """Those who come while one works at the file are served by the next, all at once."""
    put(journal, "first")
    begun = count_transactions(journal)
    with ThreadPoolExecutor(40) as pool:
        waiting = at_once(pool, journal, [(put, journal, f"key{number}") for number in range(40)])
        seqs = [one.result() for one in waiting]
    assert begun == ["BEGIN IMMEDIATE"]
    assert len(set(seqs)) == 40
    assert journal.state().pending == 41


def test_a_transaction_has_a_bound(journal, monkeypatch):
    """Who works for all goes on until he has done his own; nobody is left waiting."""
    monkeypatch.setattr(sqlite_file, "GROUP", 2)
    put(journal, "first")
    begun = count_transactions(journal)
    with ThreadPoolExecutor(7) as pool:
        calls = [(put, journal, f"key{number}") for number in range(7)]
        assert all(one.result() for one in at_once(pool, journal, calls))
    assert len(begun) == 4


def test_only_the_guilty_fails(journal):
    """What cannot be done does not fail what was asked for at the same time."""
    put(journal, "first")
    keys = ["one", "\ud800", "two"]
    with ThreadPoolExecutor(3) as pool:
        waiting = at_once(pool, journal, [(put, journal, key) for key in keys])
        errors = [one.exception() for one in waiting]
    assert errors[0] is errors[2] is None
    assert isinstance(errors[1], UnicodeEncodeError)
    assert journal.state().pending == 3


def test_same_keys_in_one_transaction(journal):
    """Of writes of a key that come at once the last one is left, ledgers keep all."""
    put(journal, "first")
    with ThreadPoolExecutor(30) as pool:
        calls = [
            (partial(put, journal, f"key{number % 3}", coalesces=number % 3 > 0),)
            for number in range(30)
        ]
        waiting = at_once(pool, journal, calls)
        seqs = [one.result() for one in waiting]
    assert len(set(seqs)) == 30
    assert journal.state().pending == 1 + 10 + 1 + 1
    assert journal.newest("key1").seq == max(seqs[1::3])
    assert len(journal.hold("key0").records) == 10


def test_room_in_one_transaction(path, store):
    """What is replaced by another of the same transaction takes no room in it."""
    journal = SqliteJournal(path, store, max_pending=2, max_pending_bytes=2 * 53)
    with ThreadPoolExecutor(4) as pool:
        keys = ["key", "key", "other", "third"]
        seqs = [
            one.result() for one in at_once(pool, journal, [(put, journal, key) for key in keys])
        ]
    assert [seq is not None for seq in seqs] == [True, True, True, False]
    assert journal.state().pending_bytes == 2 * 53
    journal.close()


def test_reading_syncs_nothing(journal):
    """Where nobody writes nobody waits for other writers."""
    put(journal)
    begun = count_transactions(journal)
    journal.newest("key")
    journal.state()
    journal.explain("key")
    journal.dead_letters()
    assert begun == ["BEGIN"] * 4


def count_steps(journal, call):
    """About how much SQLite has to do for it."""
    steps = []
    connection = journal._file._connected()
    connection.set_progress_handler(lambda: steps.append(1), 10)
    call()
    connection.set_progress_handler(None, 0)
    return len(steps)


def test_much_at_home_is_not_looked_at(journal, clock):
    """A claim is not longer at it where another process has many keys of its own."""
    journal.beat("other")
    steps = []
    for start in (0, 10):
        for number in range(start, 100 * start + 10):
            put(journal, f"key{number}", home="other")
        steps.append(count_steps(journal, lambda: journal.claim(5, home="me")))
    assert steps[1] < steps[0] + 10
    assert len(journal.claim(2000, home="other")[0]) == 1010


def test_the_wait_for_a_key_with_a_home(journal, clock):
    """A key that is not due yet is waited for, whoever's it is."""
    put(journal, "later", delay_s=90)
    put(journal, "key", home="mine", delay_s=50)
    assert journal.claim(9, home="mine") == ([], pytest.approx(50))


def test_keys_know_their_home(journal, clock):
    """Whatever is done with a key, the home in its row is that of its oldest record."""
    chance, claims = random.Random(1), []
    for number in range(400):
        key, home = f"key{number % 5}", chance.choice(["", "one", "two"])
        act = chance.randrange(8)
        if act < 4:
            put(journal, key, home=home, coalesces=chance.random() < 0.7)
        elif act == 4:
            claims += journal.claim(2, home="me")[0]
        elif act == 5:
            journal.supersede(key, journal.now() - 5)
        elif act == 6 and claims:
            claim = claims.pop(0)
            failure = Failure(claim.records[-1].seq, "no", is_final=True)
            journal.settle(claim, written=claim.records[0].seq, failure=failure)
        elif letters := journal.dead_letters(1):
            journal.drop(letters[0].id) if letters[0].is_superseded else journal.requeue(
                letters[0].id
            )
        clock.now += chance.choice([0, 0.1, 3])
        sql = (
            "SELECT key, home, COALESCE((SELECT home FROM records r WHERE r.key = k.key"
            " ORDER BY seq LIMIT 1), '') FROM keys k"
        )
        rows = journal._read(lambda connection, sql=sql: connection.execute(sql).fetchall())
        assert all(home == oldest for _, home, oldest in rows)


def test_a_clock_that_is_set_back(path, journal, clock):
    """Claims and homes of before do not last for as long as the clock was set back."""
    other = SqliteJournal(path, LocalStore(1))
    for key in ("one", "two", "three"):
        put(journal, key)
    journal.beat("mine")
    put(journal, "mine", home="mine")
    for key in ("one", "two", "three"):
        assert journal.hold(key)
    clock.now -= 0.5
    assert other.hold("one") is None
    assert other.claim(9, home="other", early=True)[0] == []
    clock.now -= 900
    put(other, "two")
    assert other.state().pending == 4
    assert other.hold("one")
    claims, _ = other.claim(9, home="other", early=True)
    assert {claim.key for claim in claims} == {"two", "three", "mine"}
    assert journal.claim(9, home="mine", early=True)[0] == []
    other.close()


def test_a_holder_whose_clock_is_set_back(journal, clock):
    """He has his claim until somebody else takes it, and renews it as ever."""
    seq = put(journal, "one")
    put(journal, "two")
    one, two = journal.hold("one"), journal.hold("two")
    clock.now -= 900
    assert journal.settle(one, written=seq) is True
    journal.renew([two])
    assert journal.hold("two") is None
    assert journal.claim(9, home="me", early=True)[0] == []


def test_a_sequence_is_ahead_of_the_clock(journal, clock):
    """Where the clock goes back sequences go on."""
    first = put(journal, "one")
    clock.now -= 100
    assert put(journal, "two") == first + 1
    assert journal.state().oldest_s == 0


# --- Interrupted ----------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


def test_an_interrupt_before_the_end(journal, store):
    """What was interrupted is not accepted; those who wait for the same thread are served."""
    put(journal, "first")
    work, waiting = journal._file._work, []

    def interrupt(connection, tasks):
        journal._file._work = work
        work(connection, tasks)
        waiting.append(pool.submit(put, journal, "other"))
        while not journal._file._queue:
            threading.Event().wait(0.001)
        raise Interrupted

    with ThreadPoolExecutor(1) as pool:
        store.write("key", entry(b"old"))
        journal._file._work = interrupt
        with pytest.raises(Interrupted):
            put(journal)
        assert waiting[0].result()
    assert journal.newest("key") is None
    assert store.read("key").payload == b"old"
    assert journal.newest("other")
    assert store.read("other")


def test_an_interrupt_takes_nobody_with_it(journal):
    """Work that one thread did for others when it was interrupted is done by another."""
    put(journal, "first")
    work = journal._file._work

    def interrupt(connection, tasks):
        journal._file._work = work
        work(connection, tasks)
        raise Interrupted

    journal._file._work = interrupt
    with ThreadPoolExecutor(3) as pool:
        waiting = at_once(pool, journal, [(put, journal, f"key{number}") for number in range(3)])
        errors = [one.exception() for one in waiting]
    assert [type(error) for error in errors if error] == [Interrupted]
    assert journal.state().pending == 3


class InterruptedConnection:
    """The interrupt comes when a transaction is durable and nobody has been told so."""

    def __init__(self, connection):
        self._connection = connection

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, sql, *parameters):
        found = self._connection.execute(sql, *parameters)
        if sql == "COMMIT":
            raise Interrupted
        return found


def test_an_interrupt_after_the_commit(journal, store):
    """What was accepted before its writer was interrupted is not served older than it is."""
    put(journal)
    plain = journal._file._connection
    journal._file._connection = InterruptedConnection(plain)
    with pytest.raises(Interrupted):
        put(journal, coalesces=False)
    journal._file._connection = plain
    assert store.read("key") is None
    assert journal.state().pending == 2


def test_an_interrupt_while_the_cache_is_written(journal, monkeypatch):
    """The value is not left half written."""
    put(journal)

    def write(key, entry):
        raise Interrupted

    monkeypatch.setattr(journal.store, "write", write)
    with pytest.raises(Interrupted):
        put(journal)
    assert journal.store.read("key") is None


class SlowStore(LocalStore):
    """One of two writes waits in it until the other has ended."""

    def __init__(self):
        super().__init__(2**20)
        self.is_in, self.may_go = threading.Event(), threading.Event()

    def write(self, key, entry):
        if entry.payload == b"first":
            self.is_in.set()
            self.may_go.wait(10)
        return super().write(key, entry)


def test_the_later_write_is_cached(path):
    """Who comes late with an older value does not leave it there."""
    store = SlowStore()
    journal = SqliteJournal(path, store)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(journal.append, "key", entry(b"first"), writer="w")
        store.is_in.wait(10)
        assert journal.append("key", entry(b"second"), writer="w") > 0
        assert store.read("key").payload == b"second"
        store.may_go.set()
        first.result()
    assert store.read("key") is None
    journal.append("key", entry(b"third"), writer="w")
    assert store.read("key").payload == b"third"
    assert journal._turns._by_key == {}
    journal.close()


def test_a_write_of_which_nobody_knows(path):
    """While others write its key, nothing older than it comes into the cache."""
    store = SlowStore()
    journal = SqliteJournal(path, store)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(journal.append, "key", entry(b"first"), writer="w", coalesces=False)
        store.is_in.wait(10)
        deny_commits(journal)
        with pytest.raises(DatabaseError, match="not authorized"):
            journal.append("key", entry(b"second"), writer="w", coalesces=False)
        store.write("key", entry(b"loaded"))
        assert journal.append("key", entry(b"third"), writer="w", coalesces=False)
        assert store.read("key") is None
        store.may_go.set()
        assert first.result()
    assert store.read("key") is None
    journal.append("key", entry(b"fourth"), writer="w")
    assert store.read("key").payload == b"fourth"
    journal.close()


# --- Processes ------------------------------------------------------------------------------------

_FIRST = """
import os, sys, time
from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.cache_strategies.sqlite_journal import SqliteJournal

journal = SqliteJournal(sys.argv[1], LocalStore(2**20), max_pending=10**6)

def put(key, **options):
    now = time.monotonic()
    value = Entry(b"v" * 200, created_at=now, fresh_until=now + 60, gone_at=now + 60)
    return journal.append(key, value, writer="w", **options)
"""


def start(code, *args):
    """Code in a process of its own."""
    script = _FIRST + textwrap.dedent(code)
    command = [sys.executable, "-W", "error", "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_make_one_file(path, journal):
    """Of several that begin at once each writes into the same file, and nothing is lost."""
    code = """
    print(flush=True)
    sys.stdin.readline()
    for number in range(20):
        put(f"{sys.argv[2]}:{number}")
    """
    ready = []
    for number in range(4):
        script = _FIRST + textwrap.dedent(code)
        command = [sys.executable, "-W", "error", "-c", script, str(path), str(number)]
        ready.append(subprocess.Popen(command, stdin=-1, stdout=-1, text=True))
    for process in ready:
        process.stdout.readline()
    for process in ready:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in ready:
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert journal.state().pending == 80


@pytest.mark.claim("Killed with -9 in the middle of writes: every accepted one is in the journal")
def test_what_was_accepted_survives_a_kill(path, journal, prove):
    """A process that is killed at any moment leaves all that it has said to be accepted."""
    code = """
    import threading
    def work(name):
        for number in range(10**9):
            key = f"{sys.argv[2]}:{name}:{number}"
            put(key)
            os.write(1, f"{key}\\n".encode())
    for name in range(4):
        threading.Thread(target=work, args=(name,), daemon=True).start()
    threading.Event().wait(60)
    """
    chance, accepted = random.Random(1), 0
    for turn in range(50 if prove.full else 5):
        process = start(code, path, turn)
        lines = [process.stdout.readline() for _ in range(chance.randrange(1, 400))]
        process.kill()
        lines += process.stdout.read().splitlines(keepends=True)
        process.stdout.close()
        process.wait()
        keys = {line.strip() for line in lines if line.endswith("\n")}
        rows = journal._read(
            lambda connection: connection.execute("SELECT key FROM records").fetchall()
        )
        assert keys <= {key for (key,) in rows}
        assert journal.state().pending == len(rows)
        accepted += len(keys)
    prove.figure(f"{accepted} accepted writes, none lost")


def test_a_fork_begins_anew(path):
    """Parent and child both go on with the file; who closes it takes nothing from the other."""
    code = """
    put("parent:1")
    assert journal._file._connection is not None
    pid = os.fork()
    if not pid:
        assert journal._file._connection is None
        put("child:1")
        sys.stdin.readline()
        put("child:2")
        os._exit(0)
    put("parent:2")
    journal.close()
    print("closed", flush=True)
    assert os.waitpid(pid, 0)[1] == 0
    put("parent:3")
    """
    script = _FIRST + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(path)],
        input="\n",
        text=True,
        timeout=30,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert done.stdout == "closed\n"
    journal = SqliteJournal(path, LocalStore(1))
    assert journal.state().pending == 5
    journal.close()


def test_a_fork_while_others_write(path):
    """A fork waits for a transaction that goes on in another thread; nothing is lost or stuck."""
    code = """
    import threading
    def work():
        for number in range(200):
            put(f"parent:{number}")
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    pids = []
    for turn in range(5):
        pid = os.fork()
        if not pid:
            for number in range(20):
                put(f"child:{turn}:{number}")
            os._exit(0)
        pids.append(pid)
    for thread in threads:
        thread.join()
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 5
    assert journal.state().pending == 200 + 5 * 20
    """
    process = start(code, path)
    process.communicate(timeout=60)
    assert process.returncode == 0


# --- Greenlets ------------------------------------------------------------------------------------

_COMMON = """
import os, sqlite3, sys, time
from functools import partial
from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.cache_strategies.sqlite_journal import SqliteJournal
from flask_muset.deadline import deadline
from flask_muset.errors import OperationTimeoutError

allocate_lock = monkey.get_original("_thread", "allocate_lock")
gevent.sleep(0)  # there is a hub from here on

class Bench:
    def __init__(self, name):
        self.path = os.path.join(sys.argv[1], name)
        self.store = LocalStore(2**24)
        self.journal = SqliteJournal(self.path, self.store, max_pending=10**6)
        self.put("first")

    def put(self, key, **options):
        now = time.monotonic()
        value = Entry(b"v" * 200, created_at=now, fresh_until=now + 60, gone_at=now + 60)
        return self.journal.append(key, value, writer="w", **options)

    @property
    def pending(self):
        return self.journal.state().pending

    def lock(self):
        self.other = sqlite3.connect(self.path, isolation_level=None)
        self.other.execute("BEGIN IMMEDIATE")

    def unlock(self):
        self.other.execute("ROLLBACK")
        self.other.close()

    def start(self, *call):
        job = gevent.spawn(*call)
        gevent.sleep(0.001)
        return job

    def start_and_be_taken(self, *call):
        job = self.start(*call)
        while not self.is_taken():
            gevent.sleep(0.001)
        return job

    def is_taken(self):
        return not self.journal._file._queue
"""

_SCENES = """
def share(bench):
    begun = []
    bench.journal._file._connection.set_trace_callback(
        lambda sql: begun.append(sql) if sql.startswith("BEGIN") else None
    )
    def work(number):
        return [bench.put(f"{number}:{turn}") for turn in range(10)]
    jobs = [gevent.spawn(work, number) for number in range(64)]
    gevent.joinall(jobs, raise_error=True)
    seqs = {seq for job in jobs for seq in job.value}
    return [len(seqs), len(begun), bench.pending]

def go_on(bench):
    bench.lock()
    job, ticks = gevent.spawn(bench.put, "key"), []
    for _ in range(20):
        gevent.sleep(0.001)
        ticks.append(job.ready())
    bench.unlock()
    return [any(ticks), bool(job.get(timeout=30))]

def cut_off_before(bench):
    cached = bench.store.read("first")
    bench.lock()
    jobs = [bench.start_and_be_taken(bench.put, "one")]
    cut = bench.start(partial(bench.put, "first", coalesces=False))
    jobs.append(bench.start(bench.put, "three"))
    cut.kill()
    bench.unlock()
    gevent.joinall(jobs, timeout=30, raise_error=True)
    return [bench.pending, bench.store.read("first") is cached]

def cut_off_within(bench):
    bench.lock()
    job = bench.start_and_be_taken(partial(bench.put, "first", coalesces=False))
    job.kill()
    before = bench.store.read("first") is not None
    bench.unlock()
    pending = bench.pending
    gevent.sleep(0.01)
    return [before, pending, bench.store.read("first") is None]

def cut_off_the_later(bench):
    bench.lock()
    jobs = [gevent.spawn(bench.put, "key", coalesces=False) for _ in range(2)]
    gevent.sleep(0.001)
    while not bench.is_taken():
        gevent.sleep(0.001)
    jobs[1].kill()
    bench.unlock()
    jobs[0].get(timeout=30)
    gevent.sleep(0.01)
    return [bench.store.read("key") is None, bench.pending]

def cut_off_with_claims(bench):
    found = []
    for ask in (partial(bench.journal.claim, 10, home="h"), partial(bench.journal.hold, "first")):
        bench.lock()
        job = bench.start_and_be_taken(ask)
        job.kill()
        bench.unlock()
        bench.pending
        gevent.sleep(0.01)
        claim = bench.journal.hold("first")
        found.append(len(claim.records))
        bench.journal.settle(claim)
    return found

def kill_the_flusher(bench):
    bench.lock()
    jobs = [bench.start_and_be_taken(bench.put, "one")]
    jobs += [bench.start(bench.put, key) for key in ("two", "three")]
    bench.journal._file._flusher.kill(block=False)
    gevent.sleep(0.001)
    bench.unlock()
    gevent.joinall(jobs, timeout=30, raise_error=True)
    return [all(job.value for job in jobs), bench.pending]

def be_late(bench):
    bench.lock()
    job = bench.start(bench.put, "other")
    try:
        with deadline(0.02):
            bench.put("key")
    except OperationTimeoutError:
        bench.unlock()
    return bool(job.get(timeout=30))

def use_native_threads(bench):
    pool = gevent.get_hub().threadpool
    def work(name):
        return all([bench.put(f"{name}:{turn}") for turn in range(20)])
    jobs = [pool.spawn(work, f"native:{number}") for number in range(5)]
    jobs += [gevent.spawn(work, f"green:{number}") for number in range(5)]
    return [all(job.get() for job in jobs), bench.pending]

def use_native_threads_with_hubs(bench):
    pool, ended = gevent.get_hub().threadpool, []
    def work(name):
        gevent.sleep(0)
        return bench.put(name)
    for turn in range(30):
        jobs = [pool.spawn(work, f"native:{turn}:{number}") for number in range(4)]
        gevent.sleep(0.0005 * (turn % 2))
        jobs += [gevent.spawn(bench.put, f"green:{turn}:{number}") for number in range(4)]
        gevent.wait(jobs, timeout=30)
        ended.append(all(job.ready() and job.successful() for job in jobs))
        if not ended[-1]:
            break
    return [all(ended), bench.pending]

def use_no_thread_of_the_hub(bench):
    pool, lock = gevent.get_hub().threadpool, allocate_lock()
    lock.acquire()
    def wait():
        with lock:
            return True
    taken = [pool.spawn(wait) for _ in range(pool.maxsize)]
    done = gevent.spawn(bench.put, "key")
    done.join(30)
    found = [done.ready(), any(job.ready() for job in taken)]
    lock.release()
    return found + [all(job.get() for job in taken)]

def tell_risks_and_close(bench):
    risks = bench.journal.risks()
    thread = bench.journal._file._thread
    sizes = [thread.size]
    bench.journal.close()
    sizes.append(thread.size)
    return [type(risks).__name__, bench.journal._file._connection is None, sizes, bench.pending]

def close_while_others_write(bench):
    bench.lock()
    jobs = [bench.start_and_be_taken(bench.put, "one")]
    jobs.append(bench.start(bench.put, "two"))
    closing = bench.start(bench.journal.close)
    closing.kill()
    closing = bench.start(bench.journal.close)
    bench.unlock()
    closing.get(timeout=30)
    gevent.joinall(jobs, timeout=30, raise_error=True)
    return bench.pending

def fork(bench):
    pid = os.fork()
    if not pid:
        bench.put("child")
        bench.journal.close()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    bench.put("parent")
    return [status, bench.pending, bool(bench.journal.newest("child"))]

result = {}
for scene in (
    share, go_on, cut_off_before, cut_off_within, cut_off_the_later, cut_off_with_claims,
    kill_the_flusher, be_late, use_native_threads, use_native_threads_with_hubs,
    use_no_thread_of_the_hub, tell_risks_and_close, close_while_others_write, fork,
):
    try:
        result[scene.__name__] = scene(Bench(scene.__name__))
    except Exception as error:
        result[scene.__name__] = repr(error)
"""


@pytest.fixture(scope="module")
def greenlets(tmp_path_factory):
    """What came of each scene, all in one process that gevent has patched."""
    return run_patched(_COMMON + _SCENES, tmp_path_factory.mktemp("greenlets"))


def test_greenlets_share_transactions(greenlets):
    """Many greenlets that write at once need few transactions, and each has its own answer."""
    answers, transactions, pending = greenlets["share"]
    assert (answers, pending) == (640, 641)
    assert transactions < 100


def test_the_hub_goes_on(greenlets):
    """While another process has the file locked all other greenlets go on."""
    assert greenlets["go_on"] == [False, True]


def test_who_is_cut_off_before_his_turn(greenlets):
    """A write that nobody has begun with is not made, and the cache is as it was."""
    assert greenlets["cut_off_before"] == [3, True]


def test_who_is_cut_off_in_his_turn(greenlets):
    """A write that is made while nobody waits for it any more is not served older than it is."""
    assert greenlets["cut_off_within"] == [True, 2, True]


def test_the_later_one_is_cut_off(greenlets):
    """Of two writes of a key in one transaction the older is not left in the cache."""
    assert greenlets["cut_off_the_later"] == [True, 3]


def test_claims_of_who_is_cut_off(greenlets):
    """A claim that nobody has got is given back, so that others need not wait for its end."""
    assert greenlets["cut_off_with_claims"] == [1, 1]


def test_a_flusher_that_is_killed(greenlets):
    """Those who wait are served all the same."""
    assert greenlets["kill_the_flusher"] == [True, 4]


def test_a_deadline_cuts_off(greenlets):
    """A caller's time ends while the file is locked; the others wait on."""
    assert greenlets["be_late"] is True


def test_a_native_thread_under_gevent(greenlets):
    """A thread that has no hub works at the file itself."""
    assert greenlets["use_native_threads"] == [True, 201]


def test_a_native_thread_with_a_hub(greenlets):
    """A hub that a native thread has for one call serves nobody else, and nobody hangs."""
    assert greenlets["use_native_threads_with_hubs"] == [True, 241]


def test_the_hub_s_threads_are_taken(greenlets):
    """A file has a thread of its own, so that nobody waits for what others do in the hub's."""
    assert greenlets["use_no_thread_of_the_hub"] == [True, False, True]


def test_risks_and_closing_under_gevent(greenlets):
    """What may block is done beside the hub; a thread ends; the next use opens the file again."""
    assert greenlets["tell_risks_and_close"] == ["list", True, [1, 0], 1]


def test_closing_under_gevent_while_others_write(greenlets):
    """They are served all the same, and so if who closes is cut off."""
    assert greenlets["close_while_others_write"] == 3


def test_a_fork_under_gevent(greenlets):
    """A worker that is forked from a patched process goes on with a connection of its own."""
    assert greenlets["fork"] == [0, 3, True]


# --- Risks ----------------------------------------------------------------------------------------

_MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /dev/shm rw,nosuid shared:4 - tmpfs tmpfs rw
41 22 0:40 / /mnt/my\040files rw - nfs4 host:/x rw
42 22 0:41 / /mnt/my\040files/here rw - ext4 /dev/vdb rw
43 22 0:42 / /mnt/host rw,relatime - fuse.sshfs host: rw
44 43 0:43 / /mnt/host rw - xfs /dev/vdc rw
45 22 0:44 / /mnt/windows rw master:1 propagate_from:2 - cifs //host/x rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/journal.db", "ext4"),
        ("/dev/shm/journal.db", "tmpfs"),
        ("/dev/shmx/journal.db", "ext4"),
        ("/mnt/my files/journal.db", "nfs4"),
        ("/mnt/my files/here/journal.db", "ext4"),
        ("/mnt/host/journal.db", "xfs"),
        ("/mnt/windows/a/b/journal.db", "cifs"),
    ],
)
def test_the_kind_of_file_system(path, kind):
    """It is that of the innermost mount, and of the last one at the same place."""
    assert sqlite_file._kind(path, _MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "risk"),
    [
        ("ext4", None),
        ("xfs", None),
        ("overlay", None),
        ("tmpfs", "in memory (tmpfs)"),
        ("nfs4", "network file system (nfs4)"),
        ("cifs", "network file system (cifs)"),
        ("fuse.sshfs", "network file system (fuse.sshfs)"),
    ],
)
def test_what_a_file_system_risks(tmp_path, store, monkeypatch, kind, risk):
    """A disk of this machine has no risk; memory and the network have one, with its cure."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 254:0 / / rw - {kind} /dev/vda rw\n")
    monkeypatch.setattr(sqlite_file, "_MOUNTS", mounts)
    journal = SqliteJournal(tmp_path / "journal.db", store)
    risks = journal.risks()
    assert len(risks) == (risk is not None)
    assert all(risk in said and str(journal.path) in said for said in risks)


def test_a_system_that_lists_no_mounts(journal, tmp_path, monkeypatch):
    """Where the kernel has no such list nothing is said."""
    monkeypatch.setattr(sqlite_file, "_MOUNTS", tmp_path / "absent")
    assert journal.risks() == []


# --- Large ----------------------------------------------------------------------------------------


def test_a_claim_of_large_records(journal):
    """A claim does not take more into memory than it must; the rest follows."""
    chance = random.Random(1)
    for _ in range(5):
        large = entry(chance.randbytes(2**19))
        journal.append("key", large, writer="w", coalesces=False)
    sizes = []
    while journal.state().pending:
        claim = journal.hold("key")
        sizes.append((len(claim.records), claim.is_whole))
        journal.settle(claim, written=claim.records[-1].seq)
    assert sizes == [(2, False), (2, False), (1, True)]


def test_dead_letters_keep_their_age(journal, clock):
    """A letter that comes back waits since it was accepted."""
    seq = put(journal)
    journal.settle(journal.hold("key"), failure=Failure(seq, "no", is_final=True))
    clock.now += 50
    assert journal.requeue(journal.dead_letters()[0].id) is True
    assert journal.state().oldest_s == pytest.approx(50, abs=0.01)


def test_a_letter_that_comes_back_is_due(journal, clock):
    """Its key does not pause any more, and is not forgotten with a hold that ends by itself."""

    def give_up(key):
        seq = put(journal, key, coalesces=False)
        assert journal.settle(journal.hold(key), failure=Failure(seq, "no", is_final=True))

    give_up("pauses")
    seq = put(journal, "pauses", coalesces=False)
    journal.settle(journal.hold("pauses"), failure=Failure(seq, "no", pause_s=1000))
    give_up("held")
    journal.hold("held")
    for letter in journal.dead_letters():
        assert journal.requeue(letter.id) is True
    assert [claim.key for claim in journal.claim(9, home="me")[0]] == ["pauses"]
    clock.now += 100
    assert {claim.key for claim in journal.claim(9, home="me")[0]} == {"pauses", "held"}


@pytest.mark.parametrize("after_s", [0, 100])
def test_a_letter_that_comes_back_is_not_superseded(journal, clock, after_s):
    """What somebody brings back is not forgotten with what a claim had, whenever that ends."""
    old = put(journal)
    journal.settle(journal.hold("key"), failure=Failure(old, "no", is_final=True))
    journal.append("key", entry(b"new"), writer="v")
    claim = journal.hold("key")
    clock.now += 1
    journal.supersede("key", journal.now())
    clock.now += after_s
    assert journal.requeue(journal.dead_letters()[0].id) is True
    assert journal.settle(claim) is not bool(after_s)
    for _ in range(2):
        claim = journal.hold("key")
        assert [record.seq for record in claim.records] == [old]
        assert journal.settle(claim) is True


def test_what_is_superseded_leaves_nothing(journal):
    """A key without records has no row."""
    put(journal)
    journal.supersede("key", journal.now() + 1)
    assert (
        journal._read(lambda connection: connection.execute("SELECT * FROM keys").fetchall()) == []
    )


def test_a_home_without_a_name(journal, clock):
    """No home is nobody's, even if somebody says that he lives there."""
    journal.beat("")
    put(journal)
    assert len(journal.claim(1, home="me")[0]) == 1


def test_what_was_held_is_swept(journal, clock):
    """Keys that were held without a record by somebody who is gone take no room."""
    for number in range(5):
        journal.hold(f"key{number}")
    put(journal, "key4", home="mine")
    journal.supersede("key4", journal.now() + 1)
    clock.now += 100
    claim = journal.hold("other")
    rows = journal._read(lambda connection: connection.execute("SELECT key FROM keys").fetchall())
    assert rows == [("other",)]
    assert journal.settle(claim) is True
