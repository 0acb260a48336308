"""What a hit costs, beside the peers in the same run."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def bench(prove, *words):
    """The JSON of a benchmark."""
    python = ROOT / ".venv-bench" / "bin" / "python"
    if not python.exists():
        prove.missing(".venv-bench, which `make prove` makes")
    done = subprocess.run(
        [python, *words], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True,
        timeout=900,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full_only
@pytest.mark.claim(
    "Instructions: a hit of the memory on 166 bytes at most 1.0 of cachetools' TTLCache although "
    "each caller gets a copy, on 10 kB at most 1.1 of SimpleCache; a hit under @cached at most 0.1 "
    "of Flask-Caching's memoize; a hit in Redis at most 0.75 of Flask-Caching's RedisCache"
)
def test_cost_of_a_hit(prove):
    """Instructions under valgrind, all in one run."""
    found = bench(prove, "cache.py", "--instructions")
    if not found:
        prove.missing("valgrind")
    small, big = found["small"], found["10 kB"]
    memory = small["flask-muset memory"] / small["cachetools TTLCache"]
    large = big["flask-muset memory"] / big["Flask-Caching SimpleCache"]
    decorated = small["flask-muset cached"] / small["Flask-Caching memoize, SimpleCache"]
    redis = small["flask-muset Redis alone"] / small["Flask-Caching RedisCache"]
    prove.figure(
        f"memory {memory:.2f} of TTLCache and {large:.2f} of SimpleCache on 10 kB, decorated "
        f"{decorated:.3f} of memoize, Redis {redis:.2f} of RedisCache"
    )
    assert memory <= 1.0
    assert large <= 1.1
    assert decorated <= 0.1
    assert redis <= 0.75
