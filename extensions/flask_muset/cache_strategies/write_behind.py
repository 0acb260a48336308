"""Write-behind: a write is accepted at the speed of the cache and brought to its source later.

    write ── journal and cache agree, durable ──> True ── later, by any process ──> the source
          └─ no room ──> the caller writes the source itself, in the order of the key
          └─ the journal is away ──> False, nothing has changed

Until the source has a value the journal answers for it, whatever the cache has lost.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from flask_muset.cache_strategies.attempts import describe
from flask_muset.cache_strategies.codec import Codec, Unreadable
from flask_muset.cache_strategies.drain import Drain
from flask_muset.cache_strategies.entry import NEVER, Entry
from flask_muset.cache_strategies.envelope import unpack
from flask_muset.cache_strategies.journal import Claim, Journal, Record
from flask_muset.cache_strategies.stores import Tell
from flask_muset.cache_strategies.writers import WriteContext, Writer, Writers
from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import CacheUnavailable, MusetError, OperationTimeoutError
from flask_muset.locks import give_lock

__all__ = ["Gone", "OutOfTurn", "WriteBehind"]

_log = logging.getLogger(__name__)

#: How long a call waits between two looks at whether it is its turn, at first and at most.
_SHORTEST_WAIT_S = 0.002
_LONGEST_WAIT_S = 0.05


class OutOfTurn(CacheUnavailable):
    """There is no room, and nobody can tell what waits: nothing was written."""


class Gone(Entry):
    """Stands for a value whose delete the source has not got yet."""

    __slots__ = ()


class WriteBehind:
    """What one app does with a journal.

    Args:
        journal: Where writes wait.
        writers: Who writes them.
        drain: Writes them beside the requests.
        codec: Makes bytes of values.
        tell: Counts `write_behind`: `ok`, `through` for what the caller wrote, `unavailable`.
        delay_s: Seconds for which a write waits for newer ones of its key.
        drains: Whether this process writes what waits.
        require_durable: Whether writes are refused where an accepted one could be lost.
        owned_only: Whether the keys that no writer owns are elsewhere, and so are never accepted.
    """

    _lock: Any

    def __init__(
        self,
        journal: Journal,
        writers: Writers,
        drain: Drain,
        codec: Codec,
        *,
        tell: Tell,
        delay_s: float = 0.1,
        drains: bool = True,
        require_durable: bool = False,
        owned_only: bool = False,
    ) -> None:
        self.journal = journal
        self.writers = writers
        self.drain = drain
        self.attempts = drain.attempts
        self._codec = codec
        self._tell = tell
        self._delay_s = delay_s
        self._drains = drains
        self._require_durable = require_durable
        self._owned_only = owned_only
        self._is_used = False
        self._risks: list[str] | None = None
        self._warned: set[str] = set()
        give_lock(self)

    @property
    def is_used(self) -> bool:
        """Whether something may wait that is to be read and written."""
        if not self._is_used:
            self._is_used = bool(self.writers) or self.journal.is_used()
        return self._is_used

    def concerns(self, key: str) -> bool:
        """Whether something of a key may wait."""
        return self._is_accepted_here(key) and self.is_used

    def _is_accepted_here(self, key: str) -> bool:
        return not self._owned_only or self.writers.owner(key) is not None

    def begin(self) -> None:
        """Write what was left, in a process that serves."""
        if self._is_used or self.writers:
            self.start()

    def start(self) -> None:
        """Begin to write what waits, in this process."""
        if self._drains:
            self.drain.start()

    def _forked(self) -> None:
        self._risks = None

    # --- Accepting

    def accept(self, key: str, entry: Entry | None, writer: Writer | None) -> bool | None:
        """Accept a write.

        Args:
            key: Of the value.
            entry: What the cache keeps; None for a delete.
            writer: Who writes it. None takes that of what waits; if nothing does, there is nothing
                to be accepted.

        Returns:
            True: it is durable. False: the journal is away, and nothing has changed. None: there is
            no room, or nothing to be accepted (see `next_writer`); nothing has changed.

        Raises:
            CacheUnavailable: It could be lost, and `require_durable` forbids that.
            ValueError: No writer owns the key, and `owned_only` needs one.
        """
        if not self._is_accepted_here(key):
            raise ValueError(
                f"{key!r} cannot be written behind: where the journal has a Redis of its own, a "
                "writer's patterns say which keys are there, and none matches; add one to it, "
                'such as @cache.writer("a.name", patterns=["user:*"]).'
            )
        self._is_used = True
        self.start()
        deadline.check()
        try:
            risks = self._look_at_risks() if writer is not None else []
            if not (risks and self._require_durable):
                seq = self._append(key, entry, writer)
        except MusetError as error:
            self._risks = None
            deadline.check()  # where it was the caller's own time that was up
            _log.debug("%r was not accepted: %s", key, error)
            self._tell("write_behind", "unavailable", None)
            return False
        if risks and self._require_durable:
            raise CacheUnavailable(f"nothing is written behind: {' '.join(risks)}")
        if not seq:
            return None
        self._tell("write_behind", "ok", None)
        self.drain.wake()
        return True

    def _append(self, key: str, entry: Entry | None, writer: Writer | None) -> int | None:
        append = partial(
            self.journal.append,
            key,
            entry,
            writer=None if writer is None else writer.name,
            coalesces=writer is None or writer.coalesces,
            delay_s=self._delay_s,
        )
        if writer is not None and not writer.is_homely:
            return append()
        functions, seq = self.attempts.functions, None
        if writer is not None:
            # What only this process can write it has to write, and others must know that it lives.
            self.drain.start()
            self.drain.beat(first=True)
            append = partial(append, home=self.drain.home)
        functions.expect(key)
        try:
            seq = append()
        finally:
            functions.arrived(key, seq, writer)
        return seq

    def _look_at_risks(self) -> list[str]:
        """What could lose a write; said once, and looked at again after the journal was away."""
        if self._risks is None:
            self._risks = self.journal.risks()
            for risk in self._risks:
                if risk not in self._warned:
                    self._warned.add(risk)
                    _log.warning("write-behind: %s", risk)
        return self._risks

    # --- In the caller's time

    def next_writer(self, key: str) -> Writer | None:
        """Who writes the last of what waits of a key; None if nothing does."""
        record = self.journal.newest(key)
        return None if record is None else self.attempts.writer_of(record)

    def write_now(self, key: str, entry: Entry | None, writer: Writer, seq: int) -> None:
        """Write a value to its source in the caller's time.

        Args:
            key: Of the value.
            entry: The value; None for a delete.
            writer: Who writes it.
            seq: That `turn` has given.

        Raises:
            Exception: What the writer has raised.
        """
        value = None if entry is None else self._codec.decode(entry.payload)
        context = WriteContext(key, seq, f"{key}:{seq}", 1, entry is None)
        with deadline(self.attempts.timeout_s):
            writer.write([(value, context)])
        self._tell("write_behind", "through", None)

    @contextmanager
    def turn(self, key: str, writer: Writer | None) -> Iterator[int]:
        """Have a key's turn: nothing older is written after what is written within.

        What waits is written first, but for what the block takes the place of: that is given up
        once the block has ended well.

        Args:
            key: Which.
            writer: Who writes within, and takes the place of its own writes if they coalesce. None:
                of all that coalesce.

        Yields:
            The sequence of what is written within.

        Raises:
            OperationTimeoutError: Somebody else has had the key's turn for too long.
            OutOfTurn: The journal is away, and what waits there has to go first.
            Exception: What a writer of something older has raised.
        """
        claim = self._hold(key)
        if claim is None:
            if writer is not None and not writer.coalesces:
                # An entry of a ledger does not make up for those before it.
                raise OutOfTurn(f"the journal is away, and may have more of {key!r}")
            yield from self._out_of_turn(key)
            return
        while True:
            written, done = 0, None
            try:
                for record in _older(claim, writer):
                    self.attempts.write_here(record)
                    written = record.seq
                if claim.is_whole:
                    yield claim.seq
                    written = claim.records[-1].seq if claim.records else 0
                    done = "" if writer is None else writer.name if writer.coalesces else None
                    return
            finally:
                self.drain.settle(claim, written, supersedes=done)
            rest = self._hold(key)
            if rest is None:
                raise OutOfTurn(f"the journal is away, and has more of {key!r}")
            claim = rest

    def _out_of_turn(self, key: str) -> Iterator[int]:
        """Let a key be written while the journal is away."""
        began = self.journal.now()
        yield round(began * 1e6)
        try:
            self.journal.supersede(key, began)
        except MusetError as error:
            _log.debug("the journal hears later that %r was written: %s", key, error)

    def _hold(self, key: str) -> Claim | None:
        """Wait for a key's turn; None if the journal is away."""
        # Real time, whatever a test has made of the clock: somebody works meanwhile.
        until, pause_s = time.monotonic() + self.attempts.timeout_s, _SHORTEST_WAIT_S
        while True:
            try:
                claim = self.journal.hold(key)
            except MusetError as error:
                deadline.check()  # where it was the caller's own time that was up
                _log.debug("%r is written without its turn: %s", key, error)
                return None
            if claim is not None:
                self.drain.keep([claim])
                return claim
            deadline.check()
            if time.monotonic() >= until:
                raise OperationTimeoutError(
                    f"{key!r} is being written for {self.attempts.timeout_s:g} s by somebody else"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_WAIT_S)

    def requeue(self, id: str) -> str | None:  # noqa: A002 - the field's name
        """Let a dead letter be written again; its key, None if there was none."""
        key = self.journal.key_of(id)
        if key is None or not self.journal.requeue(id):
            return None
        self._is_used = True
        self.begin()
        self.drain.wake()
        return key

    def drop(self, id: str) -> str | None:  # noqa: A002
        """Forget a dead letter; its key, None if there was none."""
        key = self.journal.key_of(id)
        return key if key is not None and self.journal.drop(id) else None

    # --- Reading

    def pending(self, key: str) -> Entry | None:
        """What was written and is not in the source yet: an entry, a `Gone`, or None."""
        try:
            record = self.journal.newest(key)
            return None if record is None else self._entry(record)
        except MusetError as error:
            _log.debug("what waits of %r is not known: %s", key, error)
            self._tell("get", "unavailable", None)
            return None

    def pending_of(self, keys: Sequence[str]) -> dict[str, Entry]:
        """The same for those of several keys of which something waits."""
        if not keys:
            return {}
        try:
            found = {key: self.pending(key) for key in self.journal.waiting(keys)}
        except MusetError as error:
            _log.debug("what waits of %d keys is not known: %s", len(keys), error)
            self._tell("get", "unavailable", None)
            return {}
        return {key: entry for key, entry in found.items() if entry is not None}

    def _entry(self, record: Record) -> Entry | None:
        written_at = SYSTEM.now() - max(0.0, SYSTEM.wall() - record.accepted_at)
        if record.deleted:
            return Gone(self._codec.encode(None), created_at=written_at, is_negative=True)
        try:
            entry = unpack(record.data, 0)
        except Unreadable:
            self._tell("get", "unreadable", None)
            return None
        entry.created_at = written_at
        entry.fresh_until = entry.gone_at = NEVER
        return entry

    def explain(self, key: str) -> dict[str, Any]:
        """What waits of a key, for people."""
        try:
            return self.journal.explain(key)
        except MusetError as error:
            return {"unknown": describe(error)}


def _older(claim: Claim, writer: Writer | None) -> tuple[Record, ...]:
    """What is to be written before something new of a writer is; None takes the place of all."""

    def gives_way(record: Record) -> bool:
        is_same = writer is None or (writer.coalesces and record.writer == writer.name)
        return record.coalesces and is_same

    kept = [index for index, record in enumerate(claim.records) if not gives_way(record)]
    return claim.records[: kept[-1] + 1 if kept else 0] if claim.is_whole else claim.records
