"""Fixtures that several test files share."""

import pytest
from hub_server import running_hub, use


@pytest.fixture(scope="session")
def hub_server():
    """A Hub on 127.0.0.1, for as long as the tests run."""
    with running_hub() as running:
        yield running


@pytest.fixture
def the_hub(hub_server, monkeypatch, tmp_path):
    """That Hub, empty, and this process' client pointed to it, with a cache of its own and Ada's token.
    `.waits` lists the seconds that the client would have waited between its attempts."""
    for held in (hub_server.repos, hub_server.stored, hub_server.faults, hub_server.requests):
        held.clear()
    hub_server.waits = use(monkeypatch, hub_server.endpoint, tmp_path / "home")
    return hub_server
