"""Services, alone and with all that stands round them, which end with the test."""

import contextlib

import pytest
from hosts import Network, can_make_hosts
from nginx_server import Nginx
from services import Service, Stack


@pytest.fixture
def network(prove):
    """Of hosts that can be cut off."""
    if not can_make_hosts():
        prove.missing("network namespaces (ip, root)")
    with contextlib.ExitStack() as made:
        yield Network(made)


@pytest.fixture
def make_stack(tmp_path):
    """Makes one and starts it."""
    made = []

    def make(**environ):
        made.append(Stack(tmp_path, **environ))
        return made[-1].start()

    yield make
    for stack in made:
        stack.stop()


@pytest.fixture
def make_service(tmp_path):
    """Makes one with some variables; it is not started."""
    made = []

    def make(**environ):
        made.append(Service(tmp_path, **environ))
        return made[-1]

    yield make
    for service in made:
        if service.process is not None and service.process.poll() is None:
            service.kill_group()


@pytest.fixture
def service(make_service):
    return make_service()


@pytest.fixture
def make_nginx(tmp_path):
    """Makes one that passes to some addresses; it is started."""
    made = []

    def make(*servers):
        folder = tmp_path / f"nginx{len(made)}"
        folder.mkdir()
        made.append(Nginx(folder, servers))
        return made[-1].start()

    yield make
    for nginx in made:
        nginx.stop()
