"""What a line costs, beside peers in the same run."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.full_only
@pytest.mark.claim(
    "An access-log line costs at most 3 times orjson + write; a line through loguru with two "
    "context fields and redaction at most 0.45 of loguru's serialize=True"
)
def test_cost_of_a_line(prove):
    """Instructions under valgrind."""
    python = ROOT / ".venv-bench" / "bin" / "python"
    if shutil.which("valgrind") is None or not python.exists():
        prove.missing("valgrind or .venv-bench")
    command = [python, ROOT / "benchmarks" / "logging_rate.py", "--instructions"]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=300)
    cost = json.loads(done.stdout)
    access = cost["ours, access line"] / cost["floor: orjson + write + flush"]
    line = cost["ours"] / cost["loguru serialize=True"]
    new = cost["ours, each text new"] / cost["loguru serialize=True"]
    prove.figure(
        f"access line {access:.2f} x orjson + write, line {line:.2f} of serialize=True "
        f"({new:.2f} where each text is new and looks as if it had a secret)"
    )
    assert access <= 3
    assert line <= 0.45
