"""What a request pays for its metrics, beside prometheus-flask-exporter in the same run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.full_only
@pytest.mark.claim(
    "Metrics in multiprocess mode adds at most a quarter of what prometheus-flask-exporter's own "
    "instrumentation adds; METRICS_ENABLED=False under 1 % of bare Flask"
)
def test_cost_of_a_request(prove):
    """Instructions under valgrind, in the WSGI callable."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "ours_metrics.py"],
        capture_output=True,
        check=True,
        text=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    if found is None:
        prove.missing("valgrind")
    bare = found["bare"]
    ours, theirs = found["metrics_mp"] - bare, found["exporter_mp"] - bare
    off = found["metrics_off"] / bare - 1
    prove.figure(
        f"{ours / 1000:.1f}k instructions, the exporter {theirs / 1000:.0f}k: {ours / theirs:.3f}; "
        f"off {off:.2%}"
    )
    assert ours <= theirs / 4
    assert off < 0.01
