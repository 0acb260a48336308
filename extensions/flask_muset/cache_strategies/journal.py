"""What a journal is: writes that were accepted, kept until their source has them.

The unit of order is the key. The records of one key stand in the order of their sequence; whoever
writes them to their source claims the key first, so that nobody else writes that key meanwhile. A
claim that is not renewed ends by itself, and the records are written again: at least once.

Times are seconds; moments are unix times of the journal's own clock, which all processes share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flask_muset.cache_strategies.entry import Entry

__all__ = ["Claim", "DeadLetter", "Failure", "Journal", "Record", "State"]


@dataclass(frozen=True, slots=True)
class Record:
    """One write that was accepted.

    Attributes:
        key: Of the value.
        seq: Greater than that of every record accepted before, of whatever key: microseconds of
            the journal's clock, moved on where two would meet.
        writer: Name of who writes it.
        data: The value as an envelope; empty for a delete.
        coalesces: Whether a newer record of the same key and writer may take its place.
        home: Token of the process that has accepted it, where only that has the function.
        attempts: How often it was tried, without success.
        first_failed: When it failed first, None if it has not.
    """

    key: str
    seq: int
    writer: str
    data: bytes
    coalesces: bool = True
    home: str = ""
    attempts: int = 0
    first_failed: float | None = None

    @property
    def deleted(self) -> bool:
        """Whether it says that the value is gone."""
        return not self.data

    @property
    def accepted_at(self) -> float:
        """When it was accepted."""
        return self.seq / 1e6


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write one key, and what there is to be written.

    Attributes:
        key: Which.
        token: Tells it from all others.
        records: The oldest ones, in their order; none where a key was held that has none.
        is_whole: Whether these are all of the key's.
        seq: For what a holder writes itself: greater than that of every record so far, and less
            than that of every later one; 0 from `claim`.
    """

    key: str
    token: str
    records: tuple[Record, ...]
    is_whole: bool = True
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of the record of a claim that could not be written.

    Attributes:
        seq: Of the record.
        error: Its description, for people; at most 1,000 characters are kept.
        is_final: Whether it becomes a dead letter.
        pause_s: Seconds until its key is due again, where it is tried again.
        counts: Whether this was one of its attempts; if not, `error` may be empty, which leaves the
            last one, and it has not failed first now.
    """

    seq: int
    error: str
    is_final: bool = False
    pause_s: float = 0.0
    counts: bool = True


@dataclass(frozen=True, slots=True)
class State:
    """How much there is.

    Attributes:
        pending: Records that wait, claimed ones too.
        pending_bytes: Of their data.
        oldest_s: Age of what waits longest, 0 if nothing does. A record that took the place of an
            older one is as old as that.
        dead_letters: Records that were given up.
    """

    pending: int
    pending_bytes: int
    oldest_s: float
    dead_letters: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that was given up, kept until somebody says what is to become of it.

    Attributes:
        id: Names it; of letters, digits and hyphens.
        record: As it was accepted; its attempts include the last one.
        error: Of the last attempt.
        first_failed: When it was first tried in vain.
        last_failed: And last.
        is_superseded: Whether a newer write of the key by the same writer, which coalesces, was
            accepted since: to write this one would bring an old value back.
    """

    id: str
    record: Record
    error: str
    first_failed: float
    last_failed: float
    is_superseded: bool = False


class Journal(Protocol):
    """Records by key. Every method may raise a MusetError where the journal cannot be reached.

    What is said to have happened is durable as the journal is: it survives the process, and what
    `risks` does not name.
    """

    def append(
        self,
        key: str,
        entry: Entry | None,
        /,
        *,
        writer: str | None,
        coalesces: bool = True,
        home: str = "",
        delay_s: float = 0.0,
    ) -> int | None:
        """Accept a write: make its record durable, and let the cache agree, both or neither.

        Where the key's last record is not claimed, both coalesce and both have the same writer, the
        new one takes its place: it needs no room of its own, and the key is due when it was due.
        Dead letters of the same key and writer become superseded by one that coalesces.

        Args:
            key: Of the value.
            entry: What the cache keeps; None for a delete.
            writer: Who writes it. None takes the writer (and its `coalesces` and `home`) of the
                key's last record; without a record nothing happens.
            coalesces: Whether it may take the place of an older one, and a newer one its place.
            home: See `Record`.
            delay_s: Seconds after which the key is due, where nothing of it waited before.

        Returns:
            Its sequence; 0 if nothing happened, as `writer` was None and the key had no record;
            None if there is no room: then nothing has changed.

        Raises:
            MusetError: It was not accepted. Where the answer was lost on the way nobody knows, and
                it may be written all the same.
        """
        ...

    def newest(self, key: str, /) -> Record | None:
        """The last record of a key, claimed or not; None if its source has all."""
        ...

    def waiting(self, keys: Sequence[str], /) -> set[str]:
        """Those of some keys that have records."""
        ...

    def claim(
        self, limit: int, /, *, home: str, early: bool = False
    ) -> tuple[list[Claim], float | None]:
        """Claim keys that are due, those that are due longest first.

        A key whose oldest record is of another home that is alive is left to that one.

        Args:
            limit: How many keys at most.
            home: Token of this process.
            early: Whether keys that are not due yet are claimed too.

        Returns:
            The claims, and the seconds until a key that is not among them is due, at least 0; None
            if there is none.
        """
        ...

    def hold(self, key: str, /) -> Claim | None:
        """Claim one key, due or not, even if it has no record.

        Returns:
            None if somebody else has it.
        """
        ...

    def renew(self, claims: Sequence[Claim], /) -> None:
        """Let claims last as long again as they did at first."""
        ...

    def settle(
        self,
        claim: Claim,
        /,
        *,
        written: int = 0,
        failure: Failure | None = None,
        supersedes: str | None = None,
    ) -> bool:
        """End a claim; what is left of its key is due at once, or when the failure says.

        Args:
            claim: That `claim` or `hold` gave.
            written: Those of its records whose sequence is not greater are done with.
            failure: Of the next one.
            supersedes: Name of the writer whose newer value the holder has written itself, empty
                for a value that stands for all writers': dead letters of the key by that writer
                that coalesce and are older than `claim.seq` become superseded.

        Returns:
            Whether it was still held. If not, nothing has changed.
        """
        ...

    def supersede(self, key: str, before: float, /) -> None:
        """Forget the records of a key that coalesce and were accepted before a moment.

        Those that are claimed are forgotten when their claim ends, unless they were written.
        """
        ...

    def is_used(self) -> bool:
        """Whether anything was ever accepted, as it was a tenth of a second ago at the earliest."""
        ...

    def now(self) -> float:
        """The journal's clock, as far as it is known while the journal is away; never raises."""
        ...

    def beat(self, home: str, /) -> None:
        """Say that a process is alive, for a lease's time."""
        ...

    def state(self) -> State:
        """How much there is."""
        ...

    def dead_letters(self, limit: int = 1000, /, *, after: str = "") -> list[DeadLetter]:
        """Those that were given up, in the order of when; raises ValueError for a wrong `after`."""
        ...

    def key_of(self, id: str, /) -> str | None:  # noqa: A002 - the field's name
        """The key of a dead letter; None if there is no such."""
        ...

    def requeue(self, id: str, /) -> bool:  # noqa: A002 - the field's name
        """Let a dead letter be written again: at its old place in the order, its attempts at 0.

        Returns:
            Whether there was one.

        Raises:
            ConflictError: It is superseded.
        """
        ...

    def drop(self, id: str, /) -> bool:  # noqa: A002
        """Forget a dead letter; whether there was one."""
        ...

    def risks(self) -> list[str]:
        """What could lose a record that was accepted, each in a sentence with its cure."""
        ...

    def explain(self, key: str, /) -> dict[str, Any]:
        """What waits of a key, for people: `pending`, `oldest_s`, `attempts`, `error`."""
        ...

    def close(self) -> None:
        """Let go of connections and threads; the next use begins anew."""
        ...
