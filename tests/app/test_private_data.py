"""What is one user's is nobody else's: a decision for each route, and a request by each role."""

from datetime import UTC, datetime

import pytest

from muset.ports import Role

#: Who gets an answer, for each endpoint and method of the app: everybody; whoever has a key, and
#: all the same; whoever has a key, and each their own; the user whose it is, and admins; admins;
#: admins and this machine.
OPEN, SHARED, MINE, OWN, ADMIN, NEAR = "open", "shared", "mine", "own", "admin", "near"

DECISIONS = {
    ("admin.change_policy", "POST"): ADMIN,
    ("admin.get_error", "GET"): ADMIN,
    ("admin.invalidate_cache", "POST"): ADMIN,
    ("admin.list_dead_letters", "GET"): ADMIN,
    ("admin.list_errors", "GET"): ADMIN,
    ("admin.list_policies", "GET"): ADMIN,
    ("admin.settle_dead_letter", "POST"): ADMIN,
    ("ask.ask", "POST"): SHARED,
    ("documents.add", "POST"): SHARED,
    ("documents.delete", "DELETE"): OWN,
    ("documents.get", "GET"): SHARED,
    ("documents.list_documents", "GET"): SHARED,
    ("error_catalogue.list_errors", "GET"): OPEN,
    ("error_catalogue.show_error", "GET"): OPEN,
    ("health.live", "GET"): OPEN,
    ("health.ready", "GET"): OPEN,
    ("metrics", "GET"): NEAR,
    ("openapi.openapi", "GET"): OPEN,
    ("search.search", "GET"): SHARED,
    ("static", "GET"): OPEN,
    ("swagger_ui.show", "GET"): OPEN,
    ("usage.list_usage", "GET"): MINE,
    ("users.add", "POST"): ADMIN,
    ("users.change", "PATCH"): OWN,
    ("users.delete", "DELETE"): ADMIN,
    ("users.get", "GET"): OWN,
    ("users.get_preferences", "GET"): OWN,
    ("users.list_users", "GET"): ADMIN,
    ("users.put_preferences", "PUT"): OWN,
}

#: What a request needs beside its address.
PARTS = {
    "admin.change_policy": {"json": {"mode": "auto"}},
    "admin.invalidate_cache": {"json": {"pattern": "nothing"}},
    "admin.settle_dead_letter": {"json": {"action": "drop"}},
    "ask.ask": {"json": {"question": "How many eggs does a queen lay?"}},
    "documents.add": {"json": {"title": "Wasps", "text": "A wasp queen lays forty eggs a day."}},
    "search.search": {"query_string": {"q": "queen"}},
    "usage.list_usage": {"query_string": {"group_by": "model"}},
    "users.add": {"json": {"email": "new@example.org", "name": "New"}},
    "users.change": {"json": {"name": "Ada Private"}},
    "users.put_preferences": {"json": {"likes": "ada-preference"}},
}

#: Nobody but Ada and the admins may ever see one of these.
PRIVATE = ("ada@example.org", "Ada Private", "ada-preference", "ada-model")
#: Answers that hold some of it, for her.
SHOWS = {
    "usage.list_usage",
    "users.change",
    "users.get",
    "users.get_preferences",
    "users.put_preferences",
}
ELSEWHERE = {"REMOTE_ADDR": "192.0.2.7"}


@pytest.fixture
def routes(app):
    """All of them: endpoint, method, rule; another place of the same endpoint is one more."""
    return [
        (rule.endpoint, method, rule.rule)
        for rule in app.url_map.iter_rules()
        for method in sorted(rule.methods - {"HEAD", "OPTIONS"})
    ]


@pytest.fixture
def keys(services, admin):
    """The headers of each role."""

    def key(email):
        return {"Authorization": f"Bearer {services.keys.create(email, Role.MEMBER)}"}

    return {
        "nobody": {},
        "other": key("bob@example.org"),
        "ada": key("ada@example.org"),
        "admin": admin,
    }


@pytest.fixture
def hers(client, services, keys):
    """What is Ada's; everything is read once, so that what is cached of it is cached."""
    user_id = services.keys.user_id("ada@example.org")
    document = {"title": "Bees", "text": "A bee colony has one queen. She lays 2,000 eggs a day."}
    made = client.post("/api/v1/documents", json=document, headers=keys["ada"])
    where, tag = f"/api/v1/users/{user_id}", {"If-Match": "*"}
    client.patch(where, json={"name": "Ada Private"}, headers=keys["ada"] | tag)
    likes = {"likes": "ada-preference"}
    assert client.put(f"{where}/preferences", json=likes, headers=keys["ada"]).status_code == 200
    services.ask._ledger._store.add([usage_of(user_id)])
    for path in (where, f"{where}/preferences", "/api/v1/usage?group_by=model"):
        assert any(text in client.get(path, headers=keys["ada"]).text for text in PRIVATE)
    return {
        "<int:user_id>": str(user_id),
        "<int:document_id>": str(made.json["id"]),
        "<category>": "timeout",
        "<fingerprint>": "none",
        "<name>": "database",
        "<letter_id>": "1-1",
        "<path:path>": "index.html",
        "<path:filename>": "none",
    }


def usage_of(user_id):
    return {
        "id": "ada-entry",
        "user_id": user_id,
        "request_id": "ada-request",
        "model": "ada-model",
        "provider": "p",
        "day": datetime.now(UTC).date().isoformat(),
        "status": "success",
        "requests": 1,
        "input_tokens": 1,
        "output_tokens": 1,
        "estimated": False,
        "cost": 1,
    }


def send(client, route, headers, hers):
    """A request to what is Ada's; the status and all of the answer."""
    endpoint, method, path = route
    for name, value in hers.items():
        path = path.replace(name, value)
    assert "<" not in path, f"say what stands for the variables of {path} in `hers`"
    with client.open(
        path,
        method=method,
        headers=headers | ({"If-Match": "*"} if method == "PATCH" else {}),
        environ_base=ELSEWHERE,
        **PARTS.get(endpoint, {}),
    ) as answer:
        return answer.status_code, f"{answer.headers}\n{answer.get_data(as_text=True)}"


#: What each role gets, by the decision; None for an answer that is no refusal.
EXPECTED = {
    "nobody": {OPEN: None, SHARED: 401, MINE: 401, OWN: 401, ADMIN: 401, NEAR: 403},
    "other": {OPEN: None, SHARED: None, MINE: None, OWN: 403, ADMIN: 403, NEAR: 403},
    "ada": {OPEN: None, SHARED: None, MINE: None, OWN: None, ADMIN: 403, NEAR: 403},
    "admin": {OPEN: None, SHARED: None, MINE: None, OWN: None, ADMIN: None, NEAR: None},
}


def test_each_route_has_a_decision(routes):
    """A new route fails here until somebody says who may use it."""
    assert {(endpoint, method) for endpoint, method, _ in routes} == DECISIONS.keys()


@pytest.mark.claim(
    "Two users never see each other's private data: every route, by every role, as decided"
)
def test_private_data_stays_private(client, routes, keys, hers, prove):
    """Each role gets what is decided for it, and nobody but Ada and admins anything of hers."""
    private = (*PRIVATE, keys["ada"]["Authorization"].removeprefix("Bearer "))
    wrong, leaks, shown = [], [], set()
    # What deletes comes last, so that the others ask for something that is there.
    routes.sort(key=lambda route: route[1] == "DELETE")
    for role, expected in EXPECTED.items():
        for route in routes:
            due = expected[DECISIONS[route[:2]]]
            status, answer = send(client, route, keys[role], hers)
            if status != due and not (due is None and status not in (401, 403)):
                wrong.append((role, route, status, due))
            seen = [text for text in private if text in answer]
            if seen and role in ("nobody", "other"):
                leaks.append((role, route, seen))
            if seen and role == "ada":
                shown.add(route[0])
            assert status < 500, (role, route, answer)
    prove.figure(
        f"{len(EXPECTED)} roles x {len(routes)} routes: {len(leaks)} leaks, {len(wrong)} statuses "
        "unlike decided"
    )
    assert (leaks, wrong) == ([], [])
    assert shown == SHOWS


def test_what_is_cached_for_one_is_not_given_to_another(client, services, keys, hers):
    """A hit of the cache is no way around: Bob is refused, and his own are not hers."""
    where = f"/api/v1/users/{hers['<int:user_id>']}"
    for path in (where, f"{where}/preferences"):
        assert client.get(path, headers=keys["ada"]).headers["X-Cache"] == "HIT"
        refused = client.get(path, headers=keys["other"])
        assert refused.status_code == 403
        assert "X-Cache" not in refused.headers
        tag = client.get(path, headers=keys["ada"]).headers["ETag"]
        for condition in ({"If-None-Match": tag}, {"If-None-Match": "*"}, {"If-Match": '"x"'}):
            answer = client.get(path, headers=keys["other"] | condition)
            assert answer.status_code == 403
    assert client.get("/api/v1/usage", headers=keys["other"]).json["items"] == []
    mine = services.keys.user_id("bob@example.org")
    assert client.get(f"/api/v1/users/{mine}/preferences", headers=keys["other"]).json == {}
