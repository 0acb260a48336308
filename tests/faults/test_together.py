"""All at once: two services behind nginx, and everything below them killed and restarted."""

import contextlib
import json
import math
import random
import signal
import time
from collections import Counter, defaultdict

import psycopg
import pytest
import requests
from load import Load
from waiting import until

from muset.testing.upstream import Upstream

CLIENTS = 12
BEES = {"title": "Bees", "text": "A bee colony has one queen. The queen lays eggs."}


class Clients:
    """What clients do with the service, and what they were told to be done.

    Attributes:
        documents: Texts by id.
        preferences: By user: the last number that was accepted.
        sent: By user: all numbers that were sent.
    """

    def __init__(self, stack, name="u"):
        self._stack = stack
        self.documents = {}
        self.preferences = {}
        self.sent = defaultdict(set)
        with requests.Session() as session:
            session.headers = stack.headers
            session.post(f"{stack.url}/documents", json=BEES, timeout=30).raise_for_status()
            self._users = [
                session.post(
                    f"{stack.url}/users",
                    json={"email": f"{name}{n}@example.org", "name": "u"},
                    timeout=30,
                ).json()["id"]
                for n in range(CLIENTS)
            ]

    @property
    def kinds(self):
        return {
            "list": self._list,
            "put": self._put,
            "store": self._store,
            "read": self._read,
            "ask": self._ask,
            "stream": self._stream,
        }

    def _list(self, session, _):
        return session.get(f"{self._stack.url}/documents?limit=1", timeout=60)

    def _read(self, session, _):
        return session.get(self._address(self._users[session.client]), timeout=60)

    def _address(self, user):
        return f"{self._stack.url}/users/{user}/preferences"

    def _put(self, session, number):
        user = self._users[session.client]
        self.sent[user].add(number)
        answer = session.put(self._address(user), json={"number": number}, timeout=60)
        if answer.ok:
            self.preferences[user] = number
        return answer

    def _store(self, session, number):
        text = f"Document number {number} of many, about nothing else."
        body = {"title": "t", "text": text}
        answer = session.post(f"{self._stack.url}/documents", json=body, timeout=60)
        if answer.status_code == 201:
            self.documents[answer.json()["id"]] = text
        return answer

    def _ask(self, session, number):
        question = {"question": f"How many eggs does queen {number} lay?"}
        return session.post(f"{self._stack.url}/ask", json=question, timeout=60)

    def _stream(self, session, number):
        question = {"question": f"How many eggs does the queen of hive {number} lay?"}
        head = {"Accept": "text/event-stream"}
        answer = session.post(f"{self._stack.url}/ask", json=question, headers=head, timeout=60)
        if answer.ok and answer.text.count("event: done") + answer.text.count("event: error") != 1:
            raise requests.exceptions.ChunkedEncodingError("a stream without one end")
        return answer

    def lost(self, answers):
        """What was accepted and is not there: documents, preferences, usage of questions."""
        found = []
        for document, text in self.documents.items():
            address = f"{self._stack.url}/documents/{document}"
            read = requests.get(address, headers=self._stack.headers, timeout=30)
            if read.json().get("text") != text:
                found.append(f"document {document}: {read.status_code}")
        for user, number in self.preferences.items():
            read = requests.get(self._address(user), headers=self._stack.headers, timeout=30)
            if not (read.ok and number <= read.json()["number"] <= max(self.sent[user])):
                found.append(f"user {user}: {number} became {read.text}")
        asked = {a.request_id for a in answers if a.kind in ("ask", "stream") and a.status == 200}
        return found + self._missing(asked)

    def _missing(self, asked):
        """What has not come to the database within the time that a dead worker's lease takes."""
        url = self._stack.services[0].environ["DATABASE_URL"]
        until = time.monotonic() + 30
        with psycopg.connect(url, autocommit=True) as database:
            while True:
                rows = database.execute("SELECT user_id, data FROM preferences").fetchall()
                kept = {user: json.loads(data)["number"] for user, data in rows}
                usage = {row[0] for row in database.execute("SELECT request_id FROM usage")}
                missing = [f"preferences of {user}" for user, number in self.preferences.items()
                           if kept.get(user, -1) < number]  # fmt: skip
                missing += [f"usage of {request}" for request in asked - usage]
                if not missing or time.monotonic() > until:
                    return missing
                time.sleep(0.2)


def first_put(answers, since):
    """When preferences were accepted for the first time after a moment."""
    puts = (each for each in answers if each.kind == "put" and each.status == 200)
    return min((each.ended for each in puts if each.began > since), default=math.inf)


# --- What happens, and when it is over ------------------------------------------------------------


def host_killed(stack, away_s):
    """All processes of one service, as if its host had failed."""
    stack.services[0].kill_group()
    time.sleep(away_s)
    stack.services[0].start()


def master_killed(stack, away_s):
    """The master alone; its workers end by themselves, and their port is free then."""
    service = stack.services[1]
    service.process.kill()
    service.process.wait()
    time.sleep(away_s)
    service.start_again()


def redis_killed(stack, away_s):
    stack.redis.kill()
    time.sleep(away_s)
    stack.redis.start()


def postgres_killed(stack, away_s):
    stack.postgres.kill()
    time.sleep(away_s)
    stack.postgres.start()


def reloaded(stack, _):
    """New workers in both services."""
    for service in stack.services:
        service.process.send_signal(signal.SIGHUP)


# --- What may be answered meanwhile ---------------------------------------------------------------


def of_nginx(answer):
    """What was running in a host that is gone, and must not be sent twice."""
    is_cut = answer.kind == "stream" and answer.status == 0
    is_told = answer.form == "application/problem+json" and (answer.retry_after or 0) >= 1
    return is_cut or (answer.status in (502, 504) and is_told)


def of_redis(answer):
    """A write that cannot be kept safe, also for a moment in which Redis takes more than 50 ms."""
    is_told = answer.category == "external_service" and (answer.retry_after or 0) >= 1
    return answer.kind == "put" and answer.status == 503 and is_told


def of_database(answer):
    return answer.status == 503 and (answer.retry_after or 0) >= 1


def nothing(_):
    return False


PHASES = {
    "one host killed": (host_killed, of_nginx),
    "one master killed": (master_killed, of_nginx),
    "Redis killed": (redis_killed, nothing),
    "PostgreSQL killed": (postgres_killed, of_database),
    "both reloaded": (reloaded, nothing),
}
#: Those that no other test has in a small form.
SMALL = ("one host killed", "Redis killed")


@pytest.mark.claim(
    "Two services of two workers behind nginx under load; one is killed, then a master alone, "
    "Redis and PostgreSQL are killed and started again, both reload: no accepted write is lost, "
    "errors only while something is away and of the documented kinds, over within 5 s by itself"
)
def test_everything_fails_once(make_stack, prove):
    """Phase after phase under one load; then every write that was answered with 2xx is there."""
    options = {"seed": 7, "models": ["m"], "first_token": "0.05", "tokens_per_second": 50}
    chance, undocumented, worst = random.Random(7), [], 0.0
    with Upstream(**options, tokens=20) as upstream:
        stack = make_stack(
            AI_BASE_URL=upstream.base_url,
            AI_MODEL="m",
            WEB_CONCURRENCY="2" if prove.full else "1",
        )
        clients = Clients(stack)
        with Load(stack.nginx.url, stack.headers, clients.kinds, clients=CLIENTS) as load:
            for name in PHASES if prove.full else SMALL:
                act, is_allowed = PHASES[name]
                time.sleep(chance.uniform(0.5, 1.0))
                began = time.monotonic()
                act(stack, chance.uniform(2, 4) if prove.full else 0.3)
                back = time.monotonic()
                time.sleep(8 if prove.full else 1.5)
                while first_put(load.answers, back) == math.inf and time.monotonic() < back + 30:
                    time.sleep(0.1)
                failed = load.refused(began)
                slow = [each for each in failed if of_redis(each)]
                other = [each for each in failed if not of_redis(each)]
                undocumented += [(name, each) for each in other if not is_allowed(each)]
                lates = [each.began for each in other]
                late = max([first_put(load.answers, back), *lates]) - back
                worst = max(worst, late)
                kinds = Counter(each.status for each in other)
                told = ", ".join(f"{count} x {status}" for status, count in sorted(kinds.items()))
                answers = sum(each.began >= began for each in load.answers)
                prove.figure(
                    f"{name}: back after {back - began:.0f} s, {answers} answers, {told or 'none'} "
                    f"failed, {len(slow)} x 503 for want of Redis, well {late:.1f} s later"
                )
        lost = clients.lost(load.answers)
        prove.figure(
            f"{len(clients.documents)} documents and preferences of {len(clients.preferences)} "
            f"users accepted, {len(lost)} lost"
        )
        assert lost == []
        assert undocumented == []
        assert worst < (5 if prove.full else 30)
        for service in stack.services:
            url = f"{service.url}/health/ready"
            until(lambda url=url: requests.get(url, timeout=30).json()["reasons"] == [])


# --- A host that is there and cannot be heard -----------------------------------------------------


class Cut:
    """Load, within which links of the first host are cut for 8 s.

    Attributes:
        answers: What all clients were answered.
        failed: Those that were no success.
        before: Those of them from before the cut.
        ready: What both hosts say of themselves meanwhile; 0 for nothing.
        well: Kinds of which one was a success meanwhile.
        slowest_s: What the slowest answer took.
        after_s: Time after the cut until nothing failed and the host had its stores again.
    """

    def __init__(self, stack, clients, *links):
        one, two = stack.services
        with contextlib.ExitStack() as loads:
            first, others = (
                Load(stack.nginx.url, stack.headers, each.kinds, clients=CLIENTS, pause_s=0.05)
                for each in clients
            )
            loads.enter_context(first)
            time.sleep(2)
            began = time.monotonic()
            with one.host.cut(*links):
                # nginx has kept no more connections to the first host than it has had clients: all
                # of these may come to wait for it, but not those that come now too.
                loads.enter_context(others)
                time.sleep(5)
                self.ready = [readiness(one)[0], readiness(two)[0]]
                time.sleep(max(0, began + 8 - time.monotonic()))
            back = time.monotonic()
            while readiness(one) != (200, []) and time.monotonic() < back + 30:
                time.sleep(0.05)
            again = time.monotonic()
            time.sleep(8)
        self.answers = first.answers + others.answers
        self.failed = first.refused() + others.refused()
        self.before = [each for each in self.failed if each.ended < began and not of_redis(each)]
        meanwhile = [each for each in self.answers if began < each.began and each.ended < back]
        self.well = {each.kind for each in meanwhile if each.status in (200, 201)}
        self.slowest_s = max(each.ended - each.began for each in self.answers)
        late = [each.began for each in self.failed if not of_redis(each)]
        self.after_s = max([again, *late]) - back


def readiness(service):
    """Status and reasons; status 0 for no answer."""
    try:
        answer = requests.get(f"{service.url}/health/ready", timeout=2)
    except (requests.ConnectionError, requests.Timeout):
        return 0, []
    return answer.status_code, answer.json()["reasons"]


def cut_off(network, make_stack, prove, *links):
    """What holds of either cut: nothing is lost, the other host works, all is well soon after."""
    stack = make_stack(hosts=(network.host(), network.host()), REQUEST_TIMEOUT="2")
    clients = Clients(stack), Clients(stack, "v")
    cut = Cut(stack, clients, *links)
    lost = [each for some in clients for each in some.lost(cut.answers)]
    kinds = Counter(each.status for each in cut.failed)
    documents = sum(len(some.documents) for some in clients)
    prove.figure(
        f"{len(cut.answers)} answers, failed {dict(kinds)}, the slowest took "
        f"{cut.slowest_s:.1f} s, over {cut.after_s:.1f} s after the link was back, "
        f"{documents} documents accepted, {len(lost)} lost"
    )
    assert lost == []
    assert set(kinds) <= {503, 504}
    assert [each for each in cut.failed if each.status == 503 and not each.retry_after] == []
    assert cut.before == []
    assert cut.well == set(clients[0].kinds)
    assert cut.after_s < 5
    return cut


@pytest.mark.full_only
@pytest.mark.claim(
    "One of two hosts, network namespaces, is cut off from Redis and PostgreSQL for 8 s, its "
    "packets lost: the other one works, clients of the first get 503 or 504 in time, no accepted "
    "write is lost, over within 5 s"
)
def test_a_host_is_cut_off(network, make_stack, prove):
    """In time is 2 s, and at most 5 s more for a COMMIT whose answer is waited for."""
    cut = cut_off(network, make_stack, prove, "back")
    assert cut.ready == [503, 200]
    assert [each for each in cut.answers if each.ended - each.began > 2 + 5 + 1] == []


@pytest.mark.full_only
@pytest.mark.claim(
    "One of two hosts, network namespaces, is cut off from nginx too for 8 s: the other one "
    "answers, what is under way to the first waits for it, no accepted write is lost, over within "
    "5 s"
)
def test_a_host_is_cut_off_from_all(network, make_stack, prove):
    """nginx takes a second to see it, and has some connections on which it hears nothing."""
    cut = cut_off(network, make_stack, prove, "front", "back")
    assert cut.ready == [0, 200]
    assert cut.slowest_s < 30
