"""What fairness and error handling cost, beside a peer in the same run."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.full_only
@pytest.mark.claim(
    "64 kept connections at full speed on one worker: p99 at most 3 times p50, none lost, at least "
    "0.85 of the stock worker's requests/s; a probe on a new connection: p99 under 250 ms"
)
def test_fairness(prove):
    """wrk on a bare Flask app, our worker and the stock one in turns."""
    found = importlib.import_module("fairness").measure(seconds=6, rounds=5)
    if found is None:
        prove.missing("wrk")
    ours, stock = found["ours"], found["stock"]
    prove.figure(
        f"p99 {ours['p99_x_p50']:.2f} x p50 (stock {stock['p99_ms'] / stock['p50_ms']:.0f} x), "
        f"{ours['lost']:.0f} lost, {ours['requests_x_stock']:.2f} of stock, "
        f"probe p99 {ours['probe_p99_ms']:.0f} ms (stock {stock['probe_p99_ms']:.0f})"
    )
    assert ours["p99_x_p50"] <= 3
    assert ours["lost"] == 0
    assert ours["requests_x_stock"] >= 0.85
    assert ours["probe_p99_ms"] < 250


@pytest.mark.full_only
@pytest.mark.claim("ErrorHandler costs at most 1.05 times bare Flask's instructions on success")
def test_cost_of_success(prove, costs):
    """Instructions under valgrind."""
    if costs is None:
        prove.missing("valgrind")
    prove.figure(f"{costs['success ratio']:.3f}")
    assert costs["success ratio"] <= 1.05


@pytest.mark.full_only
@pytest.mark.claim("ErrorHandler costs at most 1.15 times a catch-all JSON handler on an error")
def test_cost_of_an_error(prove, costs):
    """Instructions under valgrind, the log line discarded by its level."""
    if costs is None:
        prove.missing("valgrind")
    prove.figure(
        f"{costs['error ratio']:.3f}; {costs['new error ratio']:.3f} where no two errors are equal"
    )
    assert costs["error ratio"] <= 1.15


@pytest.fixture(scope="module")
def wrappers():
    """Instructions of each wrapper beside its peers, from the environment that has them."""
    python = ROOT / ".venv-bench" / "bin" / "python"
    if shutil.which("valgrind") is None or not python.exists():
        return None
    command = [python, BENCHMARKS / "micro.py", "--instructions"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.full_only
@pytest.mark.claim(
    "Instructions on the success path: retry and closed breaker with its window at most 2.0 times "
    "a bare try loop, a breaker that all workers share 2.5; retry + breaker + limit at most "
    "2 times the hand-written three; a rejection at most 2.5 times raise-and-catch; five policies "
    "with a timeout at most 0.6 of interlock's three without one"
)
def test_cost_of_policies(prove, wrappers):
    """Each ratio is of one run with its floor or peer."""
    if wrappers is None:
        prove.missing("valgrind or .venv-bench")
    ours = {
        "retry": ("flask-muset retry", "floor: try/except loop", 2.0),
        "breaker": ("flask-muset breaker", "floor: try/except loop", 2.0),
        "shared": ("flask-muset breaker, shared", "floor: try/except loop", 2.5),
        "three": ("flask-muset retry+breaker+limit", "floor: all three", 2.0),
        "rejection": ("flask-muset breaker, open, rejected", "floor: raise and catch", 2.5),
        "five": (
            "flask-muset fallback+retry+breaker+bulkhead+timeout",
            "interlock fallback+breaker+bulkhead",
            0.6,
        ),
    }
    ratios = {name: wrappers[own] / wrappers[peer] for name, (own, peer, _) in ours.items()}
    prove.figure(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    assert all(ratios[name] <= most for name, (_, _, most) in ours.items())


@pytest.fixture(scope="module")
def costs():
    found = importlib.import_module("http_instructions").measure(["bare", "error_handler"])
    return found and {
        "success ratio": found["error_handler"] / found["bare"],
        "error ratio": found["error_handler, error path"] / found["bare, error path"],
        "new error ratio": found["error_handler, new error path"] / found["bare, new error path"],
    }
