"""What a scripted model server is told to do: how it answers, how fast, and when it fails."""

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["KINDS", "MODES", "Delay", "Fault", "Options", "Script"]

#: Every fault by name. A `token` below is a piece of the answer; `after` says how many come first.
KINDS: Mapping[str, str] = {
    "ok": "no fault: lets one request pass in a list",
    "rate_limited": "429 with Retry-After",
    "server_error": "500",
    "unavailable": "503 with Retry-After",
    "unauthorized": "401",
    "forbidden": "403",
    "context_length": "400 with the code context_length_exceeded",
    "refused": "the connection is reset before any byte",
    "hang": "not a byte, until the client leaves",
    "slow_first_token": "the first token comes `delay` seconds later (5)",
    "slow_drip": "seven bytes at a time, `delay` seconds between them (0.002)",
    "cut": "the connection ends after some tokens, in the middle of the body",
    "truncated": "the body ends after some tokens, cleanly, but without an end of the answer",
    "stall": "silent after some tokens, until the client leaves",
    "malformed": "a line after some tokens that is no JSON; then it goes on",
    "stream_error": "an error object after some tokens",
    "filtered": "ends after some tokens with the reason content_filter",
    "zero_usage": "the usage says that no token was used",
    "missing_usage": "the usage is left out",
    "invented": "the answer cites a passage [99]",
    "unsaid": "the answer is that the passages do not say it",
}
#: How answers are made where no fault says otherwise.
MODES = ("quote", "invented", "unsaid")

#: No answer is longer, in tokens, and no delay, in seconds.
MAX_TOKENS, _LONGEST_S = 100_000, 3600.0
_DEFAULT_DELAYS = {"slow_first_token": 5.0, "slow_drip": 0.002}


def _check(is_good: bool, name: str, expected: str, got: object) -> None:
    if not is_good:
        raise ValueError(f"{name} must be {expected}, got {got!r}.")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to requests.

    Attributes:
        kind: One of `KINDS`.
        times: To how many requests; 0 for all that come.
        model: Only to requests for this model; None for any.
        rate: Share of the requests that it happens to, by a seeded coin.
        after: Tokens that are sent before it.
        delay: Seconds, for the kinds that say so; None for theirs.
        retry_after: The header as it is sent: seconds or an HTTP date.
    """

    kind: str
    times: int = 1
    model: str | None = None
    rate: float = 1.0
    after: int = 3
    delay: float | None = None
    retry_after: str = "1"

    def __post_init__(self) -> None:
        _check(self.kind in KINDS, "kind", "one of " + ", ".join(KINDS), self.kind)
        _check(self.times >= 0, "times", "0 (for ever) or more", self.times)
        _check(0 < self.rate <= 1, "rate", "above 0 and at most 1", self.rate)
        _check(self.after >= 0, "after", "0 or more", self.after)
        is_good = self.delay is None or 0 <= self.delay <= _LONGEST_S
        _check(is_good, "delay", f"from 0 to {_LONGEST_S:g} seconds", self.delay)
        is_good = self.retry_after.isascii() and self.retry_after.isprintable()
        _check(is_good, "retry_after", "printable ASCII", self.retry_after)

    @property
    def delay_s(self) -> float:
        """The delay that holds, in seconds."""
        return _DEFAULT_DELAYS.get(self.kind, 0.0) if self.delay is None else self.delay

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read `KIND[,NAME=VALUE...]`, as the command line has it.

        Raises:
            ValueError: Says what is wrong with it.
        """
        kind, *pairs = text.split(",")
        types: dict[str, Callable[[str], Any]] = {
            "times": int, "model": str, "rate": float,
            "after": int, "delay": float, "retry_after": str,
        }  # fmt: skip
        values = dict(pair.partition("=")[::2] for pair in pairs)
        for name in values:
            _check(name in types, "an option of a fault", "one of " + ", ".join(types), name)
        return cls(kind, **{name: types[name](value) for name, value in values.items()})


@dataclass(frozen=True, slots=True)
class Delay:
    """Seconds, drawn anew for each request.

    Attributes:
        shape: `fixed`, `uniform` or `lognormal`.
        a: The seconds; or the least; or the median.
        b: Unused; or the most; or the standard deviation of the logarithm.
    """

    shape: str
    a: float
    b: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Delay":
        """Read `0.05`, `uniform:0.05:0.2` or `lognormal:0.3:0.5`.

        Raises:
            ValueError: Says what is expected.
        """
        shape, *numbers = text.split(":") if ":" in text else ("fixed", text)
        expected = "SECONDS, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
        count = {"fixed": 1, "uniform": 2, "lognormal": 2}.get(shape)
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        is_good = len(values) == count and all(0 <= value <= _LONGEST_S for value in values)
        _check(is_good, "a delay", expected, text)
        return cls(shape, *values)

    def draw(self, rng: random.Random) -> float:
        """Seconds for one request, of a random source that the caller has seeded."""
        if self.shape == "uniform":
            return rng.uniform(self.a, self.b)
        if self.shape == "lognormal" and self.a > 0:
            return rng.lognormvariate(math.log(self.a), self.b)
        return self.a


@dataclass(frozen=True, slots=True)
class Options:
    """How a server answers.

    Attributes:
        seed: Of all that is drawn.
        models: The models that it has; another one is a 404.
        latency: Until the head of an answer, as `Delay` reads it.
        first_token: From there to the first token, likewise.
        tokens_per_second: Pace of the tokens; 0 for all at once.
        tokens: Length of every answer; None for as many as it has.
        mode: One of `MODES`.
        api_key: The only key that is taken; None takes any, and none.
        faults: What happens to the first requests, see `Script`.
    """

    seed: int = 0
    models: tuple[str, ...] = ("scripted",)
    latency: str = "0"
    first_token: str = "0"  # noqa: S105 - a time
    tokens_per_second: float = 0.0
    tokens: int | None = None
    mode: str = "quote"
    api_key: str | None = None
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        _check(self.mode in MODES, "mode", "one of " + ", ".join(MODES), self.mode)
        _check(bool(self.models), "models", "at least one name", self.models)
        pace = self.tokens_per_second
        _check(0 <= pace < math.inf, "tokens_per_second", "0 or more", pace)
        is_good = self.tokens is None or 1 <= self.tokens <= MAX_TOKENS
        _check(is_good, "tokens", f"from 1 to {MAX_TOKENS}", self.tokens)
        for delay in (self.latency, self.first_token):
            Delay.parse(delay)

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, line: str) -> "Options":
        """What `dumps` wrote."""
        values = json.loads(line)
        values["models"] = tuple(values["models"])
        values["faults"] = tuple(Fault(**fault) for fault in values["faults"])
        return cls(**values)


class Script:
    """A list of faults: each request gets the first that is meant for it and not used up.

    Args:
        seed: Of the coins.
        faults: In this order.
    """

    def __init__(self, seed: int, faults: Iterable[Fault] = ()) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self.load(faults)

    def load(self, faults: Iterable[Fault]) -> None:
        """Forget the list for another one."""
        self._left = [(fault, fault.times or math.inf) for fault in faults]

    def next(self, model: str) -> Fault:
        """What happens to a request for this model."""
        for index, (fault, left) in enumerate(self._left):
            is_meant = left > 0 and fault.model in (None, model)
            if is_meant and (fault.rate == 1 or self._rng.random() < fault.rate):
                self._left[index] = (fault, left - 1)
                return fault
        return _NO_FAULT


_NO_FAULT = Fault("ok")
