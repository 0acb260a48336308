"""Rate limits that processes share in a real Redis."""

import asyncio
import gc
import math
import os
import random
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limit_worker import LimitWorker, run_all
from patched import run_patched
from redis_server import SlowWay
from redis_server import redis_server as redis_server

from flask_muset.clock import Clock
from flask_muset.errors import OperationTimeoutError, RateLimitError
from flask_muset.redis import GuardedRedis, Script
from flask_muset.resilience import Policy, RateLimit
from flask_muset.resilience import shared_limits as module


@pytest.fixture
def redis(redis_server):
    """A client that a slow machine does not drive away."""
    client = GuardedRedis(redis_server.url, budget_s=10, name="limits")
    yield client
    client.close()


def questions(redis):
    """How many scripts the server has run."""
    text = redis.execute("INFO", "commandstats").decode()
    lines = dict(line.split(":", 1) for line in text.split() if ":" in line)
    stats = [lines.get(f"cmdstat_{name}", "calls=0,failed_calls=0") for name in ("evalsha", "eval")]
    numbers = [dict(pair.split("=") for pair in line.split(",")) for line in stats]
    # The first EVALSHA fails, and EVAL runs in its place.
    return sum(int(one["calls"]) - int(one["failed_calls"]) for one in numbers)


# --- Time of the test's own: the real script in a real Redis --------------------------------------

_TIME = "local time = redis.call('TIME')"
_NOW = "local now = time[1] * 1000000 + time[2]"
_EXPIRE = "redis.call('PEXPIRE', KEYS[1], "
_EXPIRES = """
local dies = redis.call('GET', KEYS[1] .. ':dies')
if dies and tonumber(dies) <= now then redis.call('DEL', KEYS[1]) end
local function expire(ms)
  redis.call('SET', KEYS[1] .. ':dies', string.format('%.0f', now + 1000 * ms))
end
"""


class Fleet:
    """Processes with one virtual time, which is that of Redis too.

    Attributes:
        now_us: The time.
        delay_us: How long a question takes to get to Redis.
        back_us: How long an answer takes to come back.
        asked: How many questions there were.
        lost: What happens to the next question: `question`, `answer`, `late`, or nothing, "".
        late: Questions that Redis has not read yet; nobody waits for them.
    """

    budget_s = 0.05
    is_usable_here = True

    def __init__(self, redis, limit, period):
        redis.execute("FLUSHALL")
        self._redis = redis
        self.limit = limit
        self.period = period
        self.now_us = 1_900_000_000_000_000
        self.delay_us = self.back_us = self.asked = 0
        self.counted_us = None
        self.lost = ""
        self.late = []
        self.passed = []
        source = module._HIT.source
        assert [source.count(part) for part in (_TIME, _NOW, _EXPIRE)] == [1, 1, 1]
        source = source.replace(_TIME, "local time = {ARGV[8], ARGV[9]}")
        source = source.replace(_NOW, _NOW + _EXPIRES).replace(_EXPIRE, "expire(")
        self._script = Script(source)

    def process(self):
        """One more process."""
        clock = Clock(now_ns=lambda: self.now_us * 1000)
        limit = RateLimit(self.limit, self.period, clock=clock)
        limit.share(self, "x")
        return limit._shared

    def key(self, name):
        return name

    def run(self, keys, args):
        """What Redis does with a question."""
        time_args = (self.now_us // 1_000_000, self.now_us % 1_000_000)
        return self._redis.script(self._script, keys, [*args, *time_args])

    def script(self, script, keys, args):
        """A question of a process."""
        assert script is module._HIT
        self.asked += 1
        self.now_us += self.delay_us
        lost, self.lost = self.lost, ""
        if lost == "late":
            self.late.append((keys, args))
        if lost in ("question", "late"):
            raise OperationTimeoutError("lost")
        answer = self.run(keys, args)
        self.counted_us = self.now_us
        self.now_us += self.back_us
        if lost == "answer":
            raise OperationTimeoutError("lost")
        return answer

    def hit(self, process):
        """One hit; if it passes, the moment at which it was counted is noted."""
        self.counted_us = None
        hit = process.hit("caller")
        if hit is not None and hit.allowed:
            self.passed.append(self.counted_us or self.now_us)
        return hit

    def most(self):
        """The most by which a window was fuller than its share of the limit; at most the limit."""
        rate = self.limit / (self.period * 1e6)
        lowest, most = math.inf, 0
        for number, at in enumerate(self.passed):
            lowest = min(lowest, number - rate * at)
            most = max(most, number + 1 - rate * at - lowest)
        return round(most, 3)


#: Limits without leases, with small ones, and with ones that live much shorter than the period.
LIMITS = [(7, 1.0), (40, 2.0), (200, 1.0), (600, 60.0), (1200, 120.0)]

_HITS = st.tuples(st.just("hit"), st.integers(0, 5), st.integers(1, 60))
_BURST = st.tuples(st.just("hit"), st.integers(0, 5), st.just(1300))
_PAUSE = st.tuples(st.just("pause"), st.just(0), st.floats(0, 1.5))
_SHORT = st.tuples(st.just("pause"), st.just(0), st.floats(0, 0.05))
_DEATH = st.tuples(st.just("die"), st.integers(0, 5), st.just(0))
_LOSS = st.tuples(st.sampled_from(["question", "answer", "late"]), st.just(0), st.just(0))
_ARRIVAL = st.tuples(st.just("arrive"), st.just(0), st.just(0))


def take_step(fleet, processes, step, which, amount):
    """One step of what may happen to a fleet."""
    if step == "hit":
        for _ in range(amount):
            hit = fleet.hit(processes[which])
            if hit is not None and not hit.allowed:
                break
    elif step == "pause":
        fleet.now_us += int(amount * fleet.period * 1e6)
    elif step == "die":
        processes[which] = fleet.process()
    elif step == "arrive":
        while fleet.late:
            fleet.run(*fleet.late.pop())
    else:
        fleet.lost = step


def test_never_exceeded_whatever_happens(redis):
    """Bursts, pauses, deaths, lost and late questions: in no window do more pass than may."""

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        st.sampled_from(LIMITS),
        st.integers(0, 20_000),
        st.lists(st.one_of(_HITS, _BURST, _PAUSE, _SHORT, _DEATH, _LOSS, _ARRIVAL), max_size=20),
    )
    def check(limit, delay_us, steps):
        fleet = Fleet(redis, *limit)
        fleet.delay_us, fleet.back_us = delay_us, 20_000 - delay_us
        processes = [fleet.process() for _ in range(6)]
        for step, which, amount in steps:
            take_step(fleet, processes, step, which, amount)
        assert fleet.most() <= limit[0]

    check()


def test_all_that_is_lent_may_be_spent_on_top_of_a_burst(redis):
    """The worst moment: all of the reserve is lent, the rest is whole; together it is the limit."""
    fleet = Fleet(redis, 600, 60.0)
    holders = [fleet.process() for _ in range(60)]
    for holder in holders:
        fleet.hit(holder)
    lent = sum(holder._callers["caller"].left for holder in holders)
    assert lent == 30
    fleet.now_us += 50_000_000
    fleet.passed.clear()
    for holder in holders:
        while (hit := fleet.hit(holder)).allowed:
            pass
    assert hit.remaining == 0
    assert len(fleet.passed) == 600
    assert fleet.most() <= 600


@pytest.mark.parametrize(
    ("limit", "lives"), [((600, 60.0), 1), ((600, 60.0), 40), ((200, 1.0), 1), ((900, 90.0), 9)]
)
def test_never_refused_at_nine_tenths(redis, limit, lives):
    """Half of the limit at once, then 0.9 of it, in processes that die while they have leases."""
    fleet = Fleet(redis, *limit)
    rng = random.Random(5)
    processes = [fleet.process() for _ in range(8)]
    step_us = limit[1] * 1e6 / limit[0] / 0.9
    refused = 0
    for number in range(limit[0] * 3):
        if number > limit[0] // 2:
            fleet.now_us += int(step_us) + 1
        which = rng.randrange(8)
        refused += not fleet.hit(processes[which]).allowed
        if rng.randrange(lives) == 0:
            processes[which] = fleet.process()
    assert refused == 0
    assert fleet.most() <= limit[0]


def test_above_the_limit_all_of_it_passes(redis):
    """A caller at 1.5 of a limit whose period is short still gets all that the limit earns."""
    fleet = Fleet(redis, 200, 0.4)
    processes = [fleet.process() for _ in range(3)]
    for number in range(3_000):
        fleet.now_us += int(0.4e6 / 200 / 1.5)
        fleet.hit(processes[number % 3])
    seconds = (fleet.passed[-1] - fleet.passed[0]) / 1e6
    assert len(fleet.passed) >= 0.98 * 200 * seconds / 0.4


@pytest.mark.parametrize("limit", [(7, 1.0), (60, 60.0), (3, 3600.0), (200, 1.0), (600, 60.0)])
def test_waiting_as_told_is_enough_in_any_process(redis, limit):
    """Whichever process refuses, after exactly its retry_after any process allows one more."""
    fleet = Fleet(redis, *limit)
    rng = random.Random(3)
    processes = [fleet.process() for _ in range(4)]
    refused = 0
    while refused < 40:
        fleet.delay_us, fleet.back_us = rng.randrange(3_000), rng.randrange(3_000)
        fleet.now_us += int(rng.expovariate(4 * limit[0] / limit[1]) * 1e6)
        hit = fleet.hit(rng.choice(processes))
        assert 0 <= hit.remaining < limit[0]
        assert hit.reset_after >= 0
        if not hit.allowed and rng.random() < 0.5:
            refused += 1
            assert 0 < hit.retry_after <= max(limit[1] / limit[0], min(0.2, limit[1] / 10)) + 0.006
            fleet.now_us += round(hit.retry_after * 1e6)
            fleet.delay_us = fleet.back_us = 0
            assert fleet.hit(rng.choice(processes)).allowed
    assert fleet.most() <= limit[0]


def test_what_remains_and_when_it_is_whole(redis):
    """`remaining` more pass and not one besides; after `reset_after` the whole limit does."""
    fleet = Fleet(redis, 40, 20.0)
    one, two = fleet.process(), fleet.process()
    hits = [fleet.hit((one, two)[number % 2]) for number in range(15)]
    assert [hit.remaining for hit in hits] == list(range(39, 24, -1))
    assert hits[-1].reset_after == 7.5
    assert [fleet.hit(two).allowed for _ in range(26)] == [True] * 25 + [False]
    fleet.now_us += 20_000_000
    assert fleet.hit(one).remaining == 39


def test_what_remains_of_a_lease_is_counted(redis):
    """With one process the estimate is exact, while a lease is spent and while time passes."""
    fleet = Fleet(redis, 600, 60.0)
    one = fleet.process()
    hits = [fleet.hit(one) for _ in range(5)]
    assert [hit.remaining for hit in hits] == [569, 568, 567, 566, 565]
    assert hits[0].reset_after == hits[4].reset_after == 0.5
    fleet.now_us += 500_000
    two = fleet.process()
    # What `one` has left now is not in the estimate of `two`.
    assert (fleet.hit(one).remaining, fleet.hit(two).remaining) == (569, 564)
    while fleet.hit(two).allowed:
        pass
    assert fleet.hit(two).reset_after == pytest.approx(57, abs=0.2)


def test_a_clock_that_is_set_back(redis):
    """If Redis's clock goes back by an hour, a caller waits for no more than a period."""
    fleet = Fleet(redis, 60, 60.0)
    for _ in range(60):
        fleet.hit(fleet.process())
    fleet.now_us -= 3_600_000_000
    hit = fleet.hit(fleet.process())
    assert not hit.allowed
    assert (hit.retry_after, hit.reset_after) == (1.0, 60.0)


def test_what_a_dead_process_was_lent_comes_back(redis):
    """Its lease is missing until it is over, and then its hits can be lent again."""
    fleet = Fleet(redis, 600, 60.0)
    for at_us in (0, 30_000_000):
        fleet.now_us += at_us
        for _ in range(40):
            fleet.hit(fleet.process())
        fleet.hit(fleet.process())
    fleet.now_us += 29_999_999
    late = fleet.process()
    fleet.hit(late)
    assert late._callers["caller"].left == 0
    fleet.now_us += 1
    fleet.hit(late)
    assert late._callers["caller"].left == math.ceil(30 / 8)


def test_a_process_holds_its_lease_no_longer_than_redis(redis):
    """The time of a lease counts from before it was asked for; what is left then is not spent."""
    fleet = Fleet(redis, 600, 60.0)
    fleet.delay_us = fleet.back_us = 20_000
    process, began = fleet.process(), fleet.now_us
    fleet.hit(process)
    fleet.now_us = began + 59_999_999
    fleet.hit(process)
    assert fleet.asked == 1
    fleet.now_us = began + 60_000_000
    fleet.hit(process)
    assert fleet.asked == 2


def test_a_late_question_ends_no_other_lease(redis):
    """Redis reads a question after the next one: the lease of that one is still counted as lent."""
    fleet = Fleet(redis, 600, 60.0)
    process = fleet.process()
    while fleet.asked < 2 or process._callers["caller"].left:
        fleet.hit(process)
    fleet.lost = "late"
    assert fleet.hit(process) is None
    assert fleet.hit(process).allowed
    caller = process._callers["caller"]
    held = f"{caller.left}:{fleet.now_us + 60_000_000}"
    fleet.run(*fleet.late.pop())
    assert redis.execute("HGET", "limit:x:caller", caller.lease) == held.encode()
    assert redis.execute("HLEN", "limit:x:caller") == 3


# --- What it costs Redis --------------------------------------------------------------------------


def test_one_script_for_a_hit_and_none_for_a_refusal(redis):
    """Below 10 a second each hit is one script; a refusal is repeated here until its time."""
    limit = RateLimit(5, 3600)
    limit.share(redis, "small")
    assert [limit.hit("a").allowed for _ in range(6)] == [True] * 5 + [False]
    assert questions(redis) == 6
    told = [limit.hit("a") for _ in range(500)]
    assert not any(hit.allowed for hit in told)
    assert 719 < told[-1].retry_after <= told[0].retry_after <= 720
    assert questions(redis) == 6
    assert limit.hit("b").allowed


def test_a_caller_far_above_a_large_limit_asks_a_few_times_a_second(redis):
    """Once the limit is reached, a process asks at most twice in 0.2 s, however often it is hit."""
    limit = RateLimit(1_200, 60)
    limit.share(redis, "large")
    while limit.hit("a").allowed:
        pass
    before, began = questions(redis), time.monotonic()
    for _ in range(20_000):
        limit.hit("a")
    took = time.monotonic() - began
    assert questions(redis) - before <= 2 * (took / 0.2 + 1)


def test_what_is_remembered_is_bounded(redis, monkeypatch):
    """The least recently hit caller is forgotten; its refusal is Redis's to repeat then."""
    monkeypatch.setattr(module, "_MAX_CALLERS", 50)
    limit = RateLimit(1, 3600)
    limit.share(redis, "x")
    assert [limit.hit("greedy").allowed for _ in range(2)] == [True, False]
    for number in range(30):
        limit.hit(f"{number}")
    asked = questions(redis)
    assert not limit.hit("greedy").allowed
    assert questions(redis) == asked
    for number in range(60):
        limit.hit(f"later {number}")
    assert len(limit._shared._callers) == 50
    assert not limit.hit("greedy").allowed
    assert questions(redis) == asked + 61


def test_any_text_is_a_key(redis):
    """What is no valid text, as a header may be, is counted in Redis and apart from others."""
    one, two = RateLimit(1, 3600), RateLimit(1, 3600)
    for limit in (one, two):
        limit.share(redis, "x")
    for key in ("\udc80", "\udc81", "ü\0 {x}", ""):
        assert [limit.hit(key).allowed for limit in (one, two)] == [True, False]


def test_keys_expire_when_the_limit_is_whole(redis):
    """Redis keeps a caller until the limit is whole and its leases are over, and no longer."""
    small, large = RateLimit(60, 60), RateLimit(60_000, 60)
    small.share(redis, "small")
    large.share(redis, "large")
    small.hit("a")
    small.hit("a")
    assert 1_000 < redis.execute("PTTL", redis.key("limit:small:a")) <= 2_000
    large.hit("b" * 100)
    (key,) = redis.execute("KEYS", redis.key("limit:large:*"))
    assert len(key) < 100
    assert 55_000 < redis.execute("PTTL", key) <= 60_000


@pytest.mark.full_only
@pytest.mark.claim(
    "A shared limit: 1 script for a hit below 10 a second, at most 0.5 ms of the process's time; a "
    "hit that was lent at most 1.5 times a local one"
)
def test_what_a_hit_costs(redis, prove):
    """Seconds of this process's CPU, the least of several rounds, turn by turn."""
    asked, lent, local = RateLimit(10**5, 10**5), RateLimit(10**7, 60), RateLimit(10**7, 60)
    asked.share(redis, "asked")
    lent.share(redis, "lent")

    def cost_us(limit, times):
        limit.hit("x")
        before = time.process_time()
        for _ in range(times):
            limit.hit("x")
        return (time.process_time() - before) / times * 1e6

    gc.disable()
    try:
        rounds = [
            (cost_us(asked, 500), cost_us(lent, 5_000), cost_us(local, 5_000)) for _ in range(9)
        ]
    finally:
        gc.enable()
    asked_us, lent_us, local_us = map(min, zip(*rounds, strict=True))
    prove.figure(f"asked {asked_us:.0f} µs, lent {lent_us:.2f} µs, local {local_us:.2f} µs")
    assert asked_us <= 500
    assert lent_us <= 1.5 * local_us


# --- How it is bound ------------------------------------------------------------------------------


def test_sharing_is_told_once_and_at_any_time(redis):
    """Before or after the first hit; again changes nothing; a like one counts for itself."""
    one, two = RateLimit(3, 3600), RateLimit(3, 3600)
    one.hit("a")
    one.share(redis, "x")
    shared = one._shared
    one.share(redis, "x")
    assert one._shared is shared
    two.share(redis, "x")
    assert [limit.hit("a").allowed for limit in (one, two, one, two)] == [True] * 3 + [False]
    assert one.like().hit("a").remaining == 2
    two.share(redis, "y")
    assert two.hit("a").allowed


def test_a_policy_shares_its_limit(redis):
    """A call above the limit of all is refused as ever; the calls of a policy have one key."""
    policies = []
    for _ in range(2):
        part = RateLimit(2, 3600)
        part.share(redis, "maps")
        policies.append(Policy("maps", [part]))
    assert [policy.call(str, 1) for policy in policies] == ["1", "1"]
    for policy in policies:
        with pytest.raises(RateLimitError) as raised:
            policy.call(str, 1)
        assert raised.value.refusal
        assert 1_700 < raised.value.retry_after_s <= 1_800
    assert redis.execute("EXISTS", redis.key("limit:maps:")) == 1


def test_a_forked_child_has_no_lease_of_its_parent(redis):
    """Parent and child do not both spend what only one of them was lent."""
    limit = RateLimit(60_000, 60)
    limit.share(redis, "x")
    limit.hit("a")
    assert limit._shared._callers["a"].left > 0
    shared, parent = limit._shared, limit._shared._process
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not shared._callers and shared._process != parent else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_threads_are_lent_once(redis):
    """8 threads at one moment: never too many pass, and what was lent is not asked for twice."""
    limit = RateLimit(60_000, 60)
    limit.share(redis, "x")
    barrier, passed = threading.Barrier(8), []

    def work():
        barrier.wait()
        passed.append(sum(limit.hit("x").allowed for _ in range(400)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == [400] * 8
    whole = int(redis.execute("HGET", redis.key("limit:x:x"), "whole"))
    seconds, micros = map(int, redis.execute("TIME"))
    assert whole - (seconds * 1_000_000 + micros) <= 3_200_000 + 400_000
    assert questions(redis) <= 3_200 / 10


# --- Under gevent ---------------------------------------------------------------------------------


def test_one_of_many_greenlets_asks(redis_server):
    """200 hits at once that find no lease: some questions, and nobody waits for a second round."""
    code = """
    import sys
    from flask_muset.redis import GuardedRedis
    from flask_muset.resilience import RateLimit
    redis = GuardedRedis(sys.argv[1], budget_s=10)
    limit = RateLimit(60_000, 60)
    limit.share(redis, "x")
    jobs = [gevent.spawn(limit.hit, "a") for _ in range(200)]
    gevent.joinall(jobs)
    result = [sum(job.value.allowed for job in jobs), len({job.value.remaining for job in jobs})]
    """
    allowed, remaining = run_patched(code, redis_server.url)
    assert allowed == 200
    assert remaining > 100
    client = GuardedRedis(redis_server.url, budget_s=10)
    assert questions(client) == 1
    client.close()


def test_who_has_waited_asks_for_itself(redis, redis_server):
    """A slow Redis and small leases: nobody waits in a long line, and one lease is out at most."""
    way = SlowWay(redis_server.port, 0.03, fixed=True)
    code = """
    import sys
    from flask_muset.redis import GuardedRedis
    from flask_muset.resilience import RateLimit
    redis = GuardedRedis(sys.argv[1], budget_s=10, max_connections=200)
    limit = RateLimit(600, 60)
    limit.share(redis, "x")
    limit._shared._patience_ns = 200_000_000
    jobs = [gevent.spawn(limit.hit, "a") for _ in range(100)]
    gevent.joinall(jobs)
    result = [sum(job.value.allowed for job in jobs), limit._shared._callers["a"].left]
    """
    allowed, left = run_patched(code, way.url)
    way.close()
    fields = redis.execute("HGETALL", redis.key("limit:x:a"))
    whole = int(fields[fields.index(b"whole") + 1])
    seconds, micros = map(int, redis.execute("TIME"))
    assert allowed == 100
    assert len(fields) <= 4
    assert left <= 4
    assert whole <= seconds * 1_000_000 + micros + (100 + 4) * 100_000
    assert questions(redis) > 30


def test_killed_while_asking(redis_server):
    """Greenlets are killed at any moment: no lease is spent twice and nobody waits for the dead."""
    way = SlowWay(redis_server.port, 0.004)
    code = """
    import random, sys, time
    from flask_muset.redis import GuardedRedis
    from flask_muset.resilience import RateLimit
    redis = GuardedRedis(sys.argv[1], budget_s=10, max_connections=20)
    limit = RateLimit(3_000, 5)
    limit.share(redis, "x")
    rng = random.Random(11)
    allowed, began = [], time.monotonic()
    def work():
        while True:
            if limit.hit("a").allowed:
                allowed.append(time.monotonic())
            gevent.sleep(rng.uniform(0, 0.002))
    class Foreign(gevent.Timeout): pass
    killed = 0
    for _ in range(20):
        jobs = [gevent.spawn(work) for _ in range(8)]
        for job in jobs:
            gevent.sleep(rng.uniform(0, 0.003))
            job.kill(Foreign(1), timeout=5)
            killed += job.dead
    took = time.monotonic() - began
    caller = limit._shared._callers["a"]
    after = limit.hit("a")
    result = [killed, len(allowed), took, caller.asked is None, after is not None, redis.in_use]
    """
    killed, allowed, took, is_free, answered, in_use = run_patched(code, way.url)
    way.close()
    assert killed == 160
    assert 0 < allowed <= 3_000 * (1 + took / 5)
    assert (is_free, answered, in_use) == (True, True, 0)


# --- Real processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers(request):
    """8 worker processes for all tests of this file, 3 in the small form."""
    count = 8 if request.config.getoption("--prove") else 3
    started = [LimitWorker() for _ in range(count)]
    yield [worker.ready() for worker in started]
    for worker in started:
        worker.kill()


def set_up(redis_server, limit, period):
    """Code that gives a worker a limit."""
    return textwrap.dedent(f"""
        redis = GuardedRedis({redis_server.url!r}, budget_s=10)
        limit = RateLimit({limit}, {period})
        limit.share(redis, "x")
        def redis_time():
            seconds, micros = redis.execute("TIME")
            return int(seconds) + int(micros) / 1e6
        redis_time()
        """)


@pytest.mark.claim(
    "Limit 60 a minute, 8 processes: of one burst exactly 60 are admitted plus one for each full "
    "second that has passed"
)
def test_exact_in_any_interleaving(redis_server, workers, prove):
    """Two bursts of all processes at once; Redis's clock says how many seconds lie between."""
    run_all(workers, set_up(redis_server, 60, 60))
    burst = """
begin, first, passed = redis_time(), None, 0
for _ in range({times}):
    passed += limit.hit("a").allowed
    first = first or redis_time()
result = [begin, first, redis_time(), passed]
"""
    first = run_all(workers, burst.format(times=30))
    time.sleep(3.3 if prove.full else 1.3)
    second = run_all(workers, burst.format(times=10))
    passed = sum(row[3] for row in first + second)
    began = min(row[0] for row in first), min(row[1] for row in first)
    least = 60 + int(max(row[0] for row in second) - began[1])
    most = 60 + int(max(row[2] for row in second) - began[0])
    prove.figure(f"{passed} admitted, from {least} to {most} expected")
    assert least <= passed <= most


PACED = """
passed, refused = [], 0
begin = time.monotonic()
for number in range(int({rate} * {seconds})):
    time.sleep(max(0, begin + number / {rate} - time.monotonic()))
    if limit.hit("a").allowed:
        passed.append(int(time.monotonic() * 1e6))
    else:
        refused += 1
result = [passed, refused]
"""
HAMMER = """
passed, refused, end = [], 0, time.monotonic() + {seconds}
while time.monotonic() < end:
    if limit.hit("a").allowed:
        passed.append(int(time.monotonic() * 1e6))
    else:
        refused += 1
result = [passed, refused]
"""


@pytest.mark.claim(
    "Limit 60,000 a minute, 8 processes: never exceeded in any t seconds, a caller at 0.9 of it "
    "never refused, at most 1 Redis command for 10 requests, above the limit too"
)
def test_large_limit(redis, redis_server, workers, prove):
    """At 0.9, then all at once, then at 1.3: windows by the processes' common clock."""
    run_all(workers, set_up(redis_server, 60_000, 60))
    fleet = Fleet(redis, 60_000, 60.0)
    parts = {"at 0.9": PACED.format(rate=900 / len(workers), seconds=30 if prove.full else 1)}
    parts["burst"] = HAMMER.format(seconds=5 if prove.full else 1)
    if prove.full:
        parts["at 1.3"] = PACED.format(rate=1_300 / len(workers), seconds=20)
    refused, ratios = {}, {}
    for name, code in parts.items():
        before = questions(redis)
        answers = run_all(workers, code)
        passed = [at for row in answers for at in row[0]]
        refused[name] = sum(row[1] for row in answers)
        ratios[name] = (len(passed) + refused[name]) / (questions(redis) - before)
        fleet.passed += passed
    fleet.passed.sort()
    prove.figure(
        f"most in a window {fleet.most():.0f} of 60000; {refused['at 0.9']} refused at 0.9; "
        + ", ".join(f"{ratio:.0f} requests a command {name}" for name, ratio in ratios.items())
    )
    assert refused["at 0.9"] == 0
    assert fleet.most() <= 60_000
    assert min(ratios.values()) >= 10


def test_counts_outlive_the_processes(redis_server, workers):
    """What a worker counted holds for its successor, although it was killed."""
    old, new = LimitWorker().ready(), workers[0]
    for worker in (old, new):
        worker.run(set_up(redis_server, 60, 3600))
    count = "result = [limit.hit('a').allowed for _ in range(40)].count(True)"
    assert old.run(count) == 40
    old.kill()
    assert new.run(count) == 20


HASTY = """
hasty = GuardedRedis({url!r})
small, large = RateLimit(60, 60), RateLimit(60_000, 60)
small.share(hasty, "small")
large.share(hasty, "large")
"""
LOAD = """
import collections
seen, slowest, end = collections.Counter(), 0, time.monotonic() + {seconds}
def work(number):
    global slowest
    while time.monotonic() < end:
        for one, name in ((small, "small"), (large, "large")):
            began = time.monotonic()
            try:
                seen[name, one.hit("load %d" % (number % 3)).allowed] += 1
            except Exception as error:
                seen["failed", repr(error)] += 1
            slowest = max(slowest, time.monotonic() - began)
        gevent.sleep(0.005)
gevent.joinall([gevent.spawn(work, number) for number in range(10)])
result = [{{f"{{a}} {{b}}": n for (a, b), n in seen.items()}}, slowest]
"""
COUNT = "result = [limit.hit({key!r}).allowed for _ in range(70)].count(True)"
BACK = """
end = time.monotonic() + 20
while (redis.state, hasty.state) != ("up", "up"):
    assert time.monotonic() < end
    gevent.sleep(0.02)
"""


@pytest.mark.claim(
    "Redis frozen, killed, restarted empty under load: no request fails; each process counts for "
    "itself meanwhile, and all together when it is back"
)
def test_redis_fails_under_load(redis_server, workers, prove):
    """Several processes with 10 greenlets each, small and large limit."""
    some = workers[:4]
    run_all(some, set_up(redis_server, 60, 3600) + HASTY.format(url=redis_server.url))
    for worker in some:
        worker.start(LOAD.format(seconds=2))
    time.sleep(0.3)
    redis_server.freeze()
    time.sleep(0.4)
    redis_server.thaw()
    time.sleep(0.4)
    redis_server.kill()
    time.sleep(0.3)
    redis_server.start()
    loads = [worker.end() for worker in some]
    failed = {key: n for counts, _ in loads for key, n in counts.items() if "failed" in key}
    run_all(some, BACK)
    before = run_all(some, COUNT.format(key="before"))
    redis_server.kill()
    away = run_all(some, COUNT.format(key="away"))
    redis_server.start()
    run_all(some, BACK)
    after = run_all(some, COUNT.format(key="after"))
    hits = sum(sum(counts.values()) for counts, _ in loads)
    slowest_ms = max(slowest for _, slowest in loads) * 1000
    prove.figure(
        f"{len(failed)} of {hits} failed, the slowest took {slowest_ms:.0f} ms; admitted of 60: "
        f"{sum(before)} before, {away} in each process while it was away, {sum(after)} after"
    )
    assert failed == {}
    assert hits > 500
    assert away == [60] * len(some)
    assert (sum(before), sum(after)) == (60, 60)


def test_another_thread_under_gevent_counts_for_itself(redis_server):
    """Redis belongs to the hub's thread; a call in another one fails neither way."""
    code = f"""
result = True
from flask_muset.redis import GuardedRedis
from flask_muset.resilience import RateLimit
for limit in (RateLimit(60, 60), RateLimit(60_000, 60)):
    limit.share(GuardedRedis({redis_server.url!r}), "threads")
    assert limit.hit("k").allowed
    pool = gevent.get_hub().threadpool
    assert [pool.spawn(limit.hit, "other").get().allowed for _ in range(3)] == [True] * 3
"""
    run_patched(code)


def test_an_awaited_policy_asks_beside_the_loop(redis_server):
    """While Redis does not answer, the loop goes on."""
    limit = RateLimit(60, 60)
    limit.share(GuardedRedis(redis_server.url, budget_s=1.0), "awaited")

    async def fine():
        return "fine"

    async def look():
        assert await limit.call(fine) == "fine"
        redis_server.freeze()
        asking = asyncio.ensure_future(limit.call(fine))
        turns = 0
        while not asking.done():
            await asyncio.sleep(0.01)
            turns += 1
        return await asking, turns

    try:
        answer, turns = asyncio.run(look())
    finally:
        redis_server.thaw()
    assert answer == "fine"
    assert turns > 5
