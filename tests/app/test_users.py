"""Users: who adds, sees, changes and deletes whom, and what becomes of what was theirs."""

import threading

import pytest
from sqlalchemy import text

from flask_muset.cache_strategies import cache_manager
from flask_muset.clock import SYSTEM
from flask_muset.errors import AuthenticationError, CacheUnavailable, ValidationError
from flask_muset.testing import virtual_clock
from muset.ports import Principal, Role
from muset.services.fields import clean_email, clean_name

USERS = "/api/v1/users"
ADA = {"email": "ada@example.org", "name": "Ada"}


def add(client, who, **changes):
    return client.post(USERS, json=ADA | changes, headers=who)


def patch(client, where, who, etag="*", **changes):
    headers = who if etag is None else who | {"If-Match": etag}
    return client.patch(where, json=changes, headers=headers)


def me(services, email="member@example.org"):
    return f"{USERS}/{services.keys.user_id(email)}"


def key_of(services, email, role=Role.MEMBER):
    return {"Authorization": f"Bearer {services.keys.create(email, role)}"}


def test_a_user_is_added_read_changed_and_deleted(client, admin):
    """201 with Location, the same when read, changed with its tag, then 404; ids do not return."""
    made = add(client, admin, name="  Ada Lovelace ")
    where = made.headers["Location"]
    assert made.status_code == 201
    assert made.json | {"created_at": ""} == {
        "id": int(where.rpartition("/")[2]),
        "email": "ada@example.org",
        "name": "Ada Lovelace",
        "created_at": "",
    }
    read = client.get(where, headers=admin)
    assert (read.json, read.headers["ETag"]) == (made.json, made.headers["ETag"])
    changed = patch(client, where, admin, read.headers["ETag"], name="Countess")
    assert (changed.status_code, changed.json) == (200, made.json | {"name": "Countess"})
    assert changed.headers["ETag"] != read.headers["ETag"]
    again = client.get(where, headers=admin)
    assert (again.json, again.headers["ETag"]) == (changed.json, changed.headers["ETag"])
    gone = client.delete(where, headers=admin)
    assert (gone.status_code, gone.data) == (204, b"")
    for answer in (
        client.get(where, headers=admin),
        client.delete(where, headers=admin),
        patch(client, where, admin, name="x"),
        client.get(f"{where}/preferences", headers=admin),
        client.put(f"{where}/preferences", json={}, headers=admin),
        client.get(f"{USERS}/{1 << 70}", headers=admin),
        client.get(f"{USERS}/0", headers=admin),
    ):
        assert (answer.status_code, answer.json["category"]) == (404, "not_found")
    assert add(client, admin).json["id"] > made.json["id"]


def test_addresses_are_one_whatever_their_case(client, services, admin):
    """Upper case and blanks around make no other user, whether added here or for a key."""
    made = add(client, admin, email=" ADA@Example.ORG ")
    assert made.json["email"] == "ada@example.org"
    assert services.keys.user_id("Ada@example.org") == made.json["id"]
    taken = add(client, admin, email="aDa@example.org", name="Another")
    assert (taken.status_code, taken.json["category"]) == (409, "conflict")
    assert "ada" not in taken.text
    mine = key_of(services, "ADA@EXAMPLE.ORG")
    assert client.get(made.headers["Location"], headers=mine).json == made.json


REFUSED = [
    ({}, 422, "email"),
    ([], 422, None),
    ({"email": "ada@example.org"}, 422, "name"),
    (ADA | {"role": "admin"}, 422, "role"),
    (ADA | {"id": 7}, 422, "id"),
    (ADA | {"email": 7}, 422, "email"),
    (ADA | {"email": None}, 422, "email"),
    (ADA | {"email": "ada"}, 422, "email"),
    (ADA | {"email": "a@b@c"}, 422, "email"),
    (ADA | {"email": "ada@.org"}, 422, "email"),
    (ADA | {"email": "ada@example."}, 422, "email"),
    (ADA | {"email": "a da@example.org"}, 422, "email"),
    (ADA | {"email": "ada\0@example.org"}, 422, "email"),
    (ADA | {"email": "ada\u202e@example.org"}, 422, "email"),
    (ADA | {"email": "\ud800@example.org"}, 422, "email"),
    (ADA | {"email": "a" * 65 + "@example.org"}, 422, "email"),
    (ADA | {"email": "a@" + "b" * 253}, 422, "email"),
    (ADA | {"name": ""}, 422, "name"),
    (ADA | {"name": " \n "}, 422, "name"),
    (ADA | {"name": "a\nb"}, 422, "name"),
    (ADA | {"name": "a\0"}, 422, "name"),
    (ADA | {"name": "\udfff"}, 422, "name"),
    (ADA | {"name": "x" * 201}, 422, "name"),
    (ADA | {"name": "x" * 200_000}, 413, None),
]


def test_what_is_no_user_is_refused(client, admin):
    """Each names the field, and none is stored."""
    for body, status, field in REFUSED:
        answer = client.post(USERS, json=body, headers=admin)
        assert (answer.status_code, answer.json["category"]) == (status, "validation"), body
        if field is not None:
            assert answer.json["errors"][0]["field"] == field, body
    assert len(client.get(USERS, headers=admin).json["items"]) == 1


def test_names_of_all_people_are_names():
    """Letters of any script, joiners and emoji are kept; a name is in one normal form."""
    for name in ("O\u2019Hara-Núñez", "王小明", "\u0645\u06cc\u200c\u062e\u0648", "👩\u200d🔬"):
        assert clean_name(name, "name") == name
    assert clean_name("Zoe\u0308", "name") == "Zoë"
    assert clean_email("ZOE\u0308@example.org", "email") == "zoë@example.org"
    with pytest.raises(ValidationError, match="U\\+0007"):
        clean_name("bell\a", "name")


def test_members_see_themselves_and_change_their_name(client, services, admin, member):
    """All else is 403, whether there is somebody with that id or not."""
    mine, others = me(services), me(services, "other@example.org")
    assert client.get(mine, headers=member).json["email"] == "member@example.org"
    assert patch(client, mine, member, name="Me").json["name"] == "Me"
    refused = [
        add(client, member),
        client.get(USERS, headers=member),
        client.delete(mine, headers=member),
        patch(client, mine, member, email="new@example.org"),
        patch(client, mine, member, email="new@example.org", name="x"),
    ]
    for where in (others, f"{USERS}/99999", f"{USERS}/{1 << 70}"):
        refused += [
            client.get(where, headers=member),
            client.delete(where, headers=member),
            patch(client, where, member, name="x"),
        ]
    assert {(answer.status_code, answer.json["category"]) for answer in refused} == {
        (403, "authorization")
    }
    assert client.get(mine, headers=admin).json["name"] == "Me"
    assert client.get(others, headers=admin).json["name"] == ""


def test_lists_have_pages(client, admin):
    """Every user once, in the order of the ids; whoever is deleted is in none."""
    ids = [add(client, admin, email=f"u{n}@example.org").json["id"] for n in range(5)]
    client.delete(f"{USERS}/{ids[2]}", headers=admin)
    seen, cursor = [], ""
    while cursor is not None:
        page = client.get(f"{USERS}?limit=2{cursor}", headers=admin).json
        seen += page["items"]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
    assert [user["id"] for user in seen][1:] == [n for n in ids if n != ids[2]]
    assert seen[1].keys() == {"id", "email", "name", "created_at"}
    assert "deleted" not in client.get(USERS, headers=admin).text


def test_nobodys_change_is_lost(client, admin):
    """428 without If-Match, 412 with an old or a weak tag; of many at once exactly one wins."""
    where = add(client, admin).headers["Location"]
    tag = client.get(where, headers=admin).headers["ETag"]
    assert patch(client, where, admin, None, name="x").status_code == 428
    for wrong in ('"other"', f"W/{tag}", "garbage"):
        answer = patch(client, where, admin, wrong, name="x")
        assert (answer.status_code, answer.json["category"]) == (412, "conflict")
    assert patch(client, where, admin, f'"a", {tag}', name="First").status_code == 200
    assert patch(client, where, admin, tag, name="Second").status_code == 412
    assert client.delete(where, headers=admin | {"If-Match": tag}).status_code == 412
    tag = client.get(where, headers=admin).headers["ETag"]
    statuses, together = [], threading.Barrier(4)

    def change(number):
        together.wait(10)
        statuses.append(patch(client, where, admin, tag, name=f"N{number}").status_code)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 412, 412, 412]
    tag = client.get(where, headers=admin).headers["ETag"]
    assert client.delete(where, headers=admin | {"If-Match": tag}).status_code == 204


def test_a_change_may_be_refused(client, admin):
    """A taken address is 409, an empty change 422, and the user stays as it was."""
    where = add(client, admin).headers["Location"]
    add(client, admin, email="bob@example.org")
    for changes, status in (
        ({"email": "BOB@example.org"}, 409),
        ({}, 422),
        ({"name": None}, 422),
        ({"name": "a\tb"}, 422),
        ({"created_at": "2026-01-01T00:00:00Z"}, 422),
    ):
        assert patch(client, where, admin, **changes).status_code == status, changes
    assert client.get(where, headers=admin).json["name"] == "Ada"
    assert patch(client, where, admin, email="Ada@Example.org").status_code == 200
    assert patch(client, where, admin, email="ada@example.com").json["email"] == "ada@example.com"
    assert add(client, admin).status_code == 201


def test_conditional_reads(client, admin):
    """304 without a body for the tag, a weak one or *; 412 for another If-Match; HEAD alike."""
    where = add(client, admin).headers["Location"]
    tag = client.get(where, headers=admin).headers["ETag"]
    assert tag.startswith('"')
    for value in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        for method in (client.get, client.head):
            answer = method(where, headers=admin | {"If-None-Match": value})
            assert (answer.status_code, answer.data) == (304, b"")
            assert answer.headers["ETag"] == tag
            assert "Content-Length" not in answer.headers
    assert client.get(where, headers=admin | {"If-None-Match": '"x"'}).status_code == 200
    for value, status in (("*", 200), (tag, 200), (f"W/{tag}", 412), ('"x"', 412)):
        answer = client.get(where, headers=admin | {"If-Match": value})
        assert answer.status_code == status
    head, get = client.head(where, headers=admin), client.get(where, headers=admin)
    assert (head.data, head.headers["Content-Length"]) == (b"", str(len(get.data)))
    allowed = client.options(where, headers=admin)
    assert {*allowed.headers["Allow"].split(", ")} == {"GET", "HEAD", "OPTIONS", "PATCH", "DELETE"}
    refused = client.post(where, json={}, headers=admin)
    assert (refused.status_code, refused.json["category"]) == (405, "validation")
    assert "PATCH" in refused.headers["Allow"]


def test_a_user_is_read_once(app, client, admin, monkeypatch):
    """From the cache until it changes; while the database cannot be read, for an hour, as stale."""
    where = add(client, admin).headers["Location"]
    with virtual_clock():
        outcomes = [client.get(where, headers=admin).headers["X-Cache"] for _ in range(2)]
        assert outcomes == ["MISS", "HIT"]
        patch(client, where, admin, name="New")
        answer = client.get(where, headers=admin)
        assert (answer.headers["X-Cache"], answer.json["name"]) == ("HIT", "New")
        client.get(where, headers=admin)
        cache_delete(app, "user:*")
        client.get(where, headers=admin)
        SYSTEM.sleep(400)

        def away(_id):
            raise ConnectionError("no database")

        monkeypatch.setattr(app.extensions["muset"].users._store, "get", away)
        stale = client.get(where, headers=admin)
        assert (stale.status_code, stale.headers["X-Cache"]) == (200, "STALE")
        SYSTEM.sleep(3600)
        assert client.get(where, headers=admin).status_code == 503


def cache_delete(app, pattern):
    with app.app_context():
        return cache_manager.delete_pattern(pattern)


def test_that_there_is_nobody_is_remembered_until_there_is(client, admin):
    """404 comes from the cache for a while; a new user is there at once."""
    where = add(client, admin).headers["Location"]
    following = f"{USERS}/{int(where.rpartition('/')[2]) + 1}"
    for outcome in ("MISS", "HIT"):
        answer = client.get(following, headers=admin)
        assert (answer.status_code, answer.headers.get("X-Cache", outcome)) == (404, outcome)
    assert add(client, admin, email="next@example.org").headers["Location"] == following
    assert client.get(following, headers=admin).status_code == 200


def test_what_is_left_of_a_user(app, client, services, admin, caplog):
    """Keys, address, name and preferences go; documents and usage stay, under a bare number."""
    hers = key_of(services, "ada@example.org")
    where = me(services, "ada@example.org")
    user_id = int(where.rpartition("/")[2])
    patch(client, where, hers, name="Ada Lovelace")
    client.put(f"{where}/preferences", json={"likes": "engines"}, headers=hers)
    document = client.post(
        "/api/v1/documents", json={"title": "Bees", "text": "A queen lays eggs."}, headers=hers
    ).headers["Location"]
    client.post("/api/v1/ask", json={"question": "Who lays eggs?"}, headers=hers)
    client.get(where, headers=hers)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert client.delete(where, headers=admin).status_code == 204
    assert f"user {user_id} is deleted, and 2 keys of the cache" in caplog.text
    assert f"audit: user {user_id} deleted" in caplog.text
    assert client.get(document, headers=hers).status_code == 401
    assert client.get(document, headers=admin).status_code == 200
    usage = client.get(f"/api/v1/usage?user_id={user_id}", headers=admin).json["items"]
    assert [item["requests"] for item in usage] == [1]
    with app.app_context():
        assert cache_manager.flush(timeout=10)
    rows = services.database.read(
        lambda c: [
            tuple(row)
            for table in ("users", "keys", "preferences", "documents")
            for row in c.execute(text(f"SELECT * FROM {table}"))
        ]
    )
    assert not [row for row in rows if "ada" in repr(row).lower() or "engines" in repr(row)]
    again = key_of(services, "ada@example.org")
    assert me(services, "ada@example.org") != where
    assert client.get(where, headers=again).status_code == 403
    assert client.delete(document, headers=again).status_code == 403
    assert client.delete(document, headers=admin).status_code == 204


def test_preferences_that_wait_do_not_outlive_their_user(client, services, admin):
    """What was accepted before is not written after: the source refuses every older write."""
    store, user_id = services.preferences._store, services.keys.user_id("ada@example.org")
    store.put(user_id, {"likes": "engines"}, 5)
    assert client.delete(f"{USERS}/{user_id}", headers=admin).status_code == 204
    store.put(user_id, {"likes": "engines"}, 1 << 62)
    stored = services.database.read(
        lambda c: c.execute(text("SELECT data FROM preferences")).scalars().all()
    )
    assert stored == [None]


def test_nobody_deletes_themselves(client, services, admin):
    """The last admin cannot lock everybody out by mistake."""
    answer = client.delete(me(services, "admin@example.org"), headers=admin)
    assert (answer.status_code, answer.json["category"]) == (409, "conflict")
    assert "another admin" in answer.json["message"]
    other = key_of(services, "other@example.org", Role.ADMIN)
    assert client.delete(me(services, "admin@example.org"), headers=other).status_code == 204
    assert client.get(USERS, headers=admin).status_code == 401


def test_a_user_is_stored_although_the_cache_is_away(app, client, services, admin, monkeypatch):
    """Whatever the cache says, a change is 200 and a deletion 204 once the database has them."""
    service = app.extensions["muset"].users
    where = add(client, admin).headers["Location"]
    user_id = int(where.rpartition("/")[2])
    real, deleted = service._cache, []

    class Away:
        def write_through(self, _key, value, write_func, _expire):
            write_func(value)
            return False

        def delete_pattern(self, _pattern):
            raise CacheUnavailable("Redis is away")

        def delete(self, key):
            deleted.append(key)
            return False

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(service, "_cache", Away())
    answer = patch(client, where, admin, name="New")
    assert (answer.status_code, answer.json["name"]) == (200, "New")
    assert client.delete(where, headers=admin).status_code == 204
    assert deleted == 2 * [f"user:{user_id}:record", f"preferences:{user_id}"]
    assert services.users._store.get(user_id) is None


def test_what_the_database_refuses_is_raised_and_not_kept(app, client, services, admin):
    """An error of the source goes to the client; the cache has no value of it."""
    service = app.extensions["muset"].users
    where = add(client, admin).headers["Location"]
    client.get(where, headers=admin)
    real = service._store.replace
    service._store.replace = lambda _user: 1 / 0
    assert patch(client, where, admin, name="Lost").status_code == 500
    service._store.replace = real
    answer = client.get(where, headers=admin)
    assert (answer.json["name"], answer.headers["X-Cache"]) == ("Ada", "MISS")


def test_old_addresses_are_brought_into_one_form(tmp_path):
    """A database from before: the first of two that differ in case gets the address, keys hold."""
    import sqlalchemy as sa
    from alembic import command

    from muset import migrations

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    config = migrations._config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        for email in ("Ada@Example.org", "ada@example.ORG", "bob@example.org"):
            row = {"email": email}
            connection.execute(
                sa.text("INSERT INTO users (email, created_at) VALUES (:email, '2026-01-01')"), row
            )
        migrations.upgrade(connection)
        found = connection.execute(sa.text("SELECT email, name, version FROM users ORDER BY id"))
        assert [tuple(row) for row in found] == [
            ("ada@example.org", "", 1),
            ("ada@example.ORG", "", 1),
            ("bob@example.org", "", 1),
        ]
    engine.dispose()


def test_a_key_of_an_old_address_is_rotated_for_its_own_user(services):
    """Where two users differ in case alone, the new key is not the other one's."""
    old = services.keys.create("ada@example.org", Role.MEMBER)
    services.keys.create("bob@example.org", Role.MEMBER)
    change = text("UPDATE users SET email = 'ADA@example.org' WHERE email = 'bob@example.org'")
    services.database.write(lambda c: c.execute(change))
    mine = next(k for k in services.keys.list() if k.email == "ADA@example.org")
    key = services.keys.rotate(mine.id)
    assert services.keys.authenticate(key).user_id == mine.user_id
    assert services.keys.authenticate(old).user_id != mine.user_id


def test_a_key_that_is_made_as_its_user_goes_does_not_hold(services):
    """Whatever is left in the table: keys of users who are not there are none."""
    key = services.keys.create("ada@example.org", Role.ADMIN)
    change = text("UPDATE users SET deleted_at = created_at WHERE email = 'ada@example.org'")
    services.database.write(lambda c: c.execute(change))
    with pytest.raises(AuthenticationError):
        services.keys.authenticate(key)
    assert services.keys.list() == []


def test_the_service_asks_for_the_role_itself(services):
    """Whoever calls the service without the routes gets no further."""
    from flask_muset.errors import AuthorizationError

    who = Principal(user_id=services.keys.user_id("m@example.org"), key_id=0, role=Role.MEMBER)
    for call in (
        lambda: services.users.add(who, "x@example.org", "X"),
        lambda: services.users.list(who, 10, 0),
        lambda: services.users.delete(who, who.user_id),
        lambda: services.users.get(who, who.user_id + 1),
    ):
        with pytest.raises(AuthorizationError):
            call()
