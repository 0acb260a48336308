"""Processes that write behind and are killed, forked from one that has everything loaded.

What they do is kept in two files, to which each line is added whole: a process that is killed
leaves no half of one. `events` has what was asked for and what was answered; `source` is the source
of all writers, with every write in its order, those that were repeated too.
"""

import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gevent
from flask import Flask

from flask_muset import CacheStrategies
from flask_muset.cache_strategies import extension
from flask_muset.errors import MusetError

_log = logging.getLogger(__name__)

_LANES = 4
_FIRST = "from gevent import monkey; monkey.patch_all(); import write_behind_worker as worker"


class Log:
    """A file of JSON lines that several processes add to."""

    def __init__(self, path):
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, *fields):
        """Add a line; where kill -9 cuts it off, the next one still begins anew."""
        line = b"\n" + json.dumps(fields).encode()
        assert os.write(self._file, line) == len(line)

    def read(self):
        """All whole lines so far."""
        lines = Path(self._path).read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("]")]


def declare_writers(cache, source, pause_s=0.0):
    """Writers of values, of a ledger, and of a ledger in batches: each a line in the source."""

    def save(value, context):
        time.sleep(pause_s)
        source.add("value", context.key, context.seq, context.token, value)
        time.sleep(pause_s)

    def add(value, context):
        time.sleep(pause_s)
        source.add("ledger", context.key, context.seq, context.token, value)
        time.sleep(pause_s)

    def add_some(writes):
        for value, context in writes:
            source.add("batch", context.key, context.seq, context.token, value)
        time.sleep(pause_s)

    cache.writer("value", patterns=["value:*"])(save)
    cache.writer("ledger", coalesce=False, patterns=["ledger:*"])(add)
    cache.writer("batch", coalesce=False, batch=10, patterns=["batch:*"])(add_some)
    return {"value": save, "ledger": add, "batch": add_some}


# --- In the processes that are killed -------------------------------------------------------------


def set_lease(lease_s, uses_redis=False):
    """Let claims of this process end sooner than those of an app do."""
    parts = [(extension, "Drain"), (extension, "SqliteJournal")]
    if uses_redis:
        from flask_muset.cache_strategies import redis_journal

        parts.append((redis_journal, "RedisJournal"))
    for module, name in parts:
        setattr(module, name, partial(getattr(module, name), lease_s=lease_s))


class Writing:
    """What one process does until it is killed: it writes, in several greenlets, what it can."""

    def __init__(self, cache, functions, events, slot, generation, seed):
        self._cache = cache
        self._functions = functions
        self._events = events
        self._slot = slot
        self._generation = generation
        self._random = random.Random(f"{seed}:{generation}")

    def run(self):
        """Runs until it is killed."""
        lanes = [gevent.spawn(self._write_on, lane) for lane in range(_LANES)]
        gevent.joinall(lanes, raise_error=True)

    def _write_on(self, lane):
        for number in itertools.count():
            name = self._random.choice(["value", "value", "value", "ledger", "batch"])
            # Some keys are a greenlet's own, so that their order is known; others are hot.
            own, hot = f"{self._slot}:{lane}", f"all:{self._random.randrange(4)}"
            key = f"{name}:{self._random.choice([own, own, hot])}"
            value = f"{self._generation}.{lane}.{number}"
            if name == "value" and self._random.random() < 0.1:
                self._note(name, key, None, partial(self._cache.delete, key))
            else:
                write = self._functions[name]
                self._note(
                    name, key, value, partial(self._cache.write_behind, key, value, write, 60)
                )
            gevent.sleep(0.001)

    def _note(self, name, key, value, call):
        began = time.monotonic_ns()
        self._events.add("began", name, key, value, began, 0)
        try:
            answer = "accepted" if call() else "refused"
        except MusetError as error:
            answer = f"raised {error!r}"
        self._events.add(answer, name, key, value, began, time.monotonic_ns())


# --- In the process that forks, kills, and writes the rest ----------------------------------------


class Nursery:
    """Forks processes with an app that is loaded and not used, as gunicorn does, and kills them.

    Args:
        folder: Of `events` and `source`.
        config: Of the apps.
        lease_s: Of claims.
        seed: Of everything that is drawn.
    """

    def __init__(self, folder, config, lease_s, seed):
        set_lease(lease_s, "CACHE_STRATEGIES_REDIS_URL" in config)
        self._seed = seed
        self._random = random.Random(seed)
        self.events, self.source = Log(f"{folder}/events"), Log(f"{folder}/source")
        # Of four processes two only accept.
        self._made = [self._make(config, drains) for drains in (False, False, True, True)]
        self._generations = itertools.count()
        self._running = {}

    def _make(self, config, drains):
        app = Flask("killed")
        app.config.update(config, CACHE_STRATEGIES_DRAIN=drains)
        cache = CacheStrategies(app)
        return app, cache, declare_writers(cache, self.source, pause_s=0.001)

    def kill(self, count):
        """Kill so many processes, each at a moment within 150 ms of its begin."""
        for slot in range(len(self._made)):
            self._fork(slot)
        for number in range(count):
            slot = min(self._running, key=lambda slot: self._running[slot][1])
            pid, kill_at = self._running.pop(slot)
            time.sleep(max(0.0, kill_at - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "one has ended by itself"
            if number + len(self._made) < count:
                self._fork(slot)

    def _fork(self, slot):
        generation = next(self._generations)
        kill_at = time.monotonic() + self._random.uniform(0, 0.15)
        pid = os.fork()
        if not pid:
            try:
                app, cache, functions = self._made[slot]
                with app.app_context():
                    Writing(cache, functions, self.events, slot, generation, self._seed).run()
            except BaseException:
                _log.exception("a process has ended by itself")
            finally:
                os._exit(1)
        self._running[slot] = pid, kill_at

    def write_the_rest(self, timeout_s):
        """Write what is left; whether it could, what waits then, and what was given up."""
        app, cache, _ = self._made[-1]
        with app.app_context():
            return cache.flush(timeout_s), cache.pending(), cache.dead_letters()


def run_nursery(text):
    """Of a process of its own: kill, write the rest, tell what has become of it."""
    logging.basicConfig(level=logging.WARNING)
    given = json.loads(text)
    nursery = Nursery(given["folder"], given["config"], given["lease_s"], given["seed"])
    nursery.kill(given["kills"])
    print("killed", flush=True)
    # Until everything that may have been away is there again.
    sys.stdin.readline()
    print(json.dumps(nursery.write_the_rest(given["timeout_s"])), flush=True)


# --- In the test ----------------------------------------------------------------------------------


class Killing:
    """A nursery in a process of its own.

    Args:
        folder: Where it keeps its files.
        config: Of the apps.
        kills: How many.
        lease_s: Of claims.
        seed: Of everything that is drawn.
    """

    def __init__(self, folder, config, *, kills, seed, lease_s=2.0, timeout_s=60.0):
        self.folder = folder
        given = {
            "folder": str(folder),
            "config": config,
            "kills": kills,
            "lease_s": lease_s,
            "seed": seed,
            "timeout_s": timeout_s,
        }
        self._errors = open(folder / "errors", "wb")  # noqa: SIM115 - closed in `end`
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{_FIRST}; worker.run_nursery({json.dumps(given)!r})"],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()

    def wait(self):
        """Until the last one is killed."""
        assert self._process.stdout.readline().strip() == "killed", self.errors()

    def write_the_rest(self):
        """Let it write what is left; the outcome."""
        out, _ = self._process.communicate("\n")
        assert self._process.returncode == 0, self.errors()
        is_all, pending, dead = json.loads(out)
        return Outcome(is_all, pending, dead, *check_lines(self.folder))

    def errors(self):
        """What it has said."""
        return (self.folder / "errors").read_text()


@dataclass(frozen=True)
class Asked:
    """One write, as its caller has seen it."""

    value: str | None
    began: int
    ended: float
    answer: str


@dataclass(frozen=True)
class Outcome:
    """What has become of all writes.

    Attributes:
        is_all: Whether what was left could be written.
        pending: What the journal says of what waits.
        dead: Dead letters.
        answers: How many writes had which answer; `began` for those that had none.
        lost: Writes that were accepted and are in no source, nor is one that is newer.
        wrong: What else is not as it must be.
        repeated: Lines that the ledgers have more than once.
    """

    is_all: bool
    pending: dict
    dead: list
    answers: Counter
    lost: list
    wrong: list
    repeated: int


def read_asked(folder):
    """All writes that were asked for, by writer and key, in the order of their begin."""
    asked = defaultdict(dict)
    for answer, name, key, value, began, ended in Log(f"{folder}/events").read():
        is_open = answer == "began"
        asked[name, key][began] = Asked(value, began, float("inf") if is_open else ended, answer)
    return {where: [calls[began] for began in sorted(calls)] for where, calls in asked.items()}


def check_lines(folder):
    """Compare what was asked for with what the source has."""
    asked, source = read_asked(folder), defaultdict(list)
    for name, key, seq, token, value in Log(f"{folder}/source").read():
        source[name, key].append((seq, token, value))
    lost, wrong, repeated = [], [], 0
    for (name, key), calls in asked.items():
        lines = source.pop((name, key), [])
        if name == "value":
            lost += _lost_value(key, calls, lines)
        else:
            some, others = _check_ledger(key, calls, lines)
            lost, wrong = lost + some, wrong + others
            repeated += len(lines) - len(set(lines))
    wrong += [f"nobody has asked for {where}" for where in source]
    answers = Counter(call.answer for calls in asked.values() for call in calls)
    return answers, lost, wrong, repeated


def _lost_value(key, calls, lines):
    """The source has the last value that was accepted, or one that may be later.

    A write that was over before one began that was accepted must not stand there.
    """
    last_accepted = max((c.began for c in calls if c.answer == "accepted"), default=0)
    if not lines:
        return [f"{key} has no value"] if last_accepted else []
    value = max(lines)[2]
    may_be = [call for call in calls if call.value == value]
    if any(call.ended >= last_accepted for call in may_be):
        return []
    return [f"{key} is {value!r}, and newer ones were accepted"]


def _check_ledger(key, calls, lines):
    """Each line that was accepted is there, and no other; in the order in which they were."""
    by_value = {call.value: call for call in calls}
    written = [value for _, _, value in lines]
    lost = [
        f"{key} has no {call.value}"
        for call in calls
        if call.answer == "accepted" and call.value not in set(written)
    ]
    wrong = [f"{key} has {value!r} of nobody" for value in written if value not in by_value]
    once = list(dict.fromkeys(lines))
    if len({token for _, token, _ in once}) != len({value for _, _, value in once}):
        wrong.append(f"{key} has tokens and lines that are not one to one")
    if once != sorted(once):
        wrong.append(f"{key} was not written in the order of its sequence")
    latest = 0
    for value in (value for _, _, value in sorted(once) if value in by_value):
        if by_value[value].ended < latest:
            wrong.append(f"{key} has {value!r} behind one that was asked for later")
        latest = max(latest, by_value[value].began)
    return lost, wrong
