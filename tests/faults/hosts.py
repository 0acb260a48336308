"""Hosts of the tests' own: network namespaces on a bridge, whose links can be cut."""

import contextlib
import itertools
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Host:
    """Where a service runs; as it stands, where the tests themselves run.

    Attributes:
        address: By which clients reach it.
        stores: By which it reaches Redis and PostgreSQL.
        command: What runs a program there.
        links: Ports of the bridge: `front` is the link to clients, `back` the one to the stores.
    """

    address: str = "127.0.0.1"
    stores: str = "127.0.0.1"
    command: tuple[str, ...] = ()
    links: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def cut(self, *links):
        """What goes over these links within the block is lost, both ways, and nobody is told."""
        try:
            for link in links:
                _set_state(self.links[link], "0")
            yield
        finally:
            for link in links:
                _set_state(self.links[link], "3")


class Network:
    """A bridge where the tests run, and hosts with two links to it.

    No host asks for a hardware address: it would be told after three seconds of a link that is cut
    that there is no way.

    Args:
        made: What is made here goes when this closes.
    """

    def __init__(self, made):
        self._made = made
        self._bridge = f"muset{secrets.token_hex(3)}"
        self._numbers = itertools.count(2)
        third = secrets.randbelow(128)
        self._subnets = {"front": f"10.213.{third}", "back": f"10.213.{third + 128}"}
        self._add("link", self._bridge, "address", _hardware("bridge", 1), "type", "bridge")
        for subnet in self._subnets.values():
            _ip("address", "add", f"{subnet}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def host(self):
        """Make a further one."""
        number = next(self._numbers)
        name = f"{self._bridge}-{number}"
        self._add("netns", name)
        return Host(
            address=f"{self._subnets['front']}.{number}",
            stores=f"{self._subnets['back']}.1",
            command=("ip", "netns", "exec", name),
            links={link: self._connect(name, link, number) for link in self._subnets},
        )

    def _connect(self, name, link, number):
        """Make a link; gives its port."""
        port, subnet, mine = f"{name}{link[0]}", self._subnets[link], _hardware(link, number)
        end = ("name", link, "address", mine, "netns", name)
        self._add("link", port, "type", "veth", "peer", *end)
        _ip("link", "set", port, "master", self._bridge, "up")
        _ip("neighbor", "add", f"{subnet}.{number}", "lladdr", mine, "dev", self._bridge)
        there, bridge = ("-n", name), _hardware("bridge", 1)
        _ip(*there, "address", "add", f"{subnet}.{number}/24", "dev", link)
        _ip(*there, "link", "set", link, "up")
        _ip(*there, "neighbor", "add", f"{subnet}.1", "lladdr", bridge, "dev", link)
        return port

    def _add(self, kind, name, *words):
        _ip(kind, "add", name, *words)
        self._made.callback(_ip, kind, "delete", name)


def can_make_hosts():
    """Whether there are `ip` and `bridge`, and this process may make namespaces and bridges."""
    if not (shutil.which("unshare") and shutil.which("bridge")):
        return False
    trial = ["unshare", "--net", "ip", "link", "add", "trial", "type", "bridge"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def _hardware(link, number):
    return f"02:00:00:00:{('bridge', 'front', 'back').index(link):02}:{number:02}"


def _set_state(port, state):
    """0 is `disabled`, 3 is `forwarding`; the interfaces at both ends stay up."""
    _run("bridge", "link", "set", "dev", port, "state", state)


def _ip(*words):
    _run("ip", *words)


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
