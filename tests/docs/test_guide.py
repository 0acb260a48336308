"""docs/guide.md: its examples use the names and arguments that were promised, and each runs."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from patched import run_patched

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide.md"

#: What each section uses, as it was promised: what is called, `_` for a value that stands without
#: its name. `retry_call` is `retry_async` for plain functions; all else has one name in both forms.
PROMISED = {
    "Exceptions": {
        "NotFoundError(message=, resource_type=, details=)",
        "ValidationError(message=, field=, details=)",
        "DatabaseError(message=, details=)",
    },
    "Retry": {
        "retry_async(_, _, _, max_retries=)",
        "RetryStrategy(max_retries=, initial_delay=, max_delay=, exponential_base=, jitter=)",
        "retry_async(_, _, _, strategy=)",
    },
    "Retry, as a decorator": {"retry(max_retries=)"},
    "Circuit breaker": {
        "ErrorRecovery()",
        "recovery.get_circuit_breaker(name=, failure_threshold=, recovery_timeout=)",
        "cb.call(_, _, _)",
    },
    "Recovery": {"error_recovery.recover_from_error(error=, recovery_actions=)"},
    "Cache": {
        "cache_manager.set(_, _, expire=)",
        "cache_manager.get(_)",
        "cache_manager.delete(_)",
        "cache_manager.delete_pattern(_)",
    },
    "Cached functions": {"cached(key_prefix=, expire=)"},
    "Cache-aside": {"CacheStrategy.cache_aside(key=, fetch_func=, expire=)"},
    "Write-through": {"CacheStrategy.write_through(key=, value=, write_func=, expire=)"},
    "Write-behind": {"CacheStrategy.write_behind(key=, value=, write_func=, expire=)"},
    "Logging": {
        "get_logger(_)",
        "LogContext(_, user_id=, request_id=)",
        "logger.info(_)",
        "logger.error(_, extra=)",
    },
    "Metrics": {
        "track_request(method=, endpoint=, status_code=, duration=)",
        "track_ai_request(model=, duration=, status=, input_tokens=, output_tokens=)",
        "track_database_query(operation=, table=, duration=)",
        "track_cache_operation(operation=, status=)",
        "track_error(category=, severity=)",
    },
}
#: What else has examples: without it the page's own would not run or prove nothing.
BESIDES = ["Set-up", "The body of an error", "When nothing waits any more", "What Prometheus reads"]
#: Of the sections with one example, which is the same in both forms.
ONE_FORM = ["Set-up", "Exceptions", "The body of an error", "Logging", "Metrics",
            "What Prometheus reads"]  # fmt: skip

_RUN_PLAIN = """
import sys
from pathlib import Path
namespace = {"__name__": "guide"}
for source in json.loads(Path(sys.argv[1]).read_text()):
    exec(compile(source, "docs/guide.md", "exec"), namespace)
result = sorted(namespace)
"""
_RUN_AWAITED = """
import ast, asyncio, json, sys
from pathlib import Path
namespace = {"__name__": "guide"}
async def main():
    for source in json.loads(Path(sys.argv[1]).read_text()):
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        awaited = eval(compile(source, "docs/guide.md", "exec", flags), namespace)
        if awaited is not None:
            await awaited
asyncio.run(main())
assert "gevent.monkey" not in sys.modules
print("result:" + json.dumps(sorted(namespace)))
"""


def is_awaited(source):
    """Whether an example is of the form for asyncio."""
    return any(isinstance(node, ast.Await) for node in ast.walk(ast.parse(source)))


def examples():
    """Section -> (plain, awaited); each begins at its line of the page, for tracebacks."""
    found = {}
    text = PAGE.read_text(encoding="utf-8")
    for part in re.split(r"^(?=## )", text, flags=re.M)[1:]:
        title, before = part.partition("\n")[0][3:], text.index(part)
        blocks = [
            "\n" * text.count("\n", 0, before + block.start(1)) + block[1]
            for block in re.finditer(r"^```python\n(.*?)^```", part, re.S | re.M)
        ]
        if blocks:
            assert [is_awaited(block) for block in blocks] in ([False], [False, True]), title
            found[title] = (blocks[0], blocks[-1])
    return found


EXAMPLES = examples()


def calls(source, ours):
    """The calls of an example on names of ours: those given, those it imports, what they give."""

    def is_ours(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in ours

    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flask_muset"):
            ours = ours | {alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and is_ours(node.value):
            ours = ours | {ast.unparse(node.targets[0])}
    for node in filter(is_ours, ast.walk(tree)):
        given = ["_"] * len(node.args) + [f"{keyword.arg}=" for keyword in node.keywords]
        found.add(f"{ast.unparse(node.func)}({', '.join(given)})")
    return found


def modules(source):
    """The modules of ours that an example imports from."""
    return {
        node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flask_muset")
    }


def test_all_is_there():
    """Each promised section has its example, in both forms or in one that serves both."""
    assert sorted(EXAMPLES) == sorted([*PROMISED, *BESIDES])
    assert [title for title, (plain, awaited) in EXAMPLES.items() if plain is awaited] == ONE_FORM


@pytest.mark.parametrize("title", PROMISED)
def test_names_and_arguments(title):
    """An example calls what was promised with the arguments that were promised, and no more."""
    plain, awaited = EXAMPLES[title]
    imported = {"CacheStrategy"} if title.startswith("Write-") else set()
    as_plain = {call.replace("retry_async", "retry_call") for call in PROMISED[title]}
    assert calls(plain, imported) == as_plain
    assert calls(awaited, imported) == PROMISED[title]


def test_modules():
    """What is awaited comes from flask_muset.aio alone, its plain form from an extension."""
    for title, (plain, awaited) in EXAMPLES.items():
        if title not in ONE_FORM:
            assert modules(awaited) <= {"flask_muset.aio"}, title
            assert modules(plain) <= {"flask_muset.resilience", "flask_muset.cache_strategies"}


def test_body_of_an_error():
    """The promised keys, and the id by which the log is searched."""
    body = next(n for n in ast.walk(ast.parse(EXAMPLES["The body of an error"][0]))
                if isinstance(n, ast.Dict))  # fmt: skip
    assert [ast.literal_eval(key) for key in body.keys] == [
        "error", "message", "category", "severity", "retryable", "details", "path", "request_id",
    ]  # fmt: skip


def test_plain_form_under_gevent(tmp_path):
    """The plain examples run from top to bottom in a process that gevent has patched."""
    (tmp_path / "examples.json").write_text(json.dumps([plain for plain, _ in EXAMPLES.values()]))
    assert "deleted_count" in run_patched(_RUN_PLAIN, tmp_path / "examples.json")


def test_awaited_form_with_asyncio(tmp_path):
    """The awaited examples run from top to bottom in a process that runs asyncio."""
    file = tmp_path / "examples.json"
    file.write_text(json.dumps([awaited for _, awaited in EXAMPLES.values()]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _RUN_AWAITED, file],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"deleted_count"' in done.stdout.splitlines()[-1]


@pytest.mark.full_only
@pytest.mark.claim("The guide's commands run: a file of tests, one test, and coverage as HTML")
def test_commands(tmp_path, prove):
    """Each command as the page has it, but for all tests: those of one file."""
    commands = re.findall(r"^\$ (pytest.*?)(?: *#.*)?$", PAGE.read_text(encoding="utf-8"), re.M)
    lines = []
    for command in commands[1:]:
        words = shlex.split(command)
        files = [] if "tests/" in command else ["tests/test_error_handling.py"]
        done = subprocess.run(
            [sys.executable, "-m", *words, *files],
            cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(tmp_path / "coverage")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        lines.append(re.search(r"(\d+ passed) in", done.stdout)[1])
        assert ("--cov" in command) == ("Coverage HTML written to dir htmlcov" in done.stdout)
    prove.figure(", ".join(lines))
    assert lines[-1] == "1 passed"
