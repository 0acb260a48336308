"""The cache in the service: documents, answers, invalidation, headers and metrics."""

import re

import pytest

from flask_muset.clock import SYSTEM
from flask_muset.testing import virtual_clock

BEES = "A bee colony has one queen. She lays 2,000 eggs a day in summer. Drones do not sting."
ANTS = "An ant colony may have many queens. The queen of the black garden ant lives up to 28 years."
EGGS = {"question": "How many eggs does the queen lay a day in summer?"}


def put(client, who, text=BEES, title="Bees"):
    made = client.post("/api/v1/documents", json={"title": title, "text": text}, headers=who)
    assert made.status_code in (200, 201)
    return made.headers.get("Location"), made.json["id"]


def ask(client, who, **options):
    return client.post("/api/v1/ask", json=EGGS | options, headers=who)


def test_the_same_question_is_answered_once(client, member):
    """The second answer is the first one, from the cache: no attempt, no tokens, and it says so."""
    put(client, member)
    first, second = ask(client, member), ask(client, member)
    assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("MISS", "HIT")
    assert (first.json["cached"], second.json["cached"]) == (False, True)
    assert first.json["attempts"][0]["outcome"] == "success"
    assert second.json["attempts"] == []
    assert second.json["usage"] == {"input_tokens": 0, "output_tokens": 0}
    for name in ("answer", "status", "citations", "model"):
        assert first.json[name] == second.json[name]
    assert int(second.headers["Age"]) >= 0
    assert "Age" not in first.headers


@pytest.mark.parametrize(
    "options", [{"k": 3}, {"max_tokens": 50}, {"document_ids": "own"}, {"question": "Do drones?"}]
)
def test_another_question_is_another_answer(client, member, options):
    """All that an answer depends on is in its key."""
    _, document_id = put(client, member)
    ask(client, member)
    if options.get("document_ids"):
        options = {"document_ids": [document_id]}
    assert ask(client, member, **options).json["cached"] is False


def test_the_order_of_the_documents_asked_for_is_no_difference(client, member):
    """The same documents in another order are the same question."""
    ids = [put(client, member)[1], put(client, member, ANTS, "Ants")[1]]
    assert ask(client, member, document_ids=ids).json["status"] == "answered"
    assert ask(client, member, document_ids=ids[::-1] + ids).json["cached"] is True


def test_only_certain_answers_are_kept(client, member):
    """An unsure answer is made anew each time."""
    put(client, member, ANTS, "Ants")
    for _ in range(2):
        answer = ask(client, member, question="What is the capital of France?")
        assert answer.json["status"] == "unsure"
        assert answer.json["cached"] is False
        assert answer.headers["X-Cache"] != "HIT"


def test_a_deleted_document_is_never_cited_again(client, member):
    """A document that comes or goes changes the key of every answer."""
    where, document_id = put(client, member)
    put(client, member, ANTS, "Ants")
    assert ask(client, member).json["citations"][0]["document_id"] == document_id
    assert ask(client, member).json["cached"] is True
    assert client.delete(where, headers=member).status_code == 204
    after = ask(client, member)
    assert after.json["cached"] is False
    assert all(c["document_id"] != document_id for c in after.json["citations"])
    _, again = put(client, member)
    assert ask(client, member).json["citations"][0]["document_id"] == again


def test_versions_of_the_documents_do_not_repeat(services, member):
    """Whatever comes and goes, two different sets of documents have two different versions."""
    store = services.documents._store
    user_id = services.keys.user_id("member@example.org")
    seen, here = {}, set()

    def note():
        version = store.version()
        assert seen.setdefault(version, frozenset(here)) == frozenset(here), version

    for step in "aaadaddaaadddaadda":
        if step == "a":
            document, _ = store.add(user_id=user_id, title="t", text=f"text {len(seen)} {step}")
            here.add(document.id)
        else:
            gone = sorted(here)[len(seen) % len(here)]
            store.delete(gone)
            here.discard(gone)
        note()


def test_a_document_is_read_once(client, member):
    """The second reading is a hit, with the same text; a conditional one is 304 all the same."""
    where, _ = put(client, member)
    first, second = client.get(where, headers=member), client.get(where, headers=member)
    assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("MISS", "HIT")
    assert first.json == second.json
    etag = {"If-None-Match": second.headers["ETag"]}
    assert client.get(where, headers=member | etag).status_code == 304


def test_that_there_is_no_document_is_remembered_until_there_is_one(client, member):
    """404 comes from the cache for a while; the new document is there at once."""
    for outcome in ("MISS", "HIT"):
        answer = client.get("/api/v1/documents/1", headers=member)
        assert answer.status_code == 404
        assert answer.json["details"] == {"document_id": 1}
        assert answer.headers.get("X-Cache", outcome) == outcome
    where, document_id = put(client, member)
    assert document_id == 1
    assert client.get(where, headers=member).status_code == 200
    client.delete(where, headers=member)
    assert client.get(where, headers=member).status_code == 404


def test_a_document_outlives_its_database_in_the_cache(client, member, services, app, monkeypatch):
    """While the database cannot be read, a document that was read lately is served, as stale."""
    where, _ = put(client, member)
    with virtual_clock():
        fresh = client.get(where, headers=member)
        SYSTEM.sleep(400)

        def away(_id):
            raise ConnectionError("no database")

        monkeypatch.setattr(app.extensions["muset"].documents._store, "get", away)
        stale = client.get(where, headers=member)
        assert (stale.status_code, stale.headers["X-Cache"]) == (200, "STALE")
        assert stale.json == fresh.json
        assert int(stale.headers["Age"]) >= 400
        SYSTEM.sleep(3600)
        assert client.get(where, headers=member).status_code == 503


def test_an_admin_invalidates_by_pattern(client, member, admin, caplog):
    """Exactly how many keys there were, in the answer and in the audit log."""
    for text in (BEES, ANTS):
        where, _ = put(client, member, text)
        client.get(where, headers=member)
    ask(client, member)

    def invalidate(who, **body):
        return client.post("/api/v1/admin/cache/invalidate", json=body, headers=who)

    assert invalidate(member, pattern="document:*").status_code == 403
    done = invalidate(admin, pattern="document:*")
    assert (done.status_code, done.json) == (200, {"deleted": 2})
    assert "2 keys of the cache deleted, which match 'document:*'" in caplog.text
    assert invalidate(admin, pattern="document:*").json == {"deleted": 0}
    assert ask(client, member).json["cached"] is True
    assert invalidate(admin, pattern="ask:*").json == {"deleted": 1}
    assert invalidate(admin, pattern="").status_code == 422
    assert invalidate(admin, pattern="x" * 2000).status_code == 422


def test_the_metrics_count_what_happened(client, member, admin):
    """Hits, misses and loads as they were, and a duration for each read."""

    def values():
        text = client.get("/metrics", headers=admin).text
        found = dict(re.findall(r"^(muset_cache_\S+) (\S+)$", text, re.MULTILINE))
        return {name: float(value) for name, value in found.items()}

    def count(seen, operation, status):
        name = f'muset_cache_operations_total{{operation="{operation}",status="{status}"}}'
        return seen.get(name, 0)

    where, _ = put(client, member)
    before = values()
    for _ in range(5):
        client.get(where, headers=member)
    after = values()
    assert count(after, "get", "hit") - count(before, "get", "hit") == 4
    assert count(after, "get", "miss") - count(before, "get", "miss") == 1
    assert count(after, "load", "ok") - count(before, "load", "ok") == 1
    timed = "muset_cache_get_duration_seconds_count"
    assert after[timed] - before.get(timed, 0) == 5
