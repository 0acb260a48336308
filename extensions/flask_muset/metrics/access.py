"""Who may read the metrics on the app's own port."""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Network", "may_read"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_FORWARDED = ("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED")
#: Set by werkzeug's ProxyFix, which has then put the client's address in the place of the proxy's.
_PROXY_FIX = "werkzeug.proxy_fix.orig"


def may_read(environ: Mapping[str, Any], allow: Iterable[Network]) -> bool:
    """Whether the address of a request is enough.

    A proxy on this machine makes everybody's requests come from it. So a request that says it was
    forwarded never counts as one of this machine, and its address counts only if the app knows
    of the proxy (ProxyFix) and the address is the client's.

    Args:
        environ: Of the request.
        allow: Whose requests are let in beside those of this machine.
    """
    try:
        address = ipaddress.ip_address(environ.get("REMOTE_ADDR") or "")
    except ValueError:
        return False  # a Unix socket has none
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if not any(name in environ for name in _FORWARDED):
        return address.is_loopback or _is_in(address, allow)
    return _PROXY_FIX in environ and _is_in(address, allow)


def _is_in(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Iterable[Network]
) -> bool:
    return any(address in network for network in networks)
