"""One router's floods, and the turns that others get meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise

import msgspec
import pytest

from pla_serve.server.link.hub import LEAST_CONTEXT, LinkHub
from pla_serve.wire.engine import AbortRequest, AddRequest, SamplingParams
from pla_serve.wire.link import Drain, InstanceReport, SetRole, ToInstance
from tests.server.link.hub_harness import FakeEngine, Router, make_hub

MANY = 20_000
Body = Callable[[FakeEngine, LinkHub, Router, Router], Awaitable[None]]


def frame(messages: Sequence[ToInstance]) -> bytes:
    return msgspec.msgpack.encode(messages)


def with_two_routers(body: Body) -> None:
    """Run ``body`` with a router that attacks and one that does not."""

    async def main() -> None:
        engine = FakeEngine()
        hub = make_hub(engine)
        attacker, other = Router(hub), Router(hub)
        await asyncio.gather(attacker.quiet(), other.quiet())
        await body(engine, hub, attacker, other)
        await asyncio.gather(attacker.leave(), other.leave())

    asyncio.run(main())


def test_a_flood_of_changes_does_not_flood_other_routers() -> None:
    """131,072 changes in one frame cut the links of all routers: too much waited to be read."""

    async def body(engine: FakeEngine, hub: LinkHub, attacker: Router, other: Router) -> None:
        changes: list[ToInstance] = []
        for number in range(MANY // 2):
            changes += [SetRole("short" if number % 2 else "mixed"), Drain(on=bool(number % 2))]
        attacker.frame(frame(changes))
        await attacker.quiet()
        while not (reports := reports_of(other)) or not reports[-1].draining:
            await asyncio.sleep(0.001)
        assert reports[-1].role == "short"
        assert len(reports) < MANY / 20
        assert other.closed is None

    with_two_routers(body)


def reports_of(router: Router) -> list[InstanceReport]:
    return [each for each in router.messages if isinstance(each, InstanceReport)]


def test_others_get_their_turn_within_a_frame() -> None:
    async def body(engine: FakeEngine, hub: LinkHub, attacker: Router, other: Router) -> None:
        names = [str(number) for number in range(900)]
        attacker.frame(
            frame([AddRequest(id=n, prompt=[1], sampling=ONE, arrival=0.0) for n in names])
        )
        seen: list[int] = []
        while len(engine.sent) < 900:
            seen.append(len(engine.sent))
            await asyncio.sleep(0)
        steps = [after - before for before, after in pairwise(seen)]
        assert max(steps) < 100
        attacker.frame(frame([AbortRequest(n) for n in names]))
        await attacker.quiet()

    with_two_routers(body)


ONE = SamplingParams(max_tokens=1)


@pytest.mark.parametrize("times", [1, 16])
def test_a_frame_far_beyond_the_context_ends_its_link_alone(times: int) -> None:
    """It takes seconds to decode. What is only a little too long is left to the engine."""

    async def body(engine: FakeEngine, hub: LinkHub, attacker: Router, other: Router) -> None:
        prompt = [1] * (LEAST_CONTEXT * times * 2)
        attacker.frame(frame([AddRequest(id="a", prompt=prompt, sampling=ONE, arrival=0.0)]))
        await attacker.quiet()
        assert bool(engine.sent) == (times == 1)
        assert (attacker.closed is None) == (times == 1)
        assert other.closed is None

    with_two_routers(body)
