"""One state of a circuit breaker for all: two apps stand for two workers, Redis is real."""

import asyncio
import contextlib
import gc
import json
import logging
import math
import threading
import time
from types import SimpleNamespace

import pytest
from flask import Flask
from patched import run_patched
from redis_server import RedisServer, SlowWay
from waiting import until

from flask_muset import Metrics, Resilience, feed
from flask_muset.errors import CircuitOpenError, NetworkError
from flask_muset.redis import GuardedRedis
from flask_muset.resilience import (
    CircuitBreaker,
    ErrorRecovery,
    RateLimit,
    force,
    sharing,
    sharing_state,
)
from flask_muset.signals import breaker_changed, sharing_changed

# A budget that a busy machine keeps.
BUDGET_S = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Redis for all tests that leave it alone."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture
def own_server(tmp_path):
    """A Redis that a test may freeze and kill."""
    server = RedisServer(tmp_path).start()
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.thaw()
    server.kill()


_count = iter(range(1000))


@pytest.fixture
def nodes():
    """A function that makes apps as several workers have them: one policy, one breaker."""
    namespace = f"test{next(_count)}"
    made = []

    def make(url, *, name="x", namespace=namespace, config=None, **options):
        app = Flask("shop")
        values = {"REDIS_URL": url, "REDIS_BUDGET": BUDGET_S, "NAMESPACE": namespace}
        app.config.update({f"RESILIENCE_{k}": v for k, v in {**values, **(config or {})}.items()})
        resilience = Resilience()
        options = {"failure_threshold": 1, "recovery_timeout": 60.0, **options}
        policy = resilience.policy("x", CircuitBreaker(name, **options))
        resilience.init_app(app)
        state = app.extensions["resilience"]
        node = SimpleNamespace(
            app=app,
            resilience=resilience,
            policy=policy,
            breaker=policy.breaker,
            redis=state.redis,
            sharing=state.sharing,
            recovery=state.recovery,
            key=f"muset:{namespace}:breaker:{name}",
        )
        made.append(node)
        return node

    yield make
    for node in made:
        end(node)


def end(node):
    """End what listens and sends, as the end of a process does."""
    sharing = node.sharing
    # The feed may be about to wake it.
    wake, sharing._wake = sharing._wake, threading.Event()
    if wake is not None:
        wake.set()
        sharing._feed.close()
    node.redis.close()


def listening():
    """The threads of breakers that are in use."""
    gc.collect()
    return [t for t in threading.enumerate() if t.name in ("breakers", "breakers-feed")]


def fail():
    raise NetworkError("down")


def trip(node, times=1):
    for _ in range(times):
        with pytest.raises(NetworkError):
            node.policy.call(fail)


def is_refused(node):
    try:
        node.policy.call(lambda: "called")
    except CircuitOpenError:
        return True
    return False


def until_state(state, *nodes):
    return until(lambda: all(node.breaker.state == state for node in nodes))


def until_shared(*nodes):
    until(lambda: all(sharing_state(node.app) == "shared" for node in nodes))
    until(lambda: all(node.sharing._feed.is_linked for node in nodes))


def half_open(*nodes):
    """Let the breakers be half-open by a trip of the first, soon: leases are as long as ever."""
    until_shared(*nodes)
    nodes[0].breaker._open_s = 0.05
    trip(nodes[0])
    until_state("half_open", *nodes)
    until(lambda: all(node.breaker.debt() is None for node in nodes))
    nodes[0].breaker._open_s = nodes[0].breaker.options["recovery_timeout"]


# --- Transitions ----------------------------------------------------------------------------------


def test_a_trip_is_everybodys(server, nodes):
    """What opens in one opens in the other, for as long; a probe that succeeds closes both."""
    a, b = nodes(server.url, recovery_timeout=1000.0), nodes(server.url)
    until_shared(a, b)
    trip(b)
    until_state("open", a, b)
    assert is_refused(a)
    # a's own open time is another one; what holds is that of the one that has opened.
    assert a.breaker.snapshot()["retry_after"] <= 60
    assert a.breaker.snapshot()["opened_at"] == pytest.approx(time.time(), abs=30)
    a.breaker.reset()
    until_state("closed", a, b)
    half_open(b, a)
    assert a.policy.call(lambda: "well") == "well"
    until_state("closed", a, b)


def test_a_probe_that_fails_opens_all_for_longer(server, nodes):
    """Growth is common: whoever probes, the next open time follows from the trips of all."""
    options = {"recovery_timeout": 0.2, "recovery_growth": 100.0}
    a, b = nodes(server.url, **options), nodes(server.url, **options)
    until_shared(a, b)
    trip(a)
    until_state("half_open", a, b)
    until(lambda: a.breaker.debt() is None)
    trip(b)
    until_state("open", a, b)
    assert a.breaker.snapshot()["retry_after"] > 10


def test_a_new_worker_knows_before_its_first_call(server, nodes):
    """The first call of a process is refused if all others know that it would fail."""
    a = nodes(server.url)
    until_shared(a)
    trip(a)
    until(lambda: a.breaker.debt() is None)
    late = nodes(server.url)
    assert is_refused(late)
    looks_first = nodes(server.url)
    assert looks_first.breaker.snapshot()["state"] == "open"


def test_namespaces_are_apart(server, nodes):
    """Apps with other namespaces share nothing, even with one name."""
    a, b = nodes(server.url), nodes(server.url, namespace="other")
    until_shared(a, b)
    trip(a)
    until(lambda: a.breaker.debt() is None)
    assert not is_refused(b)
    late = nodes(server.url, namespace="other")
    assert not is_refused(late)


def test_what_is_based_on_an_old_version_changes_nothing(server, nodes):
    """A change that comes late is not applied; who sent it takes what is stored."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    trip(a)
    until_state("open", a, b)
    until(lambda: a.breaker.debt() is None)
    # b sleeps: it hears nothing, and believes that what it knows is the newest.
    b.sharing._breakers = {}
    assert force(a.app, "x", "auto")
    trip(a)
    until(lambda: a.breaker.debt() is None)
    version = a.breaker.version
    with b.breaker._lock:
        b.breaker._close()
        b.breaker._owe()
    assert b.breaker.version < version
    b.sharing._send(b.breaker)
    assert b.breaker.version == version
    assert b.breaker.state == "open"
    assert a.breaker.state == "open"


def test_versions_grow_across_an_emptied_redis(own_server, nodes):
    """What Redis has lost is told anew by who still knows it, under a greater version."""
    a, b = nodes(own_server.url), nodes(own_server.url)
    until_shared(a, b)
    trip(a)
    until_state("open", a, b)
    version = b.breaker.version
    own_server.kill()
    own_server.start()
    late = nodes(own_server.url)
    until(lambda: late.breaker.state == "open")
    until(lambda: {a.breaker.version, b.breaker.version} == {late.breaker.version})
    assert late.breaker.version > version


def test_states_do_not_stay_for_ever(server, nodes):
    """A state is kept for a day longer than it lasts, one forced without an end for ever."""
    a = nodes(server.url, recovery_timeout=100.0)
    until_shared(a)
    client = GuardedRedis(server.url, budget_s=BUDGET_S)

    def lives_s():
        until(lambda: a.breaker.debt() is None)
        return client.execute("PTTL", a.key) / 1000

    day = 86_400
    trip(a)
    assert day + 50 < lives_s() <= day + 101
    a.breaker.reset()
    assert day - 50 < lives_s() <= day
    a.breaker.force_closed(1000)
    assert day + 950 < lives_s() <= day + 1001
    a.breaker.force_open()
    until(lambda: a.breaker.debt() is None)
    assert client.execute("PTTL", a.key) == -1
    client.close()


def test_what_lasts_longer_than_redis_can_count(server, nodes):
    """An open time without any sense is shared like another one."""
    a, b = nodes(server.url, recovery_timeout=1e300), nodes(server.url)
    until_shared(a, b)
    trip(a)
    until_state("open", b)
    until(lambda: a.breaker.debt() is None)
    assert sharing_state(a.app) == "shared"


# --- Probes ---------------------------------------------------------------------------------------


def leases(node):
    fields = node.redis.execute("HKEYS", node.key)
    return [field for field in fields if field.startswith(b"probe:")]


def test_probes_are_counted_in_common(server, nodes):
    """Of three permitted probes each may be another process's; the third success closes all."""
    a, b = (nodes(server.url, half_open_calls=3) for _ in range(2))
    half_open(a, b)
    for node in (a, b):
        assert node.policy.call(lambda: 1) == 1
        assert node.breaker.state == "half_open"
    until(lambda: leases(a) == [])
    assert b.policy.call(lambda: 1) == 1
    until_state("closed", a, b)


def test_fewer_probes_may_be_permitted_than_have_succeeded(server, nodes):
    """Who needs one success closes what another one, who needed three, has left half-open."""
    a = nodes(server.url, half_open_calls=3)
    half_open(a)
    for _ in range(2):
        a.policy.call(lambda: 1)
    until(lambda: leases(a) == [])
    assert a.breaker.state == "half_open"
    b = nodes(server.url)
    assert b.policy.call(lambda: 1) == 1
    assert b.breaker.state == "closed"
    until_state("closed", a)


def test_a_probe_that_says_nothing_gives_its_place_back(server, nodes):
    """A call that is cut off lets another process probe at once."""
    a, b = nodes(server.url), nodes(server.url)
    half_open(a, b)

    def cut_off():
        assert len(leases(a)) == 1
        assert is_refused(b)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        a.policy.call(cut_off)
    until(lambda: leases(a) == [])
    until(lambda: not is_refused(b))
    until_state("closed", a, b)


def test_who_is_cut_off_while_it_is_told_has_no_place(server, nodes):
    """A receiver of the change to half-open that is killed leaves the probe to the next call."""
    a = nodes(server.url)
    until_shared(a)
    a.sharing.turn = lambda: None  # it would be told there
    a.breaker._open_s = 0.05
    trip(a)
    a.breaker._open_s = 60.0
    until(lambda: a.breaker.state == "half_open")

    def cut_off(sender, event):
        raise KeyboardInterrupt

    with breaker_changed.connected_to(cut_off), pytest.raises(KeyboardInterrupt):
        a.policy.call(lambda: 1)
    assert not is_refused(a)


def test_a_lease_is_renewed_while_its_probe_runs(server, nodes):
    """A probe keeps its place for longer than one lease."""
    a, b = nodes(server.url), nodes(server.url)
    half_open(a, b)
    field, done = [], threading.Event()
    probe = threading.Thread(target=a.policy.call, args=(done.wait, 60))
    probe.start()
    until(lambda: field.extend(leases(b)) or field)

    def ends_at():
        return int(b.redis.execute("HGET", b.key, field[0]))

    first = ends_at()
    until(lambda: ends_at() > first)
    assert is_refused(b)
    done.set()
    probe.join()
    until_state("closed", a, b)


def test_a_probe_without_an_end_has_its_place_for_the_open_time(server, nodes):
    """After it others may try, and the one that has lost its place still counts."""
    a, b = nodes(server.url, recovery_timeout=0.3), nodes(server.url, recovery_timeout=0.3)
    half_open(a, b)
    done, seen = threading.Event(), []

    def hang():
        seen.append("began")
        done.wait(60)

    probe = threading.Thread(target=a.policy.call, args=(hang,))
    probe.start()
    until(lambda: seen)

    def ask():
        with contextlib.suppress(CircuitOpenError):
            b.policy.call(lambda: done.set() or probe.join())
            return True
        return False

    until(ask)
    until_state("closed", a, b)


@pytest.mark.parametrize("field", ["ends", "probe:gone"])
def test_a_clock_of_redis_that_is_set_back_holds_nothing_open(server, nodes, field):
    """What ends an hour from now, and lasts less, ends when it should."""
    a, b = (nodes(server.url, recovery_timeout=0.3) for _ in range(2))
    until_shared(a, b)
    trip(a)
    until(lambda: a.breaker.debt() is None)
    a.redis.execute("HSET", a.key, field, int((time.time() + 3600) * 1000))
    until(lambda: b.breaker.state != "closed")
    until(lambda: not is_refused(b))
    until_state("closed", a, b)
    late = nodes(server.url)
    assert not is_refused(late)


def test_who_has_no_connection_free_does_not_probe_alone(server, nodes):
    """While the link is up, who cannot ask is refused after one try and takes nobody's place."""
    a, b = nodes(server.url), nodes(server.url, config={"REDIS_BUDGET": 0.3})
    half_open(a, b)
    pool = b.redis._link.pool
    taken = []
    until(lambda: (slot := pool.take_free()) is None or taken.append(slot))
    asked = []
    run = b.sharing._run
    b.sharing._run = lambda *words: asked.append(words) or run(*words)
    assert is_refused(b)
    assert b.redis.state == "up"
    assert len([words for words in asked if words[0] is sharing._PROBE]) == 1
    for slot in taken:
        pool.give(slot)
    until(lambda: not is_refused(b))
    until_state("closed", a, b)


def test_who_is_refused_asks_rarely(server, nodes):
    """While others probe, refusals send nothing but one question a second."""
    a, b = nodes(server.url), nodes(server.url)
    half_open(a, b)
    began = time.monotonic()

    def probe():
        before = calls(server, "evalsha")
        for _ in range(200):
            assert is_refused(b)
        return calls(server, "evalsha") - before

    sent = a.policy.call(probe)
    # One question a second, and a's lease may be renewed.
    assert sent <= 2 + 3 * (time.monotonic() - began)


def test_under_gevent_a_killed_question_gives_its_lease_back(server):
    """Greenlets that are killed while they ask hold no place, whatever Redis has answered."""
    code = """
    import sys, time
    from flask import Flask
    from flask_muset import Resilience
    from flask_muset.errors import CircuitOpenError, NetworkError
    from flask_muset.resilience import CircuitBreaker
    app = Flask("x")
    app.config.update(RESILIENCE_REDIS_URL=sys.argv[1], RESILIENCE_NAMESPACE="killed",
                      RESILIENCE_REDIS_BUDGET=2.0)
    resilience = Resilience()
    policy = resilience.policy(
        "x", CircuitBreaker("x", failure_threshold=1, recovery_timeout=60))
    resilience.init_app(app)
    redis = app.extensions["resilience"].redis
    policy.breaker._open_s = 0.1  # its leases are longer
    def fail(): raise NetworkError
    key = redis.key("breaker:x")
    leases = lambda: sum(field.startswith(b"probe:") for field in redis.execute("HKEYS", key))
    began, asking = [], []
    def until(condition):
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            gevent.sleep(0.001)
    def half_open():
        try: policy.call(fail)
        except NetworkError: pass
        until(lambda: policy.breaker.state == "half_open" and redis.in_use == 0)
    half_open()
    policy.call(lambda: 1)  # now Redis has the scripts
    half_open()
    for n in range(3):
        asker = gevent.spawn(policy.call, began.append, n)
        gevent.sleep(0.02)  # it has sent its question, and Redis's answer is on the way
        asking.append(redis.in_use)
        asker.kill()
        until(lambda: not leases())
    def alone():
        try: return policy.call(lambda: "in a thread")
        except CircuitOpenError: return "refused"
    # A native thread has no hub to ask with: it decides by itself.
    result = [began, asking, gevent.get_hub().threadpool.apply(alone), str(policy.breaker.state)]
    """
    way = SlowWay(server.port, 0.05, fixed=True)
    assert run_patched(code, way.url) == [[], [1, 1, 1], "in a thread", "closed"]
    way.close()


def test_where_asyncio_runs_the_question_waits_in_a_thread(own_server, nodes):
    """The loop goes on while a coroutine asks; one that is cancelled then leaves no place taken."""
    a = nodes(own_server.url)
    half_open(a)

    async def well():
        return "well"

    async def main():
        own_server.freeze()
        asking = asyncio.ensure_future(a.policy.call(well))
        await asyncio.sleep(0.05)
        assert not asking.done()
        asking.cancel()
        own_server.thaw()
        with pytest.raises(asyncio.CancelledError):
            await asking
        end = time.monotonic() + 10
        while True:
            assert time.monotonic() < end
            with contextlib.suppress(CircuitOpenError):
                return await a.policy.call(well)
            await asyncio.sleep(0.01)

    assert asyncio.run(main()) == "well"
    until_state("closed", a)


# --- What an operator says ------------------------------------------------------------------------


def test_forced_states_reach_all(server, nodes):
    """Open, closed and auto hold everywhere; one with an end ends by itself, called or not."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    assert force(a.app, "x", "open")
    until_state("forced_open", a, b)
    assert is_refused(b)
    assert force(b.app, "x", "closed")
    until_state("forced_closed", a, b)
    trip(a, 3)
    assert a.breaker.state == "forced_closed"
    assert force(a.app, "x", "auto")
    until_state("closed", a, b)
    seen = []

    def listen(sender, event):
        if sender is b.app:
            seen.append(event.new)

    with breaker_changed.connected_to(listen):
        a.breaker.force_open(0.2)
        until(lambda: seen == ["forced_open", "closed"])
    late = nodes(server.url)
    assert not is_refused(late)


def test_what_an_operator_says_is_sent_once(server, nodes, monkeypatch):
    """Not by the call and by the loop: the later one would undo what others have said meanwhile."""
    a = nodes(server.url)
    until_shared(a)
    run, sent = a.sharing._run, []

    def slowly(script, *words):
        if script is sharing._CHANGE:
            sent.append(words)
            time.sleep(0.2)
        return run(script, *words)

    monkeypatch.setattr(a.sharing, "_run", slowly)
    assert force(a.app, "x", "open")
    time.sleep(0.2)
    assert len(sent) == 1


def test_a_forced_state_wins_over_a_trip_that_nobody_knows_of(server, nodes):
    """What an operator says holds whatever is stored, and whatever others are about to send."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    b.sharing._breakers = {}  # it hears nothing
    trip(a)
    until(lambda: a.breaker.debt() is None)
    b.breaker.force_closed()
    b.sharing._send(b.breaker)
    until_state("forced_closed", a, b)


def test_what_is_said_holds_also_if_a_trip_follows_before_it_is_sent(server, nodes):
    """`auto` that nobody has heard of yet is not lost when the calls fail once more."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    a.sharing._breakers = {}  # it hears and sends nothing
    b.breaker.force_open()
    until(lambda: b.breaker.debt() is None)
    a.breaker.reset()
    trip(a)
    a.sharing._send(a.breaker)
    until_state("open", a, b)
    # What was told is told once: what others say next holds.
    a.breaker.reset()
    debt = a.breaker.debt()
    trip(a)
    a.breaker.paid(debt, debt.common)
    assert a.breaker.debt().insists is False


@pytest.mark.parametrize(
    ("mode", "expires_s", "state"),
    [("open", None, "forced_open"), ("closed", 60, "forced_closed"), ("auto", None, "closed")],
)
def test_what_is_said_while_redis_is_away_is_told_later(own_server, nodes, mode, expires_s, state):
    """A forced state that could not be sent is, once Redis is back, everybody's."""
    a, b = nodes(own_server.url), nodes(own_server.url)
    until_shared(a, b)
    force(b.app, "x", "open" if mode == "auto" else "auto")
    until(lambda: a.breaker.version == b.breaker.version)
    own_server.kill()
    assert force(a.app, "x", mode, expires_s) is False
    assert a.breaker.state == state
    own_server.start()
    until_state(state, a, b)


def test_one_that_ends_while_redis_is_away_is_not_told(own_server, nodes):
    """What was said for a moment in which nobody heard it is over: what is stored holds again."""
    a, b = nodes(own_server.url), nodes(own_server.url)
    until_shared(a, b)
    assert force(b.app, "x", "open")
    until_state("forced_open", a, b)
    b.redis.execute("SAVE")
    own_server.kill()
    until(lambda: sharing_state(a.app) == "local")
    a.breaker.force_closed(0.05)
    until(lambda: a.breaker.state == "closed")
    own_server.start()
    until_state("forced_open", a, b)


@contextlib.contextmanager
def paused(node):
    """Let it hear and send nothing for a while, after which it reads what is stored."""
    node.sharing.turn = lambda: None
    breakers, node.sharing._breakers = node.sharing._breakers, {}
    yield
    node.sharing._breakers, node.sharing._must_read = breakers, True
    del node.sharing.turn


def test_a_fork_does_not_owe_what_its_parent_owes(server, nodes):
    """What was forced before the fork and ended since does not begin anew with the child."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    with paused(a):
        a.breaker.force_open()
        b.breaker.reset()
        until(lambda: b.breaker.debt() is None)
        a.breaker._forked()
        assert a.breaker.debt() is None
    until_state("closed", a, b)


@pytest.mark.parametrize(("days", "state"), [(0.9, "forced_open"), (1.1, "closed")])
def test_what_was_forced_and_heard_of_no_more_for_a_day_is_over(server, nodes, days, state):
    """Who knows a forced state tells it to a Redis that has lost it, unless it may have ended."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    a.breaker.force_open()
    until_state("forced_open", a, b)
    with paused(b):
        a.breaker.reset()
        until(lambda: a.breaker.debt() is None)
        a.redis.execute("DEL", a.key)
        b.sharing._must_read = True  # so that what it hears confirms nothing
        b.sharing._confirmed_at = time.monotonic() - days * 86_400
    until_state(state, a, b)
    until(lambda: b.sharing._confirmed_at > time.monotonic() - 60)
    assert (a.breaker.state, b.breaker.state) == (state, state)


def test_what_cannot_be_forced_is_named(server, nodes):
    """An unknown name or mode, an end without sense: a ValueError that says what is right."""
    a = nodes(server.url)
    for arguments, text in [
        (("y", "open"), r"no policy 'y' has a circuit breaker; use one of \['x'\]"),
        (("x", "ajar"), "mode must be one of open, closed, auto, got 'ajar'"),
        (("x", "auto", 5), "leave expires_s out"),
        (("x", "open", -1), "expires_s must be above 0, got -1"),
        (("recovery:y", "open"), "no policy 'recovery:y'"),
    ]:
        with pytest.raises(ValueError, match=text):
            force(a.app, *arguments)


def test_from_a_shell(server, nodes):
    """`flask resilience list` shows what all share; `set` forces the breakers of all workers."""
    a, shell = nodes(server.url), nodes(server.url)
    until_shared(a)
    trip(a)
    until(lambda: a.breaker.debt() is None)
    run = shell.app.test_cli_runner().invoke
    assert run(args=["resilience", "list"]).output.startswith("x  open  ")
    done = run(args=["resilience", "set", "x", "closed", "--expires", "30"])
    assert (done.exit_code, done.output) == (0, "x is closed for 30 s\n")
    until_state("forced_closed", a)
    shown = json.loads(run(args=["resilience", "list", "--json"]).stdout)
    assert (shown["name"], shown["state"]) == ("x", "forced_closed")
    wrong = run(args=["resilience", "set", "y", "open"])
    assert wrong.exit_code == 1
    assert "use one of ['x']" in wrong.output
    # A breaker that only the workers have made.
    found = a.recovery.get_circuit_breaker("mail")
    assert run(args=["resilience", "set", "recovery:mail", "open"]).exit_code == 0
    until(lambda: found.state == "forced_open")


def test_a_shell_that_reaches_nobody_says_so(own_server, nodes):
    """Without a Redis, or while it is away, nothing is forced and the reason is named."""
    away = nodes(own_server.url)
    own_server.kill()
    run = away.app.test_cli_runner().invoke
    done = run(args=["resilience", "set", "x", "open"])
    assert done.exit_code == 1
    assert "Redis does not answer" in done.output
    assert "not the workers' states: Redis does not" in run(args=["resilience", "list"]).stderr

    app = Flask("alone")
    resilience = Resilience()
    resilience.policy("x", CircuitBreaker)
    resilience.init_app(app)
    run = app.test_cli_runner().invoke
    done = run(args=["resilience", "set", "x", "open"])
    assert done.exit_code == 1
    assert "RESILIENCE_REDIS_URL" in done.output
    listed = run(args=["resilience", "list"])
    assert (listed.stdout, "RESILIENCE_REDIS_URL" in listed.stderr) == ("x  closed\n", True)
    assert force(app, "x", "open") is False
    assert sharing_state(app) == "local"


# --- Redis ----------------------------------------------------------------------------------------


def calls(server, name=None):
    """How many commands a server has carried out, of one name or of all but the feed's own."""
    client = GuardedRedis(server.url, budget_s=BUDGET_S)
    counts = {}
    for line in client.execute("INFO", "commandstats").decode().splitlines()[1:]:
        command, _, rest = line.removeprefix("cmdstat_").partition(":calls=")
        counts[command] = int(rest.partition(",")[0])
    client.close()
    if name is not None:
        return counts.get(name, 0)
    ours = ("ping", "subscribe", "select", "info", "hello", "client|setinfo")
    return sum(count for command, count in counts.items() if command not in ours)


@pytest.mark.claim("A closed and an open breaker send no command to Redis, sharing on")
def test_neither_closed_nor_open_sends_anything(own_server, nodes, prove):
    """Counted on the server: calls that pass, calls that fail, and refusals, in every mode."""
    rounds = 100_000 if prove.full else 3_000
    counted = {}
    options = {"failure_threshold": 10**9}
    a, b = nodes(own_server.url, **options), nodes(own_server.url, **options)
    observing = nodes(own_server.url, config={"MODE": "observe"}, **options)
    off = nodes(own_server.url, config={"MODE": "off"}, **options)
    all_nodes = (a, b, observing, off)
    until_shared(*all_nodes)
    for node in all_nodes:
        node.policy.call(math.sqrt, 4)
    time.sleep(0.3)  # what begins has begun

    def counting(what, call):
        before = calls(own_server)
        for _ in range(rounds):
            call()
        counted[what] = calls(own_server) - before

    def failing():
        with contextlib.suppress(NetworkError):
            a.policy.call(fail)

    counting("closed", lambda: a.policy.call(math.sqrt, 4))
    counting("failing", failing)
    counting("observing", lambda: observing.policy.call(math.sqrt, 4))
    counting("off", lambda: off.policy.call(math.sqrt, 4))
    b.breaker._threshold = 1
    trip(b)
    until_state("open", a, observing)
    time.sleep(0.3)
    counting("refused", lambda: is_refused(a))
    counting("would be refused", lambda: observing.policy.call(math.sqrt, 4))
    counting("off while open", lambda: off.policy.call(math.sqrt, 4))
    assert force(b.app, "x", "open")
    until_state("forced_open", a)
    time.sleep(0.3)
    counting("forced", lambda: is_refused(a))
    prove.figure(f"{rounds} calls each: {counted}")
    assert set(counted.values()) == {0}


def test_each_decides_for_itself_while_redis_is_away(own_server, nodes):
    """A process that begins then works, opens and probes alone, and agrees as soon as it can."""
    own_server.kill()
    a, b, c = (nodes(own_server.url) for _ in range(3))
    assert a.policy.call(lambda: 1) == 1
    until(lambda: sharing_state(a.app) == "local")
    trip(a)
    assert is_refused(a)
    assert not is_refused(b)
    assert not is_refused(c)
    c.breaker._open_s = 0.05
    trip(c)
    until_state("half_open", c)
    assert c.policy.call(lambda: 1) == 1  # a probe of its own
    assert c.breaker.state == "closed"
    own_server.start()
    until_shared(a, b, c)
    until_state("open", a, b, c)


def test_the_state_of_the_sharing_is_told_once(own_server, nodes, caplog):
    """Each change sends one event and, of all of ours, one log line: the client's."""
    caplog.set_level(logging.INFO, "flask_muset")
    until(lambda: not listening())  # those of other tests, which may have something to say
    a = nodes(own_server.url)
    a.redis.name = "redis of this test"
    seen = []

    def listen(sender, event):
        if sender is a.app:
            seen.append(event.state)

    with sharing_changed.connected_to(listen):
        until_shared(a)
        until(lambda: seen == ["shared"])
        own_server.kill()
        until(lambda: seen[-1] == "local", 20)
        own_server.start()
        until(lambda: seen[-1] == "shared", 20)
    states = [state for state in seen if state != "doubt"]
    assert states == ["shared", "local", "shared"]
    ours = ("flask_muset.redis", "flask_muset.feed", "flask_muset.resilience")
    told = [record.getMessage() for record in caplog.records if record.name.startswith(ours)]
    lines = [line for line in told if a.redis.name in line or "the link to" not in line]
    assert [line.startswith(f"the link to {a.redis.name} is ") for line in lines] == [True] * 3


def test_a_redis_that_refuses_is_told_of_once(server, nodes, caplog):
    """A key that is not ours stands in the way: said in one line; calls go on as ever."""
    client = GuardedRedis(server.url, budget_s=BUDGET_S)
    a = nodes(server.url, name="y")
    client.execute("SET", a.key, "something else")
    assert a.policy.call(lambda: 1) == 1
    until(lambda: "circuit breakers are not shared" in caplog.text)
    trip(a)
    assert is_refused(a)
    assert sharing_state(a.app) == "doubt"
    time.sleep(0.6)
    assert caplog.text.count("circuit breakers are not shared") == 1
    client.execute("DEL", a.key)
    until(lambda: sharing_state(a.app) == "shared")
    assert is_refused(nodes(server.url, name="y"))
    client.close()


@pytest.mark.parametrize(
    "fields",
    [
        ("version", 5, "state", "ajar", "ends", 0, "trips", 0, "since", 0),
        ("version", 5, "state", "half_open", "ends", 0, "trips", 0, "since", 0),
        ("version", "five", "state", "closed", "ends", 0, "trips", 0, "since", 0),
        ("colour", "blue"),
    ],
)
def test_one_state_that_nobody_knows_stops_no_other(server, nodes, caplog, fields):
    """What is stored for a breaker and is no state is said once, by its key; the rest goes on."""
    client = GuardedRedis(server.url, budget_s=BUDGET_S)
    a, b = nodes(server.url), nodes(server.url)
    client.execute("HSET", a.key, *fields)
    good, also_good = (node.recovery.get_circuit_breaker("good") for node in (a, b))
    assert a.policy.call(lambda: 1) == 1
    until(lambda: f"{a.key} has no state" in caplog.text)
    good.force_open()
    until(lambda: also_good.state == "forced_open")
    # It probes by itself: nobody can be asked.
    a.breaker._open_s = 0.05
    trip(a)
    until(lambda: not is_refused(a))
    assert a.breaker.state == "closed"
    until(lambda: caplog.text.count(f"{a.key} has no state") == 2)  # once by each of them
    time.sleep(0.6)
    assert caplog.text.count(f"{a.key} has no state") == 2
    assert "Traceback" not in caplog.text
    client.close()


def test_where_no_thread_can_be_started_the_next_call_tries_again(server, nodes, monkeypatch):
    """A process that is short of threads for a moment shares its states after it."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(b)

    def no_thread(*args, **options):
        raise RuntimeError("can't start new thread")

    for module in (sharing, feed):
        with monkeypatch.context() as patch:
            patch.setattr(module, "run_beside", no_thread)
            assert a.policy.call(lambda: 1) == 1
    trip(b)
    until_state("open", b)
    until(lambda: b.breaker.debt() is None)
    assert is_refused(a)
    until_shared(a)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_is_killed_begins_anew(server, nodes):
    """The next call knows what has changed meanwhile, and what it changes reaches the others."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)

    def killed():
        raise SystemExit

    a.sharing.turn = killed
    until(lambda: a.sharing._thread is None)
    del a.sharing.turn
    trip(b)
    until(lambda: b.breaker.debt() is None)
    assert is_refused(a)
    a.breaker.reset()
    until_state("closed", b)
    until_shared(a)


def test_without_the_feed_the_states_are_read(server, nodes, monkeypatch):
    """Where nothing can be heard, a trip is still everybody's within a second or so."""
    monkeypatch.setattr(feed.Feed, "_listen", lambda self: time.sleep(0.1))
    a, b = nodes(server.url), nodes(server.url)
    for node in (a, b):
        assert not is_refused(node)
    trip(a)
    until_state("open", b)
    assert sharing_state(b.app) == "shared"


def test_what_cannot_be_read_is_told_and_passed_over(server, nodes, caplog):
    """A message of nobody's making is one warning; the next one is heard."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    a.redis.execute("PUBLISH", a.redis.key("breakers"), "somebodybnonsense x")
    a.redis.execute("PUBLISH", a.redis.key("breakers"), "somebodyb1 ajar -1 0 -1 x")
    a.redis.execute("PUBLISH", a.redis.key("breakers"), "somebodyb9 open 9000 1 0 unknown")
    until(lambda: caplog.text.count("a message to breakers cannot be read") >= 2)
    until_shared(a, b)
    trip(a)
    until_state("open", b)


# --- Apps -----------------------------------------------------------------------------------------


def test_many_breakers_are_read_in_parts(server, nodes, monkeypatch):
    """No command asks for more than some of them, and each gets its own state."""
    a = nodes(server.url)
    until_shared(a)
    for number in range(7):
        found = a.recovery.get_circuit_breaker(f"{number}")
        (found.force_open if number % 2 else found.force_closed)()
    until(lambda: not any(one.debt() for one in a.recovery.breakers().values()))
    monkeypatch.setattr(sharing, "_AT_ONCE", 3)
    b = nodes(server.url)
    states = [b.recovery.get_circuit_breaker(f"{number}") for number in range(7)]
    assert [one.state for one in states] == ["forced_closed", "forced_open"] * 3 + ["forced_closed"]


def test_two_apps_of_one_instance(server, nodes):
    """Each app has breakers of its own; those of one namespace are one, those of two are not."""
    a = nodes(server.url)
    same, other = Flask("same"), Flask("other")
    for app, namespace in ((same, a.app.config["RESILIENCE_NAMESPACE"]), (other, "another")):
        app.config.update(RESILIENCE_REDIS_URL=server.url, RESILIENCE_NAMESPACE=namespace)
        app.config["RESILIENCE_REDIS_BUDGET"] = BUDGET_S
        a.resilience.init_app(app)
    with a.app.app_context():
        trip(a)
        until(lambda: a.policy.breaker.debt() is None)
    with same.app_context():
        until(lambda: is_refused(a))
    with other.app_context():
        assert a.policy.call(lambda: "called") == "called"
        assert sharing_state(other) == "shared"


def test_a_redis_that_is_given(server, nodes):
    """Its prefix is the namespace; a namespace beside it is refused at the start."""
    redis = GuardedRedis(server.url, budget_s=BUDGET_S, prefix="muset:given:")
    app = Flask("given")
    resilience = Resilience(redis=redis)
    policy = resilience.policy("x", CircuitBreaker("x", failure_threshold=1))
    resilience.init_app(app)
    a = nodes(server.url, namespace="given")
    until_shared(a)
    with pytest.raises(NetworkError):
        policy.call(fail)
    until_state("open", a)
    app = Flask("both")
    app.config["RESILIENCE_NAMESPACE"] = "shop"
    with pytest.raises(ValueError, match="RESILIENCE_NAMESPACE: the keys of a Redis client"):
        Resilience(app, redis=redis)
    redis.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("REDIS_URL", "localhost"),
        ("REDIS_URL", "http://localhost"),
        ("REDIS_MAX_CONNECTIONS", 0),
        ("REDIS_BUDGET", 0),
        ("NAMESPACE", "with space"),
    ],
)
def test_settings_that_are_not_allowed(key, value):
    """They stop the start with a text that names the key."""
    app = Flask("x")
    app.config[f"RESILIENCE_{key}"] = value
    with pytest.raises(ValueError, match=f"RESILIENCE_{key}"):
        Resilience(app)


def test_a_name_is_one_breakers(server):
    """Two breakers with one name stop the start; one in two policies is one."""
    app = Flask("x")
    app.config["RESILIENCE_REDIS_URL"] = server.url
    resilience = Resilience()
    one = CircuitBreaker("one")
    resilience.policy("a", one)
    resilience.policy("b", one)
    resilience.init_app(app)
    with pytest.raises(ValueError, match="two circuit breakers are called 'one'"):
        resilience.policy("c", CircuitBreaker("one"))
    resilience.policy("recovery:d", CircuitBreaker)
    recovery = app.extensions["resilience"].recovery
    for _ in range(2):
        with pytest.raises(ValueError, match="two circuit breakers are called 'recovery:d'"):
            recovery.get_circuit_breaker("d")
    # Without a Redis each is its own, as ever.
    alone = Resilience()
    alone.policy("a", CircuitBreaker("one"))
    alone.policy("b", CircuitBreaker("one"))
    alone.init_app(Flask("alone"))


def test_breakers_of_error_recovery_are_shared_too(server, nodes):
    """Those of one name are one for all, and never that of a policy with this name."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    ours = a.recovery.get_circuit_breaker("x", failure_threshold=1)
    theirs = b.recovery.get_circuit_breaker("x", failure_threshold=1)
    assert theirs.state == "closed"
    with pytest.raises(NetworkError):
        ours.call(fail)
    until(lambda: theirs.state == "open")
    assert a.breaker.state == b.breaker.state == "closed"
    assert force(b.app, "recovery:x", "auto")
    until(lambda: ours.state == "closed")
    # Those of no app are their process's own.
    assert ErrorRecovery().get_circuit_breaker("x").state == "closed"


def test_observing_and_off(server, nodes):
    """An observing app takes part and refuses nothing; one that is off takes only forced states."""
    a = nodes(server.url)
    observing = nodes(server.url, config={"MODE": "observe"})
    off = nodes(server.url, config={"ENABLE_CIRCUIT_BREAKER": False})
    until_shared(a, observing, off)
    for node in (observing, off):
        assert not is_refused(node)
    trip(a)
    until_state("open", a, observing)
    assert off.breaker.state == "closed"
    assert not is_refused(observing)
    assert not is_refused(off)
    assert force(a.app, "x", "auto")
    until_state("closed", a, observing)
    half_open(a, observing)
    assert observing.policy.call(lambda: "a probe") == "a probe"
    until_state("closed", a, observing)
    assert force(a.app, "x", "open")
    until_state("forced_open", observing, off)
    assert is_refused(observing)
    assert is_refused(off)
    off.breaker.set_mode("enforce")
    assert off.breaker.state == "forced_open"


def test_a_policy_that_is_declared_later(server, nodes):
    """Policies after init_app share too, and learn at their first use what others know."""
    a, b = nodes(server.url), nodes(server.url)
    until_shared(a, b)
    first = a.resilience.policy("late", CircuitBreaker("late", failure_threshold=1))
    with pytest.raises(NetworkError):
        first.call(fail)
    until(lambda: first.breaker.debt() is None)
    second = b.resilience.policy("late", CircuitBreaker("late"))
    with pytest.raises(CircuitOpenError):
        second.call(lambda: 1)


def test_limits_are_given_the_redis(server, nodes, monkeypatch):
    """The limit of requests and those in policies share by a name: one in two policies by one."""
    shared = []
    monkeypatch.setattr(
        RateLimit, "share", lambda self, redis, name: shared.append((self.limit, redis, name))
    )
    a = nodes(server.url, config={"RATE_LIMIT_REQUESTS_PER_MINUTE": 7})
    limit = RateLimit(5, 60)
    a.resilience.policy("mail", limit)
    a.resilience.policy("post", limit)
    assert shared == [(7, a.redis, "requests"), (5, a.redis, "mail"), (5, a.redis, "mail")]


def test_metrics_show_what_others_have_changed(server, nodes):
    """The gauges of each worker follow the state that all share, and say whether it is shared."""
    a, b = nodes(server.url), nodes(server.url)
    Metrics(b.app)
    until_shared(a, b)

    def sample(name):
        with b.app.test_client().get("/metrics") as answer:
            lines = answer.text.splitlines()
        found = [line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")]
        return float(found[0]) if found else None

    state = 'muset_circuit_breaker_state{name="x",state="%s"}'
    trip(a)
    until(lambda: sample(state % "open") == 1)
    assert force(a.app, "x", "auto")
    until(lambda: (sample(state % "open"), sample(state % "closed")) == (0, 1))
    b.redis._link.state = "down"  # as if
    until(lambda: sample('muset_shared_state{state="local"}') == 1)
    assert sample('muset_shared_state{state="shared"}') == 0


def test_an_app_that_is_gone_listens_no_more(server):
    """Its feed and its loop end."""
    app = Flask("gone")
    app.config["RESILIENCE_REDIS_URL"] = server.url
    resilience = Resilience()
    policy = resilience.policy("x", CircuitBreaker)
    resilience.init_app(app)
    until(lambda: not listening())  # those of other tests
    policy.call(lambda: 1)
    assert len(listening()) == 2
    del app, resilience, policy
    until(lambda: not listening())


def test_a_fork_forgets_what_the_parent_is_about(server):
    """A child knows what others know, probes and listens for itself, with a sender of its own."""
    code = """
    import os, sys, time
    from flask import Flask
    from flask_muset import Resilience
    from flask_muset.errors import CircuitOpenError, NetworkError
    from flask_muset.resilience import CircuitBreaker, sharing_state
    app = Flask("x")
    app.config.update(RESILIENCE_REDIS_URL=sys.argv[1], RESILIENCE_NAMESPACE="fork",
                      RESILIENCE_REDIS_BUDGET=2.0)
    resilience = Resilience()
    policy = resilience.policy(
        "x", CircuitBreaker("x", failure_threshold=1, recovery_timeout=60))
    resilience.init_app(app)
    policy.breaker._open_s = 0.5  # its leases are longer
    def fail(): raise NetworkError
    def state(): return str(policy.breaker.state)
    def until(condition, seconds=10):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            gevent.sleep(0.005)
    assert policy.call(lambda: 1) == 1  # before the fork
    until(lambda: app.extensions["resilience"].sharing._feed.is_linked)
    def child(work):
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = "failed"
            try: said = work()
            finally:
                os.write(w, said.encode())
                os._exit(0)
        os.close(w)
        return r, pid
    def end(r, pid):
        os.waitpid(pid, 0)
        return os.read(r, 100).decode()
    def hears():
        policy.call(lambda: 1)
        until(lambda: state() == "open")  # the sibling's trip
        return sharing_state(app)
    def trips():
        gevent.sleep(0.3)
        try: policy.call(fail)
        except NetworkError: pass
        until(lambda: policy.breaker.debt() is None)
        return "tripped"
    siblings = [child(hears), child(hears), child(trips)]
    until(lambda: state() == "open")
    said = [end(*one) for one in siblings]
    until(lambda: state() == "half_open")
    def probes():
        try: return policy.call(lambda: "probed")
        except CircuitOpenError: return "refused"
    # The parent probes while it forks: the child has no probe of its own, and Redis refuses it.
    both = policy.call(lambda: end(*child(probes)))
    result = [said, both, state()]
    """
    assert run_patched(code, server.url) == [
        ["shared", "shared", "tripped"], "refused", "closed"
    ]  # fmt: skip
