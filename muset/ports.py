"""What the services need from the outside world, as plain values and protocols.

Services are written against these names alone; `muset.app` hands the adapters in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Role(StrEnum):
    """What a key may do."""

    MEMBER = "member"
    ADMIN = "admin"


class AnswerStatus(StrEnum):
    """How far an answer can be trusted."""

    ANSWERED = "answered"
    UNSURE = "unsure"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sends a request.

    Attributes:
        user_id: The user that the key belongs to.
        key_id: The key itself.
        role: What the key may do.
    """

    user_id: int
    key_id: int
    role: Role

    @property
    def is_admin(self) -> bool:
        """Whether every document may be changed."""
        return self.role is Role.ADMIN


@dataclass(frozen=True, slots=True)
class Asker:
    """Who has asked a question, and with which request."""

    user_id: int
    request_id: str


@dataclass(frozen=True, slots=True)
class UsageEntry:
    """What one request has used; entries are added up, so each is kept exactly once.

    Attributes:
        id: Its own, made by whoever records it.
        day: In UTC, as YYYY-MM-DD.
        status: `success | error | partial | client_closed`.
        requests: How many these are.
        input_tokens: Billed tokens.
        output_tokens: Billed tokens.
        estimated: Whether the tokens were counted here, because the provider did not say.
        cost: In billionths of the currency of the prices: whole, so that sums are exact.
    """

    id: str
    user_id: int
    request_id: str
    model: str
    provider: str
    day: str
    status: str
    requests: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False
    cost: int = 0


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who has keys; what they may do is the keys' affair.

    Attributes:
        email: In lower case, unlike that of every other user.
        name: For people; empty where only a key was made for the address.
        version: Grows with each change.
    """

    id: int
    email: str
    name: str
    created_at: datetime
    version: int


class UsageGroup(StrEnum):
    """What entries of the ledger are added up by."""

    REQUEST = "request"
    USER = "user"
    MODEL = "model"
    DAY = "day"


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What was used, added up; None where the entries of a group need not agree.

    Attributes:
        after: Tells a store where the group stands among the others.
        day: In UTC, as YYYY-MM-DD.
        estimated: Whether some of the tokens were counted here.
        cost: In billionths.
    """

    after: tuple[int | str, ...]
    user_id: int | None
    model: str | None
    provider: str | None
    day: str | None
    status: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    estimated: bool
    cost: int


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A stored key; the key itself is not in it.

    Attributes:
        prefix: The first characters after `msk_`, enough to find it and too few to guess it.
        digest: SHA-256 of the whole key, 32 bytes.
        expires_at: Last moment of validity in UTC, None for no end.
        revoked_at: When it was withdrawn in UTC, None while it holds.
    """

    id: int
    user_id: int
    email: str
    role: Role
    prefix: str
    digest: bytes
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Document:
    """A stored document.

    Attributes:
        sha256: Of the text in UTF-8, 64 hexadecimal digits.
        passages: How many passages the index holds of it.
        characters: Length of the text in Unicode code points.
        text: As it was sent, line ends too; None where only the summary was read.
    """

    id: int
    user_id: int
    title: str
    sha256: str
    passages: int
    characters: int
    created_at: datetime
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a text: offsets in Unicode code points, `end` exclusive."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ScoredPassage:
    """A passage that matches a question; `text` equals the document's text[start:end].

    Attributes:
        score: BM25, higher is better, comparable within one search only.
    """

    document_id: int
    title: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What the index found for a question.

    Attributes:
        passages: The best first.
        term_weights: Every content term of the question (stemmed) with its inverse document
            frequency in the whole index; a term that no passage has bears the highest weight.
    """

    passages: tuple[ScoredPassage, ...]
    term_weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Citation:
    """A verbatim quote; `quote` equals the document's text[start:end]."""

    document_id: int
    title: str
    start: int
    end: int
    quote: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model of a provider; prices in the currency's units for a million tokens."""

    name: str
    input_price: Decimal = Decimal(0)
    output_price: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class ModelQuestion:
    """What a provider is asked.

    Attributes:
        question: As the user wrote it.
        retrieval: The passages that it may use; a text may refer to the first as [1].
        model: Name of one of the provider's models.
        max_tokens: Length of the answer at most; None for the provider's own limit.
    """

    question: str
    retrieval: Retrieval
    model: str
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of the answer's text, not empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Cited:
    """A source of the text, told by a provider that quotes."""

    citation: Citation


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the answer has cost; a zero is a zero."""

    input_tokens: int
    output_tokens: int
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class CutShort:
    """The text was ended by a limit of the provider's own, so it may lack its end."""


Piece = Delta | Cited | CutShort | Tokens


class StreamingProvider(Protocol):
    """A source of answers.

    Attributes:
        name: For people, metrics and the ledger.
        models: The first one is used where none is asked for.
        has_markers: Whether its texts refer to passages as [1], [2] and so on; else it cites.
    """

    name: str
    models: tuple[Model, ...]
    has_markers: bool

    def stream(self, question: ModelQuestion) -> Iterator[Piece]:
        """Answer from the passages alone; no text at all means that they do not say it.

        The iterator ends only when the answer is complete. Closing it, also while it waits, closes
        the connection.

        Raises:
            ExternalServiceError: It was cut off or cannot be read (502), or, not `retryable`, this
                question is declined, which says nothing about the next one; or `unavailable` (503):
                refused, asked too often (with its `retry_after`), or, not `retryable`, the
                provider does not take our key.
            OperationTimeoutError: No token for the idle time (504).
            ValidationError: The question is too long for the model.
        """
        ...


class CallPolicy(Protocol):
    """What guards the calls of a dependency."""

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the function as the policy says."""
        ...


class Write(Protocol):
    """What a writer is told beside the value."""

    @property
    def key(self) -> str:
        """Of the value in the cache."""
        ...

    @property
    def seq(self) -> int:
        """Grows from write to write: who has a greater one has something newer."""
        ...

    @property
    def deleted(self) -> bool:
        """Whether the value is gone; then None stands for it."""
        ...


class Journal(Protocol):
    """Writes that were accepted and given up. Every method raises where it cannot be reached."""

    def dead_letters(self, limit: int = ..., *, after: str = ...) -> Sequence[Mapping[str, Any]]:
        """Those behind the one that `after` names; times are unix times."""
        ...

    def requeue(self, id: str) -> bool:  # noqa: A002 - the field's name
        """Let one be written again; whether there was one."""
        ...

    def drop(self, id: str) -> bool:  # noqa: A002
        """Forget one; whether there was one."""
        ...


class Cache(Journal, Protocol):
    """Values by key that may be gone at any time, but for those that wait to be written."""

    def cache_aside(
        self,
        key: str,
        fetch_func: Callable[[], T],
        expire: float | None = None,
        *,
        stale_if_error: float = 0,
        negative_expire: float | None = None,
    ) -> T:
        """The value of a key; of all who ask for one that is not there, one fetches it.

        Args:
            key: Of the value.
            fetch_func: Gets it from its source.
            expire: Seconds for which it is fresh.
            stale_if_error: Seconds after that for which it is served when it cannot be fetched.
            negative_expire: Seconds for which it is remembered that there is none.
        """
        ...

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, `default` where there is none that is fresh."""
        ...

    def set(self, key: str, value: Any, expire: float | None = None) -> bool:
        """Keep a value for some seconds; whether it is done."""
        ...

    def delete(self, key: str) -> bool:
        """Forget a key; who is fetching it now does not put it in any more."""
        ...

    def delete_pattern(self, pattern: str) -> int:
        """Forget the keys that match, `*` standing for any text, and say how many there were.

        Raises:
            CacheUnavailable: Nobody can tell now.
        """
        ...

    def write_through(
        self,
        key: str,
        value: T,
        write_func: Callable[[T], Any],
        expire: float | None = None,
    ) -> bool:
        """Write a value to its source, then to the cache.

        Args:
            key: Of the value.
            value: What is read from now on.
            write_func: Writes the source; what it raises is raised, and nothing is kept then.
            expire: Seconds for which it is fresh.

        Returns:
            True: the source has it, and the cache agrees. False: the source has it, and the cache
            is made to agree as soon as it can be.
        """
        ...

    def pending(self) -> Mapping[str, Any]:
        """What waits to be written: `pending`, how many, and `oldest_s`, for how long at most.

        Raises:
            MusetError: The journal cannot be reached.
        """
        ...

    def writer(
        self,
        name: str,
        *,
        coalesce: bool = True,
        batch: int | None = None,
        patterns: Iterable[str] = (),
    ) -> Callable[[F], F]:
        """Declare a function that writes values to their source; it stays what it is.

        Args:
            name: What a journal calls it.
            coalesce: Whether only the last of several writes of a key matters.
            batch: How many writes it takes at once at most; None for one, not in a list.
            patterns: Keys that it writes.
        """
        ...

    def write_behind(
        self,
        key: str,
        value: T,
        write_func: Callable[..., Any],
        expire: float | None = None,
    ) -> bool:
        """Accept a value that its source gets later, and once more if somebody dies meanwhile.

        Args:
            key: Of the value.
            value: What is read from now on.
            write_func: One that was declared.
            expire: Seconds for which it is fresh.

        Returns:
            True: it survives this process. False: nothing has changed.
        """
        ...


class TrackCall(Protocol):
    """What counts the calls of models."""

    def __call__(
        self, model: str, duration: float, status: str, input_tokens: int, output_tokens: int
    ) -> None:
        """Count one; the duration in seconds."""
        ...


class KeyStore(Protocol):
    """Keys and the users they belong to."""

    def create(
        self,
        *,
        email: str,
        role: Role,
        prefix: str,
        digest: bytes,
        expires_at: datetime | None,
        only_first: bool = False,
    ) -> KeyRecord | None:
        """Store a key, and its user if the address is new; None if it should be the first."""
        ...

    def find(self, prefix: str) -> Sequence[KeyRecord]:
        """All keys with this prefix, revoked and expired ones too."""
        ...

    def list(self) -> Sequence[KeyRecord]:
        """All keys, the newest last."""
        ...

    def revoke(self, key_id: int, at: datetime) -> bool:
        """Withdraw a key; False if there is none with this id that still holds."""
        ...

    def user_id(self, email: str) -> int:
        """The id of a user, made if the address is new."""
        ...


class UserStore(Protocol):
    """Users; each call is one transaction."""

    def add(self, *, email: str, name: str) -> User | None:
        """Store a user; None if the address is another one's."""
        ...

    def get(self, user_id: int) -> User | None:
        """One user."""
        ...

    def list(self, *, limit: int, after_id: int) -> Sequence[User]:
        """Users in the order of their ids, those above `after_id` alone."""
        ...

    def replace(self, user: User) -> bool:
        """Store a user in place of the version before; False if that is not there any more.

        Raises:
            ConflictError: The address is another one's.
        """
        ...

    def delete(self, user_id: int, *, version: int | None = None) -> bool:
        """Forget a user with all that is theirs alone: address, name, keys and preferences.

        The id is never given again, and older writes of preferences are refused from now on.

        Args:
            user_id: Which.
            version: Only this one; None for any.

        Returns:
            Whether there was one.
        """
        ...


class DocumentStore(Protocol):
    """Documents and the index over their passages; each call is one transaction."""

    def add(self, *, user_id: int, title: str, text: str) -> tuple[Document, bool]:
        """Store and index; False beside the document if this user already had this text."""
        ...

    def get(self, document_id: int) -> Document | None:
        """One document with its text."""
        ...

    def list(self, *, limit: int, after_id: int) -> Sequence[Document]:
        """Summaries in the order of their ids, those above `after_id` alone."""
        ...

    def delete(self, document_id: int) -> bool:
        """Forget a document and its passages; False if there is none."""
        ...

    def version(self) -> str:
        """Changes with every document that comes or goes, and is never the same again."""
        ...

    def existing(self, document_ids: Sequence[int]) -> frozenset[int]:
        """Those of the ids that exist."""
        ...

    def search(
        self, question: str, *, k: int, document_ids: Sequence[int] | None = None
    ) -> Retrieval:
        """The k best passages; any text is a legal question."""
        ...


@dataclass(frozen=True, slots=True)
class Extracted:
    """What a file says; `title` is empty where it has none of its own."""

    text: str
    title: str = ""


class Extractor(Protocol):
    """Reads files that are more than text."""

    def extract(self, data: bytes, kind: str, charset: str | None = None) -> Extracted:
        """The text of a file.

        Args:
            data: The file.
            kind: `html` or `pdf`.
            charset: What its sender says; None for nothing.

        Raises:
            ValidationError: It cannot be read, and why.
            OperationTimeoutError: It takes longer than there is time.
        """
        ...


class PreferenceStore(Protocol):
    """What users like, as a JSON object each; older writes never undo newer ones."""

    def get(self, user_id: int) -> dict[str, Any] | None:
        """An empty one for a user without any; None if there is no such user."""
        ...

    def put(self, user_id: int, preferences: Mapping[str, Any], seq: int) -> None:
        """Keep them, unless those that are there have a sequence that is not smaller."""
        ...

    def delete(self, user_id: int, seq: int) -> None:
        """Forget them, unless they have a sequence that is not smaller."""
        ...


class UsageStore(Protocol):
    """The ledger."""

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add entries in one transaction; one whose id is there already is left as it is.

        Args:
            entries: Each has the fields of `UsageEntry`.
        """
        ...


class UsageSums(Protocol):
    """The ledger, added up."""

    def sums(
        self,
        group_by: UsageGroup,
        *,
        first_day: str,
        last_day: str,
        user_id: int | None,
        after: tuple[int | str, ...] | None,
        limit: int,
    ) -> Sequence[UsageSum]:
        """Sums in the order of what they are grouped by.

        Args:
            group_by: What makes a group.
            first_day: As YYYY-MM-DD.
            last_day: The same; it belongs to them.
            user_id: Whose entries; None for all.
            after: `after` of the sum behind which to begin; None for the first.
            limit: How many at most.
        """
        ...


class Ledger(Protocol):
    """Where it is written down what was used."""

    def record(
        self,
        asker: Asker,
        *,
        provider: str,
        model: str,
        status: str,
        input_tokens: int = 0,
        output_tokens: int = 0,
        estimated: bool = False,
        cost: int = 0,
    ) -> None:
        """Write one request down, whatever has become of it; it raises nothing.

        Args:
            asker: In whose name.
            provider: That answered, or was asked last.
            model: The same.
            status: As of `UsageEntry`.
            input_tokens: Of all calls that are billed.
            output_tokens: The same.
            estimated: Whether a provider did not say how many they were.
            cost: In billionths.
        """
        ...


class NotReadyError(Exception):
    """Why a dependency is not ready, in words that everybody may read.

    Args:
        reason: The sentence.
        word: What there is to say about it, in a word.
    """

    def __init__(self, reason: str, word: str = "failed") -> None:
        super().__init__(reason)
        self.word = word


class Probe(Protocol):
    """Whether a dependency answers.

    Attributes:
        name: For people.
        is_needed: Whether nothing works without it; else the service is degraded.
    """

    name: str
    is_needed: bool

    def check(self, timeout_s: float) -> str | None:
        """Return if it answers in time, else raise.

        Returns:
            What there is to say about it, in a word; None for nothing but that it is well.

        Raises:
            NotReadyError: It answers, and is not well.
            Exception: It does not answer; the text may be for nobody but those who read the log.
        """
        ...
