"""Every kind of fault of a real model server, with and without a stream."""

import json
import sys
import textwrap

import pytest
from asked_service import Service
from event_streams import STREAM, assert_one_end, events_of
from patched import run_patched
from redis_server import free_port
from scripted import Scripted
from wire import DONE, Wire, answers, chunk, says

from flask_muset.resilience import policies_of
from muset.ports import Model
from muset.providers.openai import OpenAIProvider
from muset.services.answering import is_declined
from muset.services.streaming import Times
from muset.testing.upstream import Upstream

MODEL = (Model("m"),)
#: By kind: the status without a fallback, whether a breaker counts it, the outcome of the attempt
#: before the first text and after it.
FAULTS = {
    "rate_limited": (503, True, {"rate_limited"}),
    "server_error": (502, True, {"error"}),
    "unauthorized": (503, True, {"unauthorized"}),
    "forbidden": (503, True, {"unauthorized"}),
    "context_length": (422, False, {"rejected"}),
    "refused": (502, True, {"error"}),
    "cut": (502, True, {"error", "cut"}),
    "truncated": (502, True, {"error", "cut"}),
    "stall": (504, True, {"timeout"}),
    "malformed": (502, True, {"error", "cut"}),
    "stream_error": (502, True, {"error", "cut"}),
}


@pytest.fixture(scope="module")
def upstream():
    with Upstream(seed=1, models=["m"], tokens_per_second=50) as upstream:
        yield upstream


@pytest.fixture
def service(upstream, tmp_path):
    upstream.reset()
    provider = OpenAIProvider("model", upstream.base_url, MODEL, idle_timeout_s=1.5)
    service = Service(
        tmp_path, [provider], times=Times(hold_back_s=0.0), CIRCUIT_BREAKER_THRESHOLD="1000"
    )
    yield service
    service.close()


def ended(answer):
    """How an answer has ended: its status, or that of its last event."""
    with answer:
        if not answer.content_type.startswith("text/event-stream"):
            return answer.status_code, answer.headers.get("Retry-After")
        events = events_of(answer.text)
    assert_one_end(events)
    name, body = events[-1]
    statuses = {"ExternalServiceError": 502, "OperationTimeoutError": 504}
    return (200, None) if name == "done" else (statuses[body["error"]], body.get("retry_after"))


def calls_of(service):
    """The calls of the model that the metrics have."""
    name = 'muset_ai_requests_total{model="m"'
    return sum(float(n) for line, n in service.metrics().items() if line.startswith(name))


@pytest.mark.claim(
    "each kind of upstream fault, streamed and not: one terminal event or one error with its "
    "status, nothing incomplete is cached, breaker, metrics and ledger agree with the upstream"
)
def test_each_fault(service, upstream, prove):
    """Asks under each fault, then once more without it: that answer must be a new one."""
    kinds = list(FAULTS) * (5 if prove.full else 1)
    asked, outcomes, before = 0, [], calls_of(service)
    for number, kind in enumerate(kinds):
        for form in ({}, STREAM):
            status = FAULTS[kind][0]
            upstream.script([kind])
            options = {"max_tokens": 500 + 2 * number + bool(form)}
            found, wait = ended(service.ask(headers=form, allow_degraded=False, **options))
            assert (kind, form, found) == (kind, form, status)
            assert wait == "1" or kind != "rate_limited"
            again = service.ask(headers=form, allow_degraded=False, **options)
            assert (again.headers["X-Cache"], ended(again)[0]) == ("MISS", 200)
            asked += 2
            outcomes += [kind, "ok"]
    seen = upstream.settled()
    rows = service.ledger()
    breaker = policies_of(service.app)["model"][1].snapshot()
    counted = calls_of(service) - before
    # The breaker's window has the last hundred calls.
    failures = sum(kind != "ok" and FAULTS[kind][1] for kind in outcomes[-100:])
    prove.figure(
        f"{asked} questions, {len(seen)} calls, {len(rows)} rows, {breaker['failures']} failures"
    )
    assert [each.outcome for each in seen] == outcomes
    assert len(rows) == asked
    assert sum(row["status"] == "success" for row in rows) == asked // 2
    assert sum(row["status"] in ("error", "partial") for row in rows) == asked // 2
    assert breaker["failures"] == failures
    assert counted == asked
    good = [row for row in rows if row["status"] == "success"]
    told = [each for each in seen if each.outcome == "ok"]
    assert [row["output_tokens"] for row in good] == [each.tokens for each in told]
    assert [row["input_tokens"] for row in good] == [each.input_tokens for each in told]


def _in_stream(error):
    return says(b"data: " + json.dumps({"error": error}).encode() + b"\n\n")


#: What a provider says to a question that it will not answer.
DECLINED = {
    "filtered": says(chunk(finish="content_filter"), DONE),
    "filtered behind a text": says(chunk("The queen "), chunk(finish="content_filter"), DONE),
    "refusal": says(b'data: {"choices": [{"delta": {"refusal": "no"}}]}\n\n', DONE),
    "in a stream": _in_stream({"code": "content_filter", "message": "no"}),
    "invalid": _in_stream({"type": "invalid_request_error", "message": "no"}),
    **{str(status): answers(status, {}) for status in (400, 404, 409, 413, 418, 422, 451)},
}


@pytest.mark.parametrize("form", [{}, STREAM])
def test_declined_questions_are_nobodys_fault(tmp_path, form):
    """Each is asked once and is a 502, and none of them counts for the breaker."""
    with Wire(*DECLINED.values()) as wire:
        service = Service(
            tmp_path,
            [OpenAIProvider("model", wire.base_url, MODEL)],
            times=Times(hold_back_s=0.0),
            CIRCUIT_BREAKER_THRESHOLD="1",
            MAX_RETRIES="2",
        )
        for number, name in enumerate(DECLINED):
            found = ended(service.ask(headers=form, allow_degraded=False, k=number + 1))
            assert (name, *found) == (name, 502, None)
            assert len(wire.requests) == number + 1
            breaker = policies_of(service.app)["model"][1].snapshot()
            assert (name, breaker["state"], breaker["failures"]) == (name, "closed", 0)
    service.close()


def test_a_question_that_one_declines_another_may_answer(tmp_path):
    """The next provider is asked, as after every other error."""
    with Wire(answers(400, {})) as wire:
        first = OpenAIProvider("model", wire.base_url, MODEL)
        service = Service(tmp_path, [first, Scripted("2,000 eggs a day [1].", name="second")])
        answer = service.ask(allow_degraded=False).json
    told = [(each["provider"], each["outcome"]) for each in answer["attempts"]]
    assert told == [("model", "error"), ("second", "success")]
    service.close()


@pytest.mark.parametrize("status", [401, 403, 408, 429, 500, 503])
def test_what_is_the_providers_fault_still_counts(tmp_path, status):
    """A wrong key, too many questions, a fault and a time-out open the breaker."""
    with Wire(answers(status, {})) as wire:
        service = Service(
            tmp_path,
            [OpenAIProvider("model", wire.base_url, MODEL)],
            CIRCUIT_BREAKER_THRESHOLD="1",
        )
        assert service.ask(allow_degraded=False).status_code in (502, 503)
        assert service.ask(allow_degraded=False).status_code == 503
        assert len(wire.requests) == 1
    assert policies_of(service.app)["model"][1].snapshot()["state"] == "open"
    service.close()


def test_settings_and_the_file_still_say_when_a_breaker_opens(tmp_path):
    """CIRCUIT_BREAKER_TIMEOUT holds, and the policy of AI_PROVIDERS wins over the settings."""
    service = Service(
        tmp_path,
        [Scripted(name="plain"), Scripted(name="chosen")],
        policies={"chosen": {"circuit_breaker": {"failure_threshold": 2}}},
        CIRCUIT_BREAKER_THRESHOLD="7",
        CIRCUIT_BREAKER_TIMEOUT="9.5",
    )
    plain, chosen = (policies_of(service.app)[name][1].options for name in ("plain", "chosen"))
    assert (plain["failure_threshold"], plain["recovery_timeout"]) == (7, 9.5)
    assert (chosen["failure_threshold"], chosen["recovery_timeout"]) == (2, 9.5)
    assert plain["ignore"] is chosen["ignore"] is is_declined
    service.close()


@pytest.mark.parametrize("form", [{}, STREAM])
@pytest.mark.parametrize(("max_tokens", "status"), [(None, "unsure"), (30, "answered")])
def test_an_answer_that_the_models_own_limit_has_cut(tmp_path, form, max_tokens, status):
    """It is unsure, and asked anew; one that is as long as was asked for is kept."""
    text = chunk("The queen lays 2,000 eggs a day [1]. She", "length")
    with Wire(says(text, DONE)) as wire:
        service = Service(tmp_path, [OpenAIProvider("model", wire.base_url, MODEL)])
        options = {} if max_tokens is None else {"max_tokens": max_tokens}
        for _ in range(2):
            with service.ask(headers=form, **options) as answer:
                if form:
                    assert events_of(answer.text)[-1] == ("done", {"status": status})
                else:
                    assert answer.json["status"] == status
                    assert answer.json["citations"]
        assert len(wire.requests) == (2 if status == "unsure" else 1)
    service.close()


@pytest.mark.parametrize("form", [{}, STREAM])
def test_a_server_that_is_not_there(tmp_path, form):
    """No connection: 503, or the documents answer."""
    url = f"http://127.0.0.1:{free_port()}/v1"
    service = Service(tmp_path, [OpenAIProvider("model", url, MODEL)])
    assert ended(service.ask(headers=form, allow_degraded=False)) == (503, "1")
    assert ended(service.ask(headers=form))[0] == 200
    service.close()


def test_every_outcome_is_the_one_that_is_told(service, upstream):
    """attempts[] says in what way the provider failed; the documents answer."""
    for number, (kind, (_, _, outcomes)) in enumerate(FAULTS.items()):
        upstream.script([kind])
        answer = service.ask(max_tokens=900 + number).json
        assert answer["status"] == "degraded"
        assert answer["attempts"][0]["outcome"] in outcomes, kind
        assert answer["attempts"][1]["provider"] == "extractive"


@pytest.mark.parametrize(
    ("kind", "status"), [("invented", "unsure"), ("unsaid", "unsure"), ("ok", "answered")]
)
def test_what_a_model_says(service, upstream, kind, status):
    """An invented source, that the passages do not say it, and a good answer."""
    upstream.script([kind])
    answer = service.ask(max_tokens=700).json
    assert answer["status"] == status
    assert "[99]" not in answer["answer"]
    if kind == "ok":
        assert answer["answer"].endswith("[1].")
        assert answer["citations"][0]["quote"] in "The queen lays 2,000 eggs a day."


# --- Under gevent, with real connections

_SETUP = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2].split(":")
from asked_service import Service
from event_streams import STREAM, events_of
from muset.ports import Model
from muset.providers.openai import OpenAIProvider
from muset.services.streaming import Times
from muset.testing.upstream import Upstream

upstream = Upstream(seed=1, models=["m"], tokens_per_second=6)

def service_of(*names, **options):
    providers = [OpenAIProvider(n, upstream.base_url, (Model("m"),)) for n in names]
    return Service(Path(sys.argv[1]), providers, **options)

def closed_within(seconds):
    end = time.monotonic() + seconds
    while upstream.state["active"] and time.monotonic() < end:
        time.sleep(0.01)
    return not upstream.state["active"]
"""


def run(code, tmp_path):
    return run_patched(
        _SETUP + textwrap.dedent(code) + "\nupstream.close()\n",
        tmp_path,
        ":".join(path for path in sys.path if path.endswith(("tests/app", "tests/ext"))),
    )


@pytest.mark.claim(
    "two providers hang, deadline 2 s: degraded, or 504 with allow_degraded false, by 2.1 s, "
    "streamed and not; no connection to a provider is open 0.1 s later"
)
def test_two_hang(tmp_path, prove):
    """Neither sends a byte; each is cut off when its share is over."""
    result = run(
        """
        upstream.script(["hang"] * 20)
        service = service_of("first", "second", REQUEST_TIMEOUT="2")
        result = []
        for form in ({}, STREAM):
            for allowed in (True, False):
                began = time.monotonic()
                with service.ask(headers=form, allow_degraded=allowed, k=3) as answer:
                    text = answer.text
                took = time.monotonic() - began
                is_degraded = '"degraded"' in text
                result.append([answer.status_code, is_degraded, took, closed_within(0.1)])
        result = [result, len(upstream.requests), upstream.state["active"]]
        """,
        tmp_path,
    )
    found, calls, still_open = result
    prove.figure(
        "; ".join(
            f"{'degraded' if is_degraded else status} after {took:.2f} s"
            for status, is_degraded, took, _ in found
        )
        + f"; {calls} calls, {still_open} open"
    )
    assert [entry[:2] for entry in found] == [[200, True], [504, False]] * 2
    assert (calls, still_open) == (8, 0)
    if prove.full:
        assert all(is_closed for _, _, _, is_closed in found)
        assert max(took for _, _, took, _ in found) <= 2.1


def test_deadlines_and_clients_that_leave(tmp_path):
    """A stream may outlast REQUEST_TIMEOUT, a whole answer not; who leaves ends the call.

    After a cut within the hold-back, the next provider has only what is left of the time.
    """
    result = run(
        """
        service = service_of("first", REQUEST_TIMEOUT="2", times=Times(hold_back_s=0.05))
        with service.ask(headers=STREAM) as answer:
            events = events_of(answer.text)
        whole = service.ask(k=3).json
        upstream.script(["stall"])
        with service.ask(headers=STREAM, k=5) as response:
            next(iter(response.response))
            active = upstream.state["active"]
        is_closed = closed_within(5)
        row, seen = service.ledger()[-1], upstream.requests[-1]
        upstream.script(["cut", "hang"])
        app = service_of("first", "second", REQUEST_TIMEOUT="3", times=Times(hold_back_s=9))
        began = time.monotonic()
        with app.ask(headers=STREAM, k=6) as answer:
            last = events_of(answer.text)[-1]
        result = [
            last, time.monotonic() - began < 10, closed_within(5),
            events[-1], whole["status"], whole["attempts"][0]["outcome"],
            active, is_closed, seen.client_left, row["status"], row["output_tokens"] > 0,
        ]
        """,
        tmp_path,
    )
    assert result == [
        *(["done", {"status": "degraded"}], True, True),
        *(["done", {"status": "answered"}], "degraded", "timeout"),
        *(1, True, True, "client_closed", True),
    ]
