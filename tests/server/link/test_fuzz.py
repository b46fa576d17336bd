"""Hostile frames on a link: nobody else is disturbed, and nothing bad reaches the engine."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.server.link import hub
from pla_serve.server.link.hub import BAD_FRAME
from pla_serve.wire.codec import encode, engine_inbox
from pla_serve.wire.engine import (
    AbortRequest,
    AddRequest,
    Begin,
    Grammar,
    HandOver,
    Lend,
    Output,
    Rejected,
    Release,
    Reserve,
    SamplingParams,
)
from pla_serve.wire.link import Alive, Drain, SetRole
from tests.server.link.hub_harness import FakeEngine, Router, make_hub

EXAMPLES = int(os.environ.get("PLA_SERVE_FUZZ_EXAMPLES", "2000"))
"""Frames in all; more of them are drawn at random, the default ones are the same each time."""
NAN = float("nan")

SAMPLING = SamplingParams(
    max_tokens=9,
    temperature=0.5,
    logprobs=3,
    logit_bias={5: 1.0},
    stop_token_ids=(7,),
    seed=1,
    grammar=Grammar("regex", "a+"),
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    top_k=3,
    top_p=0.9,
    min_p=0.1,
    min_tokens=1,
)
ADD = AddRequest(
    id="a",
    prompt=[1, 2, 3],
    sampling=SAMPLING,
    arrival=-0.5,
    deadline=2.0,
    priority=1,
    generated=1,
    hand_over=HandOver(lease_seconds=1.0),
    request_id="r",
)
VALID = [
    ADD,
    AbortRequest("a"),
    Reserve(request=ADD, source=b"x" * 20, lease_seconds=1.0),
    Begin(id="a", tokens=[4]),
    Lend(id="b", tokens=[1, 2], lease_seconds=1.0),
    Release("a"),
    SetRole("long"),
    Drain(False),
    Alive(),
]
HOSTILE = st.sampled_from(
    [
        *(NAN, float("inf"), -float("inf"), 1e308, -1e308, 1e-320, -0.0, 0.5),
        *(-1, 0, 1, 21, 2**31, -(2**31) - 1, 2**63, -(2**63), 2**64 - 1, True, None),
        *("", "x" * 600, "innocent", "long", "\ud7ff", b"", b"\xff\xfe", b"x" * 100),
        *([], [-1], [2**40], [NAN], ["x"], [[]], {}, {"id": "a"}, {1: NAN}, {-1: 1.0}),
    ]
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands inside a message."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from paths(value[index], (*path, index))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A frame of valid messages, some of them with hostile fields, or with bytes changed."""
    kind = draw(st.sampled_from(["random", "bytes", "fields", "fields"]))
    if kind == "random":
        return draw(st.binary(max_size=60))
    messages: list[Any] = []
    for message in draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=4)):
        value = msgspec.msgpack.decode(encode(message), strict=False)
        if kind == "fields":
            for _ in range(draw(st.integers(1, 2))):
                path = draw(st.sampled_from(list(paths(value))))
                value = replaced(value, path, draw(HOSTILE))
        messages.append(value)
    content = bytearray(msgspec.msgpack.encode(messages))
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, len(content) - 1))
            what = draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
            if what == "flip":
                content[place] = draw(st.integers(0, 255))
            elif what == "cut" and place:
                del content[place:]
            elif what == "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=4))
            elif len(content) > 1:
                del content[place]
    return bytes(content)


class Scene:
    """A hub with one router that has requests, and attackers that come and go."""

    def __init__(self, runner: asyncio.Runner, caplog: pytest.LogCaptureFixture) -> None:
        self.runner, self.log = runner, caplog
        runner.run(self._start())

    async def _start(self) -> None:
        self.engine = FakeEngine()
        self.hub = make_hub(self.engine)
        self.innocent = Router(self.hub)
        plain = AddRequest(
            id="innocent", prompt=[1], sampling=SamplingParams(max_tokens=9), arrival=-0.5
        )
        self.innocent.frame(msgspec.msgpack.encode([plain]))
        await self.innocent.quiet()
        (self.name,) = self.engine.routes
        self.read = engine_inbox()

    async def attack(self, content: bytes) -> None:
        self.engine.sent.clear()
        self.innocent.sent.clear()
        attacker = Router(self.hub)
        attacker.frame(content)
        await attacker.quiet()
        if attacker.closed is None:
            await attacker.leave()
        else:
            code, reason = attacker.closed
            assert code == BAD_FRAME, reason
            assert reason
        for message in self.engine.sent:
            assert self.read(encode(message)) == message
            assert getattr(message, "id", None) != self.name
        assert list(self.engine.routes) == [self.name]
        assert self.hub._traffic.in_flight == 1
        assert not [r for r in self.log.records if r.levelno >= logging.ERROR]
        self.engine.routes[self.name].take(Output(id=self.name, tokens=[5]))
        await self.innocent.quiet()
        assert Output(id="innocent", tokens=[5]) in self.innocent.messages


@pytest.fixture
def scene(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(hub, "ROUTER_SILENCE_SECONDS", 1e6)  # examples take what they take
    with asyncio.Runner() as runner:
        yield Scene(runner, caplog)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 2000,
    suppress_health_check=list(HealthCheck),
)
@given(content=frames())
def test_no_frame_disturbs_anybody_else(scene: Scene, content: bytes) -> None:
    scene.runner.run(scene.attack(content))


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"max_tokens": 9, "logprobs": -1}},
        {"sampling": {"max_tokens": 9, "logprobs": 21}},
        {"sampling": {"max_tokens": 9, "repetition_penalty": 1e-320}},
        {"sampling": {"max_tokens": 9, "logit_bias": dict.fromkeys(range(301), 1.0)}},
        {"arrival": NAN},
        {"arrival": float("inf")},
        {"deadline": NAN},
        {"priority": 2**31},
        {"prompt": [-1]},
        {"request_id": "x" * 129},
    ],
)
def test_a_request_out_of_range_is_refused_and_its_neighbour_runs(
    scene: Scene, change: dict[str, Any]
) -> None:
    async def main() -> None:
        good = {
            "type": "add",
            "id": "good",
            "prompt": [1],
            "sampling": {"max_tokens": 1},
            "arrival": 0.0,
        }
        router = Router(scene.hub)
        router.frame(msgspec.msgpack.encode([{**good, "id": "bad", **change}, good]))
        await router.quiet()
        refusals = [m for m in router.messages if isinstance(m, Rejected)]
        assert [(m.id, m.retry_after) for m in refusals] == [("bad", None)]
        assert router.closed is None
        assert [name.partition(":")[2] for name in scene.engine.routes] == ["innocent", "good"]
        await router.leave()

    scene.runner.run(main())


def test_bad_utf8_ends_the_link_with_its_reason(scene: Scene) -> None:
    async def main() -> None:
        router = Router(scene.hub)
        router.frame(b"\x91\x82\xa4type\xa5abort\xa2id\xa2\xff\xfe")
        await router.quiet()
        assert router.closed is not None
        code, reason = router.closed
        assert code == 1007
        assert "utf-8" in reason

    scene.runner.run(main())
