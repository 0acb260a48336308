"""The stack of a load run is its own."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parents[2] / "locust"))

import stack


def test_settings_of_another_deployment_stay_out(tmp_path, monkeypatch):
    """Whoever has exported a DATABASE_URL does not find the load in that database."""
    given = {}
    monkeypatch.setattr(stack, "_start", lambda _command, _output, env: given.update(env))
    for name in ("DATABASE_URL", "REDIS_URL", "REQUEST_TIMEOUT", "MUSET_DEPLOYMENT", "LOG_FILE"):
        monkeypatch.setenv(name, "of another deployment")
    monkeypatch.setenv("RATE_LIMIT_REQUESTS_PER_MINUTE", "1")
    made = stack.Stack(tmp_path, {"MAX_RETRIES": "2"})
    made.upstream = SimpleNamespace(base_url="http://127.0.0.1:1/v1")
    made.service(6379)
    assert "of another deployment" not in given.values()
    assert given["RATE_LIMIT_REQUESTS_PER_MINUTE"] == "600000"
    assert (given["MAX_RETRIES"], given["REDIS_URL"]) == ("2", "redis://127.0.0.1:6379/0")
    assert given["PATH"]
