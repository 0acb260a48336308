"""One attempt to write records: who writes them, in what, and what a failure means."""

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flask_muset import context
from flask_muset.cache_strategies.codec import Codec
from flask_muset.cache_strategies.envelope import unpack
from flask_muset.cache_strategies.journal import Failure, Record
from flask_muset.cache_strategies.stores import Tell
from flask_muset.cache_strategies.writers import UnknownWriter, WriteContext, Writer, Writers
from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import MusetError
from flask_muset.locks import give_lock
from flask_muset.redaction import redact_text
from flask_muset.translate import translate

__all__ = ["Attempts", "describe"]

_log = logging.getLogger(__name__)

#: Seconds before the second attempt; they double up to the longest, and up to half is chance.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
#: A source is away once so many keys in a row have failed by errors that may be tried again. From
#: then on it is tried once in a while, and no record uses up its attempts.
_KEYS_AWAY = 5
_PROBE_S = 0.5
_AWAY_PAUSE_S = 2.0
#: For a record whose function is on its way into this process's table.
_MOMENT_S = 0.02
_ERROR_CHARACTERS = 1000
#: Of a record whose writer is not known here, and seconds for which it is waited for at least: a
#: newer version of the app may know it.
_MOST_ATTEMPTS = 5
_DEPLOY_S = 600.0
#: Seconds for which an error that may be tried again kills nothing: a database restarts in less.
_RESTART_S = 60.0


def describe(error: BaseException) -> str:
    """An exception in a line for people, without what looks like a secret."""
    name = type(error).__name__
    try:
        text = " ".join(f"{name}: {error}".split())
    except Exception:  # noqa: BLE001 - an exception whose text cannot be made is one all the same
        text = name
    return redact_text(text)[:_ERROR_CHARACTERS]


class _NotYet(Exception):  # noqa: N818 - nobody else sees it
    """The function of a record is not in its table yet."""


class Functions:
    """Functions that only this process has, by the record that is theirs."""

    _lock: Any

    def __init__(self) -> None:
        self._arriving: dict[str, int] = {}
        self._by_key: dict[str, dict[int, Writer]] = {}
        give_lock(self)

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def keys(self) -> list[str]:
        """Of which there are functions."""
        with self._lock:
            return list(self._by_key)

    def get(self, record: Record) -> Writer | None:
        """The function of a record, or the last one of its name and key; raises _NotYet."""
        with self._lock:
            known = self._by_key.get(record.key, {})
            found = known.get(record.seq)
            if found is None and record.key in self._arriving:
                raise _NotYet
            if found is None:
                same = [writer for writer in known.values() if writer.name == record.writer]
                found = same[-1] if same else None
            return found

    def expect(self, key: str) -> None:
        """A record of this key is being accepted."""
        with self._lock:
            self._arriving[key] = self._arriving.get(key, 0) + 1

    def arrived(self, key: str, seq: int | None, writer: Writer | None) -> None:
        """It was, with this sequence; None or 0 if it was not.

        Args:
            key: Of the record.
            seq: Of the record.
            writer: Its function; None for that of the key's last record, if this process has it.
        """
        with self._lock:
            known = self._by_key.get(key, {})
            if writer is None and known:
                writer = known[max(known)]
            if seq and writer is not None:
                self._by_key.setdefault(key, {})[seq] = writer
            self._arriving[key] -= 1
            if not self._arriving[key]:
                del self._arriving[key]

    def forget(self, key: str, seq: int | None = None) -> None:
        """The records of a key up to this one are gone, or all."""
        with self._lock:
            known = self._by_key.get(key)
            if known is None:
                return
            for old in list(known):
                if seq is None or old <= seq:
                    del known[old]
            if not known:
                del self._by_key[key]


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
        """Whether a record is to be tried now; away, one at a time."""
        if not self.is_away:
            return True
        if SYSTEM.now() < self._probe_at:
            return False
        self._probe_at = float("inf")
        return True

    def ended(self) -> None:
        """What was tried has ended, one way or another."""
        self._probe_at = SYSTEM.now() + _PROBE_S

    def answered(self) -> None:
        if self.is_away:
            _log.info("the source of writer %r answers again", self._name)
        self._failed.clear()

    def failed(self, key: str, error: str) -> None:
        if len(self._failed) >= _KEYS_AWAY:
            return
        self._failed.add(key)
        if len(self._failed) >= _KEYS_AWAY:
            _log.warning("the source of writer %r is away: %s", self._name, error)


class Attempts:
    """Tries to write records, in this process.

    Args:
        writers: Who writes them.
        codec: Makes values of bytes.
        run: Calls a function in the app's context.
        tell: Counts `write_behind_write`: `ok`, `error`, `dead`, with its seconds.
        timeout_s: Seconds that one attempt may take; where gevent runs it is cut off then.
    """

    def __init__(
        self,
        writers: Writers,
        codec: Codec,
        *,
        run: Callable[[Callable[[], None]], None],
        tell: Tell,
        timeout_s: float,
    ) -> None:
        self.writers = writers
        self.timeout_s = timeout_s
        self._codec = codec
        self._run = run
        self._tell = tell
        self.begin_anew()

    def begin_anew(self) -> None:
        """In a forked child: the parent's functions are not its own."""
        self.functions = Functions()
        self._sources: dict[str, _Source] = {}

    # --- Who writes

    def writer_of(self, record: Record) -> Writer:
        """Who writes a record.

        Raises:
            UnknownWriter: Nobody here, or nobody yet.
        """
        try:
            return self._resolve(record)
        except _NotYet:
            raise UnknownWriter("its function is on its way", is_final=False) from None

    def _resolve(self, record: Record) -> Writer:
        if record.home:
            writer = self.functions.get(record) or self.writers.owner(record.key)
            if writer is not None:
                return writer
        return self.writers.named(record.writer)

    # --- Attempts

    def write(self, record: Record) -> Failure | None:
        """Write one record beside its caller; what has become of it if that failed."""
        try:
            writer = self._resolve(record)
        except _NotYet:
            return Failure(record.seq, "", pause_s=_MOMENT_S, counts=False)
        except UnknownWriter as error:
            return self._failed(None, record, error, None)
        if not self._source(writer).may_try():
            pause_s = _AWAY_PAUSE_S * SYSTEM.uniform(0.5, 1.5)
            return Failure(record.seq, "", pause_s=pause_s, counts=False)
        failed = self._try(writer, [record])
        return None if failed is None else self._failed(writer, record, *failed)

    def write_batch(self, writer: Writer, records: Sequence[Record]) -> bool:
        """Write several records at once; whether that has succeeded."""
        return self._source(writer).may_try() and self._try(writer, records) is None

    def write_here(self, record: Record) -> None:
        """Write a record in the caller's time; raises what its writer raises."""
        self.call(self.writer_of(record), [record])

    def call(self, writer: Writer, records: Sequence[Record]) -> None:
        """Call a writer; raises what it raises, and OperationTimeoutError when its time is up."""
        writes = [(self.value(record), _context(record)) for record in records]
        with deadline(self.timeout_s):
            writer.write(writes)

    def value(self, record: Record) -> Any:
        """What a record holds, None for a delete; raises Unreadable."""
        if record.deleted:
            return None
        return self._codec.decode(unpack(record.data, 0).payload)

    def _source(self, writer: Writer) -> _Source:
        return self._sources.setdefault(writer.name, _Source(writer.name))

    def _try(
        self, writer: Writer, records: Sequence[Record]
    ) -> tuple[BaseException, MusetError | None] | None:
        """Call a writer in the app's context; what it has raised, and what that is in our words."""
        began, source = SYSTEM.now(), self._source(writer)
        failed: list[tuple[BaseException, MusetError | None]] = []
        try:
            self._run(partial(self._call, writer, records, failed))
        except Exception as error:  # noqa: BLE001 - of the app's context
            failed.append((error, None))
        finally:
            source.ended()
        if failed:
            self._tell("write_behind_write", "error", SYSTEM.now() - began)
            return failed[0]
        source.answered()
        self._tell("write_behind_write", "ok", SYSTEM.now() - began)
        return None

    def _call(
        self,
        writer: Writer,
        records: Sequence[Record],
        failed: list[tuple[BaseException, MusetError | None]],
    ) -> None:
        try:
            self.call(writer, records)
        except BaseException as error:
            # A Timeout of gevent's is no Exception, and may be the writer's own.
            if _ends_all(error):
                raise
            failed.append((error, _known(error)))

    # --- Failures

    def _failed(
        self,
        writer: Writer | None,
        record: Record,
        error: BaseException,
        known: MusetError | None,
    ) -> Failure:
        text, attempts = describe(error), record.attempts + 1
        counts, most, grace_s = self._judge(writer, record.key, error, known, text)
        since = record.first_failed
        failed_for_s = 0.0 if since is None else SYSTEM.wall() - since
        if counts and attempts >= most and failed_for_s >= grace_s:
            self._tell("write_behind_write", "dead", None)
            _log.error("%r is a dead letter after %d attempts: %s", record.key, attempts, text)
            _log.debug("the last attempt of %r", record.key, exc_info=error)
            return Failure(record.seq, text, is_final=True)
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(record.attempts, 10), _LONGEST_PAUSE_S)
        asked_s = 0.0 if known is None else known.retry_after_s or 0.0
        pause_s = max(pause_s * SYSTEM.uniform(0.5, 1), asked_s)
        _log.info("%r is written again in %.1f s: %s", record.key, pause_s, text)
        return Failure(record.seq, text, pause_s=pause_s, counts=counts)

    def _judge(
        self,
        writer: Writer | None,
        key: str,
        error: BaseException,
        known: MusetError | None,
        text: str,
    ) -> tuple[bool, int, float]:
        """Whether an attempt counts, how many there may be, and for how many seconds at least."""
        if writer is None:
            is_final = isinstance(error, UnknownWriter) and error.is_final
            return True, 1 if is_final else _MOST_ATTEMPTS, 0.0 if is_final else _DEPLOY_S
        source = self._source(writer)
        if known is None or not known.retryable:
            source.answered()
            return True, writer.max_attempts, 0.0
        counts = not source.is_away
        source.failed(key, text)
        return counts, writer.max_attempts, _RESTART_S


def _context(record: Record) -> WriteContext:
    token = f"{record.key}:{record.seq}"
    return WriteContext(record.key, record.seq, token, record.attempts + 1, record.deleted)


def _known(error: BaseException) -> MusetError | None:
    """An exception in the words of the error table, the app's own translations used."""
    try:
        return translate(error, context.translations())
    except Exception:  # noqa: BLE001 - a translation of the app's own, or a text that cannot be made
        return None


def _ends_all(error: BaseException) -> bool:
    """Whether an exception is meant for whoever runs a writer, not raised by it."""
    greenlet = sys.modules.get("greenlet")
    ends = () if greenlet is None else (greenlet.GreenletExit,)
    return isinstance(error, (KeyboardInterrupt, *ends))
