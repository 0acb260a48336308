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


@pytest.mark.full_only
@pytest.mark.claim(
    "Accepting a write behind on Redis takes at most 1.35 times a raw SET by redis-py with the "
    "same fsync mode"
)
def test_accepting_on_redis(prove):
    """Turn by turn in one run, the median of each."""
    found = bench(prove, "write_behind.py", "--json", "redis")
    ratios = {fsync: row["ratio"] for fsync, row in found.items()}
    prove.figure(", ".join(f"{ratio:.2f} with {fsync}" for fsync, ratio in ratios.items()))
    assert max(ratios.values()) <= 1.35


@pytest.mark.full_only
@pytest.mark.claim(
    "On SQLite one process accepts at least 3,000 writes a second, and its hub never stops for "
    "more than 20 ms meanwhile"
)
def test_accepting_on_sqlite(prove):
    """64 greenlets at once, synchronous=FULL."""
    found = bench(prove, "write_behind.py", "--json", "sqlite")["sqlite"]
    prove.figure(f"{found['per_s']:.0f} a second, the hub stopped for {found['hub_ms']:.1f} ms")
    assert found["per_s"] >= 3000
    assert found["hub_ms"] <= 20
