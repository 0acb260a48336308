"""The whole load run, as `make load` starts it: 100 users, a constant rate, many at once.

    python locust/run.py

It starts its own stack on free ports (`stack.py`), ends within three minutes whatever happens,
prints the seven objectives, and ends with 0 only if all of them hold and both sides have counted
the same. 1 means that something does not hold or was cut short, 2 that a program is missing or a
part failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from muset.objectives import MIN_SAMPLES, OBJECTIVES, Kind, Verdict, judge, read_series
from open_loop import Plan, Result, percentile
from stack import ROOT, Fault, MissingError, Stack, blank_server, running
from verdict import Row, Scrapes, headline, judge_service, service_times, show, too_few, verdict_of

HERE = Path(__file__).parent
#: The guide's numbers, and what is offered to show the second of them.
AT_ONCE, PER_SECOND = (int(o.limit) for o in OBJECTIVES if o.kind is Kind.OFFERED_LOAD)
RATE, CONNECTIONS, STREAMS = 1.1 * PER_SECOND, 128, 128
#: What the generator may take of one core, and how many times the rate it must be able to send.
MAX_CPU, SPARE = 0.25, 3
#: Seconds that everything may take, and those of them that are left for the end of the stack.
LIMIT_S, ENDING_S = 180.0, 20.0
#: What is left over is given so long to end by itself.
_END_S = 5.0
#: Users have so long to end what they have begun.
_STOP_S = 10


class CutShortError(Exception):
    """A part took too long; the text says which."""


class Bounds:
    """What may take how long: each part for itself, and all of them together.

    A signal ends what goes on, whatever it waits for. When hardly any time is left all children
    are killed, so that nothing can wait for one of them any longer.

    Args:
        limit_s: From now on, for everything.
    """

    def __init__(self, limit_s: float) -> None:
        self._began = time.monotonic()
        self._limit_s = limit_s
        self._arm_end()

    def _left_s(self) -> float:
        return self._began + self._limit_s - time.monotonic()

    def _arm(self, act: Callable[..., None], wait_s: float) -> None:
        signal.signal(signal.SIGALRM, act)
        # 0 would mean never.
        signal.setitimer(signal.ITIMER_REAL, max(wait_s, 0.001))

    def _arm_end(self) -> None:
        self._arm(lambda *_: _signal_children(signal.SIGKILL), self._left_s() - _END_S)

    @contextmanager
    def part(self, title: str, limit_s: float) -> Iterator[None]:
        """Cut the block short after so many seconds, or when only those for the end are left.

        Raises:
            CutShortError: In the block, when its time is over.
        """

        def cut(*_: object) -> None:
            self._arm_end()
            passed_s = time.monotonic() - self._began
            raise CutShortError(f"Cut short {passed_s:.0f} s after the start: {title}.")

        self._arm(cut, min(limit_s, self._left_s() - ENDING_S))
        try:
            yield
        finally:
            self._arm_end()


def generate(folder: Path, plan: Plan, watch: Callable[[], None] = lambda: None) -> Result:
    """Carry a plan out in a process of its own.

    Args:
        folder: For the plan and the result.
        plan: What to send.
        watch: Called some times a second meanwhile.

    Raises:
        RuntimeError: It could not be carried out.
    """
    given, result = folder / "plan.json", folder / "result.json"
    given.write_text(json.dumps(asdict(plan)), encoding="utf-8")
    command = [sys.executable, str(HERE / "open_loop.py")]
    with given.open() as stdin, result.open("w") as stdout:
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout)  # noqa: S603 - our own file
    try:
        while process.poll() is None:
            watch()
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"the generator ended with {process.returncode}.")
    return Result(**json.loads(result.read_text(encoding="utf-8")))


def run_locust(stack: Stack, users: int, seconds: float) -> Mapping[str, Any]:
    """The closed loop; gives what was counted and judged, which its exit code goes by."""
    report = stack.folder / "report.json"
    command = [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless"]
    command += ["--users", str(users), "--spawn-rate", str(max(10, users // 10))]
    command += ["--run-time", f"{seconds:.0f}s", "--stop-timeout", str(_STOP_S), "--only-summary"]
    env = os.environ | stack.environ() | {"LOAD_REPORT": str(report)}
    env.pop("LOAD_SHAPE", None)
    done = subprocess.run(command, env=env, cwd=ROOT, check=False)  # noqa: S603 - Locust
    if not report.exists():
        raise RuntimeError(f"Locust ended with {done.returncode} before it could report.")
    found: Mapping[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def _reads(stack: Stack, users: Sequence[int], rate: float, seconds: float) -> Plan:
    """Cached reads of users, the first ones most often."""
    head = f"HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {stack.key}\r\n\r\n"
    return Plan(
        host="127.0.0.1",
        port=stack.port,
        requests=[f"GET /api/v1/users/{user} {head}" for user in users],
        weights=[1 / (rank + 1) ** 1.1 for rank in range(len(users))],
        rate=rate,
        count=int(rate * seconds),
        connections=CONNECTIONS,
        marker='"email"',
    )


def _streams(stack: Stack) -> Plan:
    """As many streams as connections, all at once."""
    requests = []
    for number in range(STREAMS):
        body = json.dumps({"question": f"How many eggs does the queen of hive 3 lay? ({number}.s)"})
        requests.append(
            f"POST /api/v1/ask HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {stack.key}\r\n"
            f"Accept: text/event-stream\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )
    return Plan(
        host="127.0.0.1", port=stack.port, requests=requests, weights=[1.0] * STREAMS,
        rate=10_000, count=STREAMS, connections=STREAMS, marker="event: done",
    )  # fmt: skip


def scrape(stack: Stack) -> str:
    """The service's metrics, past nginx.

    Raises:
        RuntimeError: It does not answer.
    """
    connection = HTTPConnection(stack.service_url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, HTTPException) as error:
        raise RuntimeError(f"the service does not show its metrics ({error!r}).") from None
    finally:
        connection.close()


def _active(text: str) -> int:
    """Requests that are being served, without the scrape itself."""
    gauge = "muset_http_requests_active"
    return int(sum(value for name, _, value in read_series(text) if name == gauge)) - 1


def at_once(stack: Stack) -> tuple[Result, int]:
    """Open all streams, and watch how many are served at the same time."""
    active = [0]
    # So that the last has begun before the first is at its end.
    stack.upstream.script([Fault("slow_first_token", times=0, delay=2)])
    found = generate(stack.folder, _streams(stack), lambda: active.append(_active(scrape(stack))))
    return found, max(active)


def carry_out(stack: Stack, given: argparse.Namespace, bounds: Bounds) -> list[Row]:
    """All parts, one after the other; each shows its rows when it is over."""
    with bounds.part("users in a loop", given.locust_seconds + 40):
        report = run_locust(stack, given.users, given.locust_seconds)
    rows = [Row(**row | {"verdict": Verdict(row["verdict"])}) for row in report["rows"]]
    with bounds.part("the generator alone", 20), blank_server(stack.folder) as port:
        plan = _reads(stack, report["users"], SPARE * given.rate, min(3, given.seconds))
        spare = generate(stack.folder, replace(plan, port=port, marker=""))
    with bounds.part("the constant rate", given.seconds + 20):
        result = generate(stack.folder, _reads(stack, report["users"], given.rate, given.seconds))
    rows += _shown("A constant rate", constant_rate(result, spare, given.rate))
    with bounds.part("all at once", 30):
        streams, most = at_once(stack)
    rows += _shown("All at once", [concurrency(streams, most)])
    with bounds.part("the counts", 15):
        text = scrape(stack)
    whole = [*judge_service("in all", text), counted(report, result, text), compared(report)]
    return rows + _shown("Since the start of the service, as `muset objectives` sees it", whole)


def _shown(title: str, rows: list[Row]) -> list[Row]:
    print(show(f"\n{title}", rows), flush=True)
    return rows


# --- judged ---------------------------------------------------------------------------------------


def constant_rate(result: Result, spare: Result, rate: float) -> list[Row]:
    """Whether all was answered in time, and whether the generator was up to it.

    Args:
        result: What has come of the rate.
        spare: What the generator can send alone.
        rate: Requests a second.
    """
    good, sent = result.statuses.get("200", 0) - result.unmarked, sum(result.statuses.values())
    verdict = verdict_of(good == sent and result.rate > 0.98 * rate and result.p95 < 0.1)
    figure = (
        f"{result.rate:.0f}/s, {good} of {sent} answered, p50 {_ms(result.p50)}, "
        f"p95 {_ms(result.p95)}, p99 {_ms(result.p99)}, longest {_ms(result.longest)}"
    )
    if sent < MIN_SAMPLES:
        figure, verdict = f"{figure}; {too_few(sent)}", Verdict.NO_DATA
    target = f"{rate:.0f}/s, p95 < 100 ms"
    fit = f"{result.cpu:.0%} of a core, {_ms(result.lag_p95)} late (p95)"
    fit += f"; alone {spare.rate:.0f}/s with {spare.cpu:.0%}, p95 {_ms(spare.p95)}"
    is_fit = result.cpu < MAX_CPU and spare.rate > 0.98 * SPARE * rate
    return [
        Row("Throughput", target, figure, verdict, objective="throughput"),
        Row("The generator", f"below {MAX_CPU:.0%}", fit, verdict_of(is_fit)),
    ]


def concurrency(streams: Result, most: int) -> Row:
    """Whether so many requests were served at once, and all of them to the end.

    Args:
        streams: What has come of them.
        most: Requests at once, as the service has counted them.
    """
    whole = streams.statuses.get("200", 0) - streams.unmarked
    figure = f"{most} at once, {whole} of {STREAMS} streams whole"
    verdict = verdict_of(most >= AT_ONCE and whole == STREAMS)
    target = f"{AT_ONCE} at once"
    return Row("Concurrent requests", target, figure, verdict, objective="concurrency")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def counted(report: Mapping[str, Any], result: Result, text: str) -> Row:
    """Whether the service has counted the requests of all parts, and no others."""
    statuses = result.statuses
    sent = report["api"] + sum(statuses.values()) - statuses.get("unsent", 0)
    seen = next(one.samples for one in judge(text) if one.objective.key == "api")
    figure, verdict = f"{sent} and {seen}", verdict_of(sent == seen)
    return Row("API requests, as `muset objectives`", "equal", figure, verdict)


def compared(report: Mapping[str, Any]) -> Row:
    """The same requests, by the users' clocks and by the service's."""
    times = [*report["times"]["api"], *report["times"]["probe"]]
    inside = service_times("api", Scrapes(report["before"], report["after"]))
    p95 = percentile(times, 0.95)
    mean = sum(times) / len(times) if times else 0.0
    figure = (
        f"p95 {_ms(p95)} and {_ms(inside.p95_above)} to {_ms(inside.p95_below)}; mean {_ms(mean)} "
        f"and {_ms(inside.mean)}: nginx, waiting and Locust are {_ms(mean - inside.mean)}"
    )
    return Row("API times, users and service", "the service's lower", figure,
               verdict_of(bool(times) and inside.p95_above <= p95))  # fmt: skip


# --- started --------------------------------------------------------------------------------------


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The whole load run, on a stack of its own.")
    add = parser.add_argument
    add("--users", type=int, default=100, help="of the closed loop (100)")
    add("--locust-seconds", type=float, default=60, help="of the closed loop (60)")
    add("--rate", type=float, default=RATE, help=f"reads a second ({RATE:.0f})")
    add("--seconds", type=float, default=60, help="of the constant rate (60)")
    return parser.parse_args()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def _signal_children(sign: signal.Signals) -> None:
    for pid in _children():
        with suppress(ProcessLookupError):
            os.kill(pid, sign)


def end_what_is_left() -> None:
    """End the processes that nobody else will.

    A signal may come while one is being started, before anybody has its number; and of one that was
    cut off `subprocess.run` does not wait for the end.
    """
    for sign in (signal.SIGTERM, signal.SIGKILL):
        _signal_children(sign)
        until = time.monotonic() + _END_S
        while _children() and time.monotonic() < until:
            with suppress(ChildProcessError):
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.05)


def main() -> int:
    """Start the stack, carry all out, and say what holds."""
    given = _parse()
    signal.signal(signal.SIGTERM, _stop)
    # Whoever asks for more gets it.
    bounds = Bounds(LIMIT_S + max(0, given.locust_seconds + given.seconds - 120))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="muset-load-") as folder,
            ExitStack() as parts,
        ):
            with bounds.part("the start", 60):
                s = parts.enter_context(running(Path(folder)))
            print(f"The service is at {s.url}, its metrics are at {s.service_url}/metrics;")
            print(f"it has 2 workers of {os.cpu_count()} cores and:")
            for name, value in s.settings.items():
                print(f"  {name}={value}", flush=True)
            rows = carry_out(s, given, bounds)
        print(f"\n{headline(rows)}")
        return 1 if any(row.is_bad for row in rows) else 0
    except CutShortError as error:
        print(error, file=sys.stderr)
        return 1
    except (MissingError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        end_what_is_left()
        # Python lets go of its handlers while it ends; a signal would then end it by itself.
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    sys.exit(main())
