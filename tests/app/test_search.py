"""Search: passages verbatim at their offsets, any text legal, each asked once."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

SEARCH = "/api/v1/search"
TEXTS = {
    "Bees": "# Bees 🐝\r\n\r\nA bee colony has one queen.\r\nShe lays 2,000 eggs a day — in May.",
    "Ants": "Ameisen 🐜🐜 in Österreich.\n\nThe queen of the black garden ant lives 28 years.",
    "Whales": "🐋 sing.\u2028A blue whale weighs 150 tonnes; its heart weighs 180 kg.",
}


@pytest.fixture
def documents(client, member):
    """The texts by their ids."""
    made = {}
    for title, text in TEXTS.items():
        body = {"title": title, "text": text}
        made[client.post("/api/v1/documents", json=body, headers=member).json["id"]] = text
    return made


def search(client, who, q, **more):
    return client.get(SEARCH, query_string={"q": q} | more, headers=who)


def test_passages_are_verbatim_at_their_offsets(client, member, documents):
    """text[start:end] in code points is the passage, whatever stands before it; the best first."""
    for q, text in (
        ("How many eggs does a queen lay?", TEXTS["Bees"]),
        ("garden ant years", TEXTS["Ants"]),
        ("heart of a whale", TEXTS["Whales"]),
    ):
        answer = search(client, member, q)
        assert (answer.status_code, answer.json["query"]) == (200, q)
        passages = answer.json["passages"]
        assert passages[0].keys() == {"document_id", "start", "end", "text", "score"}
        assert documents[passages[0]["document_id"]] == text
        for passage in passages:
            whole = documents[passage["document_id"]]
            assert whole[passage["start"] : passage["end"]] == passage["text"] != ""
        scores = [passage["score"] for passage in passages]
        assert scores == sorted(scores, reverse=True)


def test_no_more_than_k(client, member, documents):
    """k bounds the passages; without it there are 8 at most."""
    assert len(search(client, member, "queen", k=1).json["passages"]) == 1
    assert len(search(client, member, "queen", k=50).json["passages"]) == 2
    assert search(client, member, "zebra").json["passages"] == []


def test_any_text_is_legal(client, member, documents):
    """Operators, quotes, broken UTF-8, NUL and generated texts are words or nothing."""
    fixed = ['"', 'what is "a?', "c++ OR NOT (NEAR", "🐝", "***", "queen* AND", "text:queen", "\0",
             "' OR 1=1 --", "%", "_", "\\", "a" * 2000, "ß" * 200, "\U0001d51a"]  # fmt: skip
    draw = random.Random(7)
    made = ["".join(map(chr, draw.choices(range(1, 0xD7FF), k=40))) for _ in range(40)]
    for q in (*fixed, *(text for text in made if text.strip())):
        answer = search(client, member, q)
        assert (answer.status_code, answer.json["query"]) == (200, q), q
    answer = client.get(f"{SEARCH}?q=queen%ff%00", headers=member)
    assert (answer.status_code, len(answer.json["passages"])) == (200, 2)


def test_what_cannot_be_looked_for_is_refused(client, member):
    """422 names the parameter: no text, a blank or long one, k out of bounds, a name unknown."""
    for query, field in (
        ({}, "q"),
        ({"q": ""}, "q"),
        ({"q": " \n\u3000"}, "q"),
        ({"q": "x" * 2001}, "q"),
        ({"q": ["a", "b"]}, "q"),
        ({"q": "a", "k": 0}, "k"),
        ({"q": "a", "k": 51}, "k"),
        ({"q": "a", "k": "many"}, "k"),
        ({"q": "a", "k": "9" * 5000}, "k"),
        ({"q": "a", "limit": 5}, "limit"),
    ):
        answer = client.get(SEARCH, query_string=query, headers=member)
        assert answer.status_code == 422, query
        assert answer.json["errors"][0]["field"] == field
    assert client.get(f"{SEARCH}?q=a").status_code == 401


def test_the_same_text_is_looked_for_once(client, member, admin, documents):
    """Case and blanks make no difference, k and the documents do; users share what is found."""
    first = search(client, member, "Black Garden  ANT")
    second = search(client, admin, " black garden ant ")
    assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("MISS", "HIT")
    assert first.json["passages"] == second.json["passages"] != []
    assert int(second.headers["Age"]) >= 0
    assert search(client, member, "black garden ant", k=3).headers["X-Cache"] == "MISS"
    assert search(client, member, "garden black ant").headers["X-Cache"] == "MISS"


def test_a_deleted_document_is_never_found_again(client, member, documents):
    """A document that comes or goes changes the key of every search."""
    ants = next(number for number, text in documents.items() if text == TEXTS["Ants"])

    def found():
        answer = search(client, member, "garden ant")
        return answer.headers["X-Cache"], {p["document_id"] for p in answer.json["passages"]}

    assert found() == ("MISS", {ants})
    assert found() == ("HIT", {ants})
    assert client.delete(f"/api/v1/documents/{ants}", headers=member).status_code == 204
    assert found() == ("MISS", set())
    body = {"title": "Ants", "text": TEXTS["Ants"]}
    again = client.post("/api/v1/documents", json=body, headers=member).json["id"]
    assert found() == ("MISS", {again})


def test_native_threads_make_the_same_terms():
    """SQLite works in native threads, which stem words at the same time."""
    from muset.services import text

    starts, ends = ("relat", "nation", "hop", "electr", "adjust"), ("ional", "ing", "icity", "able")
    words = ["".join(parts) for parts in product("bcdfg", starts, ends)]
    made = text._term.__wrapped__
    expected = [made(word) for word in words]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: [made(word) for word in words], range(16)))
    finally:
        sys.setswitchinterval(interval)
    assert all(each == expected for each in found)
