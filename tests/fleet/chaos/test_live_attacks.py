"""Attacks on a real fleet: its ports between two lives, its links, its instances at their start."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from pla_serve.wire.link import PATH, SUBPROTOCOL
from tests.fleet.chaos.tiny_fleet import Process, TinyFleet, start_fleet, write_model
from tests.server.server_harness import until

CLIENT_KEY = "key-of-a-client"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    model = write_model(folder / "model")
    flags = ("--kv-cache-gib", "0.01", "--api-key", CLIENT_KEY)
    with start_fleet(model, ("--mixed", "2"), folder / "log", *flags, count=2) as live:
        yield live


def ask(fleet: TinyFleet) -> int:
    headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
    url = f"{fleet.url}/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=120, trust_env=False).status_code


def binds(port: int, option: int | None) -> bool:
    """Whether another process of this machine can listen on the port."""
    with closing(socket.socket()) as taker:
        if option is not None:
            taker.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            taker.bind(("127.0.0.1", port))
            taker.listen()
        except OSError:
            return False
        return True


def test_nobody_takes_a_port_between_two_lives(fleet: TinyFleet) -> None:
    victim = fleet.instances()[0]
    os.kill(victim.pid, signal.SIGKILL)

    def lives_again() -> Process | None:
        for option in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            assert not binds(victim.port, option), "its port was free"
        assert ask(fleet) == 200
        found = [each for each in fleet.instances() if each.port == victim.port]
        return found[0] if found and found[0].engine is not None else None

    assert until(lives_again, "the next life").pid != victim.pid
    fleet.wait_ready(2)


def test_an_instance_that_is_stopped_at_its_start_harms_nobody(fleet: TinyFleet) -> None:
    victim = fleet.instances()[1]
    os.kill(victim.pid, signal.SIGKILL)

    def next_life() -> Process | None:
        found = [each for each in fleet.instances() if each.port == victim.port]
        return found[0] if found and found[0].pid != victim.pid else None

    pid = until(next_life, "the next life").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(5):
            assert ask(fleet) == 200
    finally:
        os.kill(pid, signal.SIGCONT)
    fleet.wait_ready(2)


@pytest.mark.parametrize("target", ["instance", "router"])
@pytest.mark.parametrize(
    ("key", "origin"),
    [(None, None), ("wrong", None), (CLIENT_KEY, None), ("right", "http://evil.example")],
)
def test_a_link_is_for_the_fleets_router_alone(
    fleet: TinyFleet, target: str, key: str | None, origin: str | None
) -> None:
    port = fleet.instances()[0].port if target == "instance" else fleet.port
    headers = {"Origin": origin} if origin else {}
    if key is not None:
        key = fleet.instance_key() if key == "right" else key
        headers["Authorization"] = f"Bearer {key}"

    async def main() -> int:
        try:
            async with connect(
                f"ws://127.0.0.1:{port}{PATH}",
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                additional_headers=headers,
                proxy=None,
            ):
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    assert asyncio.run(main()) in (401, 403, 404)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/fleet/instance"])
def test_an_instance_asks_for_its_own_key(fleet: TinyFleet, path: str) -> None:
    url = f"{fleet.instances()[0].url}{path}"
    for key in ("wrong", CLIENT_KEY):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(url, headers=headers, trust_env=False).status_code == 401


def test_a_client_is_not_told_where_instances_are(fleet: TinyFleet) -> None:
    headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
    body = {"prompt": [1, 2, 3], "max_tokens": 10**9}
    answer = httpx.post(f"{fleet.url}/v1/completions", json=body, headers=headers, trust_env=False)
    assert answer.status_code == 400
    assert "127.0.0.1" not in answer.text
