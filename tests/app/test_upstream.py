"""The scripted model server, through the official client and by the byte."""

import json
import socket
import subprocess
import sys
import time
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest
from waiting import until

from muset.testing.script import KINDS, Delay, Options
from muset.testing.upstream import Fault, Upstream

PROMPT = [
    {"role": "system", "content": 'Cite as [1]. Else say "I cannot find this in the documents."'},
    {
        "role": "user",
        "content": "[1] Cows\nCows eat grass. They are\nlarge.\n\n"
        '<passage id="2" title="Bees">\nA colony has one queen. She lays 2,000 eggs a day.\n'
        "</passage>\n\nHow many eggs does she lay?",
    },
]
QUOTED = "She lays 2,000 eggs a day [2]."


@pytest.fixture(scope="module")
def shared():
    with Upstream(seed=1, models=["scripted", "other"]) as upstream:
        yield upstream


@pytest.fixture
def upstream(shared):
    shared.reset()
    return shared


def client_of(upstream, timeout=5.0, key="k"):
    return openai.OpenAI(base_url=upstream.base_url, api_key=key, max_retries=0, timeout=timeout)


@pytest.fixture
def client(upstream):
    with client_of(upstream) as client:
        yield client


def ask(client, *, stream, model="scripted", **options):
    """Text, reason of the end, usage."""
    create = client.chat.completions.create
    if not stream:
        whole = create(model=model, messages=PROMPT, **options)
        return whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage
    options["stream_options"] = {"include_usage": True}
    text, finish, usage = "", None, None
    for chunk in create(model=model, messages=PROMPT, stream=True, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish, usage


def raw(upstream, method, path, body=None, headers=None):
    """Status and parsed body of a request that no client library would send."""
    with closing(HTTPConnection(urlsplit(upstream.base_url).netloc, timeout=10)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@both
def test_answers_quote_the_passages(upstream, client, stream):
    """The sentence that fits the question with the number of its passage; usage; a record."""
    text, finish, usage = ask(client, stream=stream)
    assert (text, finish) == (QUOTED, "stop")
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    seen = upstream.settled()[-1]
    assert (seen.outcome, seen.status, seen.tokens, seen.stream) == ("ok", 200, 12, stream)
    assert seen.messages[1][1] == PROMPT[1]["content"]
    assert "user-agent" in seen.headers
    assert "authorization" not in seen.headers
    assert not seen.client_left


@both
def test_max_tokens(client, stream):
    """The answer is cut there, and says so."""
    assert ask(client, stream=stream, max_tokens=3)[:2] == ("She lays 2", "length")


def test_usage_is_given_when_asked_for(client):
    """A stream without include_usage has no usage."""
    create = client.chat.completions.create
    chunks = list(create(model="scripted", messages=PROMPT, stream=True))
    assert not any(chunk.usage for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models(client):
    """Listed, fetched, and unknown ones are not found."""
    assert [model.id for model in client.models.list()] == ["scripted", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(client, stream=False, model="none")


STATUSES = {
    "rate_limited": (openai.RateLimitError, 429, "rate_limit_exceeded"),
    "server_error": (openai.InternalServerError, 500, None),
    "unavailable": (openai.InternalServerError, 503, None),
    "unauthorized": (openai.AuthenticationError, 401, "invalid_api_key"),
    "forbidden": (openai.PermissionDeniedError, 403, None),
    "context_length": (openai.BadRequestError, 400, "context_length_exceeded"),
}


@both
@pytest.mark.parametrize("kind", STATUSES)
def test_errors_are_the_clients_classes(upstream, client, kind, stream):
    """Each status is its exception, with OpenAI's code; only some say when to come back."""
    expected, status, code = STATUSES[kind]
    upstream.script([Fault(kind, retry_after="7")])
    with pytest.raises(expected) as caught:
        ask(client, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    says_when = "7" if kind in ("rate_limited", "unavailable") else None
    assert caught.value.response.headers.get("retry-after") == says_when
    assert ask(client, stream=stream)[0] == QUOTED
    assert [seen.outcome for seen in upstream.settled()] == [kind, "ok"]


#: The exception or the end; text; tokens of the usage: of a whole answer, then of a stream.
ENDS = {
    "refused": ((openai.APIConnectionError, ""), (openai.APIConnectionError, "")),
    "cut": ((openai.APIConnectionError, ""), (openai.APIConnectionError, "She lays 2")),
    "truncated": ((openai.APIConnectionError, ""), (None, "She lays 2")),
    "malformed": ((json.JSONDecodeError, ""), (json.JSONDecodeError, "She lays 2")),
    "stream_error": ((TypeError, ""), (openai.APIError, "She lays 2")),
    "filtered": (("content_filter", "She lays 2"), ("content_filter", "She lays 2")),
    "slow_drip": (("stop", QUOTED), ("stop", QUOTED)),
    "slow_first_token": (("stop", QUOTED), ("stop", QUOTED)),
    "ok": (("stop", QUOTED), ("stop", QUOTED)),
    "invented": (("stop", "[99]."), ("stop", "[99].")),
    "unsaid": (("stop", "I cannot find this in the documents."),) * 2,
}


def end_of(client, stream):
    """How an answer ends, an exception's class or a reason, and the text so far."""
    text, finish = "", None
    try:
        if not stream:
            return ask(client, stream=False)[1::-1]
        for chunk in client.chat.completions.create(model="scripted", messages=PROMPT, stream=True):
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason
    except (openai.APIError, ValueError, TypeError) as error:
        return type(error), text
    return finish, text


@both
@pytest.mark.parametrize("kind", ENDS)
def test_broken_answers(upstream, client, kind, stream):
    """What the client makes of each fault, and that the next answer is whole again."""
    upstream.script([Fault(kind, delay=0.0001)])
    expected, expected_text = ENDS[kind][stream]
    end, text = end_of(client, stream)
    assert end == expected
    assert text.endswith(expected_text)
    assert upstream.settled()[-1].outcome == kind
    assert ask(client, stream=stream)[0] == QUOTED


@both
@pytest.mark.parametrize("kind", ["hang", "stall"])
def test_silence_lasts_until_the_client_leaves(upstream, kind, stream):
    """The server waits, notices at once that nobody is there, and writes it down."""
    upstream.script([kind])
    with client_of(upstream, timeout=1) as client, pytest.raises(openai.APITimeoutError):
        ask(client, stream=stream)
    seen = upstream.settled()[-1]
    assert seen.client_left
    assert seen.tokens == (3 if kind == "stall" else 0)
    until(lambda: upstream.state["connections"] == 0)


@both
def test_usage_may_be_zero_or_missing(upstream, client, stream):
    """Two different things."""
    upstream.script(["zero_usage", "missing_usage"])
    assert ask(client, stream=stream)[2].total_tokens == 0
    assert ask(client, stream=stream)[2] is None


def test_every_kind_has_a_test():
    """None of the faults is left out above."""
    elsewhere = {"hang", "stall", "zero_usage", "missing_usage"}
    assert {*STATUSES, *ENDS, *elsewhere} == set(KINDS)


def test_a_script_is_a_list(upstream, client):
    """In order, by model, a number of times, for ever; another script replaces it."""
    upstream.script([Fault("filtered", model="other", times=2), "ok", Fault("unsaid", times=0)])
    for model in ("scripted", "other", "other", "other", "scripted"):
        ask(client, stream=False, model=model)
    outcomes = [seen.outcome for seen in upstream.settled()]
    assert outcomes == ["ok", "filtered", "filtered", "unsaid", "unsaid"]
    upstream.script([])
    assert ask(client, stream=False)[0] == QUOTED
    assert upstream.state["outcomes"] == {"ok": 2, "filtered": 2, "unsaid": 2}


def test_a_rate_is_seeded():
    """The same seed meets the same requests, another one others."""

    def outcomes(seed):
        with Upstream(seed=seed, faults=[Fault("filtered", times=0, rate=0.5)]) as upstream:
            body = json.dumps({"model": "scripted", "messages": PROMPT})
            for _ in range(20):
                raw(upstream, "POST", "/v1/chat/completions", body)
            return [seen.outcome for seen in upstream.settled()]

    first = outcomes(1)
    assert 0 < first.count("filtered") < 20
    assert outcomes(1) == first
    assert outcomes(2) != first


def test_pace_and_length():
    """Latency, delay of the first token and tokens per second add up; answers have a length."""
    options = {"latency": "0.1", "first_token": "uniform:0.1:0.2", "tokens_per_second": 50}
    with Upstream(tokens=20, **options) as upstream, client_of(upstream) as client:
        for stream in (False, True):
            began = time.monotonic()
            assert ask(client, stream=stream)[2].completion_tokens == 20
            assert time.monotonic() - began >= 0.1 + 0.1 + 19 / 50


def test_a_client_that_leaves_in_the_middle_is_noticed():
    """Also between two tokens that are far from each other."""
    with Upstream(tokens_per_second=0.05) as slow, client_of(slow) as client:
        stream = client.chat.completions.create(model="scripted", messages=PROMPT, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        seen = slow.settled(timeout=15)[-1]
    assert (seen.tokens, seen.client_left) == (1, True)


def test_a_key(upstream):
    """Where one is set no other is taken; where none is set any is."""
    assert raw(upstream, "GET", "/v1/models")[0] == 200
    with Upstream(api_key="right") as guarded:
        with client_of(guarded, key="right") as client:
            assert ask(client, stream=False)[0] == QUOTED
        with client_of(guarded, key="wrong") as client, pytest.raises(openai.AuthenticationError):
            ask(client, stream=False)
        assert raw(guarded, "GET", "/v1/models")[0] == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("{", 400),
        ("[" * 100_000, 400),
        ("[]", 400),
        ("null", 400),
        ('{"model": "scripted"}', 400),
        ('{"model": "scripted", "messages": [{"role": "user"}]}', 400),
        (
            '{"model": "scripted", "messages": [{"role": "user", "content": ""}], "max_tokens": 0}',
            400,
        ),
    ],
)
def test_bad_requests(upstream, body, status):
    """Each has OpenAI's error, and none reaches the record."""
    got, error = raw(upstream, "POST", "/v1/chat/completions", body)
    assert got == status
    assert error["error"]["type"] == "invalid_request_error"
    assert upstream.requests == []


def test_limits(upstream):
    """Bodies and heads that are too large are refused before they are read or kept."""
    path = "/v1/chat/completions"
    assert raw(upstream, "POST", path, headers={"Content-Length": str(1 << 40)})[0] == 413
    assert raw(upstream, "POST", path, headers={"Transfer-Encoding": "chunked"})[0] == 411
    heads = {f"X-{n}": "x" * 8000 for n in range(20)}
    assert raw(upstream, "GET", "/v1/models", headers=heads)[0] == 431
    assert raw(upstream, "GET", "/nothing")[0] == 404
    assert raw(upstream, "PUT", "/v1/models")[0] == 501


def test_the_record_is_bounded(upstream):
    """Old prompts are forgotten, the request is not."""
    body = json.dumps({"model": "scripted", "messages": PROMPT})
    with closing(HTTPConnection(urlsplit(upstream.base_url).netloc, timeout=10)) as connection:
        for _ in range(201):
            connection.request("POST", "/v1/chat/completions", body)
            connection.getresponse().read()
    seen = upstream.settled()
    assert len(seen) == 201
    assert [bool(one.messages) for one in seen] == [False] + [True] * 200


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Fault("nothing"), "kind must be one of ok, rate_limited"),
        (lambda: Fault("cut", rate=0), "rate must be above 0"),
        (lambda: Fault("cut", times=-1), "times must be"),
        (lambda: Fault("cut", after=-1), "after must be"),
        (lambda: Fault("cut", delay=float("nan")), "delay must be"),
        (lambda: Fault("rate_limited", retry_after="1\r\nX: y"), "retry_after must be"),
        (lambda: Fault.parse("cut,often=1"), "an option of a fault must be one of times"),
        (lambda: Fault.parse("cut,times=x"), "times must be a number, got 'x'"),
        (lambda: Delay.parse("gauss:1:2"), "a delay must be SECONDS"),
        (lambda: Delay.parse("-1"), "a delay must be SECONDS"),
        (lambda: Delay.parse("uniform:1"), "a delay must be SECONDS"),
        (lambda: Options(mode="loud"), "mode must be one of quote"),
        (lambda: Options(models=()), "models must be at least one"),
        (lambda: Options(tokens=0), "tokens must be from 1"),
        (lambda: Options(tokens_per_second=-1), "tokens_per_second must be"),
        (lambda: Upstream(latency="soon"), "a delay must be SECONDS"),
    ],
)
def test_what_is_not_allowed_is_named(make, text):
    """A wrong value is an error at once, with what is expected."""
    with pytest.raises(ValueError, match=text):
        make()


def test_a_bad_script_changes_nothing(upstream, client):
    """The control channel says what is wrong, and the old script stays."""
    upstream.script(["unsaid"])
    for body in ('{"faults": [{"kind": "x"}]}', '{"faults": [{"kind": "cut", "x": 1}]}', "[]"):
        status, error = raw(upstream, "POST", "/_control/script", body)
        assert (status, "cannot be read" in error["error"]["message"]) == (400, True)
    assert ask(client, stream=False)[0] == PROMPT[0]["content"].split('"')[1]
    assert raw(upstream, "GET", "/_control/none")[0] == 404


def test_the_command(tmp_path):
    """A free port is printed; faults by option; SIGTERM ends it with 0, also within an answer."""
    command = [sys.executable, "-m", "muset.testing.upstream", "--port", "0", "--model", "m"]
    command += ["--fault", "stall,times=0,after=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process.stdout:
        netloc = urlsplit(process.stdout.readline().strip()).netloc
        with closing(HTTPConnection(netloc, timeout=10)) as connection:
            body = {"model": "m", "stream": True, "messages": PROMPT}
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            assert connection.getresponse().status == 200
            process.terminate()
            assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--fault", "no"], 2, "kind must be one of"),
        (["--latency", "x"], 2, "a delay must be"),
        (["--port", "USED"], 1, "cannot listen on 127.0.0.1"),
    ],
)
def test_the_command_refuses(arguments, code, text):
    """One line that says what is wrong."""
    with closing(socket.create_server(("127.0.0.1", 0))) as used:
        port = str(used.getsockname()[1])
        arguments = [port if argument == "USED" else argument for argument in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "muset.testing.upstream", *arguments],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert done.returncode == code
    assert text in done.stderr


def test_it_ends_with_the_process_that_started_it():
    """A test run that is killed leaves no server behind."""
    code = (
        "from muset.testing.upstream import Upstream; import os;"
        "u = Upstream(); print(u.base_url, flush=True); os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    address = urlsplit(done.stdout.strip())
    for _ in range(200):
        try:
            socket.create_connection((address.hostname, address.port), 1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("it still listens")
