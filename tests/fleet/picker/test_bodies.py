"""Bodies that Envoy sends piece by piece: what all of them together may hold, and for how long."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pla_serve.fleet.picker.addresses import InstanceAddresses
from pla_serve.fleet.picker.prompts import PromptReader
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.server.api.body import FREE_BYTES, BodyReader
from pla_serve.server.limits import Limits

pytest.importorskip("google.protobuf")

from pla_serve.fleet.picker import messages
from pla_serve.fleet.picker.envoy_request import EnvoyRequest
from tests.fleet.picker.test_server import body, head

HALF = 100_000
"""Bytes that one client's bodies may hold, beside those that are free."""


class Counted:
    """Counts outcomes, in place of the metrics."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def ended(self, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def reader() -> PromptReader:
    settings = SimpleNamespace(api_keys=(), share_prefix_cache=False)
    bodies = BodyReader(4 * HALF, Limits(max_upload_bytes=2 * HALF, body_seconds=7.0))
    return PromptReader(cast(Any, SimpleNamespace(settings=settings)), bodies)


def requested(reader: PromptReader) -> tuple[EnvoyRequest, Counted]:
    counted = Counted()
    request = EnvoyRequest(cast(Any, None), reader, InstanceAddresses(), [], cast(Any, counted))
    return request, counted


async def told(request: EnvoyRequest, message: Any) -> list[Any]:
    return [answer async for answer in request.answers(message)]


def test_bodies_count_from_their_first_piece_until_their_requests_end(
    reader: PromptReader,
) -> None:
    async def check() -> None:
        piece = body(b" " * (FREE_BYTES + HALF // 2 + 1), end=False)
        (first, _), (second, counted) = requested(reader), requested(reader)
        for request in (first, second):
            assert await told(request, head(mode=messages.FULL_DUPLEX)) == []
        assert await told(first, piece) == []
        [refusal] = await told(second, piece)
        assert refusal.immediate_response.status.code == 429
        assert counted.outcomes == ["refused"]
        second.close()
        first.close()
        third, _ = requested(reader)
        await told(third, head(mode=messages.FULL_DUPLEX))
        assert await told(third, piece) == []
        third.close()

    asyncio.run(check())


def test_a_body_is_due_until_the_request_is_decided(reader: PromptReader) -> None:
    async def check() -> None:
        request, counted = requested(reader)
        assert request.due is None
        await told(request, head(mode=messages.FULL_DUPLEX))
        assert request.due == pytest.approx(asyncio.get_running_loop().time() + 7.0, abs=5.0)
        await told(request, body(b"{", end=False))
        assert request.too_slow().immediate_response.status.code == 408
        assert request.due is None
        assert counted.outcomes == ["refused"]

    asyncio.run(check())


def test_an_instance_is_looked_up_once_however_many_ask() -> None:
    asked: list[str] = []

    async def check() -> None:
        answer = asyncio.Event()

        async def resolve(host: str) -> str:
            asked.append(host)
            await answer.wait()
            return "10.0.0.7"

        addresses = InstanceAddresses(resolve)
        instance = cast(FleetInstance, SimpleNamespace(name="http://one:8000", epoch=1))
        waiting = [asyncio.create_task(addresses.of(instance)) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        answer.set()
        assert await asyncio.gather(*waiting[1:]) == ["10.0.0.7:8000"] * 4
        assert await addresses.of(instance) == "10.0.0.7:8000"

    asyncio.run(check())
    assert asked == ["one"]
