"""The API as a client sees it, in process."""

import collections
import io
import json
import math

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks as checks_of

from muset.blueprints import openapi
from muset.ports import Role

SUFFIXES = tuple(
    """ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness
    fulness ousness aliti iviti biliti icate ative iciti ical ful ance able ible ement ment ion
    ism ate ous ive ize s es ies sses eed ed ing logi y e l""".split()  # noqa: SIM905
)
TEXT = "# Bees\r\n\r\nA bee colony has one queen. She lays up to 2,000 eggs a day in summer.\r\n"


def put(client, who, title="Bees", text=TEXT):
    return client.post("/api/v1/documents", json={"title": title, "text": text}, headers=who)


def test_document_in_listed_out_and_gone(client, member):
    """A text is stored as sent, listed, read with an ETag, asked about, deleted and never cited."""
    made = put(client, member)
    assert made.status_code == 201
    assert made.json.keys() == {
        "id", "title", "sha256", "passages", "characters", "created_at"
    }  # fmt: skip
    where = made.headers["Location"]
    read = client.get(where, headers=member)
    assert read.json["text"] == TEXT
    again = client.get(where, headers=member | {"If-None-Match": read.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    listed = client.get("/api/v1/documents", headers=member).json
    assert [item["id"] for item in listed["items"]] == [made.json["id"]]
    question = {"question": "How many eggs does the queen lay?"}
    answer = client.post("/api/v1/ask", json=question, headers=member).json
    assert answer["status"] == "answered"
    for citation in answer["citations"]:
        assert TEXT[citation["start"] : citation["end"]] == citation["quote"]
    assert answer["attempts"][0]["outcome"] == "success"
    assert client.delete(where, headers=member).status_code == 204
    assert client.get(where, headers=member).status_code == 404
    answer = client.post("/api/v1/ask", json=question, headers=member).json
    assert (answer["status"], answer["citations"]) == ("unsure", [])


def test_same_text_is_kept_once_and_ids_are_not_reused(client, member):
    """The same text answers 200 with the same id; a deleted id never comes back."""
    first, second = put(client, member), put(client, member, title="Other")
    assert (second.status_code, second.json) == (200, first.json)
    client.delete(first.headers["Location"], headers=member)
    assert put(client, member).json["id"] > first.json["id"]


def test_upload(client, member):
    """Files are taken with their names or titles; other kinds are 415, other encodings 422."""

    def upload(name, data, **form):
        form["file"] = (io.BytesIO(data), name)
        return client.post("/api/v1/documents", data=form, headers=member)

    made = upload("notes.md", "Größe: 3 m".encode())
    assert (made.status_code, made.json["title"], made.json["characters"]) == (201, "notes", 10)
    assert upload("a.txt", b"text", title="Named").json["title"] == "Named"
    page = upload("a.html", b"<title>On bees</title><p>One queen.</p>").json
    assert (page["title"], page["characters"]) == ("On bees", 10)
    for name in ("a.docx", "a.pdf.exe"):
        refused = upload(name, b"x")
        assert refused.status_code == 415
        assert ".html, .pdf" in refused.json["message"]
    bad = upload("b.txt", b"abc\xff")
    assert bad.status_code == 422
    assert "byte 3" in bad.json["errors"][0]["message"]


@pytest.mark.parametrize(
    ("kwargs", "status"),
    [
        ({"data": "{", "content_type": "application/json"}, 400),
        ({"data": "{}", "content_type": "text/plain"}, 415),
        ({"data": "a=1", "content_type": "application/x-www-form-urlencoded"}, 422),
        ({"json": {}}, 422),
        ({"json": []}, 422),
        ({"json": {"title": "x", "text": " \n"}}, 422),
        ({"json": {"title": "x", "text": "a\0b"}}, 422),
        ({"json": {"title": "x", "text": "\ud800"}}, 422),
        ({"json": {"title": "x" * 201, "text": "a"}}, 422),
        ({"json": {"title": "x", "text": "a", "more": 1}}, 422),
    ],
)
def test_bad_documents(client, member, kwargs, status):
    """What cannot be stored is refused with the right status, and names the field where it can."""
    answer = client.post("/api/v1/documents", headers=member, **kwargs)
    assert answer.status_code == status
    assert answer.json["category"] == "validation"


def test_too_large(environ, services, member, end):
    """A text above the limit is 413 and names the limit."""
    from muset.app import create_app
    from muset.settings import load_settings

    small = load_settings(environ | {"MUSET_MAX_DOCUMENT_BYTES": "2048"})
    app = create_app(small)
    client = app.test_client()
    for size in (2049, 1_000_000):
        answer = put(client, member, text="x" * size)
        assert answer.status_code == 413
    end(app)


def test_bad_questions(client, member):
    """Unknown model, unknown document and limits are 422 that name the field."""
    for body, field in (
        ({"question": ""}, "question"),
        ({"question": "   "}, "question"),
        ({"question": "x" * 2001}, "question"),
        ({"question": "x", "k": 0}, "k"),
        ({"question": "x", "model": "gpt-0"}, "model"),
        ({"question": "x", "document_ids": [999]}, "document_ids"),
        ({"question": "x", "max_tokens": 0}, "max_tokens"),
    ):
        answer = client.post("/api/v1/ask", json=body, headers=member)
        assert answer.status_code == 422, body
        assert answer.json["errors"][0]["field"] == field


def test_document_filter_and_length(client, member):
    """document_ids narrows the search and max_tokens bounds the words of the answer."""
    one = put(client, member).json["id"]
    two = put(client, member, "Wasps", "A wasp queen lays eggs in spring, some forty a day.").json
    body = {"question": "How many eggs does a queen lay?", "document_ids": [two["id"]]}
    answer = client.post("/api/v1/ask", json=body, headers=member).json
    assert {citation["document_id"] for citation in answer["citations"]} == {two["id"]}
    body |= {"document_ids": [one], "max_tokens": 3}
    answer = client.post("/api/v1/ask", json=body, headers=member).json
    assert answer["status"] == "unsure"


def test_paging(client, member):
    """Pages follow each other without a gap or a repeat, and end with null."""
    for number in range(5):
        put(client, member, text=f"text {number}")
    seen, cursor = [], ""
    for _ in range(3):
        page = client.get(f"/api/v1/documents?limit=2{cursor}", headers=member).json
        seen += [item["id"] for item in page["items"]]
        cursor = f"&cursor={page['next_cursor']}"
    assert (len(set(seen)), page["next_cursor"]) == (5, None)


def test_keys_and_roles(client, services, admin, member):
    """Without a valid key 401 with a challenge, with too small a role 403, owners apart."""
    for header in (
        {},
        {"Authorization": "Bearer msk_" + "x" * 43},
        {"Authorization": "Basic eA=="},
    ):
        answer = client.get("/api/v1/documents", headers=header)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert client.get("/api/v1/admin/errors", headers=member).status_code == 403
    assert client.get("/api/v1/admin/errors", headers=admin).status_code == 200
    where = put(client, member).headers["Location"]
    other = services.keys.create("other@example.org", Role.MEMBER)
    other = {"Authorization": f"Bearer {other}"}
    assert client.get(where, headers=other).status_code == 200
    assert client.delete(where, headers=other).status_code == 403
    assert client.delete(where, headers=admin).status_code == 204
    big = "/api/v1/documents/99999999999999999999999"
    assert client.get(big, headers=admin).status_code == 404


def test_admin_errors(app, client, admin):
    """A fault of the service is found by its fingerprint, with its traceback; another is a 404."""
    app.view_functions["ask.ask"] = lambda: 1 / 0
    assert client.post("/api/v1/ask", headers=admin).status_code == 500
    kept = client.get("/api/v1/admin/errors", headers=admin).json["items"][0]
    assert kept["type"] == "ZeroDivisionError"
    one = client.get(f"/api/v1/admin/errors/{kept['fingerprint']}", headers=admin).json
    assert "ZeroDivisionError" in one["traceback"]
    assert one["source"] == "this process"
    assert client.get("/api/v1/admin/errors/none", headers=admin).status_code == 404


def test_health(app, client, monkeypatch):
    """Alive always; ready with the database, unavailable without, draining while it stops."""
    import sys
    import types

    assert client.get("/health/live").json == {"status": "alive"}
    assert client.get("/health/ready").json["status"] == "ready"
    worker = types.SimpleNamespace(draining=lambda: True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "flask_muset.worker", worker)
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json["status"]) == (503, "draining")

    def gone(_):
        raise TimeoutError

    monkeypatch.setattr(type(app.extensions["muset"].database), "check", lambda self, s: gone(s))
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json["status"]) == (503, "unavailable")
    assert answer.json["checks"] == {"database": "failed", "journal": "ok", "state": "local"}


def test_docs_page_asks_no_other_host(client):
    """The page and its assets come from here."""
    page = client.get("/docs/")
    assert page.status_code == 200
    assert "http://" not in page.text.replace("http://localhost", "")
    assert "https://" not in page.text
    with client.get("/docs/swagger-ui-bundle.js") as bundle:
        assert bundle.status_code == 200


def test_document_is_exactly_what_is_served(app):
    """Every route of the API and of health is in the OpenAPI document, and nothing else."""
    served = {
        (rule.rule.replace("<int:", "{").replace("<", "{").replace(">", "}"), method.lower())
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.rule.startswith(("/api/", "/health/")) and rule.rule != openapi.PATH
    }
    described = {
        (path, method) for path, item in openapi.document(app)["paths"].items() for method in item
    }
    assert described == served


def no_traceback(_context, response, _case):
    """What went wrong inside is for the log."""
    assert "Traceback (most recent call last)" not in response.text
    assert '.py", line' not in response.text


def parts_of(operation):
    """How many things of a request may vary."""
    return len(list(operation.iter_parameters())) + len(list(operation.body))


@pytest.mark.claim("10,000 generated requests: no 5xx, no undocumented status, no traceback")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schemathesis(app, admin, prove):
    """Generated requests: no 5xx, no undocumented status, every answer fits its schema."""
    checks = [
        no_traceback,
        schemathesis.checks.not_a_server_error,
        checks_of.status_code_conformance,
        checks_of.content_type_conformance,
        checks_of.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_wsgi(openapi.PATH, app)
    # What is always the same is asked for once, and leaves its share to those that come later.
    operations = sorted((found.ok() for found in schema.get_all_operations()), key=parts_of)
    statuses, wanted = collections.Counter(), 10_000 if prove.full else 6 * len(operations)
    for number, operation in enumerate(operations):
        share = (wanted - statuses.total()) / (len(operations) - number)

        @hypothesis.settings(
            max_examples=math.ceil(share),
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def generated(case):
            response = case.call_and_validate(headers=admin, checks=checks)
            statuses[f"{response.status_code // 100}xx"] += 1

        generated()
    prove.figure(f"{statuses.total()} requests to {len(operations)} operations: {dict(statuses)}")
    assert statuses.total() >= wanted
    assert statuses["2xx"] > wanted / 20


@hypothesis.settings(max_examples=150, derandomize=True, deadline=None, database=None)
@hypothesis.given(st.text(max_size=400))
def test_passages_and_sentences_of_any_text(text):
    """Spans are in order, in range, stripped, and passages hold every character but blanks."""
    from muset.services.text import split_passages, split_sentences

    for spans in (split_passages(text), split_sentences(text)):
        end = 0
        for span in spans:
            assert end <= span.start < span.end <= len(text)
            piece = text[span.start : span.end]
            assert piece == piece.strip() != ""
            end = span.end
        covered = "".join(text[s.start : s.end] for s in spans)
        assert "".join(covered.split()) == "".join(text.split())


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_terms_are_those_of_the_index(services, client, member):
    """Our stems equal FTS5's on the words of the test documents."""
    from pathlib import Path

    from sqlalchemy import text as sql

    from muset.services.text import terms

    data = Path(__file__).parent.parent / "data"
    document = (data / "arbor_day_leaves.txt").read_text(encoding="utf-8")
    put(client, member, "Leaves", document)
    vocabulary = services.database.read(
        lambda c: set(c.execute(sql("SELECT term FROM passages_vocab")).scalars())
    )
    ours = set(terms(document))
    assert len(ours ^ vocabulary) / len(vocabulary) < 0.002, sorted(ours ^ vocabulary)[:20]


@hypothesis.settings(max_examples=150, derandomize=True, deadline=None, database=None)
@hypothesis.given(st.text(max_size=200), st.lists(st.sampled_from(SUFFIXES), max_size=4))
def test_terms_are_counted_as_they_are_made(text, suffixes):
    """Looking at likely words alone counts every term as often as it is in the text."""
    from collections import Counter

    from muset.services.text import term_counter, terms

    for whole in (text, f"_{text} Rel{''.join(suffixes)} bu{''.join(suffixes)}_a{text}"):
        counted = Counter(terms(whole))
        assert term_counter(counted.keys())(whole) == counted
        for term, times in counted.items():
            assert term_counter({term})(whole) == {term: times}


def test_any_question_is_legal(client, member):
    """Operators, quotes, brackets and emoji in a question are words or nothing."""
    put(client, member)
    for question in ('what is "a?', "c++ OR NOT (NEAR", "🐝🐝", "***", "queen* AND", "a" * 2000):
        answer = client.post("/api/v1/ask", json={"question": question}, headers=member)
        assert answer.status_code == 200, question
        json.dumps(answer.json)
