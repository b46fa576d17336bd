"""What a replica says of its engine."""

from __future__ import annotations

import asyncio

import pytest

from pla_serve.fleet.router.prefixes import Chain
from pla_serve.plugins.ray.calls import ReplicaCall, read_call
from pla_serve.plugins.ray.load import EngineAnswers, InstanceLoad
from pla_serve.server.engine.session import EngineDiedError
from pla_serve.wire.engine import Accepted, AddRequest, EngineReady, SamplingParams

READY = EngineReady(
    max_model_len=512,
    kv_tokens=4096,
    kv_bytes_per_token=64,
    layers=2,
    vocab_size=300,
    device="cpu",
    dtype="float32",
    policy="fcfs",
)


def test_a_replica_whose_engine_ended_wants_no_requests() -> None:
    load = InstanceLoad("m", 16)
    assert load.report("mixed", "", 0.0, 1.0) is None
    load.ready(READY)
    first = load.report("short", "b1", 0.0, 1.0)
    load.lost("it died")
    second = load.report("short", "b1", 0.0, 2.0)
    load.ready(READY)
    third = load.report("short", "b2", 0.0, 3.0)
    assert first is not None
    assert second is not None
    assert third is not None
    assert [stats.report.ready for stats in (first, second, third)] == [True, False, True]
    assert (first.facts.boot, third.facts.boot, first.report.role) == ("b1", "b2", "short")


def test_arrivals_are_counted_in_predicted_seconds_by_class() -> None:
    load = InstanceLoad("m", 16)
    load.demand(0.0)
    for seconds, short in ((0.5, True), (0.5, True), (3.0, False)):
        request = AddRequest(id="r", prompt=[1], sampling=SamplingParams(max_tokens=1), arrival=0.0)
        call = ReplicaCall(request, Chain([1]), lambda: 0.0)
        call.seconds, call.short = seconds, short
        load.arrived(read_call(call.packed(), 0.0), 1.0)
    demand = load.demand(2.0)
    assert demand["short_rate"] == pytest.approx(0.5)
    assert demand["long_rate"] == pytest.approx(1.5)


def test_answers_come_at_once_and_the_end_of_the_engine_after_them() -> None:
    async def run() -> None:
        answers = EngineAnswers()
        assert await answers.next(0.001) == []
        answers.take(Accepted("r", 0))
        answers.fail(EngineDiedError("gone"))
        assert await answers.next(1.0) == [Accepted("r", 0)]
        with pytest.raises(EngineDiedError):
            await answers.next(1.0)

    asyncio.run(run())
