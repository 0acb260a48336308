"""What both databases promise to the stores, and the index over passages."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import sqlalchemy
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from flask_muset import Resilience
from muset import migrations
from muset.app import make_services
from muset.models import Corpus, Passage
from muset.ports import Role
from muset.services.text import terms

ODD = ["ﷺ" * 700, "it's a \\ 'quoted' \\' thing", "ﾞ ｶﾞ", "x" * 5000, "½ and m² of 2,000.5", "İi ß"]


@pytest.fixture
def store(services):
    return services.documents._store


@pytest.fixture
def user_id(services):
    return services.keys.user_id("a@example.org")


def at_once(count, call):
    """What calls from so many threads give, begun at the same moment."""
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait(20)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def recount(services):
    """Number and size of the passages, and in how many each term is, from the passages alone."""

    def read(connection):
        texts = connection.execute(sqlalchemy.select(Passage.text)).scalars().all()
        frequencies = Counter(term for one in texts for term in set(terms(one)))
        return len(texts), sum(map(len, texts)), frequencies

    return services.database.read(read)


def counted(services):
    """The same as the index keeps it."""

    def read(connection):
        row = connection.execute(sqlalchemy.select(Corpus.passages, Corpus.characters)).one()
        query = "SELECT term, doc FROM passages_vocab"
        if connection.dialect.name == "postgresql":
            query = "SELECT term, passages FROM terms"
        return *row, dict(map(tuple, connection.execute(text(query))))

    return services.database.read(read)


def test_the_version_is_never_the_same_again(store, user_id):
    """Each document that comes or goes gives a new one; a text that is there already does not."""
    versions = [store.version()]
    for number in range(3):
        document, is_new = store.add(user_id=user_id, title="t", text=f"text {number % 2}")
        assert is_new
        versions.append(store.version())
        assert store.add(user_id=user_id, title="t", text=f"text {number % 2}")[1] is False
        assert store.version() == versions[-1]
        assert store.delete(document.id)
        versions.append(store.version())
        assert not store.delete(document.id)
    assert len(set(versions)) == 7


def test_the_index_keeps_count(services, store, user_id):
    """After documents have come and gone it knows of each term in how many passages it is."""
    rng = random.Random(3)
    ids = []
    for number in range(12):
        words = [f"{rng.choice('abcdefgh')}{rng.choice('xyz')}" for _ in range(rng.randrange(900))]
        ids.append(
            store.add(user_id=user_id, title="t", text=f"n{number} " + " ".join(words))[0].id
        )
    for document_id in ids[::2]:
        assert store.delete(document_id)
    assert counted(services) == recount(services)
    for document_id in ids[1::2]:
        assert store.delete(document_id)
    assert counted(services) == (0, 0, {})


@pytest.mark.parametrize("odd", ODD)
def test_odd_texts_are_stored_and_found(store, user_id, odd):
    """Long words, ligatures of many letters, quotes, backslashes and lone marks."""
    document, _ = store.add(user_id=user_id, title="t", text=odd + " anchor")
    assert store.get(document.id).text == odd + " anchor"
    assert store.search("anchor", k=1).passages[0].document_id == document.id
    found = store.search(odd, k=3)
    assert {passage.document_id for passage in found.passages} <= {document.id}
    assert store.search(odd + " anchor", k=3).passages
    assert store.delete(document.id)


def test_the_best_passages_are_found_among_many(store, user_id):
    """Of passages that nearly all have the common words, those with the rare ones come first."""
    rng = random.Random(4)
    common = [f"common{chr(97 + n)}" for n in range(4)]
    paragraphs = []
    for _ in range(900):
        words = rng.choices(common, k=40) + [f"w{rng.randrange(3000)}" for _ in range(60)]
        paragraphs.append(" ".join(rng.sample(words, len(words))))
    paragraphs[321] += " needle haystack"
    paragraphs[654] += " needle"
    whole = "\n\n".join(paragraphs)
    document, _ = store.add(user_id=user_id, title="t", text=whole)
    other, _ = store.add(user_id=user_id, title="t", text="commona commonb in another document")
    found = store.search("haystack needle " + " ".join(common), k=8).passages
    assert ["needle haystack" in p.text for p in found] == [True] + [False] * 7
    assert "needle" in found[1].text
    assert len(found) == 8
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    for passage in found:
        assert whole[passage.start : passage.end] == passage.text or passage.document_id == other.id
    only = store.search("haystack commona", k=5, document_ids=[other.id]).passages
    assert [p.document_id for p in only] == [other.id]
    assert store.search("haystack", k=5, document_ids=[other.id]).passages == ()
    assert store.search("haystack", k=5, document_ids=[document.id]).passages


def test_a_text_that_comes_at_once_from_many_is_kept_once(services, store, user_id):
    """One of them has made it; all get the same document, which is counted once."""
    got = at_once(6, lambda n: store.add(user_id=user_id, title=f"t{n}", text="The same text."))
    assert len({document.id for document, _ in got}) == 1
    assert sum(is_new for _, is_new in got) == 1
    assert counted(services)[:2] == recount(services)[:2] == (1, 14)


def test_documents_that_come_and_go_at_once_are_counted(services, store, user_id):
    """Nobody waits for ever, and no count is lost."""
    old = [store.add(user_id=user_id, title="t", text=f"old text {n}")[0].id for n in range(4)]

    def change(number):
        store.add(user_id=user_id, title="t", text=f"new text {number}")
        return store.delete(old[number % 4])

    assert sum(at_once(8, change)) == 4
    assert counted(services) == recount(services)


def test_several_that_start_at_once_make_one_first_key(settings, services):
    """Each has connections of its own; one prints a key."""
    others = [make_services(settings, Resilience()) for _ in range(4)]
    shown = []
    keys = at_once(4, lambda n: others[n].keys.first_admin_key("admin@example.org", shown.append))
    assert len([key for key in keys if key]) == len(shown) == 1
    assert len(services.keys.list()) == 1
    for other in others:
        other.database.close()


def test_several_that_start_at_once_install_one_key(settings, services):
    """MUSET_ADMIN_KEY in many places is one key."""
    others = [make_services(settings, Resilience()) for _ in range(4)]
    key = "msk_" + "k" * 43
    at_once(4, lambda n: others[n].keys.install(key, "admin@example.org"))
    assert services.keys.authenticate(key).role is Role.ADMIN
    assert len(services.keys.list()) == 1
    for other in others:
        other.database.close()


@pytest.mark.parametrize("header", ["msk_\0" + "x" * 42, "msk_é" + "x" * 42, "msk_ " + "x" * 42])
def test_a_key_of_other_characters_is_none(services, header):
    """It is refused as any unknown one, before a database could choke on it."""
    from flask_muset.errors import AuthenticationError

    with pytest.raises(AuthenticationError):
        services.keys.authenticate(header)


def test_a_read_keeps_nothing(services, store):
    """What a unit of work changes where it is only to look is refused, or gone when it ends."""
    before = store.version()
    with suppress(DBAPIError):
        services.database.read(lambda c: c.execute(text("UPDATE corpus SET version = version + 1")))
    assert store.version() == before


def test_queries_are_counted_by_operation_and_table(client, member):
    """The same names on both databases."""
    body = {"title": "Bees", "text": "A bee colony has one queen."}
    assert client.post("/api/v1/documents", json=body, headers=member).status_code == 201
    exposed = client.get("/metrics").text
    for labels in ('operation="insert",table="passages"', 'operation="select",table="documents"'):
        assert f"muset_database_queries_total{{{labels}}}" in exposed
    assert 'muset_database_queries_total{operation="commit",table="-"}' in exposed


def test_the_newest_revision_is_the_one_that_is_looked_for():
    """Alembic's own look at the files finds the same."""
    scripts = ScriptDirectory.from_config(migrations._config())
    assert scripts.get_heads() == [migrations.HEAD]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_database_of_the_version_before_opens(settings):
    """What was stored is found, counted and deleted after the upgrade."""
    services = make_services(settings, Resilience())
    engine = create_engine(settings.database_url)
    config = migrations._config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.exec_driver_sql("INSERT INTO users VALUES (1, 'a@example.org', '2030-01-01')")
        connection.exec_driver_sql(
            "INSERT INTO documents VALUES (7, 1, 't', 'x', 9, 1, 'old queen', '2030-01-01 00:00')"
        )
        connection.exec_driver_sql("INSERT INTO passages VALUES (1, 7, 0, 9, 'old queen')")
    engine.dispose()
    services.database.write(migrations.upgrade)
    store = services.documents._store
    assert [p.document_id for p in store.search("queens", k=3).passages] == [7]
    assert counted(services) == recount(services) == (1, 9, {"old": 1, "queen": 1})
    assert store.delete(7)
    assert counted(services) == (0, 0, {})
    services.database.close()
