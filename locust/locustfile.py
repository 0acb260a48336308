"""Users of Muset for Locust: readers, askers and listeners to streams.

    locust -f locust/locustfile.py --headless --users 100 --spawn-rate 10 --run-time 1m

MUSET_URL (or --host) is the service, http://127.0.0.1:8080 without it; MUSET_KEY a key of an admin.
LOAD_SHAPE takes one of the shapes of `shapes.py`. The exit code is 0 only if every objective but
those of offered load was measured and holds, and both sides have counted the same.
"""

import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

# Locust adds the folder of the file that it was given, which may be another one.
sys.path.insert(0, str(Path(__file__).parent))

import gevent
from locust import FastHttpUser, between, events, task
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, FastHttpSession
from locust.env import Environment
from locust.exception import CatchResponseError
from locust.runners import LocalRunner

from shapes import make_shape, restore
from tally import Api, ApiError, Tally
from verdict import Row, Scrapes, add_to_html, cut_short, judge_counts, judge_run, show, write_rows

_log = logging.getLogger(__name__)

HOST = os.environ.get("MUSET_URL") or "http://127.0.0.1:8080"
KEY = os.environ.get("MUSET_KEY") or ""
HEADERS = {"Authorization": f"Bearer {KEY}"}
SHAPE = os.environ.get("LOAD_SHAPE") or ""

#: What is read, and how unevenly: the second of them half as often as the first, and so on.
USERS, DOCUMENTS, SEARCHES, QUESTIONS, ZIPF = 200, 50, 100, 50, 1.1
#: Requests a second that come whatever has become of those before.
PROBE_RATE = float(os.environ.get("LOAD_PROBE_RATE") or 20)
#: Seconds that users have to end what they have begun, so that both sides count the same; Locust's
#: --stop-timeout takes its place.
STOP_S = 45

USER_ROUTE = "/api/v1/users/<int:user_id>"
DOCUMENT_ROUTE = "/api/v1/documents/<int:document_id>"
SEARCH_ROUTE = "/api/v1/search"
ASK_ROUTE = "/api/v1/ask"

if SHAPE:
    Shape = make_shape(SHAPE)


def weights(count: int) -> list[float]:
    """How often each of so many is drawn."""
    return [1 / (rank + 1) ** ZIPF for rank in range(count)]


@dataclass(slots=True)
class Run:
    """One run: what is there to be read, what was counted, and what has come of it."""

    tally: Tally = field(default_factory=Tally)
    stop_s: float = STOP_S
    users: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    before: str = ""
    seeded: str = ""
    ledger: tuple[int, int, int] = (0, 0, 0)
    probe: Any = None
    rows: list[Row] = field(default_factory=list)
    scrapes: Scrapes | None = None


class Current:
    """The run that goes on; Locust has one at a time."""

    run = Run()


# --- one request ----------------------------------------------------------------------------------


@contextmanager
def exchange(
    client: FastHttpSession, method: str, path: str, name: str, **options: Any
) -> Iterator[Any]:
    """Send a request and count its answer; what refuses and says when to come back is no error."""
    tally, began = Current.run.tally, time.perf_counter()
    try:
        with client.request(
            method, path, name=name, headers=HEADERS | options.pop("headers", {}),
            catch_response=True, **options,
        ) as response:  # fmt: skip
            status = response.status_code
            if status < 400 and response.request_meta["exception"] is None and status:
                yield response
            else:
                _count_error(tally, response, name)
                yield None
            tally.count(status, is_question=name == ASK_ROUTE)
    except gevent.GreenletExit:
        # Who is stopped while he begins has sent nothing yet; the others have had their time.
        tally.cut += time.perf_counter() - began > Current.run.stop_s / 2
        raise


def _count_error(tally: Tally, response: Any, name: str) -> None:
    """Tell a refusal from an error."""
    status, meta = response.status_code, response.request_meta
    headers = response.headers or {}
    try:
        error = json.loads(response.content or b"")["error"]
    except (ValueError, KeyError, TypeError, *FAILURE_EXCEPTIONS):
        error = "none of the service's" if status else "no answer"
    # A worker that has too much to do looks at no question.
    if name == ASK_ROUTE and status in (500, 502, 503, 504) and error != "OverloadedError":
        tally.questions += 1
    if status in (429, 503) and headers.get("Retry-After"):
        tally.refused += 1
        meta["name"] = f"refused: {name}"
        response.success()
        return
    tally.errors[f"{status} {error}"] += 1
    response.failure(CatchResponseError(f"{status} {error}"))


# --- users ----------------------------------------------------------------------------------------


class MusetUser(FastHttpUser):
    """What all have in common; each has a random source of its own."""

    abstract = True
    host = HOST
    numbers: ClassVar[Iterator[int]] = iter(range(1 << 60))

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.number = next(self.numbers)
        self.random = random.Random(self.number)  # noqa: S311 - repeatable, not secret

    def one_of(self, things: Sequence[Any]) -> Any:
        """Draw, the first ones most often."""
        return self.random.choices(things, weights(len(things)))[0]

    def read(self, path: str, name: str) -> None:
        """Read one thing and count how long it took."""
        with exchange(self.client, "GET", path, name) as response:
            if response is not None:
                Current.run.tally.times["api"].append(response.request_meta["response_time"] / 1000)


class Reader(MusetUser):
    """Reads users, documents and search results."""

    weight = 8
    wait_time = between(0.2, 1.0)

    @task(6)
    def user(self) -> None:
        """One user."""
        self.read(f"/api/v1/users/{self.one_of(Current.run.users)}", USER_ROUTE)

    @task(3)
    def document(self) -> None:
        """One document with its text."""
        self.read(f"/api/v1/documents/{self.one_of(Current.run.documents)}", DOCUMENT_ROUTE)

    @task(2)
    def search(self) -> None:
        """Passages."""
        self.read(f"/api/v1/search?q=queen+of+hive+{self.one_of(range(SEARCHES))}", SEARCH_ROUTE)


class Asker(MusetUser):
    """Asks what others have asked too, and waits for the whole answer."""

    weight = 1
    wait_time = between(0.5, 1.5)

    @task
    def ask(self) -> None:
        """One question of few."""
        body = {"question": question(self.one_of(range(QUESTIONS)))}
        with exchange(self.client, "POST", "/api/v1/ask", ASK_ROUTE, json=body) as response:
            if response is None:
                return
            tally, answer = Current.run.tally, response.json()
            tally.count_answer(answer["usage"])
            if not answer["cached"]:
                tally.times["ai"].append(response.request_meta["response_time"] / 1000)


class Listener(MusetUser):
    """Asks what nobody has asked yet, and reads the answer as it is made."""

    weight = 1
    wait_time = between(0.5, 1.5)
    asked = 0

    @task
    def stream(self) -> None:
        """One question of its own, to the event that ends it."""
        self.asked += 1
        text = f"{question(self.random.randrange(DOCUMENTS))} ({self.number}.{self.asked}.{RUN})"
        began = time.perf_counter()
        with exchange(
            self.client, "POST", "/api/v1/ask", ASK_ROUTE, stream=True,
            json={"question": text}, headers={"Accept": "text/event-stream"},
        ) as response:  # fmt: skip
            if response is None:
                return
            self._read(response, began)

    def _read(self, response: Any, began: float) -> None:
        tally, usage, end, is_cached = Current.run.tally, None, None, True
        first_s = 0.0
        try:
            for event, data in read_events(response):
                if event == "delta" and not first_s:
                    first_s = time.perf_counter() - began
                    tally.first_deltas.append(first_s)
                elif event == "usage":
                    usage, is_cached = data, response.headers.get("X-Cache") == "HIT"
                elif event in ("done", "error"):
                    end = event
        except FAILURE_EXCEPTIONS as error:
            end = f"broken off: {type(error).__name__}"
        took_s = time.perf_counter() - began
        response.request_meta["response_time"] = 1000 * took_s
        if end == "done" and usage is not None:
            tally.count_answer(usage)
            if not is_cached:
                tally.times["ai"].append(took_s)
            return
        tally.questions += 1
        what = f"stream ended with {end or 'nothing'}"
        tally.errors[what] += 1
        response.failure(CatchResponseError(what))


#: Tells the questions of this run from those of another one.
RUN = f"{time.time():.0f}"


def read_events(response: Any) -> Iterator[tuple[str, Any]]:
    """The events of a stream, each with its data, to its end."""
    while piece := response._response.readline(b"\n\n"):
        fields: dict[str, str] = {}
        for line in bytes(piece).decode().splitlines():
            name, _, value = line.partition(": ")
            fields[name] = value
        if "event" in fields:
            yield fields["event"], json.loads(fields["data"])


# --- what there is to be read ---------------------------------------------------------------------


def question(hive: int) -> str:
    """A question that the documents answer."""
    return f"How many eggs does the queen of hive {hive} lay a day?"


def document_text(hive: int) -> str:
    """Some paragraphs of which one answers the question of this hive."""
    rng = random.Random(hive)  # noqa: S311 - repeatable, not secret
    rest = [
        f"On day {day} the scouts of hive {hive} found {rng.randrange(10, 500)} flowers in field "
        f"{rng.randrange(1, 90)}, and the foragers brought {rng.randrange(10, 90)} grams of nectar."
        for day in range(12)
    ]
    rest.insert(5, f"The queen of hive {hive} lays {1500 + 7 * hive} eggs a day.")
    return "\n\n".join(rest)


def seed(api: Api, run: Run) -> None:
    """Make sure that everything is there; a run finds what another one has left."""
    for number in range(USERS):
        body = {"email": f"load-{number}@example.org", "name": f"Load {number}"}
        api.call("POST", "/api/v1/users", body, accept=(409,))
    for hive in range(DOCUMENTS):
        body = {"title": f"Hive {hive}", "text": document_text(hive)}
        run.documents.append(api.call("POST", "/api/v1/documents", body)["id"])
    cursor: str | None = "0"
    while cursor is not None:
        page = api.call("GET", f"/api/v1/users?limit=100&cursor={cursor}")
        cursor = page["next_cursor"]
        run.users += [
            item["id"]
            for item in page["items"]
            if item["email"].startswith("load-") and item["email"].endswith("@example.org")
        ]


def probe(environment: Environment, run: Run) -> None:
    """Read at a constant rate, each timed from when it was due."""
    client = FastHttpSession(
        environment.host or HOST, environment.events.request, None,
        concurrency=100, network_timeout=30, connection_timeout=30,
    )  # fmt: skip
    rng, running = random.Random(0), gevent.pool.Group()  # noqa: S311 - repeatable, not secret
    began, due_s = time.perf_counter(), 0.0

    def read(user_id: int, due: float) -> None:
        with exchange(client, "GET", f"/api/v1/users/{user_id}", "at a constant rate") as response:
            if response is not None:
                took_s = time.perf_counter() - due
                response.request_meta["response_time"] = 1000 * took_s
                run.tally.times["probe"].append(took_s)

    try:
        while True:
            due_s += 1 / PROBE_RATE
            gevent.sleep(max(0.0, began + due_s - time.perf_counter()))
            user_id = rng.choices(run.users, weights(len(run.users)))[0]
            running.spawn(read, user_id, began + due_s)
    finally:
        running.join(environment.stop_timeout)
        running.kill()


# --- the run --------------------------------------------------------------------------------------


@events.init.add_listener
def check(environment: Environment, runner: Any, **_: Any) -> None:
    """Refuse what cannot work before anything is sent; without the page, seed."""
    if not KEY:
        sys.exit("MUSET_KEY must be a key of an admin, as `muset keys create` makes them.")
    if not isinstance(runner, LocalRunner):
        sys.exit("Run Locust as one process: the counts of several cannot be compared.")
    environment.stop_timeout = environment.stop_timeout or STOP_S
    if environment.parsed_options is not None and environment.parsed_options.headless:
        # Now, so that --run-time is all for the users.
        try:
            Current.run = prepare(environment)
        except ApiError as error:
            print(error, file=sys.stderr)
            sys.exit(2)


def prepare(environment: Environment) -> Run:
    """Seed, and remember what was counted before.

    Raises:
        ApiError: The service cannot be used so.
    """
    run = Run(stop_s=environment.stop_timeout)
    api = Api(environment.host or HOST, KEY, run.tally)
    run.before = api.scrape()
    run.ledger = api.usage()
    seed(api, run)
    run.seeded = api.scrape()
    return run


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Start the constant rate; a run that the page has started is seeded first."""
    if Current.run.probe is not None or not Current.run.seeded:
        try:
            Current.run = prepare(environment)
        except ApiError as error:
            _log.error("%s", error)
            environment.process_exit_code = 2
            environment.runner.quit()
            return
    Current.run.probe = gevent.spawn(probe, environment, Current.run)


@events.test_stopping.add_listener
def end_probe(environment: Environment, **_: Any) -> None:
    """The constant rate ends beside the users, in the same time."""
    if Current.run.probe is not None:
        Current.run.probe.kill(block=False)


@events.test_stop.add_listener
def end(environment: Environment, **_: Any) -> None:
    """Let everything come to rest, then compare and judge."""
    run = Current.run
    if run.probe is None:
        return
    run.probe.join()
    shape = environment.shape_class
    if getattr(shape, "has_faults", False):
        restore()
    api = Api(environment.host or HOST, KEY, run.tally)
    try:
        judge(api, run, times_decide=getattr(shape, "times_decide", True))
    except ApiError as error:
        _log.error("%s", error)
        environment.process_exit_code = 2
        return
    is_bad = any(row.is_bad for row in run.rows)
    environment.process_exit_code = 1 if is_bad else 0


def judge(api: Api, run: Run, *, times_decide: bool) -> None:
    """Ask the service what it has counted, and compare."""
    ledger = tuple(now - then for now, then in zip(api.usage(), run.ledger, strict=True))
    until = time.monotonic() + 10
    while True:
        scrapes = Scrapes(run.before, api.scrape())
        pending = {
            "wait": scrapes.total("muset_write_behind_pending"),
            "given up": scrapes.total("muset_write_behind_dead_letters"),
        }
        counts = judge_counts(run.tally, scrapes, ledger, pending)
        # A stream is counted when its connection ends, gauges once a second; what was cut short is
        # counted on one side alone.
        is_settled = run.tally.cut or not any(row.is_bad for row in counts)
        if is_settled or time.monotonic() > until:
            break
        gevent.sleep(0.5)
    run.scrapes = scrapes
    counts.append(cut_short(run.tally))
    loaded = Scrapes(run.seeded, scrapes.after)
    objectives = judge_run(run.tally, loaded, times_decide=times_decide)
    run.rows = [*objectives, *counts]
    print(show("Objectives", objectives), show("Counts", counts), sep="\n", flush=True)


@events.quitting.add_listener
def report(environment: Environment, **_: Any) -> None:
    """Judge what Ctrl-C has ended, and write the rows beside Locust's own files."""
    # Locust itself would stop the users only when it has settled its exit code.
    environment.runner.stop()
    run, options = Current.run, environment.parsed_options
    if not run.rows or options is None:
        return
    if options.csv_prefix:
        write_rows(Path(f"{options.csv_prefix}_objectives.csv"), run.rows)
    if options.json_file:
        path = Path(options.json_file)
        write_rows(path.with_name(f"{path.stem}_objectives.json"), run.rows)
    if options.html_file and Path(options.html_file).exists():
        add_to_html(Path(options.html_file), run.rows)
    path = os.environ.get("LOAD_REPORT")
    if path:
        Path(path).write_text(json.dumps(summary(run)), encoding="utf-8")


def summary(run: Run) -> Mapping[str, Any]:
    """For whoever has started this, such as `make load`."""
    return {
        "api": run.tally.api,
        "times": run.tally.times,
        "rows": [asdict(row) for row in run.rows],
        "users": run.users,
        "before": run.seeded,
        "after": run.scrapes.after if run.scrapes else "",
    }
