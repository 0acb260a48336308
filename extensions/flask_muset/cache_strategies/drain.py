"""What brings the records of a journal to their sources.

Each process claims keys that are due, calls their writers beside its requests, and settles. A key is
written by one process at a time and in the order of its records; one that fails waits by itself and
holds up nobody else.
"""

import atexit
import logging
import secrets
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from flask_muset import context
from flask_muset.cache_strategies.codec import Codec
from flask_muset.cache_strategies.envelope import unpack
from flask_muset.cache_strategies.journal import Claim, Failure, Journal, Record, State
from flask_muset.cache_strategies.stores import Tell
from flask_muset.cache_strategies.writers import UnknownWriter, WriteContext, Writer, Writers
from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import MusetError
from flask_muset.locks import give_lock, is_patched, make_event, run_beside
from flask_muset.redaction import redact_text
from flask_muset.translate import translate

__all__ = ["Drain", "describe", "write_context"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at a journal in which nothing is due, for what other processes left.
_POLL_S = 1.0
#: Seconds before the second attempt; they double up to the longest, and up to half is chance.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
#: A source is away once so many keys in a row have failed by errors that may be tried again. From
#: then on it is tried once in a while, and no record uses up its attempts.
_KEYS_AWAY = 5
_PROBE_S = 0.5
_AWAY_PAUSE_S = 2.0
#: For a record whose function is on its way into this process's table, and for a key that is due
#: and was not to be had.
_MOMENT_S = 0.02
_ERROR_CHARACTERS = 1000
#: Of a record whose writer is not known here, and seconds for which it is waited for at least: a
#: newer version of the app may know it.
_MOST_ATTEMPTS = 5
_DEPLOY_S = 600.0
#: Seconds for which an error that may be tried again kills nothing: a database restarts in less.
_RESTART_S = 60.0


def write_context(record: Record) -> WriteContext:
    """What the writer of a record is told."""
    token = f"{record.key}:{record.seq}"
    return WriteContext(record.key, record.seq, token, record.attempts + 1, record.deleted)


def describe(error: BaseException) -> str:
    """An exception in a line for people, without what looks like a secret."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return redact_text(text)[:_ERROR_CHARACTERS]


class _NotYet(Exception):  # noqa: N818 - nobody else sees it
    """The function of a record is not in its table yet."""


class _Functions:
    """Functions that only this process has, by the record that is theirs."""

    def __init__(self) -> None:
        self._arriving: dict[str, int] = {}
        self._by_key: dict[str, dict[int, Writer]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, record: Record) -> Writer | None:
        """The function of a record; raises _NotYet."""
        found = self._by_key.get(record.key, {}).get(record.seq)
        if found is None and record.key in self._arriving:
            raise _NotYet
        return found

    def expect(self, key: str) -> None:
        """A record of this key is being accepted."""
        self._arriving[key] = self._arriving.get(key, 0) + 1

    def arrived(self, key: str, seq: int | None, writer: Writer) -> None:
        """It was, with this sequence; None or 0 if it was not."""
        if seq:
            self._by_key.setdefault(key, {})[seq] = writer
        self._arriving[key] -= 1
        if not self._arriving[key]:
            del self._arriving[key]

    def forget(self, key: str, seq: int) -> None:
        """The records of a key up to this one are gone."""
        known = self._by_key.get(key)
        if known is None:
            return
        for old in [one for one in known if one <= seq]:
            del known[old]
        if not known:
            self._by_key.pop(key, None)


class _Source:
    """Whether what a writer writes to is there, as far as this process has seen."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failed: set[str] = set()
        self._probe_at = 0.0

    @property
    def is_away(self) -> bool:
        return len(self._failed) >= _KEYS_AWAY

    def may_try(self) -> bool:
        """Whether a record is to be tried now."""
        if not self.is_away:
            return True
        now = SYSTEM.now()
        if now < self._probe_at:
            return False
        self._probe_at = now + _PROBE_S
        return True

    def answered(self) -> None:
        if self.is_away:
            _log.info("the source of writer %r answers again", self._name)
        self._failed.clear()

    def failed(self, key: str, error: str) -> None:
        if len(self._failed) == _KEYS_AWAY:
            return
        self._failed.add(key)
        if self.is_away:
            _log.warning("the source of writer %r is away: %s", self._name, error)


class Drain:
    """Writes what a journal has, in this process.

    Args:
        journal: Whose records.
        writers: Who writes them.
        codec: Makes values of bytes.
        run: Calls a function in the app's context.
        tell: Counts `write_behind_write`: `ok`, `error`, `dead`, with its seconds.
        publish: Is told how much there is, about once a second.
        at_once: How many writers run at the same time at most, at least 1.
        timeout_s: Seconds that one attempt may take; where gevent runs it is cut off then.
        lease_s: Of the journal.
        exit_s: Seconds that the end of the process waits for what can still be written.
    """

    _lock: Any

    def __init__(
        self,
        journal: Journal,
        writers: Writers,
        codec: Codec,
        *,
        run: Callable[[Callable[[], None]], None],
        tell: Tell,
        publish: Callable[[State], None],
        at_once: int = 8,
        timeout_s: float = 30.0,
        lease_s: float = 10.0,
        exit_s: float = 5.0,
    ) -> None:
        self.exit_s = exit_s
        self._journal = journal
        self._writers = writers
        self._codec = codec
        self._run = run
        self._tell = tell
        self._publish = publish
        self._at_once = at_once
        self.timeout_s = timeout_s
        self._pause_s = lease_s / 3
        #: Is called before keys are claimed; what it raises keeps them from being claimed.
        self.before_claims: Callable[[], None] = _nothing
        self._begin_anew()
        give_lock(self)

    def _begin_anew(self) -> None:
        #: Token of this process, for functions that only it has.
        self.home = secrets.token_hex(8)
        self.functions = _Functions()
        self._sources: dict[str, _Source] = {}
        self._jobs: deque[tuple[Writer | None, list[Claim]]] = deque()
        self._running = 0
        self._held: dict[str, Claim] = {}
        self._is_renewing = self._is_started = self._is_closed = False
        self._is_away = False
        self._next_beat = self._next_state = 0.0
        self._wake: Any = None

    def _forked(self) -> None:
        self._begin_anew()

    # --- The loop beside the requests

    def start(self) -> None:
        """Begin to write in this process, if that has not begun."""
        if self._is_started:
            return
        with self._lock:
            if self._is_started or self._is_closed:
                return
            self._is_started = True
        self._wake = make_event()
        atexit.register(_close_at_exit, weakref.ref(self))
        run_beside(partial(_loop, weakref.ref(self), self._wake), name="write-behind")

    def wake(self) -> None:
        """Something is due."""
        if self._wake is not None:
            self._wake.set()

    def turn(self) -> float:
        """Claim what is due; the seconds until the next look."""
        try:
            claimed, due_s = self._fill(early=False)
            self._tell_state()
            self._is_away = False
        except MusetError as error:
            if not self._is_away:
                self._is_away = True
                _log.warning("the journal of write-behind cannot be read: %s", error)
            return _POLL_S
        if claimed and self._running < self._at_once:
            return 0.0
        return _POLL_S if due_s is None else min(max(due_s, _MOMENT_S), _POLL_S)

    def _tell_state(self) -> None:
        now = SYSTEM.now()
        if self.functions and now >= self._next_beat:
            self._next_beat = now + self._pause_s
            self._journal.beat(self.home)
        if now >= self._next_state:
            self._next_state = now + _POLL_S
            self._publish(self._journal.state())

    # --- On demand

    def flush(self, timeout_s: float, *, beside: bool = True) -> bool:
        """Write all that waits, what is not due too; what fails is tried again when it is due.

        Args:
            timeout_s: Seconds after which it gives up.
            beside: Whether writers run beside the caller.

        Returns:
            Whether nothing waits any more, of any process.

        Raises:
            MusetError: The journal cannot be reached.
        """
        until, early, seen = SYSTEM.now() + timeout_s, True, set[str]()
        while True:
            claimed, due_s = self._fill(early=early, beside=beside)
            early = early and seen.isdisjoint(claimed)
            seen.update(claimed)
            is_idle = not claimed and not self._running
            if is_idle and self._journal.state().pending == 0:
                return True
            left_s = until - SYSTEM.now()
            if left_s <= 0:
                return False
            if not claimed or self._running >= self._at_once:
                self._wait(left_s, due_s)

    def _wait(self, left_s: float, due_s: float | None) -> None:
        """Until a writer of this process may have ended, or something is due."""
        if self._running:
            time.sleep(min(left_s, 0.005))
        else:
            SYSTEM.sleep(min(left_s, 0.05 if due_s is None else max(due_s, 0.001), _POLL_S))

    def close(self, timeout_s: float) -> None:
        """Write what there is for some time, then leave the rest to other processes."""
        with self._lock:
            is_first, self._is_closed = self._is_started and not self._is_closed, True
        if not is_first:
            return
        self.wake()
        try:
            # Late in the life of a process no thread can be started.
            self.flush(timeout_s, beside=is_patched())
        except MusetError as error:
            _log.warning("the journal of write-behind keeps what was not written: %s", error)

    @property
    def is_closed(self) -> bool:
        """Whether it writes no more."""
        return self._is_closed

    # --- Claiming

    def _fill(self, *, early: bool, beside: bool = True) -> tuple[list[str], float | None]:
        """Claim as many keys as there is room for, and let them be written."""
        free = self._at_once - self._running
        if free <= 0:
            return [], None
        self.before_claims()
        limit = max(free, self._writers.largest_batch)
        claims, due_s = self._journal.claim(limit, home=self.home, early=early)
        self.keep(claims)
        self._jobs.extend(self._grouped(claims))
        if beside:
            for _ in range(min(free, len(self._jobs))):
                self._spawn()
        else:
            self._work()
        return [claim.key for claim in claims], due_s

    def _spawn(self) -> None:
        with self._lock:
            self._running += 1
        try:
            run_beside(self._work_beside, name="write-behind-writer")
        except BaseException:
            with self._lock:
                self._running -= 1
            raise

    def _grouped(self, claims: Iterable[Claim]) -> list[tuple[Writer | None, list[Claim]]]:
        """One job for each claim, and for a writer of batches one for several."""
        jobs: list[tuple[Writer | None, list[Claim]]] = []
        groups: dict[str, tuple[list[Claim], int]] = {}
        for claim in claims:
            writer = self._batch_writer(claim)
            if writer is None:
                jobs.append((None, [claim]))
                continue
            count = len(_leading(claim, writer))
            group, has = groups.get(writer.name, ([], 0))
            if not group or has + count > (writer.batch or 1):
                group, has = [], 0
                jobs.append((writer, group))
            group.append(claim)
            groups[writer.name] = group, has + count
        return jobs

    def _batch_writer(self, claim: Claim) -> Writer | None:
        try:
            writer = self._writers.named(claim.records[0].writer) if claim.records else None
        except UnknownWriter:
            return None  # which is said where it is to be written
        return writer if writer is not None and writer.batch is not None else None

    # --- Writing

    def _work_beside(self) -> None:
        try:
            self._work()
        finally:
            with self._lock:
                self._running -= 1
            self.wake()

    def _work(self) -> None:
        while True:
            try:
                writer, claims = self._jobs.popleft()
            except IndexError:
                return
            if writer is None or len(claims) == 1:
                for claim in claims:
                    self._write(claim)
            else:
                self._write_batch(writer, claims)

    def _write(self, claim: Claim) -> None:
        """Write the records of a key one after the other, up to the first that fails."""
        written, failure = 0, None
        try:
            for record, newer in zip(claim.records, (*claim.records[1:], None), strict=True):
                if newer is None or not _takes_place(newer, record):
                    failure = self._attempt(record)
                if failure is not None:
                    break
                written = record.seq
        finally:
            self.settle(claim, written, failure)

    def _write_batch(self, writer: Writer, claims: list[Claim]) -> None:
        """Write the first records of several keys at once; each alone if that fails."""
        left = list(claims)
        try:
            picked = [_leading(claim, writer) for claim in claims]
            records = [record for some in picked for record in some]
            if self._source(writer).may_try() and self._try(writer, records) is None:
                for claim, some in zip(claims, picked, strict=True):
                    left.remove(claim)
                    self.settle(claim, some[-1].seq)
            while left:
                self._write(left.pop(0))
        finally:
            for claim in left:
                self.settle(claim)

    def _attempt(self, record: Record) -> Failure | None:
        """Write one record; what has become of it if that failed."""
        try:
            writer = self._resolve(record)
        except _NotYet:
            return Failure(record.seq, "", pause_s=_MOMENT_S, counts=False)
        except UnknownWriter as error:
            return self._failed(None, record, error)
        source = self._source(writer)
        if not source.may_try():
            pause_s = _AWAY_PAUSE_S * SYSTEM.uniform(0.5, 1.5)
            return Failure(record.seq, "", pause_s=pause_s, counts=False)
        failed = self._try(writer, [record])
        return None if failed is None else self._failed(writer, record, failed)

    def _resolve(self, record: Record) -> Writer:
        if record.home:
            writer = self.functions.get(record) or self._writers.owner(record.key)
            if writer is not None:
                return writer
        return self._writers.named(record.writer)

    def _source(self, writer: Writer) -> _Source:
        return self._sources.setdefault(writer.name, _Source(writer.name))

    def _try(self, writer: Writer, records: Sequence[Record]) -> Exception | None:
        """Call a writer; the exception that it has raised."""
        began = SYSTEM.now()
        try:
            writes = [(self.value(record), write_context(record)) for record in records]
            self._run(partial(self._call, writer, writes))
        except Exception as error:  # noqa: BLE001 - it becomes a failure of the record
            self._tell("write_behind_write", "error", SYSTEM.now() - began)
            return error
        self._source(writer).answered()
        self._tell("write_behind_write", "ok", SYSTEM.now() - began)
        return None

    def _call(self, writer: Writer, writes: Sequence[tuple[Any, WriteContext]]) -> None:
        with deadline(self.timeout_s):
            writer.write(writes)

    def value(self, record: Record) -> Any:
        """What a record holds, None for a delete; raises Unreadable."""
        if record.deleted:
            return None
        return self._codec.decode(unpack(record.data, 0).payload)

    def _failed(self, writer: Writer | None, record: Record, error: Exception) -> Failure:
        text, attempts = describe(error), record.attempts + 1
        known = translate(error, context.translations())
        counts, most, grace_s = self._judge(writer, record.key, known, error, text)
        since = record.first_failed
        failed_for_s = 0.0 if since is None else SYSTEM.wall() - since
        if counts and attempts >= most and failed_for_s >= grace_s:
            self._tell("write_behind_write", "dead", None)
            _log.error(
                "%r is a dead letter after %d attempts", record.key, attempts, exc_info=error
            )
            return Failure(record.seq, text, is_final=True)
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(record.attempts, 10), _LONGEST_PAUSE_S)
        pause_s = max(pause_s * SYSTEM.uniform(0.5, 1), known.retry_after_s or 0.0)
        _log.info("%r is written again in %.1f s: %s", record.key, pause_s, text)
        return Failure(record.seq, text, pause_s=pause_s, counts=counts)

    def _judge(
        self, writer: Writer | None, key: str, known: MusetError, error: Exception, text: str
    ) -> tuple[bool, int, float]:
        """Whether an attempt counts, how many there may be, and for how many seconds at least."""
        if writer is None:
            is_final = isinstance(error, UnknownWriter) and error.is_final
            return True, 1 if is_final else _MOST_ATTEMPTS, 0.0 if is_final else _DEPLOY_S
        source = self._source(writer)
        if not known.retryable:
            source.answered()
            return True, writer.max_attempts, 0.0
        counts = not source.is_away
        source.failed(key, text)
        return counts, writer.max_attempts, _RESTART_S

    # --- In somebody else's time

    def writer_of(self, record: Record) -> Writer:
        """Who writes a record.

        Raises:
            UnknownWriter: Nobody here, or nobody yet.
        """
        try:
            return self._resolve(record)
        except _NotYet:
            raise UnknownWriter("its function is on its way", is_final=False) from None

    def write_here(self, record: Record) -> None:
        """Write a record in the caller's time; raises what its writer raises."""
        self._call(self.writer_of(record), [(self.value(record), write_context(record))])

    # --- Claims that this process has

    def keep(self, claims: Iterable[Claim]) -> None:
        """Let claims last until they are settled."""
        for claim in claims:
            self._held[claim.token] = claim
        with self._lock:
            if self._is_renewing or not self._held:
                return
            self._is_renewing = True
        run_beside(self._renew, name="write-behind-claims")

    def settle(self, claim: Claim, written: int = 0, failure: Failure | None = None) -> None:
        """End a claim; one that cannot be settled ends by itself, and is written again."""
        self._held.pop(claim.token, None)
        try:
            is_held = self._journal.settle(claim, written=written, failure=failure)
        except MusetError as error:
            _log.warning("%r may be written again, its claim was not settled: %s", claim.key, error)
            return
        if not is_held:
            _log.warning("the claim of %r had ended, it may be written again", claim.key)
            return
        gone = written if failure is None or not failure.is_final else failure.seq
        self.functions.forget(claim.key, gone)

    def _renew(self) -> None:
        while True:
            # Real time, whatever a test has made of the clock.
            time.sleep(self._pause_s)
            with self._lock:
                if not self._held:
                    self._is_renewing = False
                    return
            try:
                self._journal.renew(list(self._held.values()))
            except MusetError as error:
                _log.debug("claims could not be renewed: %s", error)


def _nothing() -> None:
    pass


def _takes_place(newer: Record, older: Record) -> bool:
    """Whether the older of two neighbours need not be written."""
    return older.coalesces and newer.coalesces and newer.writer == older.writer


def _leading(claim: Claim, writer: Writer) -> list[Record]:
    """The first records of a claim that a writer takes, the last one of those that coalesce."""
    picked: list[Record] = []
    for record in claim.records:
        if record.writer != writer.name or len(picked) >= (writer.batch or 1):
            break
        if picked and _takes_place(record, picked[-1]):
            picked.pop()
        picked.append(record)
    return picked


def _loop(drain_of: "weakref.ref[Drain]", wake: Any) -> None:
    """Runs as long as there is the drain, which it does not keep."""
    while True:
        drain = drain_of()
        if drain is None or drain.is_closed:
            return
        try:
            wait_s = drain.turn()
        except Exception:
            _log.exception("write-behind goes on in a moment")
            wait_s = _POLL_S
        del drain
        wake.wait(wait_s)
        wake.clear()


def _close_at_exit(drain_of: "weakref.ref[Drain]") -> None:
    drain = drain_of()
    if drain is not None:
        drain.close(drain.exit_s)
