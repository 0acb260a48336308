"""The files of many processes: written, read as one, folded."""

import cProfile
import fcntl
import os
import pstats
import subprocess
import sys
import textwrap

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from flask_muset.metrics import files
from flask_muset.metrics.exposition import FolderCollector, labels_in_archive, render
from flask_muset.metrics.series import Families
from flask_muset.metrics.store import Store, file_for, pack, read_entries

#: Each of some forked workers counts and dies.
_WORKERS = """
import os, sys
from flask_muset.metrics.exposition import labels_in_archive
from flask_muset.metrics.series import Families
from flask_muset.metrics.store import Store
folder, workers, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def archived(name):
    return frozenset(labels_in_archive(folder).get(name, ()))
families = Families(Store(folder), "x", 60, archived)
families["http_requests_active"].get().add(1)
for worker in range(workers):
    pid = os.fork()
    if not pid:
        families["http_requests_active"].get().add(1)
        for n in range(first, first + 50):
            families["http_requests_total"].add(1, "GET", f"/r{n}", "200")
            families["http_request_duration_seconds"].observe(0.1 * n, "GET", f"/r{n}")
        os._exit(0)
    os.waitpid(pid, 0)
"""


def run_workers(folder, workers, first=0):
    """Let workers count 50 series each and die."""
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WORKERS), str(folder), str(workers), str(first)],
        check=True,
        timeout=60,
    )


def values(folder):
    text, _ = render([FolderCollector(str(folder))], None)
    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


def test_folding_changes_nothing_that_is_shown(tmp_path):
    """Counters and histograms stay, to the last bit; gauges of the dead go; files become two."""
    run_workers(tmp_path, 5)
    before = values(tmp_path)
    assert before["x_http_requests_total", "/r7", "GET", "200"] == 5
    files.fold(str(tmp_path))
    after = values(tmp_path)
    gauges = {key for key in before if key[0] == "x_http_requests_active"}
    assert {k: v for k, v in before.items() if k not in gauges} == after
    assert sorted(os.path.basename(path) for path in files.paths(str(tmp_path))) == [
        "counter_archive.db",
        "histogram_archive.db",
    ]


def test_prometheus_clients_own_collector_reads_the_files(tmp_path):
    """The format is the client's: its text is the same as ours."""
    run_workers(tmp_path, 2)
    files.fold(str(tmp_path))
    run_workers(tmp_path, 1)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    ours, _ = render([FolderCollector(str(tmp_path))], None)
    assert sorted(generate_latest(registry).splitlines()) == sorted(ours.splitlines())


@pytest.mark.claim("A scrape with 32 dead workers takes at most 1.5 times the calls of one with 2")
def test_a_scrape_does_not_grow_with_dead_workers(tmp_path, prove):
    """The archive has what all dead workers have together, once."""

    def calls(folder):
        # Counted, not timed: a machine that does something else meanwhile changes nothing.
        profile = cProfile.Profile()
        profile.runcall(render, [FolderCollector(str(folder))], None)
        return pstats.Stats(profile).total_calls

    took = {}
    for dead in (2, 32):
        folder = tmp_path / str(dead)
        run_workers(folder, dead)
        files.fold(str(folder))
        took[dead] = calls(folder)
    prove.figure(f"{took[2]} calls with 2, {took[32]} with 32")
    assert took[32] <= took[2] * 1.5


def test_new_workers_do_not_get_around_the_cap(tmp_path):
    """Series that dead workers left count, so generations of workers stay below it together."""
    for generation in range(4):
        run_workers(tmp_path, 1, first=50 * generation)
        files.fold(str(tmp_path))
    series = labels_in_archive(str(tmp_path))["x_http_requests_total"]
    assert len(series) <= 60 + 1
    found = values(tmp_path)
    total = sum(v for key, v in found.items() if key[0] == "x_http_requests_total")
    assert total == 200
    assert found["x_metrics_overflow_total", "x_http_requests_total"] == 140


def test_a_file_grows(tmp_path):
    """Values that were placed before a file grew are still written to it."""
    store = Store(str(tmp_path))
    cells = [store.cell("counter", f'["m", "m_total", {{"n": "{n}"}}, ""]'.encode())
             for n in range(3_000)]  # fmt: skip
    for cell in cells:
        store.add(cell, 1.0)
    path = file_for(str(tmp_path), "counter", os.getpid())
    assert os.path.getsize(path) > 1 << 16
    assert [value for _, value, _ in read_entries(path)] == [1.0] * 3_000


def test_a_process_with_the_id_of_a_dead_one_goes_on(tmp_path):
    """Counters continue, gauges begin at zero."""
    for kind in ("counter", "gauge_livesum"):
        path = file_for(str(tmp_path), kind, os.getpid())
        body = pack(b"k", 5.0)
        with open(path, "wb") as file:
            file.write((8 + len(body)).to_bytes(4, sys.byteorder) + bytes(4) + body)
    store = Store(str(tmp_path))
    for kind, expected in (("counter", 6.0), ("gauge_livesum", 1.0)):
        cell = store.cell(kind, b"k")
        store.add(cell, 1.0)
        assert store.value(cell) == expected


def test_a_file_that_is_not_whole_ends_early(tmp_path):
    """A writer that died in the middle of an entry spoils nothing."""
    whole = pack(b"k", 5.0)
    for cut in range(len(whole)):
        data = (8 + len(whole) * 2).to_bytes(4, sys.byteorder) + bytes(4) + whole + whole[:cut]
        (tmp_path / "counter_1.db").write_bytes(data)
        found = [entry[:2] for entry in read_entries(str(tmp_path / "counter_1.db"))]
        assert found == [(b"k", 5.0)]
    (tmp_path / "counter_1.db").write_bytes(b"")
    assert list(read_entries(str(tmp_path / "counter_1.db"))) == []
    assert list(read_entries(str(tmp_path / "none.db"))) == []


def test_files_that_were_made_this_moment(tmp_path):
    """An empty file of a new worker, of whatever kind, does not spoil a scrape."""
    run_workers(tmp_path, 1)
    before = values(tmp_path)
    for name in ("counter_m1.db", "gauge_livesum_m1.db", "gauge_all_1.db"):
        (tmp_path / name).write_bytes(b"")
    assert values(tmp_path) == before


def test_a_stopped_reader_does_not_stop_the_server(tmp_path, monkeypatch):
    """Folding waits for a while and then leaves the files to the next time."""
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    run_workers(tmp_path, 1)
    count = len(files.paths(str(tmp_path)))
    with open(tmp_path / ".lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        files.fold(str(tmp_path))
        assert len(files.paths(str(tmp_path))) == count
        fcntl.flock(held, fcntl.LOCK_UN)
        files.fold(str(tmp_path))
        assert len(files.paths(str(tmp_path))) == 2


def test_nothing_is_read_while_files_are_folded(tmp_path, monkeypatch):
    """A scrape that cannot have the lock fails; it would count a worker twice, and fall later."""
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    run_workers(tmp_path, 1)
    with open(tmp_path / ".lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="stayed locked"):
            values(tmp_path)
    assert values(tmp_path)


def test_a_failed_fold_changes_nothing(tmp_path, monkeypatch):
    """No space left: the archive is the old one, the dead worker's files are there."""
    run_workers(tmp_path, 2)
    before = values(tmp_path)

    def full(*_args):
        raise OSError("no space")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        files.fold(str(tmp_path))
    monkeypatch.undo()
    assert values(tmp_path) == before
    assert list(tmp_path.glob("*.new")) == []


def test_sums_do_not_depend_on_the_order(tmp_path):
    """Durations are added exactly, so no sum falls by a rounding error when files are folded."""
    families = Families(Store(), "x", 100)
    series = families["http_request_duration_seconds"].get("GET", "/")
    numbers = [0.1, 1e-5, 3e4, 0.7, 1 / 3] * 200
    for number in numbers:
        series.observe(number)
    forward = families.store.value(series.total)
    for number in reversed(numbers):
        series.observe(number)
    assert families.store.value(series.total) == 2 * forward
    assert forward == pytest.approx(sum(numbers), abs=1e-3)
