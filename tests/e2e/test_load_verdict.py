"""What a load run says of its figures: the headline, the rows and the exit code are one."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_service import healthy_metrics

sys.path.append(str(Path(__file__).parents[2] / "locust"))

import run
from open_loop import Result
from tally import Tally
from verdict import Scrapes, headline, judge_counts, judge_run

LOOP, SERVICE = "API, users in a loop", "API response time, in the service"


def tally(**times):
    """A run whose users waited for 10 ms; `times` says otherwise."""
    good = {name: [0.01] * 200 for name in ("api", "ai", "probe")}
    return Tally(statuses=Counter({200: 600}), api=400, times=good | times)


def judged(seen, text=None, **options):
    """The rows of objectives, by title."""
    scrapes = Scrapes("", healthy_metrics(400) if text is None else text)
    return {row.title: row for row in judge_run(seen, scrapes, **options)}


def bad(rows):
    """The titles of those that make a run fail."""
    return {row.title for row in rows if row.is_bad}


def test_who_waits_decides_as_the_service_does():
    """An objective holds only by the service's count and by what the users saw."""
    assert bad(judged(tally()).values()) == set()
    assert bad(judged(tally(api=[0.01] * 189 + [0.2] * 11)).values()) == {LOOP}
    slow = healthy_metrics(400).replace('le="0.1"} 400', 'le="0.1"} 379')
    assert bad(judged(tally(), slow).values()) == {SERVICE}


def test_what_was_not_measured_has_not_been_shown():
    """Fewer than 100 requests make the run fail and say how many they were, on either side."""
    rows = judged(tally(ai=[0.01] * 99), healthy_metrics(99))
    assert len(bad(rows.values())) == 6
    assert rows["AI, as users see it"].figure == "not enough requests: 99, needed 100"
    assert rows[SERVICE].figure == "not enough requests: 99, needed 100"


def test_times_that_do_not_decide():
    """Where something is broken on purpose errors decide alone, and a run without answers fails."""
    assert bad(judged(tally(api=[]), times_decide=False).values()) == set()
    nothing = judged(Tally(), times_decide=False)
    assert bad(nothing.values()) == {"Errors"}
    seen = tally()
    seen.errors["500 InternalError"] = 6
    assert bad(judged(seen, times_decide=False).values()) == {"Errors"}


@pytest.mark.parametrize(
    ("ledger", "counted", "waits", "expected"),
    [
        ((2, 6, 4), 602, 0, set()),
        (
            (1, 3, 2),
            602,
            0,
            {"Questions = rows of the ledger", "Tokens of answers = of the ledger"},
        ),
        ((2, 6, 4), 601, 0, {"Answers by status = counted by the service"}),
        ((2, 6, 4), 602, 1, {"Writes that wait, or were given up"}),
    ],
)
def test_both_sides_must_have_counted_the_same(ledger, counted, waits, expected):
    """A row that is missing, a wrong counter and a write that waits are each found."""
    seen = tally()
    for _ in range(2):
        seen.count(200, is_question=True)
        seen.count_answer({"input_tokens": 3, "output_tokens": 2})
    text = f'muset_http_requests_total{{endpoint="/api/v1/x",status_code="200"}} {counted}\n'
    assert bad(judge_counts(seen, Scrapes("", text), ledger, {"wait": waits})) == expected


GOOD, SPARE = Result(statuses={"200": 400}, rate=1_100.0, cpu=0.1), Result(rate=3_300.0)
WHOLE = Result(statuses={"200": run.STREAMS})


def all_rows(seen, result=GOOD, spare=SPARE, most=128):
    """Those of a whole run."""
    rows = judge_run(seen, Scrapes("", healthy_metrics(400)))
    return [*rows, *run.constant_rate(result, spare, 1_100.0), run.concurrency(WHOLE, most)]


@pytest.mark.parametrize(
    ("rows", "held", "why"),
    [
        (all_rows(tally()), 7, ""),
        (all_rows(tally(api=[0.2] * 200)), 6, f"{LOOP} (missed)"),
        (all_rows(tally(ai=[])), 6, "AI, as users see it (no data)"),
        (all_rows(tally(), most=99), 6, "Concurrent requests (missed)"),
        (all_rows(tally(), replace(GOOD, rate=900.0)), 6, "Throughput (missed)"),
        (all_rows(tally(), replace(GOOD, statuses={"200": 99})), 6, "Throughput (no data)"),
        (all_rows(tally(), spare=replace(SPARE, rate=900.0)), 7, "The generator (missed)"),
    ],
    ids=["all", "slow", "unmeasured", "narrow", "slack", "few", "generator"],
)
def test_the_headline_agrees_with_the_exit_code(rows, held, why):
    """It counts what holds on both sides, names what does not, and 7 of 7 alone is not enough."""
    end = f"; what does not: {why}." if why else ", and so does all else."
    assert headline(rows) == f"{held} of 7 objectives hold{end}"
    assert bool(bad(rows)) == bool(why)


def test_an_objective_that_nobody_judged_does_not_hold():
    """The headline of no rows at all."""
    assert headline([]).startswith("0 of 7")
