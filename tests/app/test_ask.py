"""Questions to several providers: who answers, how it is told, what is kept and written down."""

import threading
import time
from decimal import Decimal

import pytest
from asked_service import BEES, EGGS, Service
from event_streams import STREAM, assert_one_end, events_of, text_of
from scripted import Scripted

from flask_muset.errors import (
    DatabaseError,
    ExternalServiceError,
    OperationTimeoutError,
    ValidationError,
)
from flask_muset.testing import virtual_clock
from muset.ports import Model, Tokens
from muset.services.streaming import Times

GOOD = "The queen lays 2,000 eggs a day [1]."
PRICED = (Model("priced", Decimal("0.15"), Decimal("0.6")),)


def away(**options):
    return ExternalServiceError("away", unavailable=True, **options)


def cut():
    return ExternalServiceError("cut off")


@pytest.fixture
def make(tmp_path):
    made = []

    def make(*providers, hold_back_s=0.0, keep_alive_s=9.0, policies=None, **environ):
        times = Times(hold_back_s=hold_back_s, keep_alive_s=keep_alive_s)
        made.append(Service(tmp_path, providers, times=times, policies=policies, **environ))
        return made[-1]

    yield make
    for service in made:
        service.close()


def outcomes(answer):
    return [(a["provider"], a["outcome"]) for a in answer["attempts"]]


# --- Who answers


def test_the_first_that_answers(make):
    """A provider that fails is followed by the next one, whose answer it is."""
    first = Scripted(away())
    second = Scripted(GOOD, name="second", models=(Model("large"),))
    service = make(first, second)
    answer = service.ask().json
    assert (answer["answer"], answer["status"], answer["model"]) == (GOOD, "answered", "large")
    assert outcomes(answer) == [("first", "unavailable"), ("second", "success")]
    assert answer["citations"] == [
        {
            "document_id": service.bees,
            "title": "Bees",
            "start": 28,
            "end": 60,
            "quote": "The queen lays 2,000 eggs a day.",
        }
    ]
    assert answer["usage"] == {"input_tokens": 100, "output_tokens": 10}
    assert first.questions[0].retrieval.passages[0].text == BEES


@pytest.mark.parametrize("headers", [{}, STREAM])
def test_the_documents_answer_when_nobody_does(make, headers):
    """The last resort quotes the documents; its answer is degraded, and is not kept."""
    service = make(Scripted(away()), Scripted(cut(), name="second"))
    for _ in range(2):
        answer = service.ask(headers=headers)
        assert answer.headers["X-Cache"] == "MISS"
        if headers:
            events = events_of(answer.text)
            assert_one_end(events)
            assert events[-1] == ("done", {"status": "degraded"})
            assert "2,000 eggs" in text_of(events)
            assert events[0] == ("meta", {"model": "extractive"})
        else:
            assert answer.json["status"] == "degraded"
            assert "2,000 eggs" in answer.json["answer"]
            assert answer.json["citations"][0]["document_id"] == service.bees
            assert [o for _, o in outcomes(answer.json)] == ["unavailable", "error", "success"]


def test_a_degraded_answer_may_find_nothing(make):
    """It is degraded all the same: a model might have known more."""
    answer = make(Scripted(away())).ask(question="What is the capital of France?").json
    assert (answer["status"], answer["citations"]) == ("degraded", [])
    assert answer["answer"] == "The documents do not say enough about this."


ERRORS = {
    "cut or malformed": (cut(), 502, None),
    "refused": (away(), 503, "1"),
    "stall": (OperationTimeoutError("no token"), 504, None),
    "429": (away(retry_after=7), 503, "7"),
    "401": (away(retryable=False), 503, None),
    "context length": (ValidationError("is too long", field="question"), 422, None),
    "bug": (ZeroDivisionError("x"), 500, None),
}


@pytest.mark.parametrize("headers", [{}, STREAM])
@pytest.mark.parametrize("name", ERRORS)
def test_the_status_without_a_fallback(make, name, headers):
    """allow_degraded false: the last provider's error is the status, for a stream too."""
    error, status, wait = ERRORS[name]
    answer = make(Scripted(error)).ask(headers=headers, allow_degraded=False)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, wait)
    assert answer.content_type == "application/json"


def test_the_last_real_error_is_the_status(make):
    """That a breaker is open says less than what another provider has answered."""
    first, second = Scripted(away()), Scripted(cut(), name="second")
    service = make(first, second, CIRCUIT_BREAKER_THRESHOLD="1")
    assert service.ask(allow_degraded=False).status_code == 502
    second_breaker = {"second": {"circuit_breaker": {"mode": "off"}}}
    service = make(first, second, policies=second_breaker, CIRCUIT_BREAKER_THRESHOLD="1")
    assert service.ask(allow_degraded=False).status_code == 502
    assert service.ask(allow_degraded=False).status_code == 502
    assert first.calls == 2


@pytest.mark.claim(
    "all providers cooling: degraded answers, none kept; with allow_degraded false 503 with the "
    "smallest remaining cool-down as Retry-After, and no call"
)
def test_all_are_cooling(make, prove):
    """Breakers of 20 s and 60 s are open: 20 s, then 15 s later 5 s."""
    first, second = Scripted(cut()), Scripted(cut(), name="second")
    with virtual_clock() as clock:
        service = make(
            first,
            second,
            policies={"second": {"circuit_breaker": {"recovery_timeout": 20.0}}},
            CIRCUIT_BREAKER_THRESHOLD="1",
        )
        assert service.ask(allow_degraded=False).status_code == 502
        refused = service.ask(allow_degraded=False)
        clock.advance(15)
        later = service.ask(allow_degraded=False)
        degraded = [service.ask().json for _ in range(2)]
    prove.figure(
        f"{refused.status_code}, Retry-After {refused.headers['Retry-After']} and 15 s later "
        f"{later.headers['Retry-After']}; {first.calls + second.calls} calls"
    )
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "20")
    assert (later.status_code, later.headers["Retry-After"]) == (503, "5")
    assert (first.calls, second.calls) == (1, 1)
    assert [(a["status"], a["cached"]) for a in degraded] == [("degraded", False)] * 2
    assert outcomes(degraded[0]) == [
        ("first", "refused_by_breaker"),
        ("second", "refused_by_breaker"),
        ("extractive", "success"),
    ]


def test_a_model_is_chosen(make):
    """Those that have it are asked, then the last resort; a name that nobody has is refused."""
    first = Scripted(GOOD)
    second = Scripted(away(), name="second", models=(Model("large"), Model("huge")))
    service = make(first, second)
    answer = service.ask(model="huge").json
    assert (answer["status"], answer["model"]) == ("degraded", "extractive")
    assert (first.calls, second.questions[0].model) == (0, "huge")
    assert service.ask(model="extractive").json["status"] == "answered"
    unknown = service.ask(model="tiny")
    assert unknown.status_code == 422
    assert unknown.json["errors"][0] == {
        "field": "model",
        "code": "invalid",
        "message": "must be one of: small, large, huge, extractive",
    }


def test_a_policy_has_the_parts_that_are_asked_for(make):
    """A bulkhead that is full is passed by, and counted as a refusal of ours."""
    inside = []
    first = Scripted([lambda _: inside.append(service.ask(k=3).json), GOOD])
    service = make(first, policies={"first": {"bulkhead": {"limit": 1}, "retry": {}}})
    assert service.ask().json["status"] == "answered"
    assert outcomes(inside[0]) == [("first", "refused_by_limit"), ("extractive", "success")]


# --- One deadline


def test_each_has_an_equal_share_until_its_first_token(make):
    """Two hang: each for half of the time; then the documents answer before it is over."""
    first, second = Scripted(60), Scripted(60, name="second")
    with virtual_clock() as clock:
        service = make(first, second, REQUEST_TIMEOUT="2", CIRCUIT_BREAKER_THRESHOLD="1")
        answer = service.ask().json
        assert answer["status"] == "degraded"
        assert [(a["outcome"], round(a["duration_s"], 3)) for a in answer["attempts"]] == [
            ("timeout", 0.9),
            ("timeout", 0.9),
            ("success", 0.0),
        ]
        assert clock.now == pytest.approx(1_001.8)
        assert (first.open, second.open) == (0, 0)
        assert [outcome for _, outcome in outcomes(service.ask().json)][:2] == [
            "refused_by_breaker"
        ] * 2
        clock.advance(100)
        began = clock.now
        late = service.ask(allow_degraded=False)
        assert (late.status_code, clock.now) == (504, pytest.approx(began + 2))


def test_a_time_that_the_caller_chose_is_not_the_providers_fault(make):
    """X-Request-Timeout-Ms cuts off as well, and no breaker counts it."""
    first = Scripted(60)
    with virtual_clock():
        service = make(first, CIRCUIT_BREAKER_THRESHOLD="1")
        for _ in range(3):
            service.ask(headers={"X-Request-Timeout-Ms": "1000"})
    assert first.calls == 3


def test_who_has_begun_may_use_the_time(make):
    """After its first token a provider is not held to its share."""
    first = Scripted([0.5, "The queen lays ", 3, "2,000 eggs [1]."])
    with virtual_clock():
        service = make(first, Scripted(GOOD, name="second"), REQUEST_TIMEOUT="5")
        assert outcomes(service.ask().json) == [("first", "success")]


# --- Citations


@pytest.mark.claim("an invented citation is taken out, and the answer is unsure and not kept")
def test_an_invented_citation(make, prove):
    """A marker of no passage, cut into pieces, beside one that is right; streamed and not."""
    script = ["The queen lays ", "2,000 eggs [", "99", "] a day", " [", "1", "]."]
    service = make(Scripted(script))
    answer = service.ask().json
    response, events = service.stream()
    citations = [data for name, data in events if name == "citation"]
    found = [
        (answer["answer"], answer["status"], answer["citations"]),
        (text_of(events), events[-1][1]["status"], citations),
    ]
    prove.figure("; ".join(f"{text!r}, {status}" for text, status, _ in found))
    for text, status, cited in found:
        assert (text, status) == ("The queen lays 2,000 eggs a day [1].", "unsure")
        assert [c["quote"] for c in cited] == ["The queen lays 2,000 eggs a day."]
    assert response.headers["X-Cache"] == "MISS"
    assert service.ask().headers["X-Cache"] == "MISS"


def test_an_answer_without_a_source_is_unsure(make):
    """Text without a marker, and no text at all."""
    service = make(Scripted(["It lays many."], []))
    answer = service.ask().json
    assert (answer["answer"], answer["status"], answer["citations"]) == (
        "It lays many.",
        "unsure",
        [],
    )
    answer = make(Scripted([])).ask().json
    assert (answer["answer"], answer["status"]) == (
        "The documents do not say enough about this.",
        "unsure",
    )


@pytest.mark.claim(
    "a deleted document is not cited: not if it goes while the answer is made, and not afterwards"
)
def test_a_document_that_goes(make, prove):
    """Deleted between the search and the end of the answer, then asked about again."""

    def cited_in(form):
        """The answers of one form that cite something that is gone."""
        gone = []

        def delete(_question):
            if not gone:
                gone.append(service.client.delete(url, headers=service.who).status_code)

        service = make(Scripted([delete, GOOD]))
        url = f"/api/v1/documents/{service.bees}"
        answers = [service.ask(headers=form) for _ in range(3)]
        assert gone == [204]
        url = f"/api/v1/documents/{service.put(BEES)}"
        assert '"answered"' in service.ask(headers=form).text
        assert service.ask(headers=form).headers["X-Cache"] == "HIT"
        assert service.client.delete(url, headers=service.who).status_code == 204
        answers.append(service.ask(headers=form))
        assert answers[-1].headers["X-Cache"] == "MISS"
        assert all('"unsure"' in answer.text for answer in answers)
        return sum('"quote"' in answer.text for answer in answers)

    citations = cited_in({}) + cited_in(STREAM)
    prove.figure(f"{citations} citations in 8 answers")
    assert citations == 0


# --- Streams


def test_a_stream(make):
    """Model, text, sources, tokens, end; with the headers that keep others from holding it up."""
    service = make(Scripted(["The queen lays ", "2,000 eggs a day ", "[1]", "."]))
    response, events = service.stream()
    assert response.content_type == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["X-Cache"] == "MISS"
    assert response.text.startswith("retry: 2000\n\nid: 1\nevent: meta\n")
    names = [name for name, _ in events]
    assert names == ["meta", *["delta"] * (len(names) - 4), "citation", "usage", "done"]
    assert names.count("delta") > 1
    assert text_of(events) == GOOD
    assert events[0][1] == {"model": "small"}
    assert events[-3][1]["quote"] == "The queen lays 2,000 eggs a day."
    assert events[-2][1] == {"input_tokens": 100, "output_tokens": 10}
    assert events[-1][1] == {"status": "answered"}


@pytest.mark.parametrize("first", ["whole", "stream"])
def test_an_answer_is_kept_for_both_forms(make, first):
    """Made as one and asked for as the other: the same text, no call, no tokens."""
    provider = Scripted(["The queen lays ", "2,000 eggs a day [1]."])
    service = make(provider)
    service.ask(headers=STREAM if first == "stream" else {})
    response, events = service.stream()
    whole = service.ask()
    assert (response.headers["X-Cache"], whole.headers["X-Cache"]) == ("HIT", "HIT")
    assert text_of(events) == whole.json["answer"] == GOOD
    assert [data for name, data in events if name == "citation"] == whole.json["citations"]
    assert events[-2][1] == whole.json["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert events[0][1]["model"] == whole.json["model"]
    assert (whole.json["attempts"], provider.calls) == ([], 1)


def test_where_nothing_is_cached_both_forms_say_so(make):
    """Several workers without a Redis keep nothing."""
    service = make(Scripted(GOOD), WEB_CONCURRENCY="2")
    for _ in range(2):
        assert service.stream()[0].headers["X-Cache"] == "BYPASS"
        assert service.ask().headers["X-Cache"] == "BYPASS"


def test_a_cut_within_the_hold_back_is_not_seen(make):
    """The next provider's text is the only one; it is told as if nothing had been."""
    service = make(
        Scripted(["The drone ", cut()]),
        Scripted(GOOD, name="second", models=(Model("large"),)),
        hold_back_s=30.0,
    )
    _, events = service.stream()
    assert text_of(events) == GOOD
    assert [data for name, data in events if name == "meta"] == [{"model": "large"}]
    assert events[-1] == ("done", {"status": "answered"})
    assert [row["status"] for row in service.ledger()] == ["success"]


def test_a_cut_after_the_hold_back_is_an_error(make):
    """The client has a part of the text: no second text, and nothing is kept."""
    first = Scripted(["The queen ", 0.8, "lays ", 0.2, cut()])
    second = Scripted(GOOD, name="second")
    service = make(first, second, hold_back_s=0.05)
    _, events = service.stream()
    assert text_of(events).startswith("The queen")
    name, body = events[-1]
    assert (name, body["error"], body["category"]) == (
        "error",
        "ExternalServiceError",
        "external_service",
    )
    assert body["path"] == "/api/v1/ask"
    assert body["retryable"] is True
    assert len(body["request_id"]) >= 8
    assert (first.calls, second.calls) == (1, 0)
    (row,) = service.ledger()
    assert (row["status"], row["estimated"], row["output_tokens"]) == ("partial", 1, 4)
    assert service.stream()[0].headers["X-Cache"] == "MISS"


def test_a_cut_stream_counts_against_its_provider(make):
    """A provider that breaks off in the middle again and again is left alone as well."""
    first = Scripted(["The queen ", 0.5, "lays ", cut()])
    service = make(first, hold_back_s=0.01, CIRCUIT_BREAKER_THRESHOLD="2")
    ends = [service.stream()[1][-1][0] for _ in range(3)]
    assert ends == ["error", "error", "done"]
    assert first.calls == 2


def test_a_stream_says_that_it_lives(make):
    """Comments while no token comes, before the first one too; an error is an event then."""
    service = make(Scripted([1, "The queen ", 1, "lays [1]."], [1, cut()]), keep_alive_s=0.1)
    response, events = service.stream()
    begin, _, end = response.text.partition("event: delta")
    assert begin.count("\n: ") + end.count("\n: ") >= 4
    assert "\n: " in begin
    assert "\n: " in end
    assert events[-1] == ("done", {"status": "answered"})
    _, events = service.stream(allow_degraded=False, k=3)
    assert [name for name, _ in events] == ["error"]
    assert [row["status"] for row in service.ledger()] == ["success", "error"]


def test_a_client_that_leaves(make):
    """The provider's connection is closed, and what was used is written down, as an estimate."""
    first = Scripted(["The queen lays ", *[0.02, "and "] * 500, GOOD])
    service = make(first)
    with service.ask(headers=STREAM) as response:
        chunks = iter(response.response)
        for _ in range(4):
            next(chunks)
    assert first.all_closed.wait(10)
    assert first.open == 0
    (row,) = service.ledger()
    assert (row["status"], row["estimated"], row["provider"]) == ("client_closed", 1, "first")
    assert 0 < row["output_tokens"] < 500
    assert row["input_tokens"] > 10
    assert service.metrics()['muset_ai_requests_total{model="small",status="cancelled"}'] == "1.0"
    assert service.ask(headers=STREAM).headers["X-Cache"] == "MISS"


def test_a_slow_client_slows_its_provider(make):
    """No more than a bounded number of events waits for who does not read."""
    told = []
    steps = [step for n in range(300) for step in (lambda _, n=n: told.append(n), "egg ")]
    service = make(Scripted([*steps, "[1]."]))
    with service.ask(headers=STREAM) as response:
        chunks = iter(response.response)
        next(chunks)
        time.sleep(0.3)
        assert len(told) <= 2 * 64 + 2
        rest = b"".join(chunks).decode()
    assert "event: done" in rest
    assert len(told) == 300


def test_a_process_that_stops_ends_its_streams(make, monkeypatch):
    """With an error that says when to come back."""
    service = make(Scripted(["The queen ", *[0.05, "lays "] * 200]), keep_alive_s=0.1)
    ask = service.app.extensions["muset"].ask
    monkeypatch.setattr(ask, "_times", Times(hold_back_s=0, keep_alive_s=0.1, draining_s=0.2))
    monkeypatch.setattr(ask, "_is_draining", lambda: True)
    _, events = service.stream()
    name, body = events[-1]
    assert (name, body["error"], body["retry_after"]) == ("error", "OverloadedError", 1)
    assert body["errors"][0]["code"] == "draining"
    assert [row["status"] for row in service.ledger()] == ["partial"]


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        ("text/event-stream", True),
        ("text/event-stream, application/json;q=0.5", True),
        ("application/json, text/event-stream", False),
        ("*/*", False),
        ("text/html", False),
        (";;;", False),
    ],
)
def test_who_gets_a_stream(make, accept, is_stream):
    """Who names it, and does not want JSON as much."""
    with make(Scripted(GOOD)).ask(headers={"Accept": accept}) as answer:
        assert answer.content_type.startswith("text/event-stream") == is_stream
        assert b"2,000" in answer.data


# --- One call for many


def test_many_who_ask_the_same_wait_for_one_call(make):
    """Eight at once: one call, one answer for all."""
    go = threading.Event()
    first = Scripted([lambda _: go.wait(10), GOOD])
    service = make(first)
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(
                service.app.test_client().post("/api/v1/ask", json=EGGS, headers=service.who).json
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 10
    while not first.calls and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    go.set()
    for thread in threads:
        thread.join(20)
    assert first.calls == 1
    assert {answer["answer"] for answer in answers} == {GOOD}
    assert sorted(len(answer["attempts"]) for answer in answers) == [0] * 7 + [1]
    assert sum(row["input_tokens"] for row in service.ledger()) == 100


# --- What is written down


def test_tokens_and_costs_are_exact(make):
    """Prices for a million tokens; two users, each with rows of their own."""
    service = make(Scripted([GOOD, Tokens(1_234_567, 89)], models=PRICED))
    service.ask()
    service.ask(who=service.other)
    service.ask(who=service.other, k=2)
    rows = service.ledger()
    assert [(row["user_id"], row["model"], row["cost"]) for row in rows] == [
        (1, "priced", 1_234_567 * 150 + 89 * 600),
        (2, "priced", 0),
        (2, "priced", 1_234_567 * 150 + 89 * 600),
    ]
    assert [row["estimated"] for row in rows] == [0, 0, 0]


def test_all_billed_attempts_are_summed(make):
    """One that broke off in the middle was billed too; the answer's usage is that of the ledger."""
    first = Scripted(["The queen lays ", cut()], models=PRICED)
    service = make(first, Scripted([GOOD, Tokens(50, 7)], name="second"))
    answer = service.ask().json
    (row,) = service.ledger()
    assert outcomes(answer) == [("first", "cut"), ("second", "success")]
    assert answer["usage"] == {n: row[n] for n in ("input_tokens", "output_tokens")}
    assert (row["provider"], row["output_tokens"], row["estimated"]) == ("second", 4 + 7, 1)
    sent = row["input_tokens"] - 50
    assert row["cost"] == sent * 150 + 4 * 600


def test_a_zero_is_a_zero(make):
    """What a provider reports is not estimated anew."""
    service = make(Scripted([GOOD, Tokens(0, 0)], models=PRICED))
    service.ask()
    (row,) = service.ledger()
    assert (row["input_tokens"], row["cost"], row["estimated"]) == (0, 0, 0)


def test_a_search_that_fails_is_written_down(make, monkeypatch):
    """Before any provider is asked: one row for each form."""
    service = make(Scripted(GOOD))

    def fail(*_args, **_kwargs):
        raise DatabaseError("away", unavailable=True)

    documents = service.app.extensions["muset"].ask._documents
    monkeypatch.setattr(documents, "search", fail)
    assert [service.ask(headers=form).status_code for form in ({}, STREAM)] == [503, 503]
    rows = [(row["status"], row["provider"], row["model"]) for row in service.ledger()]
    assert rows == [("error", "first", "small")] * 2


def test_metrics_count_each_call(make):
    """A call by its outcome; one that was not made is none."""
    service = make(Scripted(cut()), Scripted(GOOD, name="second"), CIRCUIT_BREAKER_THRESHOLD="2")

    def count(status):
        line = f'muset_ai_requests_total{{model="small",status="{status}"}}'
        return float(service.metrics().get(line, 0))

    before = count("error"), count("success"), count("refused_by_breaker")
    for k in range(1, 5):
        service.ask(k=k)
    after = count("error"), count("success"), count("refused_by_breaker")
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 4, 0]
