"""What goes in and out, as pydantic models; the OpenAPI document is made of them."""

import re
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, StringConstraints

__all__ = [
    "AskIn",
    "AskOut",
    "DeadLetterIn",
    "DeadLetterList",
    "DeadLetterOut",
    "DeadLetterQuery",
    "DocumentForm",
    "DocumentIn",
    "DocumentList",
    "DocumentOut",
    "DocumentWithText",
    "ErrorList",
    "FoundError",
    "InvalidateIn",
    "InvalidateOut",
    "KeptError",
    "Live",
    "PageQuery",
    "PolicyIn",
    "PolicyList",
    "PolicyOut",
    "Preferences",
    "Ready",
    "SearchOut",
    "SearchQuery",
    "UsageList",
    "UsageQuery",
    "UserIn",
    "UserList",
    "UserOut",
    "UserPatch",
]

_MAX_ID = (1 << 63) - 1
Id = Annotated[int, Field(ge=1, le=_MAX_ID)]
Title = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Email = Annotated[str, StringConstraints(min_length=3, max_length=254)]

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DocumentIn(_In):
    """A text to store."""

    title: Title
    text: Annotated[str, StringConstraints(min_length=1)]


class DocumentForm(BaseModel):
    """A file: text or Markdown in UTF-8, HTML, or PDF with text in it.

    Without a title that of the HTML page is taken, else the file's name.
    """

    file: Annotated[
        Any,
        Field(
            description="text/plain, text/markdown, text/html or application/pdf.",
            json_schema_extra={"type": "string", "format": "binary"},
        ),
    ]
    title: Title | None = None


class PageQuery(BaseModel):
    """Which page of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}$")] | None = None


class DocumentOut(BaseModel):
    """A stored document."""

    id: int
    title: str
    sha256: str
    passages: int
    characters: int
    created_at: datetime


class DocumentWithText(DocumentOut):
    """A stored document with its text, as it was sent."""

    text: str


class DocumentList(BaseModel):
    """A page of documents."""

    items: list[DocumentOut]
    next_cursor: str | None


class AskIn(_In):
    """A question about the stored documents."""

    question: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    document_ids: Annotated[list[Id], Field(min_length=1, max_length=100)] | None = None
    k: Annotated[int, Field(ge=1, le=20)] = 8
    model: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    allow_degraded: bool = True


class CitationOut(BaseModel):
    """A verbatim quote: `quote` is the document's text[start:end], in code points."""

    document_id: int
    title: str
    start: int
    end: int
    quote: str


class AttemptOut(BaseModel):
    """One call of a provider."""

    provider: str
    model: str
    outcome: str
    wait_s: float
    duration_s: float


class UsageOut(BaseModel):
    """Billed tokens."""

    input_tokens: int
    output_tokens: int


class AskOut(BaseModel):
    """An answer with its sources."""

    answer: str
    status: Literal["answered", "unsure", "degraded"]
    citations: list[CitationOut]
    attempts: list[AttemptOut]
    usage: UsageOut
    model: str
    cached: bool


class Preferences(RootModel[dict[str, Any]]):
    """Any JSON object of at most 16,384 bytes as compact JSON, and 64 levels."""


class UserIn(_In):
    """A user to add."""

    email: Email
    name: Name


class UserPatch(_In):
    """What is to be changed of a user; what is null or left out stays. Addresses are for admins."""

    email: Email | None = None
    name: Name | None = None


class UserOut(BaseModel):
    """A user; `name` is empty where only a key was made for the address."""

    id: int
    email: str
    name: str
    created_at: datetime


class UserList(BaseModel):
    """A page of users."""

    items: list[UserOut]
    next_cursor: str | None


class SearchQuery(BaseModel):
    """What to look for."""

    model_config = ConfigDict(extra="forbid")

    q: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    k: Annotated[int, Field(ge=1, le=50)] = 8


class PassageOut(BaseModel):
    """A passage: `text` is the document's text[start:end], in code points.

    Scores compare passages of one answer only; the greater the better.
    """

    document_id: int
    start: int
    end: int
    text: str
    score: float


class SearchOut(BaseModel):
    """The passages that match, the best first."""

    query: str
    passages: list[PassageOut]


def _day(text: Any) -> date:
    if not isinstance(text, str) or not _DAY.fullmatch(text):
        raise ValueError("write a day as YYYY-MM-DD")
    return date.fromisoformat(text)


Day = Annotated[date, BeforeValidator(_day)]


class UsageQuery(BaseModel):
    """Which usage, and what it is added up by; days are in UTC, and `to` belongs to them."""

    model_config = ConfigDict(extra="forbid")

    first: Annotated[Day | None, Field(alias="from")] = None
    last: Annotated[Day | None, Field(alias="to")] = None
    group_by: Literal["request", "user", "model", "day"] = "day"
    user_id: Id | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,2000}$")] | None = None


class UsageItem(BaseModel):
    """Usage of a group; what its entries need not agree in is null.

    `estimated` says that some of the tokens were counted here; `cost` is in the currency of the
    prices, to the billionth.
    """

    user_id: int | None
    model: str | None
    provider: str | None
    day: date | None
    status: Literal["success", "error", "partial", "client_closed"] | None
    requests: int
    input_tokens: int
    output_tokens: int
    estimated: bool
    cost: float


class UsageList(BaseModel):
    """A page of usage."""

    items: list[UsageItem]
    next_cursor: str | None


class KeptError(BaseModel):
    """One fault and its newest occurrences."""

    fingerprint: str
    type: str
    error: str
    category: str
    severity: str
    status: int
    place: str
    message: str
    traceback: str | None
    count: int
    last_seen: str
    newest: list[dict[str, Any]]


Source = Literal["all workers", "this process"]


class FoundError(KeptError):
    """One fault, and whose errors were looked through."""

    source: Source


class ErrorList(BaseModel):
    """The newest errors, the one that happened last first, and whose they are."""

    items: list[KeptError]
    next_cursor: None = None
    source: Source


class PolicyIn(_In):
    """What an operator wants of a policy's circuit breaker."""

    mode: Literal["auto", "open", "closed"]
    expires_s: Annotated[float, Field(gt=0, le=86_400)] | None = None


class Breaker(BaseModel):
    """What a circuit breaker knows; rates from 0 to 1, times in seconds."""

    state: Literal["closed", "open", "half_open", "forced_open", "forced_closed"]
    calls: int
    failures: int
    slow_calls: int
    failure_rate: float
    slow_call_rate: float
    opened_at: float | None
    retry_after: float | None


class PolicyOut(BaseModel):
    """A policy; without a breaker its state is `none`.

    `shared` says whether the state is the one of all workers; else it is that of the worker which
    answers.
    """

    name: str
    shared: bool
    state: Literal["closed", "open", "half_open", "forced_open", "forced_closed", "none"]
    parts: list[str]
    breaker: Breaker | None


class PolicyList(BaseModel):
    """All policies."""

    items: list[PolicyOut]
    next_cursor: None = None


class InvalidateIn(_In):
    """Which keys of the cache to delete: `*` stands for any text, all else for itself."""

    pattern: Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class InvalidateOut(BaseModel):
    """Exactly how many there were."""

    deleted: int


class DeadLetterQuery(BaseModel):
    """Which page of the dead letters."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,100}$")] | None = None


class DeadLetter(BaseModel):
    """A write that was accepted and given up; `superseded` if a newer one has made it void."""

    id: str
    key: str
    writer: str
    error: str
    attempts: int
    first_failed: datetime
    last_failed: datetime
    superseded: bool


class DeadLetterList(BaseModel):
    """The dead letters, the one that was given up first at the head."""

    items: list[DeadLetter]
    next_cursor: str | None


class DeadLetterIn(_In):
    """What is to become of a dead letter: written again, or forgotten."""

    action: Literal["requeue", "drop"]


class DeadLetterOut(BaseModel):
    """What was done."""

    id: str
    action: Literal["requeue", "drop"]


class Live(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class Ready(BaseModel):
    """Whether the service can work, and why not."""

    status: Literal["ready", "degraded", "draining", "unavailable"]
    reasons: list[str]
    checks: dict[str, str]
