"""The settings of the service: the environment, typed and checked. Its only reader."""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = [
    "HIDDEN",
    "SETTINGS",
    "Setting",
    "Settings",
    "SettingsError",
    "is_exposed",
    "load_settings",
]

HIDDEN = "********"
_CONTAINER_SECRETS = Path("/run/secrets")


class SettingsError(ValueError):
    """One or more variables are not allowed; the text names each with its cure."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One environment variable.

    Attributes:
        name: Of the variable.
        default: What holds without it, in its final type.
        parse: Makes the value of the text, or raises ValueError with what is expected.
        meaning: One sentence for people.
        secret: Never shown; may come from the file that `<name>_FILE` names.
    """

    name: str
    default: Any
    parse: Callable[[str], Any]
    meaning: str
    secret: bool = False


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise ValueError("true or false")
    return known[text.lower()]


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        expected = f"a whole number from {low} to {high}"
        try:
            value = int(text)
        except ValueError:
            raise ValueError(expected) from None
        if not low <= value <= high:
            raise ValueError(expected)
        return value

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        expected = f"seconds from {low:g} to {high:g}"
        try:
            value = float(text)
        except ValueError:
            raise ValueError(expected) from None
        if not low <= value <= high:
            raise ValueError(expected)
        return value

    return parse


def _choice(*allowed: str, upper: bool = False) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.upper() if upper else text.lower()
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return value

    return parse


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("printable text")
    return text


def _deployment(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise ValueError("1 to 64 letters, digits, dots, underscores or hyphens")
    return text


def _networks(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        for name in names:
            ip_network(name, strict=False)
    except ValueError:
        raise ValueError("addresses or networks such as 10.0.0.0/8, separated by commas") from None
    return names


def _hosts(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    if not all(re.fullmatch(r"[a-z0-9._:-]{1,253}", name) for name in names):
        raise ValueError(
            "hosts such as llm.example.org or 192.0.2.1, without ports, separated by commas"
        )
    return names


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if urlsplit(text).scheme not in schemes:
            raise ValueError("a URL that begins with " + " or ".join(f"{s}://" for s in schemes))
        return text

    return parse


_POSTGRESQL = re.compile(r"postgresql(\+psycopg)?://")


def _database_url(text: str) -> str:
    # A relative path would mean another file in another working directory.
    if text.startswith("sqlite:////") and not text.endswith("/"):
        return text
    if not (_POSTGRESQL.match(text) and _is_complete(text)):
        raise ValueError(
            "the URL of an SQLite file with an absolute path, such as "
            "sqlite:////var/lib/muset/muset.db, or of a PostgreSQL database, such as "
            "postgresql://muset:password@db.example.org:5432/muset (what is not a letter or a "
            "digit in a password is written as % and two hexadecimal digits)"
        )
    return _POSTGRESQL.sub("postgresql+psycopg://", text, count=1)


def _is_complete(text: str) -> bool:
    """Whether a URL has a readable port, if any, and the name of a database."""
    parts = urlsplit(text)
    try:
        return parts.port != 0 and re.fullmatch(r"/[^/]+", parts.path) is not None
    except ValueError:
        return False


def _absolute_path(text: str) -> str:
    # As with the database: `muset serve` goes to another folder.
    if not text.startswith("/") or text.endswith("/"):
        raise ValueError("the absolute path of a file")
    return text


def _admin_key(text: str) -> str:
    if not (text.startswith("msk_") and len(text) >= 47 and text.isascii() and text.isprintable()):
        raise ValueError("msk_ and at least 43 random letters, as `muset keys create` makes them")
    return text


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "LOG_LEVEL",
        "INFO",
        _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", upper=True),
        "The least level that is logged.",
    ),
    Setting("LOG_FORMAT", "json", _choice("json", "text"), "Form of a log line."),
    Setting("LOG_FILE", "/var/log/muset/app.log", _text, "A file beside standard error."),
    Setting("ENABLE_METRICS", True, _boolean, "Whether metrics are kept."),
    Setting("METRICS_PORT", 9090, _integer(0, 65535), "Port of the metrics, 0 for none."),
    Setting("REQUEST_TIMEOUT", 30.0, _seconds(0.1, 3600), "Deadline of a request, seconds."),
    Setting(
        "MAX_CONCURRENT_REQUESTS",
        100,
        _integer(1, 100_000),
        "Requests at once in one worker process.",
    ),
    Setting(
        "RATE_LIMIT_REQUESTS_PER_MINUTE",
        60,
        _integer(0, 1_000_000),
        "Requests a minute of one key, 0 for no limit.",
    ),
    Setting("ENABLE_CIRCUIT_BREAKER", True, _boolean, "Whether breakers may open."),
    Setting(
        "CIRCUIT_BREAKER_THRESHOLD",
        5,
        _integer(1, 10_000),
        "Failures in a row that open a breaker.",
    ),
    Setting(
        "CIRCUIT_BREAKER_TIMEOUT",
        60.0,
        _seconds(0.1, 86_400),
        "Seconds that a breaker stays open.",
    ),
    Setting("MAX_RETRIES", 3, _integer(0, 100), "Retries after the first call."),
    Setting("RETRY_INITIAL_DELAY", 1.0, _seconds(0, 3600), "First wait at most, seconds."),
    Setting("RETRY_MAX_DELAY", 60.0, _seconds(0, 3600), "Any wait at most, seconds."),
    Setting(
        "REDIS_URL",
        None,
        _url("redis", "rediss", "unix"),
        "Redis for many workers; unset means embedded.",
        secret=True,
    ),
    Setting(
        "REDIS_MAX_CONNECTIONS",
        10,
        _integer(1, 10_000),
        "Connections to Redis of one worker process.",
    ),
    Setting(
        "CACHE_REDIS_URL",
        None,
        _url("redis", "rediss", "unix"),
        "A second Redis for what is only cached, which may evict; unset means REDIS_URL.",
        secret=True,
    ),
    Setting(
        "LOG_FILE_MAX_BYTES",
        100_000_000,
        _integer(0, 1 << 40),
        "Size from which LOG_FILE is rotated; 0 leaves that to logrotate.",
    ),
    Setting(
        "MUSET_SLOW_REQUEST",
        5.0,
        _seconds(0.001, 3600),
        "Seconds from which a request is logged as slow.",
    ),
    Setting("METRICS_HOST", None, _text, "Address of the metrics port; unset means MUSET_HOST."),
    Setting(
        "METRICS_ALLOW",
        (),
        _networks,
        "Networks that may read /metrics without a key, separated by commas.",
    ),
    Setting("MUSET_HOST", "127.0.0.1", _text, "Address that the service listens on."),
    Setting("PORT", 8000, _integer(1, 65535), "Port that the service listens on."),
    Setting("WEB_CONCURRENCY", 1, _integer(1, 1024), "Worker processes."),
    Setting(
        "MUSET_TRUSTED_PROXIES",
        0,
        _integer(0, 10),
        "Proxies in a row before the service, whose X-Forwarded-For and -Proto are believed.",
    ),
    Setting(
        "MUSET_WRONG_KEYS_PER_MINUTE",
        20,
        _integer(0, 1_000_000),
        "Wrong keys a minute from one client address, 0 for no limit of their own.",
    ),
    Setting(
        "MUSET_MAX_REQUESTS",
        0,
        _integer(0, 1_000_000_000),
        "Requests after which a worker process gives way to a new one, 0 for never.",
    ),
    Setting(
        "MUSET_DEPLOYMENT",
        "default",
        _deployment,
        "Name of this deployment: two that share a Redis need two names.",
    ),
    Setting("MUSET_DATA_DIR", "data", _text, "Folder of everything that is kept."),
    Setting(
        "DATABASE_URL",
        None,
        _database_url,
        "The database; unset means muset.db in the data folder.",
        secret=True,
    ),
    Setting(
        "DATABASE_POOL_SIZE",
        8,
        _integer(1, 1000),
        "Connections to PostgreSQL of one worker process.",
    ),
    Setting(
        "MUSET_ADMIN_KEY", None, _admin_key, "An admin key that the start installs.", secret=True
    ),
    Setting(
        "MUSET_MAX_DOCUMENT_BYTES",
        10 * 1024 * 1024,
        _integer(1024, 1 << 30),
        "Size of a document at most, in bytes of UTF-8.",
    ),
    Setting(
        "AI_PROVIDERS",
        None,
        _absolute_path,
        "A TOML file that lists the model servers; unset means AI_BASE_URL, or no model.",
    ),
    Setting(
        "AI_BASE_URL",
        None,
        _url("http", "https"),
        "The one model server: its OpenAI-compatible API, such as https://llm.example.org/v1.",
    ),
    Setting("AI_API_KEY", None, _text, "The key for AI_BASE_URL.", secret=True),
    Setting("AI_MODEL", None, _text, "The model that AI_BASE_URL is asked for."),
    Setting(
        "AI_INSECURE_HOSTS",
        (),
        _hosts,
        "Hosts of model servers that may get a key over plain http, or have an address of a "
        "cloud's metadata, separated by commas.",
    ),
    Setting(
        "AI_IDLE_TIMEOUT",
        10.0,
        _seconds(0.1, 3600),
        "Seconds without a token, once the first has come, that end an answer.",
    ),
)


def _default_values() -> dict[str, Any]:
    return {setting.name: setting.default for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Settings:
    """The values that hold.

    Attributes:
        values: By the name of the variable, in their final types.
        sources: By the name of the variable: `default`, `environment` or `file`.
        environ: What they were read from; AI_PROVIDERS names variables that keys are in.
    """

    values: Mapping[str, Any] = field(default_factory=_default_values)
    sources: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def host(self) -> str:
        """Address that the service listens on."""
        return str(self.values["MUSET_HOST"])

    @property
    def port(self) -> int:
        """Port that the service listens on."""
        return int(self.values["PORT"])

    @property
    def deployment(self) -> str:
        """Name under which the keys in Redis stand."""
        return str(self.values["MUSET_DEPLOYMENT"])

    @property
    def web_concurrency(self) -> int:
        """Number of worker processes."""
        return int(self.values["WEB_CONCURRENCY"])

    @property
    def trusted_proxies(self) -> int:
        """Proxies in a row before the service."""
        return int(self.values["MUSET_TRUSTED_PROXIES"])

    @property
    def wrong_keys_per_minute(self) -> int:
        """Wrong keys a minute from one client address, 0 for no limit of their own."""
        return int(self.values["MUSET_WRONG_KEYS_PER_MINUTE"])

    @property
    def max_requests(self) -> int:
        """Requests after which a worker process gives way to a new one, 0 for never."""
        return int(self.values["MUSET_MAX_REQUESTS"])

    @property
    def log_level(self) -> str:
        """Name of a level of `logging`."""
        return str(self.values["LOG_LEVEL"])

    @property
    def data_dir(self) -> Path:
        """Folder of everything that is kept, absolute."""
        return Path(self.values["MUSET_DATA_DIR"]).absolute()

    @property
    def journal_path(self) -> Path | None:
        """File of the writes that were accepted; None with Redis, which has them."""
        return self.data_dir / "journal.db" if self.redis_url is None else None

    @property
    def database_url(self) -> str:
        """URL of the database."""
        return str(self.values["DATABASE_URL"] or f"sqlite:///{self.data_dir / 'muset.db'}")

    @property
    def database_pool_size(self) -> int:
        """Connections to PostgreSQL of one worker process."""
        return int(self.values["DATABASE_POOL_SIZE"])

    @property
    def admin_key(self) -> str | None:
        """An admin key that the start installs."""
        key: str | None = self.values["MUSET_ADMIN_KEY"]
        return key

    @property
    def log_format(self) -> str:
        """`json` or `text`."""
        return str(self.values["LOG_FORMAT"])

    @property
    def log_file(self) -> Path | None:
        """The file beside standard error; the default one only where it can be written."""
        path = Path(self.values["LOG_FILE"])
        is_chosen = self.sources.get("LOG_FILE", "default") != "default"
        writable = os.access(path if path.exists() else path.parent, os.W_OK)
        return path if is_chosen or writable else None

    @property
    def log_file_max_bytes(self) -> int:
        """Size from which LOG_FILE is rotated, 0 for never."""
        return int(self.values["LOG_FILE_MAX_BYTES"])

    @property
    def slow_request_s(self) -> float:
        """Seconds from which a request is logged as slow."""
        return float(self.values["MUSET_SLOW_REQUEST"])

    @property
    def enable_metrics(self) -> bool:
        """Whether metrics are kept."""
        return bool(self.values["ENABLE_METRICS"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The configuration of the Metrics extension."""
        return {
            "METRICS_ENABLED": self.values["ENABLE_METRICS"],
            "METRICS_PORT": self.values["METRICS_PORT"],
            "METRICS_HOST": self.values["METRICS_HOST"] or self.host,
            "METRICS_ALLOW": self.values["METRICS_ALLOW"],
        }

    @property
    def resilience(self) -> dict[str, Any]:
        """The configuration of the Resilience extension."""
        names = (
            "REQUEST_TIMEOUT",
            "MAX_CONCURRENT_REQUESTS",
            "RATE_LIMIT_REQUESTS_PER_MINUTE",
            "ENABLE_CIRCUIT_BREAKER",
            "CIRCUIT_BREAKER_THRESHOLD",
            "CIRCUIT_BREAKER_TIMEOUT",
            "MAX_RETRIES",
            "RETRY_INITIAL_DELAY",
            "RETRY_MAX_DELAY",
        )
        return {f"RESILIENCE_{name}": self.values[name] for name in names}

    @property
    def redis_url(self) -> str | None:
        """URL of Redis, None for the embedded default."""
        url: str | None = self.values["REDIS_URL"]
        return url

    @property
    def cache_redis_url(self) -> str | None:
        """URL of the Redis of what is only cached, None for that of all else."""
        url: str | None = self.values["CACHE_REDIS_URL"]
        return url

    @property
    def redis_max_connections(self) -> int:
        """Connections to each Redis of one worker process."""
        return int(self.values["REDIS_MAX_CONNECTIONS"])

    @property
    def max_document_bytes(self) -> int:
        """Size of a document at most, in bytes of UTF-8."""
        return int(self.values["MUSET_MAX_DOCUMENT_BYTES"])

    @property
    def ai_providers(self) -> Path | None:
        """The file that lists the model servers."""
        path = self.values["AI_PROVIDERS"]
        return None if path is None else Path(path)

    @property
    def ai_base_url(self) -> str | None:
        """The one model server."""
        url: str | None = self.values["AI_BASE_URL"]
        return url

    @property
    def ai_api_key(self) -> str | None:
        """Its key."""
        key: str | None = self.values["AI_API_KEY"]
        return key

    @property
    def ai_model(self) -> str | None:
        """Its model."""
        model: str | None = self.values["AI_MODEL"]
        return model

    @property
    def ai_insecure_hosts(self) -> tuple[str, ...]:
        """Hosts of model servers that may have any address, and get a key over plain http."""
        hosts: tuple[str, ...] = self.values["AI_INSECURE_HOSTS"]
        return hosts

    @property
    def exposed_files(self) -> tuple[Path, ...]:
        """The files of secrets that everybody on this machine can read."""
        named = (self.environ.get(f"{s.name}_FILE") for s in SETTINGS if s.secret)
        return tuple(Path(name) for name in named if name and is_exposed(Path(name)))

    @property
    def ai_idle_timeout_s(self) -> float:
        """Seconds without a token, once the first has come, that end an answer."""
        return float(self.values["AI_IDLE_TIMEOUT"])

    def shown(self, setting: Setting) -> str:
        """A value as people may see it."""
        value = self.values[setting.name]
        if value is None:
            return "(unset)"
        if isinstance(value, tuple):
            return ",".join(value) or "(none)"
        if setting.secret or "://" in str(value):
            return _without_secrets(str(value))
        return str(value).lower() if isinstance(value, bool) else str(value)


#: An @ anywhere else is of a password that is not written as it should be.
_URL = re.compile(r"([a-z+]+://)([^/?#@]*@)?([^?#@]*)(\?[^#@]*)?")


def _without_secrets(value: str) -> str:
    """A URL without its user, password and options; of anything else nothing."""
    match = _URL.fullmatch(value)
    if match is None:
        return HIDDEN
    scheme, user, place, options = match.groups()
    return scheme + (f"{HIDDEN}@" if user else "") + place + (f"?{HIDDEN}" if options else "")


def _raw(setting: Setting, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The text of a variable and where it is from; a secret may stand in a file."""
    text = environ.get(setting.name)
    path = environ.get(f"{setting.name}_FILE") if setting.secret else None
    if not path:
        return text or None, "environment"
    if text:
        raise ValueError(f"set in one way only: unset it or {setting.name}_FILE")
    try:
        return Path(path).read_text(encoding="utf-8").strip(), "file"
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"a readable file in {setting.name}_FILE ({error})") from None


def is_exposed(path: Path) -> bool:
    """Whether there is a file of secrets that everybody on this machine can read.

    In a container "everybody" is this service: /run/secrets, where its secrets are put, is no file
    of this machine's.
    """
    if _CONTAINER_SECRETS in path.parents:
        return False
    return path.exists() and bool(path.stat().st_mode & stat.S_IROTH)


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """What is allowed by itself and not with the rest."""
    if values["RETRY_MAX_DELAY"] < values["RETRY_INITIAL_DELAY"]:
        yield (
            f"RETRY_MAX_DELAY must be at least RETRY_INITIAL_DELAY "
            f"({values['RETRY_INITIAL_DELAY']:g}), got {values['RETRY_MAX_DELAY']:g}."
        )
    if values["CACHE_REDIS_URL"] is not None and values["REDIS_URL"] is None:
        yield "CACHE_REDIS_URL is beside REDIS_URL, which has what must not be lost; set both."
    one = [name for name in ("AI_BASE_URL", "AI_API_KEY", "AI_MODEL") if values[name] is not None]
    if one and values["AI_PROVIDERS"] is not None:
        yield f"AI_PROVIDERS and {', '.join(one)} are two ways to say the same; unset one of them."
    elif one and (values["AI_BASE_URL"] is None or values["AI_MODEL"] is None):
        yield f"AI_BASE_URL and AI_MODEL are needed together, got {', '.join(one)} alone."


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check every variable; an empty one counts as unset.

    Args:
        environ: None takes the process's own environment.

    Raises:
        SettingsError: Names every variable that is not allowed.
    """
    environ = os.environ if environ is None else environ
    values, sources, problems = _default_values(), {}, []
    for setting in SETTINGS:
        text: str | None = None
        try:
            text, source = _raw(setting, environ)
            if text is not None:
                values[setting.name] = setting.parse(text)
                sources[setting.name] = source
        except ValueError as expected:
            got = HIDDEN if setting.secret or "@" in (text or "") else repr(text)
            problems.append(f"{setting.name} must be {expected}, got {got}.")
    if not problems:
        problems += _contradictions(values)
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(values, sources, dict(environ))
