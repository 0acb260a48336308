"""Which providers there are: AI_PROVIDERS, or AI_BASE_URL and AI_MODEL, or none.

A kind of provider is an entry point of the group `muset.providers`: its name is the `kind`, and
what it names is called with a `ProviderConfig` and returns a `muset.ports.StreamingProvider`.
"""

import logging
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NoReturn

from flask_muset.redaction import redact_text
from flask_muset.resilience import Bulkhead, CircuitBreaker, RetryStrategy, Timeout
from flask_muset.resilience.guards import Part
from muset.ports import Model, StreamingProvider
from muset.settings import HIDDEN, Settings, SettingsError, is_exposed

__all__ = ["Configured", "ProviderConfig", "is_sendable", "load_providers"]

_log = logging.getLogger(__name__)
_GROUP = "muset.providers"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}", re.ASCII)
_HIGHEST_PRICE = 1_000_000
#: Decimals of a price at most: a billionth is the ledger's unit.
_PRICE_DECIMALS = 9
_MAX_KEY_BYTES = 16_384
#: What a policy may say, each with what stands in for the arguments that it does not.
_PARTS: Mapping[str, Part] = {
    part.kind: part for part in (RetryStrategy(), CircuitBreaker("-"), Bulkhead(1), Timeout(1.0))
}
#: What has no default that would fit.
_NEEDED = {"bulkhead": "limit", "timeout": "seconds"}


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """What a kind of provider is told to make one; each checks what it needs of it.

    Attributes:
        name: For people, metrics and the ledger.
        models: None, one or more; their names differ.
        base_url: As it was written.
        api_key: Printable ASCII without spaces.
        idle_timeout_s: Seconds without a token, once the first has come, after which it gives up.
        options: What the kind alone knows.
        insecure_hosts: Hosts that the operator lets have any address, and get a key over plain
            http.
    """

    name: str
    models: tuple[Model, ...] = ()
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    idle_timeout_s: float = 10.0
    options: Mapping[str, Any] = field(default_factory=dict)
    insecure_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Configured:
    """A provider that is ready; it has opened nothing yet.

    Attributes:
        policy: By kind of part, arguments that win over the code's, as RESILIENCE_POLICIES has them
            for one policy.
    """

    provider: StreamingProvider
    policy: Mapping[str, Mapping[str, Any]]


def is_sendable(key: str) -> bool:
    """Whether a key is printable ASCII without spaces, and not empty, as a header must have it."""
    return re.fullmatch(r"[!-~]+", key, re.ASCII) is not None


def load_providers(settings: Settings) -> tuple[Configured, ...]:
    """Make the providers, in the order in which they are asked; none where none is set.

    Raises:
        SettingsError: Names the file, the provider, the key and the cure.
    """
    if settings.ai_providers is not None:
        return _from_file(settings.ai_providers, settings)
    if settings.ai_base_url is None or settings.ai_model is None:
        return ()
    entry = _Entry("AI_BASE_URL", {})
    config = ProviderConfig(
        "openai",
        models=(Model(settings.ai_model),),
        base_url=settings.ai_base_url,
        api_key=None if settings.ai_api_key is None else entry.key(settings.ai_api_key),
        idle_timeout_s=settings.ai_idle_timeout_s,
        insecure_hosts=settings.ai_insecure_hosts,
    )
    return (Configured(entry.make("openai", config), {}),)


def _from_file(path: Path, settings: Settings) -> tuple[Configured, ...]:
    found: dict[str, Configured] = {}
    for number, values in enumerate(_tables(path), start=1):
        entry = _Entry(f"{path}: provider {number}", values)
        name = entry.name()
        entry.where = f"{path}: provider {name!r}"
        if name in found:
            entry.refuse("name", "another one than that of a provider before it", name)
        found[name] = _configured(entry, name, settings)
    return tuple(found.values())


def _tables(path: Path) -> list[Any]:
    """The tables of the file."""
    try:
        # As they are written: a float would no longer be the price.
        content = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise SettingsError(f"AI_PROVIDERS: {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise SettingsError(f"AI_PROVIDERS: {path} is no TOML ({error}).") from None
    tables = content.pop("providers", None)
    if content:
        raise SettingsError(f"{path}: {sorted(content)} are not known; use [[providers]] alone.")
    if not isinstance(tables, list) or not tables:
        raise SettingsError(f"{path} has no provider; begin each with a line [[providers]].")
    return tables


def _configured(entry: "_Entry", name: str, settings: Settings) -> Configured:
    entry.check_keys()
    kind = entry.text("kind")
    if kind is None:
        entry.refuse("kind", f"one of {sorted(_kinds())}", None)
    config = ProviderConfig(
        name,
        models=entry.models(),
        base_url=entry.text("base_url"),
        api_key=entry.api_key(settings),
        idle_timeout_s=settings.ai_idle_timeout_s,
        options=_without_decimals(entry.table("options")),
        insecure_hosts=settings.ai_insecure_hosts,
    )
    return Configured(entry.make(kind, config), entry.policy())


class _Entry:
    """One provider of the file, as it was written."""

    _KEYS = (
        "name", "kind", "base_url", "api_key_env", "api_key_file", "models", "policy", "options",
    )  # fmt: skip

    def __init__(self, where: str, values: Any) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise SettingsError(f"{where} must be a table; begin it with a line [[providers]].")
        self._values: Mapping[str, Any] = values

    def refuse(self, key: str, expected: str, got: object) -> NoReturn:
        """Stop the start."""
        is_missing = "missing" if got is None else f"got {got!r}"
        raise SettingsError(f"{self.where}: {key} must be {expected}, {is_missing}.")

    def check_keys(self, values: Any = None, known: Sequence[str] = _KEYS, key: str = "") -> None:
        """Refuse what nobody would read."""
        for unknown in (self._values if values is None else values).keys() - set(known):
            raise SettingsError(f"{self.where}: {key}{unknown} is not known; use {list(known)}.")

    def text(self, key: str) -> str | None:
        """A text that is not empty, None where there is none."""
        value = self._values.get(key)
        if value is not None and not (isinstance(value, str) and value):
            self.refuse(key, "a text that is not empty", value)
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """A table, an empty one where there is none."""
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            self.refuse(key, "a table", value)
        return value

    def name(self) -> str:
        """Its name."""
        name = self.text("name")
        if name is None or not _NAME.fullmatch(name):
            self.refuse("name", "1 to 64 letters, digits, dots, underscores or hyphens", name)
        return name

    # --- the key: never shown ---

    def api_key(self, settings: Settings) -> str | None:
        """The key, from the environment or from a file."""
        variable, file = self.text("api_key_env"), self.text("api_key_file")
        if variable is not None and file is not None:
            raise SettingsError(f"{self.where}: set api_key_env or api_key_file, not both.")
        if variable is not None:
            found = settings.environ.get(variable)
            if not found:
                # It may be the key itself that somebody has put there.
                got = variable if _VARIABLE.fullmatch(variable) else HIDDEN
                self.refuse("api_key_env", "the name of a variable that is set", got)
            return self.key(found)
        return None if file is None else self.key(self._read_key(settings, file))

    def _read_key(self, settings: Settings, file: str) -> str:
        assert settings.ai_providers is not None  # noqa: S101 - it was read from there
        path = settings.ai_providers.parent / file
        try:
            if is_exposed(path):
                _log.warning("%s has a key and can be read by everybody here; chmod o-r it", path)
            with path.open("rb") as opened:
                return opened.read(_MAX_KEY_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "no text"
            shown = redact_text(str(path))
            self.refuse("api_key_file", f"a file that can be read ({why})", shown)

    def key(self, found: str) -> str:
        """A key that can be sent in a header."""
        if not is_sendable(found):
            raise SettingsError(
                f"{self.where}: the API key must be printable ASCII without spaces and not empty; "
                "write it as you were given it, without quotes."
            )
        return found

    # --- models ---

    def models(self) -> tuple[Model, ...]:
        """The models, in their order."""
        listed = self._values.get("models", [])
        if not isinstance(listed, list):
            self.refuse("models", 'a list such as [{name = "small"}]', listed)
        models = tuple(self._model(n, values) for n, values in enumerate(listed))
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                self.refuse("models", "of different names", name)
        return models

    def _model(self, number: int, values: Any) -> Model:
        key = f"models[{number}]"
        if not isinstance(values, dict):
            self.refuse(key, 'a table such as {name = "small"}', values)
        self.check_keys(values, ("name", "input_price", "output_price"), f"{key}.")
        name = values.get("name")
        if not (isinstance(name, str) and name and name.isprintable() and len(name) <= 200):
            self.refuse(f"{key}.name", "the name that its server knows it by", name)
        return Model(
            name,
            self._price(f"{key}.input_price", values.get("input_price", 0)),
            self._price(f"{key}.output_price", values.get("output_price", 0)),
        )

    def _price(self, key: str, value: Any) -> Decimal:
        is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
        price = Decimal(value) if is_number else Decimal("nan")
        exponent = price.as_tuple().exponent
        is_fine = isinstance(exponent, int) and exponent >= -_PRICE_DECIMALS
        if not is_fine or not 0 <= price <= _HIGHEST_PRICE:
            self.refuse(key, f"a number from 0 to {_HIGHEST_PRICE}, for a million tokens", value)
        return price

    # --- policy ---

    def policy(self) -> Mapping[str, Mapping[str, Any]]:
        """Arguments by kind of part, each one that the part takes."""
        policy: dict[str, Mapping[str, Any]] = {}
        written = self.table("policy")
        self.check_keys(written, tuple(_PARTS), "policy.")
        for kind, options in written.items():
            key, part = f"policy.{kind}", _PARTS[kind]
            if not isinstance(options, dict):
                self.refuse(key, "a table", options)
            self.check_keys(options, tuple(part.options), f"{key}.")
            needed = _NEEDED.get(kind)
            if needed is not None and needed not in options:
                self.refuse(f"{key}.{needed}", "set", None)
            policy[kind] = _without_decimals(options)
            try:
                part.like(**policy[kind])
            except (TypeError, ValueError) as error:
                raise SettingsError(f"{self.where}: {key}: {error}") from None
        return policy

    # --- kinds ---

    def make(self, kind: str, config: ProviderConfig) -> StreamingProvider:
        """The provider, made by whoever knows its kind."""
        kinds = _kinds()
        if kind not in kinds:
            self.refuse("kind", f"one of {sorted(kinds)}, or of a package that is installed", kind)
        try:
            factory: Callable[[ProviderConfig], StreamingProvider] = kinds[kind].load()
        except (ImportError, AttributeError) as error:
            raise SettingsError(
                f"{self.where}: the package that has the kind {kind!r} cannot be used ({error}); "
                f"{kinds[kind].value} must be what makes a provider."
            ) from error
        try:
            return factory(config)
        except ValueError as error:
            raise SettingsError(f"{self.where}: {error}.") from None


def _kinds() -> dict[str, EntryPoint]:
    """The kinds of provider that are installed, by name."""
    kinds: dict[str, EntryPoint] = {}
    for point in entry_points(group=_GROUP):
        known = kinds.setdefault(point.name, point)
        if known.value != point.value:
            raise SettingsError(
                f"two packages have a provider of the kind {point.name!r} ({known.value} and "
                f"{point.value}); uninstall one."
            )
    return kinds


def _without_decimals(value: Any) -> Any:
    """The same with floats, for those who do not reckon with money."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: _without_decimals(item) for key, item in value.items()}
    return [_without_decimals(item) for item in value] if isinstance(value, list) else value
