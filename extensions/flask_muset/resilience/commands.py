"""`flask resilience ...`: the circuit breakers of all workers, from a shell."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

__all__ = ["MODES", "make_commands"]

#: What an operator may want of a breaker.
MODES = ("open", "closed", "auto")

#: Shows by name of a policy what is known of its breaker.
Look = Callable[[], Mapping[str, Mapping[str, Any]]]
#: Forces the breaker of a policy: name, mode, seconds; whether all workers are told.
Force = Callable[[str, str, float | None], bool]

#: Whether this process knows what all share: `shared`, `doubt` or `local`.
State = Callable[[], str]

_ALONE = (
    "a command has a process of its own, whose circuit breakers no worker knows of; set "
    "RESILIENCE_REDIS_URL to the Redis of the workers"
)
_AWAY = "Redis does not answer"


def make_commands(look: Look, force: Force, state: State | None) -> click.Group:
    """The commands of one app.

    Args:
        look: Shows the breakers.
        force: Forces one.
        state: What this process knows; None where there is no Redis.
    """
    group = click.Group("resilience", help="The circuit breakers of all workers.")
    group.add_command(_list(look, state))
    group.add_command(_set(force, has_redis=state is not None))
    return group


def _list(look: Look, state: State | None) -> click.Command:
    @click.command("list")
    @click.option("--json", "as_json", is_flag=True, help="One JSON object in each line.")
    def command(as_json: bool) -> None:
        """Show the states that all workers share."""
        found = look()
        if state is None or state() != "shared":
            why = _ALONE if state is None else _AWAY
            click.echo(f"these are not the workers' states: {why}.", err=True)
        for name, shown in sorted(found.items()):
            click.echo(json.dumps({"name": name, **shown}) if as_json else _line(name, shown))

    return command


def _line(name: str, shown: Mapping[str, Any]) -> str:
    wait_s = shown["retry_after"]
    return f"{name}  {shown['state']}" + ("" if wait_s is None else f"  {wait_s:.0f} s")


def _set(force: Force, *, has_redis: bool) -> click.Command:
    @click.command("set")
    @click.argument("name")
    @click.argument("mode", type=click.Choice(MODES))
    @click.option("--expires", type=float, help="Seconds after which it decides by itself again.")
    def command(name: str, mode: str, expires: float | None) -> None:
        """Force a breaker open or closed in all workers; auto lets it decide by itself again."""
        if not has_redis:
            raise click.ClickException(f"{_ALONE}.")
        try:
            is_shared = force(name, mode, expires)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        if not is_shared:
            raise click.ClickException(f"nothing has changed: {_AWAY}; try again when it does.")
        click.echo(f"{name} is {mode}" + ("" if expires is None else f" for {expires:g} s"))

    return command
