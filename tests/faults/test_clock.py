"""The machine's clock jumps by an hour while the service runs."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
import requests
from services import ROOT
from waiting import until

#: Debian's; the path of others is their linker's.
_LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


class Clock:
    """What a process that is started with `environ` takes for the time of day.

    Waits and time-outs are by the monotonic clock, which no jump changes; so it is left alone.
    """

    def __init__(self, folder):
        self._file = folder / "clock.txt"
        self.jump(0)
        self.environ = {
            "LD_PRELOAD": str(_LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds):
        """Be so far from the real time from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)


def wait_for(service, seconds):
    """Until the service's clock is that far from ours."""

    def has_jumped():
        date = requests.get(f"{service.url}/health/live", timeout=30).headers["Date"]
        return abs(parsedate_to_datetime(date).timestamp() - time.time() - seconds) < 600

    until(has_jumped)


def key_for_half_an_hour(service):
    """A key that expires, made by the real clock."""
    done = subprocess.run(
        [sys.executable, "-m", "muset.cli", "keys", "create", "--user", "short@example.org",
         "--role", "member", "--expires", "30m"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"MUSET_DATA_DIR": str(service.data_dir / "data")},
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def written(service):
    """The preferences of the first user, as the database has them."""
    with sqlite3.connect(service.data_dir / "data" / "muset.db") as database:
        row = database.execute("SELECT data FROM preferences WHERE user_id = 1").fetchone()
    database.close()
    return None if row is None else json.loads(row[0])


@pytest.mark.full_only
@pytest.mark.claim(
    "The clock jumps an hour on and back: writes that are accepted are written, nobody may do more "
    "or less than the limit, keys expire by the time of day"
)
def test_the_clock_jumps(make_service, tmp_path, prove):
    """An hour on, and back, and an hour back: lost is nothing, and nothing stands still.

    What is cached, limited and leased goes by the monotonic clock or survives the jump; keys expire
    by the time of day, which is what their owners meant.
    """
    if not _LIBRARIES:
        prove.missing("libfaketime")
    clock = Clock(tmp_path)
    limit = 40
    service = make_service(RATE_LIMIT_REQUESTS_PER_MINUTE=str(limit), **clock.environ)
    service.start()
    api = f"{service.url}/api/v1"
    short = {"Authorization": f"Bearer {key_for_half_an_hour(service)}"}
    late = []
    for number, (seconds, status) in enumerate([(3600, 401), (0, 200), (-3600, 200), (0, 200)]):
        clock.jump(seconds)
        wait_for(service, seconds)
        began = time.monotonic()
        mine, value = f"{api}/users/1/preferences", {"jump": number}
        put = requests.put(mine, json=value, headers=service.headers, timeout=30)
        assert put.status_code == 200
        assert requests.get(mine, headers=service.headers, timeout=30).json() == value
        until(lambda value=value: written(service) == value)
        assert requests.get(f"{api}/documents", headers=short, timeout=30).status_code == status
        late.append(time.monotonic() - began)
        # What waits seems old for a moment if it was accepted before a jump.
        ready = f"{service.url}/health/ready"
        until(lambda url=ready: not requests.get(url, timeout=30).json()["reasons"])
    statuses, began = [], time.monotonic()
    for seconds in (0, 3600, -3600):
        clock.jump(seconds)
        wait_for(service, seconds)
        statuses += [
            requests.get(f"{api}/documents", headers=service.headers, timeout=30).status_code
            for _ in range(limit)
        ]
    # A jump gives no further requests, and takes none.
    minutes = (time.monotonic() - began) / 60
    prove.figure(
        f"written within {max(late):.1f} s of each of {len(late)} jumps, {statuses.count(200)} "
        f"requests in {minutes:.1f} minutes of a limit of {limit} a minute"
    )
    assert statuses[0] == 200
    assert statuses.count(200) <= limit * (1 + minutes) + 1
    assert service.stop() == 0
