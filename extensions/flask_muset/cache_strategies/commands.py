"""`flask cache-strategies ...`: what waits to be written behind, and what was given up."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from flask_muset.cache_strategies.manager import described
from flask_muset.errors import MusetError

if TYPE_CHECKING:
    from flask_muset.cache_strategies.cache import Cache

__all__ = ["make_commands"]

_PAGE = 1000


def make_commands(cache: "Cache") -> click.Group:
    """The commands of one app."""
    group = click.Group("cache-strategies", help="Writes that wait, and those that were given up.")
    letters = click.Group("dead-letters", help="Writes that were given up.")
    for command in (_list(cache), _requeue(cache), _drop(cache)):
        letters.add_command(command)
    group.add_command(letters)
    group.add_command(_flush(cache))
    return group


class _Command(click.Command):
    """Says in one line why the journal cannot be reached, instead of with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MusetError as error:
            raise click.ClickException(error.message) from error


def _list(cache: "Cache") -> click.Command:
    @click.command("list", cls=_Command)
    @click.option("--json", "as_json", is_flag=True, help="One JSON object in each line.")
    def command(as_json: bool) -> None:
        """Show them, the oldest first."""
        after = ""
        while True:
            page = cache.behind.journal.dead_letters(_PAGE, after=after)
            for letter in page:
                shown = described(letter)
                click.echo(json.dumps(shown) if as_json else _line(shown))
            if len(page) < _PAGE:
                return
            after = page[-1].id

    return command


def _line(shown: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(shown["last_failed"], UTC).isoformat(timespec="seconds")
    note = " (superseded)" if shown["superseded"] else ""
    return (
        f"{shown['id']}  {at}  {shown['writer'] or '-'}  {shown['key']!a}  "
        f"{shown['attempts']} attempts{note}: {shown['error']!a}"
    )


def _requeue(cache: "Cache") -> click.Command:
    @click.command("requeue", cls=_Command)
    @click.argument("ids", nargs=-1, required=True)
    def command(ids: tuple[str, ...]) -> None:
        """Let dead letters be written again."""
        for one in ids:
            if not cache.requeue(one):
                raise click.ClickException(f"there is no dead letter {one!r}.")
            click.echo(f"{one} is written again")

    return command


def _drop(cache: "Cache") -> click.Command:
    @click.command("drop", cls=_Command)
    @click.argument("ids", nargs=-1, required=True)
    def command(ids: tuple[str, ...]) -> None:
        """Forget dead letters: these writes are lost."""
        for one in ids:
            if not cache.drop(one):
                raise click.ClickException(f"there is no dead letter {one!r}.")
            click.echo(f"{one} is dropped")

    return command


def _flush(cache: "Cache") -> click.Command:
    @click.command("flush", cls=_Command)
    @click.option("--timeout", default=30.0, show_default=True, help="Seconds.")
    def command(timeout: float) -> None:
        """Write all that waits; ends with 1 if something is left."""
        if cache.behind.drain.flush(timeout):
            click.echo("nothing waits any more")
            return
        left = cache.behind.journal.state().pending
        raise click.ClickException(f"{left} writes still wait after {timeout:g} s.")

    return command
