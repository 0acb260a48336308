"""What a scripted model server has seen."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from muset.testing.model import ChatRequest

__all__ = ["Record", "Seen"]

#: Requests that are kept, and those of them that have their prompt.
_KEPT, _KEPT_PROMPTS = 20_000, 200


@dataclass(slots=True)
class Seen:
    """What the server knows of one request for a completion.

    Attributes:
        id: As the answer has it.
        outcome: The kind of the fault that was meant for it, or `ok`.
        status: Of the answer; 0 while there is none.
        input_tokens: Of the prompt.
        tokens: Of the answer, those that were sent.
        client_left: Whether the client closed the connection before the end.
        began: Unix time.
        duration_s: Seconds to the end; None while it runs.
        headers: In small letters; without the key.
        messages: The prompt; None where it was too long ago.
    """

    id: str
    model: str
    stream: bool
    outcome: str
    input_tokens: int
    began: float
    headers: dict[str, str]
    messages: list[tuple[str, str]] | None
    status: int = 0
    tokens: int = 0
    client_left: bool = False
    duration_s: float | None = None


class Record:
    """The newest requests, and how many there were of each outcome.

    Attributes:
        seen: In the order in which they came.
        outcomes: All of them since the last reset.
        active: Requests that are not answered yet.
    """

    def __init__(self) -> None:
        self.active = 0
        self._count = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was seen; ids go on."""
        self.seen: deque[Seen] = deque(maxlen=_KEPT)
        self.outcomes: Counter[str] = Counter()

    def add(
        self, request: ChatRequest, outcome: str, seed: int, headers: Mapping[str, str]
    ) -> Seen:
        """Write a request down."""
        self._count += 1
        seen = Seen(
            id=f"chatcmpl-{seed}-{self._count}",
            model=request.model,
            stream=request.stream,
            outcome=outcome,
            input_tokens=request.count_tokens(),
            began=time.time(),
            headers={k.lower(): v for k, v in headers.items() if k.lower() != "authorization"},
            messages=list(request.messages),
        )
        self.seen.append(seen)
        if len(self.seen) > _KEPT_PROMPTS:
            self.seen[-_KEPT_PROMPTS - 1].messages = None
        self.outcomes[outcome] += 1
        return seen
