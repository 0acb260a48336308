"""Usage: sums that are exact, for those who may see them, page by page."""

import base64
import itertools
import json
import random
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from flask_muset.cache_strategies import cache_manager
from flask_muset.errors import CacheUnavailable
from muset.ports import UsageGroup

USAGE = "/api/v1/usage"
BEES = {"title": "Bees", "text": "A bee colony has one queen. The queen lays 2,000 eggs a day."}
FIELDS = {
    "user_id", "model", "provider", "day", "status",
    "requests", "input_tokens", "output_tokens", "estimated", "cost",
}  # fmt: skip
MARCH = {"from": "2026-03-01", "to": "2026-03-31"}
NUMBERS = ("requests", "input_tokens", "output_tokens")


def entry(number, **changes):
    made = {
        "id": f"id-{number}",
        "user_id": 1,
        "request_id": f"request-{number}",
        "model": "m",
        "provider": "p",
        "day": "2026-03-01",
        "status": "success",
        "requests": 1,
        "input_tokens": 0,
        "output_tokens": 0,
        "estimated": False,
        "cost": 0,
    }
    return made | changes


@pytest.fixture
def store(services):
    """Where entries are added."""
    return services.ask._ledger._store


def usage(client, who, **query):
    """All items of all pages."""
    items, cursor = [], None
    while True:
        more = {} if cursor is None else {"cursor": cursor}
        answer = client.get(USAGE, query_string=query | more, headers=who)
        assert answer.status_code == 200, answer.json
        items += answer.json["items"]
        cursor = answer.json["next_cursor"]
        if cursor is None:
            return items


def test_what_was_asked_is_counted_at_once(client, services, member, admin):
    """The question that was answered a moment ago is in the sums, without a wait for anything."""
    client.post("/api/v1/documents", json=BEES, headers=member)
    for number in range(1, 6):
        question = {"question": "How many eggs does the queen lay a day?"}
        assert client.post("/api/v1/ask", json=question, headers=member).status_code == 200
        (item,) = usage(client, member)
        assert item["requests"] == number
    assert item.keys() == FIELDS
    today = datetime.now(UTC).date()
    assert date.fromisoformat(item["day"]) in (today, today - timedelta(days=1))
    (item,) = usage(client, admin, group_by="user")
    assert item["user_id"] == services.keys.user_id("member@example.org")
    (item,) = usage(client, member, group_by="model")
    assert (item["model"], item["provider"]) == ("extractive", "extractive")
    items = usage(client, member, group_by="request")
    assert [(item["requests"], item["status"]) for item in items] == 5 * [(1, "success")]


def rows(count, seed=5):
    draw = random.Random(seed)
    return [
        entry(
            number,
            user_id=draw.choice([1, 2, 10]),
            model=draw.choice(["small", "Large", "größe"]),
            provider=draw.choice(["a", "b"]),
            day=(date(2026, 3, 1) + timedelta(days=draw.randrange(9))).isoformat(),
            status=draw.choice(["success", "error", "partial", "client_closed"]),
            input_tokens=draw.randrange(1_000_000),
            output_tokens=draw.randrange(1_000_000),
            estimated=draw.random() < 0.05,
            cost=draw.randrange(10**12),
        )
        for number in range(count)
    ]


def by(entries, *names):
    """The sums as Python makes them, by the values of some fields."""
    sums = defaultdict(lambda: [0, 0, 0, False, Decimal(0)])
    for item in entries:
        total = sums[tuple(item[name] for name in names)]
        for place, name in enumerate(NUMBERS):
            total[place] += item[name]
        total[3] |= item["estimated"]
        total[4] += Decimal(item["cost"]).scaleb(-9)
    return sums


def test_sums_are_those_of_the_entries(client, admin, store):
    """Each grouping adds up to the ledger, to the billionth; what differs is null."""
    entries = rows(400)
    store.add(entries)
    groups = {"user": ("user_id",), "model": ("model", "provider"), "day": ("day",)}
    for group_by, names in groups.items():
        expected = by(entries, *names)
        items = usage(
            client, admin, group_by=group_by, limit=3, **{"from": "2026-03-01", "to": "2026-03-31"}
        )
        places = [tuple(item[name] for name in names) for item in items]
        assert len(places) == len(set(places)) == len(expected)
        for place, item in zip(places, items, strict=True):
            found = [
                *(item[name] for name in NUMBERS),
                item["estimated"],
                Decimal(repr(item["cost"])),
            ]
            assert found == expected[place]
            shared = {"user_id", "model", "provider", "day", "status"} - {*names}
            assert {item[name] for name in shared} == {None}
    items = usage(
        client, admin, group_by="request", limit=100, **{"from": "2026-03-01", "to": "2026-03-31"}
    )
    names = ("user_id", "model", "provider", "day", "status", "input_tokens", "output_tokens")
    assert sorted(tuple(item[name] for name in names) for item in items) == sorted(
        tuple(made[name] for name in names) for made in entries
    )
    assert [item["day"] for item in items] == sorted(item["day"] for item in items)


def test_days_bound_what_is_counted(client, admin, store):
    """Both ends belong to it; a range of 366 days is the longest, and the last 30 the default."""
    today = datetime.now(UTC).date()
    days = [today - timedelta(days=back) for back in (0, 29, 30, 365, 366)]
    store.add([entry(number, day=day.isoformat()) for number, day in enumerate(days)])

    def count(**query):
        return sum(item["requests"] for item in usage(client, admin, **query))

    assert count() == 2
    assert count(**{"from": days[3].isoformat()}) == 4
    assert count(to=days[2].isoformat()) == 1
    assert count(**{"from": days[4].isoformat(), "to": days[4].isoformat()}) == 1
    assert count(to="0001-01-01") == 0
    tomorrow = (today + timedelta(days=2)).isoformat()
    for query, field in (
        ({"from": days[4].isoformat()}, "from"),
        ({"from": tomorrow}, "from"),
        ({"from": "2026-03-02", "to": "2026-03-01"}, "from"),
        ({"from": "2026-02-30"}, "from"),
        ({"from": "1772323200"}, "from"),
        ({"from": "2026-3-1"}, "from"),
        ({"to": "2026-03-01T00:00:00"}, "to"),
        ({"to": "10000-01-01"}, "to"),
        ({"group_by": "key"}, "group_by"),
        ({"user_id": 0}, "user_id"),
        ({"user_id": 1 << 63}, "user_id"),
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"first": "2026-03-01"}, "first"),
    ):
        answer = client.get(USAGE, query_string=query, headers=admin)
        assert answer.status_code == 422, query
        assert answer.json["errors"][0]["field"] == field


def test_members_see_their_own(client, services, admin, member, store):
    """In every grouping, and 403 for somebody else's; admins see all, or one user's."""
    mine = services.keys.user_id("member@example.org")
    other = services.keys.user_id("other@example.org")
    today = datetime.now(UTC).date().isoformat()
    for user_id, tokens in ((mine, 1), (other, 100)):
        store.add([entry(user_id, user_id=user_id, day=today, input_tokens=tokens)])
    for group_by in UsageGroup:

        def tokens(who, group_by=group_by, **query):
            items = usage(client, who, group_by=group_by.value, **query)
            return sum(item["input_tokens"] for item in items)

        assert tokens(member) == tokens(member, user_id=mine) == tokens(admin, user_id=mine) == 1
        assert tokens(admin) == 101
        assert tokens(admin, user_id=other) == 100
        for user_id in (other, 9999):
            query = {"group_by": group_by.value, "user_id": user_id}
            answer = client.get(USAGE, query_string=query, headers=member)
            assert answer.status_code == 403
    assert client.get(USAGE).status_code == 401


def cursor_of(place):
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def test_a_cursor_is_checked(client, admin, store):
    """What is none, or one of another list, is 422; one for a place without an entry is fine."""
    store.add(rows(20))
    first = client.get(
        USAGE, query_string={"group_by": "day", "limit": 1, "to": "2026-03-20"}, headers=admin
    )
    good = first.json["next_cursor"]
    answer = client.get(USAGE, query_string={"group_by": "user", "cursor": good}, headers=admin)
    assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, "cursor")
    nested = base64.urlsafe_b64encode(b"[" * 700).decode()
    bad = ["", "x", "====", "ä", "a" * 2001, cursor_of(None), cursor_of({}), cursor_of([]),
           cursor_of([1]), cursor_of([True]), cursor_of(["2026-03-01", "x"]), cursor_of(["\0"]),
           cursor_of(["\ud800"]), nested, "W10="]  # fmt: skip
    for cursor in bad:
        query = {"group_by": "day", "cursor": cursor}
        answer = client.get(USAGE, query_string=query, headers=admin)
        assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, "cursor"), cursor
    for cursor in (cursor_of([1 << 63]), cursor_of([1.5]), cursor_of([True])):
        query = {"group_by": "user", "cursor": cursor}
        assert client.get(USAGE, query_string=query, headers=admin).status_code == 422
    for place in (["2026-03-02x"], ["\U0010ffff" * 9], [""]):
        query = {"group_by": "day", "cursor": cursor_of(place)}
        assert client.get(USAGE, query_string=query, headers=admin).status_code in (200, 422)


def test_a_long_name_of_a_model_is_a_place_too(client, admin, store):
    """The cursor that a page gives is one that the next page takes, whatever models are called."""
    names = [character * 100 for character in ("\U0001f41d", "\u200b", '"', "a")]
    store.add([entry(number, model=name, provider=name) for number, name in enumerate(names)])
    items = usage(client, admin, group_by="model", limit=1, **MARCH)
    assert {item["model"] for item in items} == {*names}


def test_large_sums_are_exact(client, admin, store):
    """Costs add up as whole numbers: a tenth of a million times is a hundred thousand."""
    tenth = 10**8
    store.add([entry(n, cost=tenth + n % 2, input_tokens=2**40) for n in range(1000)])
    (item,) = usage(client, admin, group_by="day", **{"from": "2026-03-01", "to": "2026-03-01"})
    assert Decimal(repr(item["cost"])) == Decimal("100.0000005")
    assert item["input_tokens"] == 1000 * 2**40


def test_what_cannot_be_counted_yet_is_said(app, client, admin, monkeypatch):
    """503 with Retry-After while an accepted entry cannot be written; all of it afterwards."""
    ledger = app.extensions["muset"].ask._ledger
    real = ledger._store.add
    down = [True]

    def add(entries):
        if down[0]:
            raise ConnectionError("no database")
        real(entries)

    ledger._store.add = add
    monkeypatch.setattr("muset.services.usage_report._SETTLE_S", 0.3)
    client.post("/api/v1/documents", json=BEES, headers=admin)
    client.post("/api/v1/ask", json={"question": "Who lays eggs?"}, headers=admin)
    answer = client.get(USAGE, headers=admin)
    assert (answer.status_code, answer.json["category"]) == (503, "external_service")
    assert int(answer.headers["Retry-After"]) >= 1
    down[0] = False
    with app.app_context():
        assert cache_manager.flush(timeout=20)
    assert [item["requests"] for item in usage(client, admin)] == [1]


def test_without_a_journal_nobody_says_that_it_is_all(client, settings, admin):
    """Whether something waits is not known then: 503, not a number that may be too small."""
    settings.journal_path.mkdir()
    answer = client.get(USAGE, headers=admin)
    assert (answer.status_code, answer.json["category"]) == (503, "database")


class Clock:
    """Time that passes while somebody waits."""

    def __init__(self):
        self.at = 0.0

    def now(self):
        return self.at

    wall = now

    def sleep(self, seconds):
        self.at += seconds


def test_only_what_was_accepted_before_is_waited_for():
    """Others go on asking meanwhile: once all that waits is younger than the call, it goes on."""
    from muset.ports import Principal, Role
    from muset.services.usage_report import UsageReport

    class Sums:
        def sums(self, *_args, **_kwargs):
            return []

    class Waiting:
        """Each look finds the next number of writes, and the age of the oldest."""

        def __init__(self, *looks):
            self.looks = itertools.chain(looks, itertools.repeat(looks[-1]))

        def pending(self):
            return dict(zip(("pending", "oldest_s"), next(self.looks), strict=True))

    def waited(*looks):
        clock = Clock()
        report = UsageReport(Sums(), Waiting(*looks), clock)
        assert report.list(Principal(1, 1, Role.MEMBER), UsageGroup.DAY) == ([], None)
        return clock.at

    assert waited((0, 0.0)) == 0
    assert waited((3, 5.0), (3, 5.02), (7, 0.01)) == pytest.approx(0.04)
    assert waited((3, 0.3)) == pytest.approx(0.32)
    with pytest.raises(CacheUnavailable, match="the oldest for"):
        waited((1, 9.0))
