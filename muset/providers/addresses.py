"""Which addresses a model server may have, and where a key may go without encryption.

A server of one's own on this machine or in a private network is as good as any other. The services
that tell a cloud's machines their secrets are none, whatever name stands for them.
"""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

__all__ = ["refusal"]

#: Link-local networks have the metadata of most clouds, the credentials of their containers, and no
#: model server; the others are Amazon's, Google's, Alibaba's, Azure's and Oracle's.
_METADATA = tuple(
    ip_network(text)
    for text in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",
        "fd20:ce::254/128",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
)
_CURE = "name its host in AI_INSECURE_HOSTS if that is meant"


def refusal(text: str, *, key_in_clear: bool) -> str | None:
    """Why nothing may be sent to an address, and the cure; None if it may.

    Args:
        text: An IPv4 or IPv6 address as the system writes it.
        key_in_clear: Whether a key would be sent without encryption.
    """
    address = _plain(text)
    if any(address in network for network in _METADATA):
        return f"{text} belongs to a cloud's metadata, which is no model server; {_CURE}"
    if key_in_clear and address.is_global:
        return f"{text} is public, and the key would go there unencrypted; use https://, or {_CURE}"
    return None


def _plain(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
