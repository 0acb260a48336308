"""What a run has shown: the objectives, and whether both sides have counted the same.

The objectives are those of `muset.objectives`. What a user waits for is judged by what the clients
have measured, what only the service can know by the difference of two of its scrapes.
"""

import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

from muset.objectives import (
    MIN_SAMPLES,
    OBJECTIVES,
    Kind,
    Objective,
    Verdict,
    judge,
    read_series,
    series_of,
)
from open_loop import percentile
from tally import Tally

__all__ = [
    "Row",
    "Scrapes",
    "ServiceTimes",
    "add_to_html",
    "cut_short",
    "headline",
    "judge_counts",
    "judge_run",
    "judge_service",
    "service_times",
    "show",
    "too_few",
    "verdict_of",
    "write_rows",
]

#: Share of answers that may be errors.
_MAX_ERRORS = 0.01


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result.

    Attributes:
        title: What was looked at.
        target: What was promised.
        figure: What was found.
        verdict: Whether it holds.
        decides: Whether the exit code depends on it.
        objective: The key of the objective that it judges, if it judges one.
    """

    title: str
    target: str
    figure: str
    verdict: Verdict
    decides: bool = True
    objective: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether it makes the run fail; what has not been measured has not been shown."""
        return self.decides and self.verdict is not Verdict.HOLDS


@dataclass(frozen=True, slots=True)
class Scrapes:
    """The service's metrics before and after."""

    before: str
    after: str

    def total(self, name: str) -> float:
        """A gauge as it was at last, the worst of its series; 0 without any."""
        found = [value for series, _, value in read_series(self.after) if series == name]
        return max(found, default=0.0)

    def statuses(self) -> Counter[int]:
        """Answers of `/api/` by status.

        What was refused before it was routed has no route; nobody asks for another unknown path.
        """
        found: Counter[int] = Counter()
        for name, labels, value in read_series(self.after, self.before):
            endpoint = labels.get("endpoint", "")
            if name == "muset_http_requests_total" and (
                endpoint.startswith("/api/") or endpoint == "__unmatched__"
            ):
                found[int(labels["status_code"])] += int(value)
        return +found


def verdict_of(holds: bool) -> Verdict:
    """The verdict on what can be judged."""
    return Verdict.HOLDS if holds else Verdict.MISSED


def too_few(samples: int) -> str:
    """The figure of what cannot be judged."""
    return f"not enough requests: {samples}, needed {MIN_SAMPLES}"


def _of(key: str) -> Objective:
    return next(one for one in OBJECTIVES if one.key == key)


def _latency(title: str, objective: Objective, times: Sequence[float]) -> Row:
    row = Row(title, objective.target, "", Verdict.NO_DATA, objective=objective.key)
    if len(times) < MIN_SAMPLES:
        return replace(row, figure=too_few(len(times)))
    share = sum(t < objective.limit for t in times) / len(times)
    figure = (
        f"{share:.1%}, p50 {_ms(percentile(times, 0.5))}, p95 {_ms(percentile(times, 0.95))}, "
        f"p99 {_ms(percentile(times, 0.99))}, {len(times)} samples"
    )
    return replace(row, figure=figure, verdict=verdict_of(share >= objective.share))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def judge_service(title: str, exposition: str, since: str = "") -> list[Row]:
    """The objectives that the service's own counts can tell.

    Args:
        title: Put behind the objective's.
        exposition: In Prometheus' text format.
        since: An earlier one, to judge only by what has happened since then.
    """
    rows = []
    for found in judge(exposition, since):
        one, is_judged = found.objective, found.verdict is not Verdict.NO_DATA
        figure = f"{found.figure}, {found.samples} samples" if is_judged else too_few(found.samples)
        if one.kind is not Kind.OFFERED_LOAD:
            row = Row(f"{one.title}, {title}", one.target, figure, found.verdict, objective=one.key)
            rows.append(row)
    return rows


def judge_run(tally: Tally, scrapes: Scrapes, *, times_decide: bool = True) -> list[Row]:
    """The objectives as far as this run can tell, and the share of errors.

    Args:
        tally: What the clients have seen.
        scrapes: What the service has counted.
        times_decide: False if something was broken meanwhile, or too little is asked on purpose:
            the objectives are shown and decide nothing.
    """
    rows = [
        _latency("API, users in a loop", _of("api"), tally.times["api"]),
        _latency("API, a constant rate, from when due", _of("api"), tally.times["probe"]),
        _latency("AI, as users see it", _of("ai"), tally.times["ai"]),
        *judge_service("in the service", scrapes.after, scrapes.before),
    ]
    return [*(replace(row, decides=times_decide) for row in rows), _errors(tally)]


def _errors(tally: Tally) -> Row:
    sent, wrong = sum(tally.statuses.values()), sum(tally.errors.values())
    figure = f"{wrong} of {sent}, and {tally.refused} that were told when to come back"
    if wrong:
        figure += ": " + ", ".join(f"{n} {what}" for what, n in tally.errors.most_common(5))
    share = wrong / sent if sent else 0.0
    return Row("Errors", "below 1 %", figure, verdict_of(sent > 0 and share < _MAX_ERRORS))


def judge_counts(
    tally: Tally, scrapes: Scrapes, ledger: tuple[int, int, int], pending: Mapping[str, float]
) -> list[Row]:
    """Whether both sides have counted the same.

    Args:
        tally: What the clients have seen.
        scrapes: What the service has counted.
        ledger: Questions, input tokens and output tokens that came to the ledger.
        pending: What still waits in the journal, and what was given up.
    """
    rows, *tokens = ledger
    ours, theirs = +tally.statuses, scrapes.statuses()
    seen = [tally.input_tokens, tally.output_tokens]
    # Of a stream that broke off, and of a question that failed, only the ledger has the tokens.
    is_whole = tally.questions == tally.answers
    is_same = tokens == seen if is_whole else all(t >= s for t, s in zip(tokens, seen, strict=True))
    return [
        Row(
            "Questions = rows of the ledger",
            "equal",
            f"{tally.questions} ({tally.answers} answered) and {rows}",
            verdict_of(tally.questions == rows),
        ),
        Row(
            "Tokens of answers = of the ledger",
            "equal" if is_whole else "not fewer there",
            f"{seen[0]} + {seen[1]} and {tokens[0]} + {tokens[1]}",
            verdict_of(is_same),
        ),
        Row(
            "Answers by status = counted by the service",
            "equal",
            f"{_counts(ours)} and {_counts(theirs)}",
            verdict_of(ours == theirs),
        ),
        Row(
            "Writes that wait, or were given up",
            "none",
            ", ".join(f"{value:.0f} {what}" for what, value in pending.items()),
            verdict_of(not any(pending.values())),
        ),
    ]


def cut_short(tally: Tally) -> Row:
    """Whether everything that was asked was also waited for."""
    return Row("Requests that were cut short", "none", str(tally.cut), verdict_of(not tally.cut))


def _counts(statuses: Mapping[int, int]) -> str:
    return ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items())) or "none"


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """What the service's own histogram says of an objective's requests, in seconds.

    Attributes:
        count: How many.
        mean: Exact.
        p95_above: The 95th percentile is above this bound of a bucket.
        p95_below: And not above this one.
    """

    count: int
    mean: float
    p95_above: float
    p95_below: float


def service_times(key: str, scrapes: Scrapes) -> ServiceTimes:
    """The times of an objective's operations, as the service has measured them."""
    objective, series = _of(key), read_series(scrapes.after, scrapes.before)
    within: defaultdict[float, float] = defaultdict(float)
    for _, labels, value in series_of(objective, series, "_bucket"):
        within[float(labels["le"])] += value
    count = sum(value for _, _, value in series_of(objective, series, "_count"))
    total = sum(value for _, _, value in series_of(objective, series, "_sum"))
    bounds = [0.0, *sorted(within)]
    at = next((n for n, b in enumerate(bounds) if within[b] >= 0.95 * count), len(bounds) - 1)
    mean = total / count if count else math.nan
    return ServiceTimes(int(count), mean, bounds[max(0, at - 1)], bounds[at])


# --- shown and written ----------------------------------------------------------------------------


def headline(rows: Sequence[Row]) -> str:
    """How many objectives hold, each by all rows that judge it, and which rows do not."""
    bad = [row for row in rows if row.is_bad]
    missed = {row.objective for row in rows if row.verdict is not Verdict.HOLDS}
    held = sum(one.key in {row.objective for row in rows} - missed for one in OBJECTIVES)
    text = f"{held} of {len(OBJECTIVES)} objectives hold"
    titles = ", ".join(f"{row.title} ({row.verdict.value})" for row in bad)
    return f"{text}; what does not: {titles}." if bad else f"{text}, and so does all else."


def show(title: str, rows: Iterable[Row]) -> str:
    """A table as text."""
    lines = [f"{title}:"]
    for row in rows:
        word = row.verdict.value + ("" if row.decides else " (does not decide)")
        lines.append(f"  {word:<8} {row.title:<42} {row.target:<18} {row.figure}")
    return "\n".join(lines)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write them to a file, as JSON or CSV by its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [asdict(row) for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(found, file, indent=2)
            return
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def add_to_html(path: Path, rows: Iterable[Row]) -> None:
    """Put them on top of Locust's report."""
    cells = "".join(
        "<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in _cells(row)) + "</tr>"
        for row in rows
    )
    table = (
        '<table style="font-family: sans-serif; margin: 1em" cellpadding="4">'
        "<caption>Objectives and counts</caption>" + cells + "</table>"
    )
    text = path.read_text(encoding="utf-8")
    head, mark, rest = text.partition("<body>")
    path.write_text(head + mark + table + rest if mark else text + table, encoding="utf-8")


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.verdict.value, row.title, row.target, row.figure
