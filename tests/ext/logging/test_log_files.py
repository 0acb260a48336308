"""One log file of many processes: rotated by them, by others, and always whole."""

import fcntl
import json
import os
import signal
import threading
import time

import pytest

from flask_muset.logging.files import LogFile

WORKERS = 8


def in_children(count, work):
    """Run `work(number)` in forked processes at once; all must end well."""
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def written(folder):
    """How often each line was found, in all files of a folder."""
    found = {}
    for path in folder.glob("app.log*"):
        for line in path.read_text("ascii").splitlines():
            entry = json.loads(line)
            key = entry["worker"], entry["number"]
            found[key] = found.get(key, 0) + 1
    return found


def line_of(worker, number):
    return json.dumps({"worker": worker, "number": number, "text": "x" * 80}) + "\n"


@pytest.mark.claim(
    "8 workers write 200,000 lines into one LOG_FILE while it rotates 20 times: every line there "
    "once, whole, valid"
)
def test_many_workers(prove, tmp_path):
    """Each rotates the file when it finds it full; none is told by another."""
    total = 200_000 if prove.full else 40_000
    each, size = total // WORKERS, total * len(line_of(0, 10_000)) // 40
    file = LogFile(tmp_path / "app.log", max_bytes=size, backups=100)

    def work(worker):
        for number in range(each):
            file.write(line_of(worker, number))

    began = time.monotonic()
    in_children(WORKERS, work)
    took = time.monotonic() - began
    file.close()
    found = written(tmp_path)
    rotations = len(list(tmp_path.glob("app.log.*")))
    lost, doubled = total - len(found), sum(count > 1 for count in found.values())
    prove.figure(
        f"{total} lines, {rotations} rotations, {lost} lost, {doubled} doubled, "
        f"{total / took:.0f} lines/s"
    )
    assert (lost, doubled) == (0, 0)
    assert rotations >= 20


def test_moved_away_by_others(tmp_path):
    """logrotate renames and creates under writers; a file nobody locks is never written again."""
    path, each = tmp_path / "app.log", 4_000
    file = LogFile(path)
    stop = threading.Event()
    grew = []

    def rotate():
        number = 0
        while not stop.wait(0.005):
            number += 1
            old = tmp_path / f"app.log-{number}"
            try:
                path.rename(old)
            except FileNotFoundError:
                continue  # nobody has written since the last time
            with old.open("rb") as renamed:
                fcntl.flock(renamed, fcntl.LOCK_EX)  # as flock(1) does before it compresses
                size = os.fstat(renamed.fileno()).st_size
            grew.append((old, size))

    def work(worker):
        for number in range(each):
            file.write(line_of(worker, number))

    # Forked before the thread is there: a process with threads should not fork.
    starter = os.fork()
    if not starter:
        code = 1
        try:
            in_children(4, work)
            code = 0
        finally:
            os._exit(code)
    rotator = threading.Thread(target=rotate)
    rotator.start()
    status = os.waitpid(starter, 0)[1]
    stop.set()
    rotator.join()
    file.close()
    assert status == 0
    assert written(tmp_path) == {(w, n): 1 for w in range(4) for n in range(each)}
    assert len(grew) > 3
    assert [old.stat().st_size for old, _ in grew] == [size for _, size in grew]


def test_an_idle_process_follows(tmp_path):
    """What is written long after the file was moved away is in the new one."""
    path = tmp_path / "app.log"
    file = LogFile(path)
    file.write("before\n")
    path.rename(tmp_path / "app.log.1")
    file.write("after\n")
    assert path.read_text() == "after\n"
    path.unlink()
    file.write("again\n")
    assert path.read_text() == "again\n"
    file.close()


def test_backups_are_kept(tmp_path):
    """The newest files stay, as many as asked for, none larger than asked for."""
    file = LogFile(tmp_path / "app.log", max_bytes=1_000, backups=3)
    for number in range(200):
        file.write(f"{number:099}\n")
    file.close()
    names = ("app.log.3", "app.log.2", "app.log.1", "app.log")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert max((tmp_path / name).stat().st_size for name in names) <= 1_000
    text = "".join((tmp_path / name).read_text() for name in names)
    assert [int(line) for line in text.splitlines()] == list(range(160, 200))


def test_a_file_in_use_is_not_deleted(tmp_path):
    """While somebody still writes to the oldest file, nothing is rotated and nothing is lost."""
    file = LogFile(tmp_path / "app.log", max_bytes=100, backups=1)
    for number in range(3):
        file.write(f"{number:079}\n")
    with (tmp_path / "app.log.1").open("ab") as slow:
        fcntl.flock(slow, fcntl.LOCK_SH)
        file.write(f"{3:079}\n")
        slow.write(f"{-1:079}\n".encode())
    texts = "".join(path.read_text() for path in tmp_path.iterdir())
    assert sorted(int(line) for line in texts.split()) == [-1, 1, 2, 3]
    file.close()


def test_a_line_larger_than_the_file(tmp_path):
    """It is written whole, into a file of its own."""
    file = LogFile(tmp_path / "app.log", max_bytes=100, backups=5)
    for line in ("short\n", "x" * 10_000 + "\n", "short\n"):
        file.write(line)
    file.close()
    assert (tmp_path / "app.log.1").read_text() == "x" * 10_000 + "\n"


def test_a_folder_that_cannot_be_changed(tmp_path, capfd, monkeypatch):
    """Without the right to rename the file grows on; that is said once."""
    file = LogFile(tmp_path / "app.log", max_bytes=100, backups=1)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    for number in range(10):
        file.write(f"{number:079}\n")
    file.close()
    assert [int(line) for line in (tmp_path / "app.log").read_text().split()] == list(range(10))
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "cannot be rotated" in line]) == 1


def test_locked_by_a_stranger(tmp_path):
    """No request waits for somebody who has locked the current file."""
    file = LogFile(tmp_path / "app.log")
    with (tmp_path / "app.log").open("rb") as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        began = time.monotonic()
        file.write("line\n")
        assert time.monotonic() - began < 5
    assert (tmp_path / "app.log").read_text() == "line\n"
    file.close()


def test_a_full_disk(tmp_path):
    """A part of a line that was written before the disk was full does not spoil the next line."""
    path = tmp_path / "app.log"

    def work(_):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        file = LogFile(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            file.write("0123456789 too long\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.write("whole\n")

    in_children(1, work)
    assert path.read_text() == "0123456789\nwhole\n"


def test_logged_within_a_write(tmp_path, monkeypatch):
    """A signal's handler may log in the middle of a line; its line follows."""
    file = LogFile(tmp_path / "app.log")
    write, nested = os.write, ["nested\n"]

    def interrupted(fd, data):
        if nested:
            file.write(nested.pop())
        return write(fd, data)

    monkeypatch.setattr(os, "write", interrupted)
    file.write("outer\n")
    assert (tmp_path / "app.log").read_text() == "outer\nnested\n"
    file.close()


def test_threads(tmp_path):
    """Threads of one process share the file, also while it rotates."""
    file = LogFile(tmp_path / "app.log", max_bytes=20_000, backups=100)

    def work(worker):
        for number in range(500):
            file.write(line_of(worker, number))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert written(tmp_path) == {(w, n): 1 for w in range(8) for n in range(500)}
    assert len(list(tmp_path.iterdir())) > 10


@pytest.mark.parametrize("bad", [{"max_bytes": -1}, {"backups": 0}])
def test_numbers_too_small(tmp_path, bad):
    """They are refused by name and value."""
    with pytest.raises(ValueError, match=r"at least 0 .* at least 1, got"):
        LogFile(tmp_path / "app.log", **bad)
