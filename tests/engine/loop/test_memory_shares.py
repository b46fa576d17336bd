"""A tenant whose prompts fill the KV memory gives way to another one, and loses no token by it."""

from __future__ import annotations

import pytest

from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import AddRequest, SamplingParams
from tests.engine.test_outputs import assert_at_rest
from tests.engine.tiny import Engine, expected, make_engine

FLOOD = {f"a{i}": tuple(range(1 + i, 45 + i)) for i in range(6)}
"""Three of them fill 40 blocks of 4 tokens."""
GUESTS = {f"b{i}": tuple(range(50 + i, 60 + i)) for i in range(4)}
MADE = 10


def add(engine: Engine, name: str, prompt: tuple[int, ...]) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=MADE, ignore_eos=True)
    engine.inbox.append(
        AddRequest(
            id=name,
            prompt=list(prompt),
            sampling=sampling,
            arrival=engine.clock(),
            tenant=name[0],
        )
    )


def finished(engine: Engine, name: str) -> bool:
    outputs = engine.outputs(name)
    return bool(outputs) and outputs[-1].finish_reason is not None


@pytest.mark.parametrize("policy", ["length-aware", "fcfs"])
def test_a_flood_of_longs_gives_way(policy: str) -> None:
    config = PolicyConfig(boundary_tokens=12, long_chunk_tokens=16, max_batch_tokens=64)
    engine = make_engine("llama", create_policy(policy, config, CostModel()), blocks=40)
    assert isinstance(engine.loop, EngineLoop)
    for name, prompt in FLOOD.items():
        add(engine, name, prompt)
    while not engine.parts.gate.backlog(False)[0]:
        engine.loop.step()
    for name, prompt in GUESTS.items():
        add(engine, name, prompt)
    while not all(finished(engine, name) for name in GUESTS):
        engine.loop.step()
    assert sum(finished(engine, name) for name in FLOOD) <= 3, "the parked ones go later"
    engine.run()
    assert_at_rest(engine)
    for name, prompt in {**FLOOD, **GUESTS}.items():
        assert len(engine.tokens(name)) == MADE
        common = expected("llama", prompt, MADE)
        assert engine.tokens(name)[: len(common)] == common
