"""A disk that has no room: writes are refused and told so, reads go on, and it recovers."""

import contextlib
import os
import resource
import subprocess

import pytest
import requests

BIG = " ".join(f"word{n}" for n in range(150_000))


@pytest.fixture
def tiny_disk(tmp_path, prove):
    """A file system of 3 MiB at tmp_path/data."""
    folder = tmp_path / "data"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "muset-tests", folder]
    # Root of a container may lack the right too.
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        prove.missing("mount, with the right to it,")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def check_refusal(service):
    """A document for which there is no room is refused as documented, and what was there is read.

    Lost is nothing: it was not accepted.
    """
    url = f"{service.url}/api/v1"
    refused = requests.post(
        f"{url}/documents",
        json={"title": "big", "text": BIG},
        headers=service.headers,
        timeout=60,
    )
    assert (refused.status_code, refused.json()["category"]) == (503, "database")
    assert int(refused.headers["Retry-After"]) >= 1
    for _ in range(3):
        read = requests.get(f"{url}/documents/1", headers=service.headers, timeout=60)
        assert (read.status_code, read.json()["title"]) == (200, "small")
        listed = requests.get(f"{url}/documents", headers=service.headers, timeout=60)
        assert [each["title"] for each in listed.json()["items"]] == ["small"]
    assert requests.get(f"{service.url}/health/live", timeout=60).ok
    assert "disk" in service.output()


def store(service, title, text):
    return requests.post(
        f"{service.url}/api/v1/documents",
        json={"title": title, "text": text},
        headers=service.headers,
        timeout=60,
    ).status_code


@pytest.mark.full_only
@pytest.mark.claim(
    "A full disk: 503 with Retry-After for writes, reads go on, over with room again"
)
def test_a_full_disk(service, tiny_disk, prove):
    """ENOSPC; and once there is room again, all is as before."""
    service.start()
    assert store(service, "small", "A small document.") == 201
    filler = tiny_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    check_refusal(service)
    answer = requests.put(
        f"{service.url}/api/v1/users/1/preferences",
        json={"a": "b" * 10_000},
        headers=service.headers,
        timeout=60,
    )
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    filler.unlink()
    assert store(service, "after", "There is room again.") == 201
    prove.figure("database and preferences refused, read meanwhile, 201 after")
    assert service.stop() == 0


def test_a_file_that_may_not_grow(service):
    """A quota or a limit of the process: EFBIG, which SQLite takes for a broken disk."""
    service.start()
    assert store(service, "small", "A small document.") == 201
    (pid,) = service.workers()
    sizes = [path.stat().st_size for path in service.data_dir.rglob("*") if path.is_file()]
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(sizes) + 100_000, hard))
    check_refusal(service)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert store(service, "after", "There is room again.") == 201
    assert service.workers() == [pid]
