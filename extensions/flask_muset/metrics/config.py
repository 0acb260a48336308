"""The configuration of Metrics, read and checked once."""

import ipaddress
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from flask_muset.configuration import Key, flag, read, whole
from flask_muset.metrics.access import Network

__all__ = ["KEYS", "PREFIX", "Config", "read_config"]

PREFIX = "METRICS_"
_is_prefix = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*").fullmatch


def _is_network(value: Any) -> bool:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        return False
    return isinstance(value, str)


def _is_networks(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(map(_is_network, value))


def _is_host(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not re.search(r"[\s/]", value)


KEYS = {
    "ENABLED": flag(True),
    "NAMESPACE": Key(
        "muset",
        lambda v: isinstance(v, str) and bool(_is_prefix(v)),
        "letters, digits and underscores, not beginning with a digit",
    ),
    "PORT": whole(0, 0, 65_535),
    "HOST": Key("127.0.0.1", _is_host, "an address or a host name"),
    "ALLOW": Key((), _is_networks, "a list of addresses and networks such as '10.0.0.0/8'"),
    "MAX_SERIES": whole(1_000, 10, 100_000),
}


@dataclass(frozen=True, slots=True)
class Config:
    """What one app is set to.

    Attributes:
        enabled: False measures nothing and shows nothing.
        namespace: Stands before all names.
        port: Where Prometheus reads beside the app's own port, 0 for nowhere.
        host: Address of that port.
        allow: Who may read `/metrics` beside this machine.
        max_series: Of each metric in a process.
    """

    enabled: bool
    namespace: str
    port: int
    host: str
    allow: tuple[Network, ...]
    max_series: int


def read_config(config: MutableMapping[str, Any]) -> Config:
    """Set the defaults in an app's configuration and return the checked values.

    Raises:
        ValueError: A key is unknown or its value is not allowed; the text names both and the cure.
    """
    values = read(config, "Metrics", PREFIX, KEYS)
    return Config(
        enabled=values["ENABLED"],
        namespace=values["NAMESPACE"],
        port=values["PORT"],
        host=values["HOST"],
        allow=tuple(ipaddress.ip_network(each, strict=False) for each in values["ALLOW"]),
        max_series=values["MAX_SERIES"],
    )
