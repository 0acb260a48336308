"""What brings the records of a journal to their sources.

Each process claims keys that are due, lets their writers run beside its requests, and settles. A
key is written by one process at a time and in the order of its records; one that fails waits by
itself and holds up nobody else.
"""

import atexit
import contextvars
import logging
import secrets
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from flask_muset.cache_strategies.attempts import Attempts
from flask_muset.cache_strategies.journal import Claim, Failure, Journal, Record, State
from flask_muset.cache_strategies.writers import UnknownWriter, Writer
from flask_muset.clock import SYSTEM
from flask_muset.errors import MusetError
from flask_muset.locks import give_lock, has_lasting_hub, is_patched, make_event, run_beside

__all__ = ["Drain"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at a journal in which nothing is due, for what other processes left.
_POLL_S = 1.0
#: For a key that is due and was not to be had.
_MOMENT_S = 0.02
#: Where all that is due is for writers that have all the places that they may have: how long until
#: the next look, how many keys it takes, and how long these wait, so that others come before them.
_CROWDED_S = 0.1
_CROWDED_AGAIN_S = 1.0
_WIDE = 32
#: Between two tries to settle a claim.
_AGAIN_S = 0.5
#: How much longer the end of a process waits for writers that are at it, and then for the loop.
_SLACK_S = 0.5


class _Job:
    """What one writer is called for next.

    Attributes:
        writer: Takes the first records of all claims at once; None if each is written by itself.
        claims: One, or several of a batch.
        name: Of the writer of the first record.
    """

    __slots__ = ("claims", "name", "writer")

    def __init__(self, writer: Writer | None, claims: list[Claim]) -> None:
        self.writer = writer
        self.claims = claims
        records = claims[0].records
        self.name = records[0].writer if records else ""


class Drain:
    """Writes what a journal has, in this process.

    Args:
        journal: Whose records.
        attempts: Tries to write them.
        publish: Is told how much there is, about once a second.
        at_once: How many writers run at the same time at most, at least 1.
        lease_s: Of the journal.
        exit_s: Seconds that the end of the process waits for what can still be written.
    """

    _lock: Any

    def __init__(
        self,
        journal: Journal,
        attempts: Attempts,
        *,
        publish: Callable[[State], None],
        at_once: int = 8,
        lease_s: float = 10.0,
        exit_s: float = 5.0,
    ) -> None:
        self.attempts = attempts
        self._journal = journal
        self._publish = publish
        self._at_once = at_once
        self._pause_s = lease_s / 3
        self.exit_s = exit_s
        self._begin_anew()
        give_lock(self)

    def _begin_anew(self) -> None:
        #: Token of this process, for functions that only it has.
        self.home = secrets.token_hex(8)
        self._jobs: deque[_Job] = deque()
        self._running: dict[str, int] = {}
        self._busy = 0
        self._held: dict[str, Claim] = {}
        #: For each flush that goes on the keys that have failed since it began.
        self._flushes: list[set[str]] = []
        #: Claims that the journal could not be told the end of.
        self._unsettled: dict[str, partial[None]] = {}
        self._is_renewing = self._is_started = self._is_away = self._is_crowded = False
        self._closes_at: float | None = None
        self._next_beat = self._next_state = 0.0
        self._wake: Any = None
        self._ended: Any = None

    def _forked(self) -> None:
        self._begin_anew()
        self.attempts.begin_anew()

    # --- The loop beside the requests

    def start(self) -> None:
        """Begin to write in this process, if that has not begun."""
        if self._is_started or not has_lasting_hub():
            return
        with self._lock:
            if self._is_started or self._closes_at is not None:
                return
            self._is_started = True
        self._wake, self._ended = make_event(), make_event()
        try:
            loop = partial(_loop, weakref.ref(self), self._wake, self._ended)
            run_beside(loop, name="write-behind")
        except BaseException:
            self._is_started = False
            raise
        atexit.register(_close_at_exit, weakref.ref(self))

    def wake(self) -> None:
        """Something is due."""
        if self._wake is not None:
            self._wake.set()

    def turn(self) -> float | None:
        """Claim what is due; the seconds until the next look, None if there will be none."""
        closes_at, due_s = self._closes_at, None
        self.keep(())
        try:
            if closes_at is not None:
                self._finish(closes_at)
                return None
            self._tell_state()
            claimed, due_s, _ = self._fill(early=False, is_wide=self._is_crowded)
            self._is_away = False
        except MusetError as error:
            if not self._is_away:
                self._is_away = True
                _log.warning("the journal of write-behind cannot be read: %s", error)
            return None if closes_at is not None else _POLL_S
        if self._is_crowded:
            return _CROWDED_S
        if claimed and self._busy < self._at_once:
            return 0.0
        return _POLL_S if due_s is None else min(max(due_s, _MOMENT_S), _POLL_S)

    def _tell_state(self) -> None:
        # First of all: without a sign of life others give up what only this process can write.
        self.beat()
        now = SYSTEM.now()
        if now >= self._next_state:
            self._next_state = now + _POLL_S
            self._publish(self._journal.state())

    def beat(self, *, first: bool = False) -> None:
        """Say that this process lives, as long as it has functions that no other one has.

        Args:
            first: Whether it is about to have one.
        """
        now, functions = SYSTEM.now(), self.attempts.functions
        if now < self._next_beat or not (first or functions):
            return
        self._journal.beat(self.home)
        self._next_beat = now + self._pause_s
        for key in functions.keys:
            # What others have superseded or dropped.
            if self._journal.newest(key) is None:
                functions.forget(key)

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
        failed: set[str] = set()
        self._flushes.append(failed)
        try:
            return self._flush(SYSTEM.now() + timeout_s, failed, beside=beside)
        finally:
            self._flushes.remove(failed)

    def _flush(self, until: float, failed: set[str], *, beside: bool) -> bool:
        early = True
        while True:
            claimed, due_s, is_all = self._fill(early=early, until=None if beside else until)
            # Once to each key before its time: one that has failed since waits for it.
            early = early and not is_all and failed.isdisjoint(claimed)
            is_idle = not claimed and not self._busy
            if is_idle and self._journal.state().pending == 0:
                return True
            left_s = until - SYSTEM.now()
            if left_s <= 0:
                return False
            if not claimed or self._busy >= self._at_once:
                self._wait(left_s, due_s)

    def _wait(self, left_s: float, due_s: float | None) -> None:
        """Until a writer of this process may have ended, or something is due."""
        if self._busy:
            time.sleep(min(left_s, _CROWDED_S if self._is_crowded else 0.005))
        else:
            SYSTEM.sleep(min(left_s, 0.05 if due_s is None else max(due_s, 0.001), _POLL_S))

    def close(self, timeout_s: float) -> None:
        """Write what there is for some time, then leave the rest to other processes."""
        with self._lock:
            is_first = self._is_started and self._closes_at is None
            self._closes_at = SYSTEM.now() + timeout_s
        if is_first:
            self.wake()
            # The loop writes, so that a writer that hangs does not keep the process from ending.
            self._ended.wait(timeout_s + 2 * _SLACK_S)

    def _finish(self, closes_at: float) -> None:
        left_s = closes_at - SYSTEM.now()
        try:
            if left_s > 0:
                # Late in the life of a process no thread can be started.
                self.flush(left_s, beside=is_patched())
            # What is being written is written again unless its claim is settled.
            until = SYSTEM.now() + _SLACK_S
            while self._busy and SYSTEM.now() < until:
                time.sleep(0.005)
        finally:
            while self._jobs:
                self._give_back([self._jobs.popleft()])

    # --- Claiming

    def _fill(
        self, *, early: bool, until: float | None = None, is_wide: bool = False
    ) -> tuple[list[str], float | None, bool]:
        """Claim as many keys as there is room for, and let them be written.

        Args:
            early: Whether also those that are not due.
            until: Write them here, up to this moment; None for beside.
            is_wide: Whether to look at more keys than there is room for.

        Returns:
            The keys; the seconds until others are due, None for never; whether these were all.
        """
        free = self._at_once - self._busy
        if free <= 0:
            return [], None, False
        claims: list[Claim] = []
        try:
            due_s, is_all = self._claim(claims, max(free, _WIDE) if is_wide else free, early=early)
            jobs, crowded = self._sorted_out(self._grouped(claims))
        except BaseException:
            for claim in claims:
                self.settle(claim)
            raise
        # A batch takes the records of several keys, of which some were another writer's.
        self._jobs.extend(jobs[:free])
        self._give_back(jobs[free:])
        self._give_back(crowded, _CROWDED_AGAIN_S)
        self._is_crowded = bool(crowded) and not jobs
        if until is not None:
            self._work(until)
        else:
            for _ in jobs[:free]:
                self._spawn()
        keys = [claim.key for job in jobs[:free] for claim in job.claims]
        return keys, due_s, is_all and len(jobs) <= free

    def _sorted_out(self, jobs: list[_Job]) -> tuple[list[_Job], list[_Job]]:
        """Those that may be done now, and those whose writers have all their places."""
        has = {**self._running}
        for job in list(self._jobs):
            has[job.name] = has.get(job.name, 0) + 1
        now: list[_Job] = []
        later: list[_Job] = []
        for job in jobs:
            has[job.name] = has.get(job.name, 0) + 1
            (now if has[job.name] <= self._most_of_one() else later).append(job)
        return now, later

    def _most_of_one(self) -> int:
        """How many places a writer may have; one that hangs must leave some to the others."""
        is_only = sum(1 for _ in self.attempts.writers) < 2
        return self._at_once if is_only else max(1, self._at_once - 1)

    def _claim(self, claims: list[Claim], free: int, *, early: bool) -> tuple[float | None, bool]:
        """Claim keys into a list, for a writer of batches more than one.

        Returns:
            When others are due, and whether there are no more.
        """
        wanted = free
        while True:
            found, due_s = self._journal.claim(wanted, home=self.home, early=early)
            claims += found
            self.keep(found)
            largest = max((self._batch_of(claim) for claim in claims), default=1)
            if len(found) < wanted or wanted > free or largest <= len(claims):
                return due_s, len(found) < wanted
            # Once more, and more than there are places: one of them takes these all.
            wanted = max(largest - len(claims), free + 1)

    def _batch_of(self, claim: Claim) -> int:
        writer = self._batch_writer(claim)
        return 1 if writer is None or writer.batch is None else writer.batch

    def _give_back(self, jobs: Iterable[_Job], pause_s: float = 0.0) -> None:
        for job in jobs:
            for claim in job.claims:
                failure = None
                if pause_s and claim.records:
                    failure = Failure(claim.records[0].seq, "", pause_s=pause_s, counts=False)
                self.settle(claim, 0, failure)

    def _spawn(self) -> None:
        """Begin one more worker, if there is room."""
        with self._lock:
            if self._busy >= self._at_once:
                return
            self._busy += 1
        try:
            run_beside(self._work_beside, name="write-behind-writer")
        except BaseException:
            with self._lock:
                self._busy -= 1
            raise

    def _grouped(self, claims: Iterable[Claim]) -> list[_Job]:
        """One job for each claim, and for a writer of batches one for several."""
        jobs: list[_Job] = []
        groups: dict[str, tuple[_Job, int]] = {}
        for claim in claims:
            writer = self._batch_writer(claim)
            if writer is None:
                jobs.append(_Job(None, [claim]))
                continue
            count = len(_leading(claim, writer))
            job, has = groups.get(writer.name, (None, 0))
            if job is None or has + count > (writer.batch or 1):
                job, has = _Job(writer, [claim]), 0
                jobs.append(job)
            else:
                job.claims.append(claim)
            groups[writer.name] = job, has + count
        return jobs

    def _batch_writer(self, claim: Claim) -> Writer | None:
        if not claim.records:
            return None
        try:
            writer = self.attempts.writers.named(claim.records[0].writer)
        except UnknownWriter:
            return None  # which is said where it is to be written
        return None if writer.batch is None else writer

    # --- Writing

    def _work_beside(self) -> None:
        try:
            self._work()
        finally:
            with self._lock:
                self._busy -= 1
            self.wake()

    def _work(self, until: float | None = None) -> None:
        while until is None or SYSTEM.now() < until:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            with self._lock:
                self._running[job.name] = self._running.get(job.name, 0) + 1
            try:
                self._carry_out(job)
            finally:
                with self._lock:
                    self._running[job.name] -= 1
                    if not self._running[job.name]:
                        del self._running[job.name]

    def _carry_out(self, job: _Job) -> None:
        left = list(job.claims)
        try:
            if job.writer is not None and len(left) > 1:
                self._write_batch(job.writer, left)
            while left:
                self._write(left.pop(0))
        finally:
            for claim in left:
                self.settle(claim)

    def _write(self, claim: Claim) -> None:
        """Write the records of a key one after the other, up to the first that fails."""
        written, failure = 0, None
        try:
            for record, newer in zip(claim.records, (*claim.records[1:], None), strict=True):
                if written and (record.home not in ("", self.home) or self._is_late()):
                    break  # it is left to its home, as the first one of a key is, or to the next
                if newer is None or not _takes_place(newer, record):
                    failure = self.attempts.write(record)
                if failure is not None:
                    break
                written = record.seq
        finally:
            self.settle(claim, written, failure)

    def _write_batch(self, writer: Writer, claims: list[Claim]) -> None:
        """Write the first records of several keys at once; those that were leave the list."""
        picked = [_leading(claim, writer) for claim in claims]
        if self.attempts.write_batch(writer, [record for some in picked for record in some]):
            for some in picked:
                self.settle(claims.pop(0), some[-1].seq)

    # --- Claims that this process has

    def keep(self, claims: Iterable[Claim]) -> None:
        """Let claims last until they are settled."""
        for claim in claims:
            self._held[claim.token] = claim
        if not has_lasting_hub():
            return  # the loop's next turn sees to it
        with self._lock:
            if self._is_renewing or not self._held:
                return
            self._is_renewing = True
        try:
            run_beside(self._renew, name="write-behind-claims")
        except RuntimeError as error:
            # The process ends and starts no more threads; what it does now takes less than a lease.
            self._is_renewing = False
            _log.debug("claims are not renewed: %s", error)

    def settle(
        self,
        claim: Claim,
        written: int = 0,
        failure: Failure | None = None,
        supersedes: str | None = None,
    ) -> None:
        """End a claim; while the journal cannot be told, the claim is kept and told again.

        Args:
            claim: Which.
            written: See `Journal.settle`, as for the others.
            failure: See there.
            supersedes: See there.
        """
        end = partial(self._settle, claim, written, failure, supersedes)
        try:
            # Without the caller's deadline, which may be up.
            contextvars.Context().run(end)
        except Exception:  # noqa: BLE001 - it is said, and the claim ends by itself
            self._held.pop(claim.token, None)
            _log.exception("%r may be written again, its claim was not settled", claim.key)
        except BaseException:
            # Cut off in the middle. Once more, where whoever cuts this one off cannot reach it.
            run_beside(end, name="write-behind-claims")
            raise

    def _settle(
        self, claim: Claim, written: int, failure: Failure | None, supersedes: str | None
    ) -> None:
        try:
            is_held = self._journal.settle(
                claim, written=written, failure=failure, supersedes=supersedes
            )
        except MusetError as error:
            _log.debug("the claim of %r is settled later: %s", claim.key, error)
            end = partial(self._settle, claim, written, failure, supersedes)
            self._unsettled[claim.token] = end
            self.keep([claim])
            return
        self._held.pop(claim.token, None)
        if not is_held:
            _log.warning("the claim of %r had ended, it may be written again", claim.key)
            return
        if failure is not None and failure.counts:
            for failed in self._flushes:
                failed.add(claim.key)
        gone = written if failure is None or not failure.is_final else failure.seq
        if gone:
            self.attempts.functions.forget(claim.key, gone)

    def _renew(self) -> None:
        renewed_at = time.monotonic()
        try:
            while True:
                # Real time, whatever a test has made of the clock.
                time.sleep(min(_AGAIN_S, self._pause_s))
                for token in list(self._unsettled):
                    self._unsettled.pop(token)()
                with self._lock:
                    if not self._held:
                        self._is_renewing = False
                        return
                if time.monotonic() >= renewed_at + self._pause_s:
                    renewed_at = time.monotonic()
                    self._renew_all()
        except BaseException:
            self._is_renewing = False
            raise

    def _renew_all(self) -> None:
        try:
            self._journal.renew(list(self._held.values()))
        except MusetError as error:
            _log.debug("claims could not be renewed: %s", error)

    def _is_late(self) -> bool:
        """Whether the process ought to have ended."""
        return self._closes_at is not None and SYSTEM.now() >= self._closes_at

    @property
    def is_closing(self) -> bool:
        """Whether it is to write no more."""
        return self._closes_at is not None


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


def _loop(drain_of: "weakref.ref[Drain]", wake: Any, ended: Any) -> None:
    """Runs as long as there is the drain, which it does not keep."""
    while True:
        drain = drain_of()
        if drain is None:
            return
        try:
            wait_s = drain.turn()
        except Exception:  # noqa: BLE001 - it is said, and the loop goes on
            _log.exception("write-behind goes on in a moment")
            wait_s = None if drain.is_closing else _POLL_S
        if wait_s is None:
            ended.set()
            return
        del drain
        wake.wait(wait_s)
        wake.clear()


def _close_at_exit(drain_of: "weakref.ref[Drain]") -> None:
    drain = drain_of()
    if drain is not None:
        drain.close(drain.exit_s)
