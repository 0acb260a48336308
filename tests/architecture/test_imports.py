"""Who may import whom."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import flask_muset
import muset

ROOT = Path(__file__).parents[2]
EXTENSIONS = ROOT / "extensions" / "flask_muset"
SERVICE = ROOT / "muset"


def imports_of(path):
    """All modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(folder, forbidden, allowed=()):
    """Imports of forbidden packages below a folder."""
    return [
        (str(path.relative_to(ROOT)), name)
        for path in folder.rglob("*.py")
        if path.name not in allowed
        for name in imports_of(path)
        if name.split(".")[0] in forbidden or name in forbidden
    ]


def test_extensions_do_not_know_the_service():
    """flask_muset never imports muset."""
    assert offenders(EXTENSIONS, {"muset"}) == []


def test_only_the_binding_knows_flask():
    """Beside extension.py, the catalogue's views and the shared context nothing imports Flask."""
    binding = ("extension.py", "catalogue.py", "context.py")
    assert offenders(EXTENSIONS, {"flask"}, binding) == []


FOLDERS = ("cache_strategies", "error_handler", "logging", "metrics", "resilience")


def test_extensions_do_not_know_each_other():
    """They meet in the modules at the package's root, which know none of them."""
    for folder in FOLDERS:
        siblings = {f"flask_muset.{other}" for other in FOLDERS if other != folder}
        found = [
            (path.name, name)
            for path in (EXTENSIONS / folder).rglob("*.py")
            for name in imports_of(path)
            if ".".join(name.split(".")[:2]) in siblings
        ]
        assert found == [], folder
    # The test kit and the asynchronous names are made of an extension's parts.
    users = ("testing.py", "aio.py", "__init__.py")
    roots = [path for path in EXTENSIONS.glob("*.py") if path.name not in users]
    below = {f"flask_muset.{folder}" for folder in FOLDERS}
    found = [
        (path.name, name)
        for path in roots
        for name in imports_of(path)
        if ".".join(name.split(".")[:2]) in below
    ]
    assert found == []


def test_services_know_neither_flask_nor_clients():
    """Services work on plain values: no Flask, no database, no adapters, no blueprints."""
    forbidden = {
        "flask", "sqlalchemy", "alembic", "gevent", "urllib3",
        "muset.adapters", "muset.blueprints", "muset.app", "muset.providers", "muset.models",
    }  # fmt: skip
    assert offenders(SERVICE / "services", forbidden) == []


def test_blueprints_know_no_storage():
    """Blueprints call services; no SQL and no adapter."""
    forbidden = {"sqlalchemy", "muset.adapters", "muset.models", "muset.providers", "muset.app"}
    assert offenders(SERVICE / "blueprints", forbidden) == []


def test_one_reader_of_the_environment():
    """Only settings.py reads os.environ."""
    readers = [
        path.name
        for path in SERVICE.rglob("*.py")
        if "os.environ" in path.read_text(encoding="utf-8") or "getenv" in path.read_text("utf-8")
    ]
    assert readers == ["settings.py"]


def test_one_place_patches():
    """monkey.patch_all stands in gunicorn.conf.py, first of all, and nowhere else."""
    patched = [
        path.relative_to(ROOT).as_posix()
        for folder in (SERVICE, EXTENSIONS)
        for path in folder.rglob("*.py")
        if "patch_all" in path.read_text(encoding="utf-8")
    ]
    assert patched == ["muset/gunicorn.conf.py"]
    lines = (SERVICE / "gunicorn.conf.py").read_text(encoding="utf-8").split('"""')[2].split("\n")
    assert [line for line in lines if line][:2] == [
        "from gevent import monkey",
        "monkey.patch_all()",
    ]


def test_importing_loads_no_other_library():
    """Importing ErrorHandler imports none of the libraries whose errors it translates."""
    code = (
        "import sys; from flask_muset import ErrorHandler; from flask import Flask;"
        "ErrorHandler(Flask('x'));"
        "assert not [m for m in sys.modules if m.startswith('flask_muset.resilience')];"
        "print([m for m in ('sqlalchemy', 'redis', 'httpx', 'requests', 'urllib3', 'pydantic',"
        "'marshmallow', 'gevent', 'gunicorn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_sorted_and_exist(monkeypatch):
    """Every module's __all__ is sorted and names what is there."""
    import importlib
    import pkgutil

    # The hooks for gunicorn say there where workers keep their metrics, which are not this process.
    for name in ("PROMETHEUS_MULTIPROC_DIR", "FLASK_MUSET_METRICS_BASE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    names = [
        name
        for package in (flask_muset, muset)
        for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if ".migrations" not in name
    ]
    for name in [*names, "flask_muset"]:
        module = importlib.import_module(name)
        public = getattr(module, "__all__", [])
        upper = [n for n in public if n.isupper()]
        classes = [n for n in public if not n.isupper() and n[0].isupper()]
        rest = [n for n in public if n[0].islower()]
        assert public == [*sorted(upper), *sorted(classes), *sorted(rest)], name
        assert all(hasattr(module, n) for n in public), name


@pytest.mark.parametrize("name", ["Makefile", "README.md", "docs/quickstart.md", ".ci/run"])
def test_installs_name_both_folders(name):
    """No install names the service alone: flask-muset is never taken from an index."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if "pip install" in line and "-e ." in line.replace("'", ""):
            assert "./extensions" in line, line


def test_every_test_module_has_a_name_of_its_own():
    """`make prove` collects all of them in one run, where two of one name cannot be told apart."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
