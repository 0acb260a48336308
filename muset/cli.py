"""The command `muset`.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 the documents do not answer the question.
"""

import atexit
import json
import os
import re
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import click
from flask import current_app
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from flask_muset import Resilience
from flask_muset.cache_strategies import cache_manager
from flask_muset.errors import MusetError
from flask_muset.resilience import breaker_of, force, policies_of, sharing_state
from muset import __version__, migrations
from muset.adapters.backup import copy_database
from muset.app import Services, create_app, make_services
from muset.objectives import Verdict, judge
from muset.ports import AnswerStatus, Extracted, Principal, Role
from muset.providers.config import load_providers
from muset.services.ask import Question
from muset.services.dead_letters import DeadLetterService
from muset.services.files import SUFFIXES, FileService
from muset.settings import SETTINGS, Settings, SettingsError, load_settings

__all__ = ["main"]

_ADMIN = "admin@localhost"
_UNSURE = 3
_LONGEST_FLUSH_S = 86_400
_PAGE = 100
_MAX_METRICS_BYTES = 100_000_000
_LIFETIME = re.compile(r"([1-9][0-9]{0,4})([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def _fail(text: str, code: int = 1) -> None:
    click.echo(f"Error: {text}", err=True)
    sys.exit(code)


def _reason(error: MusetError) -> str:
    entries = [f"{e['field']}: {e['message']}" for e in error.errors if e["field"]]
    return "; ".join(entries) or error.message or error.user_message


def _guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn expected faults into one line and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except SettingsError as error:
            return _fail(str(error), 2)
        except MusetError as error:
            return _fail(_reason(error))
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error)
            return _fail(f"the database refused: {' '.join(reason.split())}")
        except OSError as error:
            return _fail(str(error))

    return run


@click.group(help="Documents in, questions, cited answers out.")
@click.version_option(__version__)
def main() -> None:
    """The entry point."""


def _open(settings: Settings) -> Services:
    """The services on a database that has the newest schema."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    services = make_services(settings, Resilience(), providers=load_providers(settings))
    click.get_current_context().call_on_close(services.database.close)
    # Else nothing is written: the service may have the database locked.
    if not services.database.read(migrations.is_newest):
        services.database.write(migrations.upgrade)
    return services


# --- serve ----------------------------------------------------------------------------------------


def _check_port(settings: Settings) -> None:
    """Say it before a key is printed that nobody can use yet."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            _fail(
                f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
                "stop what uses it, or set PORT or MUSET_HOST."
            )


def _check_log_file(settings: Settings) -> None:
    path = settings.log_file
    if path is None:
        return
    try:
        path.open("ab").close()
    except OSError as error:
        _fail(
            f"LOG_FILE {str(path)!r} cannot be written ({error.strerror}); make its folder, let "
            "this user write there, or unset it.",
            2,
        )


def _announce(key: str) -> None:
    click.echo(f"Admin key: {key}")
    click.echo("It is shown once; keep it.")
    sys.stdout.flush()


@main.command()
@_guarded
def serve() -> None:
    """Migrate the database, make the first admin key, and serve with gunicorn."""
    settings = load_settings()
    _check_port(settings)
    _check_log_file(settings)
    services = _open(settings)
    if settings.admin_key is not None:
        services.keys.install(settings.admin_key, _ADMIN)
        key = None
    else:
        key = services.keys.first_admin_key(_ADMIN, _announce)
    services.database.close()
    base = f"http://{settings.host}:{settings.port}"
    header = f'-H "Authorization: Bearer {key or "$MUSET_KEY"}"'
    click.echo(f"Docs: {base}/docs/")
    click.echo("Put a document in, then ask about it:")
    click.echo(f"  curl -s {base}/api/v1/documents {header} -F file=@README.md")
    click.echo(
        f"  curl -s {base}/api/v1/ask {header} -H 'Content-Type: application/json' "
        """-d '{"question": "What does Muset do?"}'"""
    )
    sys.stdout.flush()
    config = str(Path(__file__).with_name("gunicorn.conf.py"))
    command = [sys.executable, "-m", "gunicorn", "-c", config, "muset.app:create_app()"]
    os.execv(sys.executable, command)  # noqa: S606


# --- keys -----------------------------------------------------------------------------------------


@main.group()
def keys() -> None:
    """Make, list and withdraw keys."""


def _lifetime(text: str | None) -> timedelta | None:
    if text is None:
        return None
    match = _LIFETIME.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no time; write 90d, 12h or 30m.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


@keys.command("create")
@click.option("--user", required=True, metavar="EMAIL", help="Whose key it is.")
@click.option("--role", required=True, type=click.Choice([role.value for role in Role]))
@click.option("--expires", metavar="TIME", help="How long it holds: 90d, 12h or 30m.")
@_guarded
def create_key(user: str, role: str, expires: str | None) -> None:
    """Make a key; it is printed alone on the last line and cannot be shown again."""
    lifetime = _lifetime(expires)
    key = _open(load_settings()).keys.create(user, Role(role), lifetime)
    click.echo(f"A {role} key for {user}:")
    click.echo(key)


@keys.command("list")
@_guarded
def list_keys() -> None:
    """List all keys by their first letters."""
    for record in _open(load_settings()).keys.list():
        state = "withdrawn" if record.revoked_at else f"until {record.expires_at or 'withdrawn'}"
        click.echo(f"{record.id}\tmsk_{record.prefix}...\t{record.role}\t{record.email}\t{state}")


@keys.command("revoke")
@click.argument("key_id", type=int)
@_guarded
def revoke_key(key_id: int) -> None:
    """Withdraw a key."""
    _open(load_settings()).keys.revoke(key_id)
    click.echo(f"Key {key_id} is withdrawn.")


@keys.command("rotate")
@click.argument("key_id", type=int)
@_guarded
def rotate_key(key_id: int) -> None:
    """Withdraw a key and make another one like it, printed alone on the last line."""
    key = _open(load_settings()).keys.rotate(key_id)
    click.echo(f"Key {key_id} is withdrawn; in its place:")
    click.echo(key)


# --- documents and questions ----------------------------------------------------------------------


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files that are named, and those of the folders that are read; no hidden ones there.

    Links to folders are not followed, so no folder comes twice or for ever.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                    yield Path(folder, name)


def _read(files: FileService, path: Path) -> Extracted:
    """A file's text and title; it is not read further than is allowed."""
    # A pipe or device would keep us waiting.
    if not path.is_file():
        raise OSError("is no file, or a broken link")
    with path.open("rb") as file:
        return files.read(path.name, file.read(files.max_bytes + 1))


def _owner(services: Services, email: str) -> Principal:
    return Principal(user_id=services.keys.user_id(email), key_id=0, role=Role.ADMIN)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--user", default=_ADMIN, metavar="EMAIL", show_default=True, help="The owner.")
@_guarded
def ingest(paths: tuple[Path, ...], user: str) -> None:
    """Store and index text, Markdown, HTML and PDF files, and folders of them.

    A file that cannot be read is named, and the others go in; the exit code is 1 then.
    """
    services = _open(load_settings())
    who = _owner(services, user)
    files, failures, stored = list(_files(paths)), [], 0
    with click.progressbar(files, label="Indexing", file=sys.stderr) as bar:
        for path in bar:
            try:
                found = _read(services.files, path)
                stored += services.documents.add(who, found.title, found.text)[1]
            except MusetError as error:
                failures.append((path, _reason(error)))
            except OSError as error:
                failures.append((path, error.strerror or str(error)))
    for path, reason in failures:
        click.echo(f"{path}: {reason}", err=True)
    known = len(files) - stored - len(failures)
    click.echo(f"{stored} stored, {known} known already, {len(failures)} failed.")
    if failures or not files:
        sys.exit(1)


@main.command()
@click.argument("question")
@click.option("--document", "documents", type=int, multiple=True, help="Use these ids alone.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@_guarded
def ask(question: str, documents: tuple[int, ...], as_json: bool) -> None:
    """Answer a question from the stored documents."""
    asked = Question(question, document_ids=list(documents) or None)
    answer = _open(load_settings()).ask.ask(asked)
    if as_json:
        citations = [
            {
                "document_id": c.document_id,
                "title": c.title,
                "start": c.start,
                "end": c.end,
                "quote": c.quote,
            }
            for c in answer.citations
        ]
        payload = {"answer": answer.text, "status": answer.status, "citations": citations}
        click.echo(json.dumps(payload))
    else:
        click.echo(answer.text)
        for c in answer.citations:
            click.echo(f"  [{c.document_id}] {c.title}, characters {c.start} to {c.end}")
    if answer.status is AnswerStatus.UNSURE:
        sys.exit(_UNSURE)


# --- the cache ------------------------------------------------------------------------------------


@contextmanager
def _app() -> Iterator[Services]:
    """The whole service in this process, beside the one that may be running."""
    settings = load_settings()
    _open(settings).database.close()
    # The port of the metrics is the service's, and this is one process.
    alone = {"ENABLE_METRICS": False, "WEB_CONCURRENCY": 1}
    app = create_app(replace(settings, values={**settings.values, **alone}))
    services: Services = app.extensions["muset"]
    # Writers go on until the process ends, and what was registered first is called last.
    atexit.register(services.database.close)
    with app.app_context():
        yield services


@main.group()
def policies() -> None:
    """Read and force circuit breakers; needs REDIS_URL, over which all workers share them."""


def _needs_redis() -> None:
    if load_settings().redis_url is None:
        _fail(
            "without REDIS_URL each process has breakers of its own; ask the service itself: GET "
            "/api/v1/admin/policies, POST /api/v1/admin/policies/NAME.",
        )


@policies.command("list")
@_guarded
def list_policies() -> None:
    """Print each policy that has a circuit breaker, with its state."""
    _needs_redis()
    with _app():
        if sharing_state(current_app) == "local":
            _fail("Redis does not answer, so nobody here knows the state of the workers.")
        for name, parts in sorted(policies_of(current_app).items()):
            breaker = breaker_of(parts)
            if breaker is not None:
                click.echo(f"{name}\t{breaker.state}")


@policies.command("set")
@click.argument("name")
@click.argument("mode", type=click.Choice(["open", "closed", "auto"]))
@click.option("--expires", metavar="TIME", help="How long it holds: 2h, 10m; without it for good.")
@_guarded
def set_policy(name: str, mode: str, expires: str | None) -> None:
    """Force the circuit breaker of a policy in all workers; `auto` lets it decide again."""
    _needs_redis()
    lifetime = _lifetime(expires)
    expires_s = None if lifetime is None else lifetime.total_seconds()
    with _app():
        try:
            told = force(current_app, name, mode, expires_s)
        except ValueError as error:
            _fail(str(error), 2)
        if not told:
            _fail("Redis does not answer, nothing has changed.")
    click.echo(f"{name} is {mode}" + (f" for {expires}." if expires else "."))


@main.group()
def cache() -> None:
    """Look after what waits to be written; works while the service runs."""


def _flush_timeout(_context: object, _option: object, seconds: float) -> float:
    if not 0 <= seconds <= _LONGEST_FLUSH_S:
        raise click.BadParameter(f"must be from 0 to {_LONGEST_FLUSH_S} seconds, got {seconds:g}.")
    return seconds


@cache.command("flush")
@click.option(
    "--timeout",
    type=float,
    default=30.0,
    show_default=True,
    metavar="S",
    callback=_flush_timeout,
    help="Seconds to wait.",
)
@_guarded
def flush_cache(timeout: float) -> None:
    """Write all that was accepted to where it belongs; exit code 1 if something is left."""
    with _app():
        is_done = cache_manager.flush(timeout=timeout)
        state = cache_manager.pending()
    if not is_done:
        _fail(
            f"not all is written: {state['pending']} left, the oldest has waited for "
            f"{state['oldest_s']:.0f} s; {state['dead_letters']} given up, see "
            "`muset cache dead-letters list`."
        )
    click.echo("All is written.")


@cache.group("dead-letters")
def dead_letters() -> None:
    """Look after writes that were given up."""


def _all_dead_letters(letters: DeadLetterService) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    after: str | None = ""
    while after is not None:
        page, after = letters.list(_PAGE, after)
        found += page
    return found


@dead_letters.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
@_guarded
def list_dead_letters(as_json: bool) -> None:
    """List them: id, writer, key, attempts, when the last one failed, and why."""
    with _app() as services:
        found = _all_dead_letters(services.dead_letters)
    if as_json:
        click.echo(json.dumps(found))
        return
    for letter in found:
        state = "superseded" if letter["superseded"] else f"{letter['attempts']} attempts"
        error = " ".join(letter["error"].split())
        columns = (letter["id"], letter["writer"], letter["key"], state, letter["last_failed"])
        click.echo("\t".join((*columns, error)))


@dead_letters.command("requeue")
@click.argument("letter_id", metavar="ID")
@_guarded
def requeue_dead_letter(letter_id: str) -> None:
    """Have one written again, at its old place in the order."""
    with _app() as services:
        services.dead_letters.settle(letter_id, "requeue")
    click.echo(f"Dead letter {letter_id} is requeued.")


@dead_letters.command("drop")
@click.argument("letter_id", metavar="ID")
@_guarded
def drop_dead_letter(letter_id: str) -> None:
    """Forget one."""
    with _app() as services:
        services.dead_letters.settle(letter_id, "drop")
    click.echo(f"Dead letter {letter_id} is dropped.")


# --- settings and database ------------------------------------------------------------------------


@main.command("settings")
@_guarded
def show_settings() -> None:
    """Print every setting with its value, where it is from and what it means."""
    settings = load_settings()
    for setting in SETTINGS:
        source = settings.sources.get(setting.name, "default")
        click.echo(f"{setting.name}={settings.shown(setting)}")
        click.echo(f"    {source}; {setting.meaning}")


@main.command("objectives")
@click.option("--url", metavar="URL", help="Of /metrics; default that of this machine's service.")
@click.option("--key", envvar="MUSET_KEY", metavar="KEY", help="An admin key, for another machine.")
@_guarded
def show_objectives(url: str | None, key: str | None) -> None:
    """Judge the seven objectives by what the service has counted since its start.

    Exit code 1 if one is missed; too few samples are no failure.
    """
    settings = load_settings()
    url = url or f"http://{settings.host}:{settings.port}/metrics"
    if urlsplit(url).scheme not in ("http", "https"):
        _fail(f"--url must begin with http:// or https://, got {url!r}.", 2)
    asked = Request(url)  # noqa: S310
    if key:
        # A redirect may lead to somebody else.
        asked.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urlopen(asked, timeout=10) as answer:  # noqa: S310
            findings = judge(answer.read(_MAX_METRICS_BYTES).decode())
    except (OSError, HTTPException) as error:
        _fail(f"{url} cannot be read ({error}); is the service running, and ENABLE_METRICS true?")
    except ValueError as error:
        _fail(f"{url} has no metrics: {error}")
    for found in findings:
        objective = found.objective
        click.echo(
            f"{found.verdict.value:<8}{objective.title:<22}{objective.target:<36}"
            f"{found.figure:<26}{found.samples} samples"
        )
    if any(found.verdict is Verdict.MISSED for found in findings):
        sys.exit(1)


@main.group()
def db() -> None:
    """Look after the database."""


@db.command("upgrade")
@_guarded
def upgrade() -> None:
    """Bring the schema to the newest version."""
    _open(load_settings())
    click.echo("The database has the newest schema.")


def _sqlite_files(settings: Settings) -> list[Path]:
    """The databases that are files, the journal first.

    What moves from the journal to the database meanwhile is then in both copies, and written twice
    is written once.
    """
    url = make_url(settings.database_url)
    database = Path(str(url.database)) if url.get_backend_name() == "sqlite" else None
    files = [settings.journal_path, database]
    return [path for path in files if path is not None and path.exists()]


@main.command("backup")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@_guarded
def back_up(folder: Path) -> None:
    """Copy the databases of the data folder into another FOLDER; works while the service runs."""
    settings = load_settings()
    files = _sqlite_files(settings)
    if make_url(settings.database_url).get_backend_name() != "sqlite":
        click.echo("The database is a server's: back it up with its own tool, such as pg_dump.")
    elif not files:
        _fail(f"there is no database in {settings.data_dir} yet; is MUSET_DATA_DIR right?")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for source in files:
        try:
            size = copy_database(source, folder / source.name)
        except sqlite3.Error as error:
            _fail(f"{source} cannot be copied: {error}")
        click.echo(f"{folder / source.name}\t{size} bytes")


if __name__ == "__main__":
    main()
