"""The kept errors of all processes, in a Redis: counted exactly, whoever is asked for them.

Below the deployment's prefix and the format's version, `f1:`:

    seen            a sorted set: when each fault happened last, in microseconds since the epoch
    f:<fault>       a hash: `fault`, what is said of it, as JSON, and `count`
    n:<fault>       a sorted set: its newest occurrences, as JSON, by their moments
    epoch           a name for all of this: where it is another one, Redis has lost what it had
    done:<process>  the number of the last batch of a process

No request waits for Redis: each process notes its errors in its memory, and a loop beside the
requests sends what is new. A batch whose reply was lost is sent again as it was, and its number
tells whether it has arrived. Where Redis has lost what it had, each process sends all that it still
keeps.

The scripts make the names of what they touch, which a Redis Cluster would not take.
"""

import atexit
import contextlib
import json
import logging
import math
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flask_muset.error_handler.journal import KEPT_OF_EACH, Noted, Occurrence, RecentErrors, iso
from flask_muset.errors import MusetError, OverloadedError
from flask_muset.locks import give_lock, has_lasting_hub, make_event, run_beside
from flask_muset.redaction import redact
from flask_muset.redis import GuardedRedis, Script

__all__ = ["SharedErrors"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at whether something is new, and at whether Redis has what it was sent.
_PAUSE_S = 1.0
_LOOK_S = 10.0
#: Seconds that somebody waits while another one sends.
_TURN_S = 1.0
#: Seconds that the end of a process may take for what is new, and how much longer it is waited for.
_EXIT_S = 1.0
_SLACK_S = 0.5
#: Seconds since it happened last after which a fault is forgotten.
_KEEP_S = 7 * 86_400
#: Bytes of one batch, and of what is read at a time; one fault may be more. They must be few enough
#: for the budget of a client that others use too.
_BATCH_BYTES = 65_536
_PAGE_BYTES = 131_072
#: Bytes of a text that is sent, of a traceback, and of an occurrence's details.
_TEXT_BYTES = 1_024
_TRACEBACK_BYTES = 8_192
_DETAILS_BYTES = 4_096
#: More than any text that is sent has as JSON, where a character may take six bytes.
_READ_BYTES = 131_072

_FAULT: dict[str, type | tuple[type, ...]] = {
    "fingerprint": str,
    "type": str,
    "error": str,
    "category": str,
    "severity": str,
    "status": int,
    "place": str,
    "message": str,
    "traceback": (str, type(None)),
}
_OCCURRENCE: dict[str, type | tuple[type, ...]] = {
    "request_id": str,
    "method": str,
    "path": str,
    "message": str,
    "details": dict,
    "at": str,
}


def _script(name: str) -> Script:
    return Script(Path(__file__).with_name(f"shared_{name}.lua").read_text("utf-8"))


_ADD = _script("add")
_READ = _script("read")


class SharedErrors:
    """Sends what one process keeps to the others, and reads what all have.

    Args:
        recent: What this process keeps.
        redis: Where they meet.
        keep: How many faults, at least 1.
    """

    _lock: Any

    def __init__(self, recent: RecentErrors, redis: GuardedRedis, keep: int) -> None:
        self._recent = recent
        self._redis = redis
        self._keep = keep
        self._place = redis.key("f1:")
        self._begin_anew()
        give_lock(self)

    def _begin_anew(self) -> None:
        #: Whether this process sends what is new.
        self.is_started = False
        self._process = secrets.token_hex(8)
        #: What was sent last, until it is known to have arrived, and its number.
        self._batch: list[Any] = []
        self._number = 0
        #: Of the Redis that has what was sent; empty before anything was.
        self._epoch = b""
        self._next_look = 0.0
        self._is_away = False
        self._turns: Any = None
        self._closing: Any = None
        self._ended: Any = None

    def _forked(self) -> None:
        self._begin_anew()

    # --- The loop beside the requests

    def start(self) -> None:
        """Begin to send what is new, if that has not begun."""
        if not has_lasting_hub():
            return
        closing, ended = make_event(), make_event()
        with self._lock:
            if self.is_started:
                return
            self._closing, self._ended, self.is_started = closing, ended, True
        try:
            loop = partial(_loop, weakref.ref(self), closing, ended)
            run_beside(loop, name="shared-errors")
        except RuntimeError as error:
            # There are too many threads, or the process ends. The next error tries again.
            self.is_started = False
            _log.debug("the errors of this process are not shared yet: %s", error)
            return
        atexit.register(_close_at_exit, weakref.ref(self))

    def turn(self, until: float) -> None:
        """Send what is new, and have a look now and then.

        Args:
            until: `time.monotonic()` after which no further batch is sent.
        """
        is_due = time.monotonic() >= self._next_look
        if not (is_due or self._batch or self._recent.untaken()):
            return
        try:
            self.push(until)
            self._is_away = False
        except MusetError as error:
            if not self._is_away:
                _log.warning("the errors of this process are not shared for now: %s", error)
            self._is_away = True

    def close(self) -> None:
        """Send what is new for some time, at the end of the process."""
        if self.is_started:
            self._closing.set()
            self._ended.wait(_EXIT_S + _SLACK_S)

    # --- Sending

    def push(self, until: float = math.inf) -> None:
        """Send what is new.

        Args:
            until: `time.monotonic()` after which no further batch is sent.

        Raises:
            MusetError: Redis did not take it; it is kept and sent again.
        """
        with self._in_turn():
            self._next_look = time.monotonic() + _LOOK_S
            # Once more where Redis has lost what it had: then all is new.
            if not self._send_all(until):
                self._send_all(until)

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        with self._lock:
            if self._turns is None:
                # Made here, for it must be gevent's where gevent has patched.
                self._turns = threading.Lock()
        if not self._turns.acquire(timeout=_TURN_S):
            raise OverloadedError("what is new takes long to be sent")
        try:
            yield
        finally:
            self._turns.release()

    def _send_all(self, until: float) -> bool:
        # What may have arrived already; else a look.
        if (self._batch or self._epoch) and not self._send():
            return False
        for batch in self._batches(until):
            self._number += 1
            self._batch = batch
            if not self._send():
                return False
        return True

    def _send(self) -> bool:
        """Send the batch; False if Redis has lost what it had, and nothing was added."""
        epoch = self._redis.script(
            _ADD,
            [self._place + name for name in ("seen", "epoch", f"done:{self._process}")],
            [
                self._place, self._epoch, secrets.token_hex(8), self._number, _KEEP_S, self._keep,
                KEPT_OF_EACH, *self._batch,
            ],
        )  # fmt: skip
        self._batch = []
        if epoch is None:
            self._epoch = b""
            self._recent.give_back()
            return False
        self._epoch = epoch
        return True

    def _batches(self, until: float) -> Iterator[list[Any]]:
        batch: list[Any] = []
        size = 0
        for fingerprint in self._recent.untaken():
            if time.monotonic() >= until:
                break
            noted = self._recent.take(fingerprint)
            if noted is None:
                continue
            words = _words(noted)
            batch += words
            size += sum(len(word) for word in words if isinstance(word, bytes))
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    # --- Reading

    def newest(self) -> list[dict[str, Any]]:
        """What all processes have, as `RecentErrors.newest` has it, this one's to the last.

        Raises:
            MusetError: Redis does not answer.
        """
        self.push()
        found: dict[bytes, dict[str, Any]] = {}
        unreadable: set[bytes] = set()
        count = 0
        while count < self._keep and (rows := self._page(count)):
            count += len(rows)
            for row in rows:
                try:
                    found[row[0]] = _error_of(*row)
                except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
                    unreadable.add(row[0])
        if unreadable:
            _log.warning(
                "%d kept errors below %s cannot be read and are left out",
                len(unreadable),
                self._place,
            )
        return list(found.values())

    def _page(self, count: int) -> list[Any]:
        """Some that follow on the first ones; what happens meanwhile may move one into both."""
        rows: list[Any] = self._redis.script(
            _READ,
            [self._place + "seen"],
            [
                self._place, count, self._keep - count, KEPT_OF_EACH, _READ_BYTES, _PAGE_BYTES,
                _KEEP_S,
            ],
        )  # fmt: skip
        return rows


def _loop(shared_of: "weakref.ref[SharedErrors]", closing: Any, ended: Any) -> None:
    """Runs as long as there is what it sends for, which it does not keep."""
    is_last = False
    try:
        while not is_last:
            shared = shared_of()
            if shared is None:
                return
            is_last = closing.is_set()
            try:
                shared.turn(time.monotonic() + _EXIT_S if is_last else math.inf)
            except Exception:  # noqa: BLE001 - it is said, and the loop goes on
                _log.exception("some errors of this process were not shared")
            del shared
            closing.wait(_PAUSE_S)
    finally:
        ended.set()
        shared = shared_of()
        if shared is not None and not is_last:
            shared.is_started = False  # cut off; the next error begins anew


def _close_at_exit(shared_of: "weakref.ref[SharedErrors]") -> None:
    shared = shared_of()
    if shared is not None:
        shared.close()


# --- What is sent and what is read ----------------------------------------------------------------


def _words(noted: Noted) -> list[Any]:
    """What the script takes for a fault; only redacted texts."""
    text = {
        name: _cut(value, _TRACEBACK_BYTES if name == "traceback" else _TEXT_BYTES)
        for name, value in noted.fault.items()
    }
    moment, _ = noted.last[-1]
    words = [text["fingerprint"], noted.count, _micros(moment), _json(text), len(noted.last)]
    for moment, occurrence in noted.last:
        words += [_micros(moment), _json(_shown(moment, occurrence))]
    return words


def _shown(moment: float, occurrence: Occurrence) -> dict[str, Any]:
    shown = {name: _cut(value, _TEXT_BYTES) for name, value in occurrence.shown().items()}
    size = len(_json(shown["details"]))
    if size > _DETAILS_BYTES:
        shown["details"] = {"…": f"{size} bytes"}
    return shown | {"at": iso(moment)}


def _cut(value: Any, most_bytes: int) -> Any:
    if not isinstance(value, str):
        return value
    data = value.encode("utf-8", "replace")
    return value if len(data) <= most_bytes else data[:most_bytes].decode("utf-8", "ignore") + "…"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _micros(moment: float) -> int:
    return round(moment * 1_000_000)


def _error_of(
    fingerprint: bytes, micros: bytes, fault: bytes, count: bytes, newest: list[bytes]
) -> dict[str, Any]:
    """What is listed of a fault; one of several errors if somebody else has written it."""
    error = _checked(json.loads(fault), _FAULT)
    if error["fingerprint"] != fingerprint.decode() or int(count) < 1 or not newest:
        raise ValueError("the parts of this entry do not belong together")
    return error | {
        "count": int(count),
        "last_seen": iso(float(micros) / 1_000_000),
        "newest": [_occurrence_of(one) for one in newest],
    }


def _occurrence_of(text: bytes) -> dict[str, Any]:
    occurrence = _checked(json.loads(text), _OCCURRENCE)
    # Bounded in depth, and nothing but what JSON knows.
    return occurrence | {"details": redact(occurrence["details"])}


def _checked(value: Any, shape: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    if not all(isinstance(value[name], kind) for name, kind in shape.items()):
        raise TypeError("a part of this entry is of another kind")
    return {name: value[name] for name in shape}
