"""Fixtures: live servers with the fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.server.server_harness import Live


@pytest.fixture
def serve() -> Iterator[Callable[..., Live]]:
    """Starts servers and stops them at the end of the test."""
    servers: list[Live] = []

    def start(*, ready: bool = True, **options: Any) -> Live:
        servers.append(Live(**options))
        if ready:
            servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server for tests that leave it as they found it."""
    server = Live()
    server.wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as client:
        yield client
