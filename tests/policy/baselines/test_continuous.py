"""The baselines batch as the field's engines do."""

from __future__ import annotations

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, BatchClass, Chunk, PrefillPolicy, PrefillRequest, Run
from pla_serve.policy.registry import create_policy

CONFIG = PolicyConfig(max_batch_tokens=1000, long_chunk_tokens=400, boundary_tokens=256)
BASELINES = ("fcfs", "hrrn", "srpt")


def make(name: str, config: PolicyConfig = CONFIG, **sizes: int) -> PrefillPolicy:
    policy = create_policy(name, config, CostModel(CostProfile(1e-3, 0, 0, 0, 0)))
    for number, (request_id, tokens) in enumerate(sizes.items()):
        policy.add(PrefillRequest(request_id, number * 0.001, tokens), 0.0)
    return policy


def run(policy: PrefillPolicy, now: float = 1.0) -> Batch:
    decision = policy.next(now)
    assert isinstance(decision, Run)
    return decision.batch


def shape(batch: Batch) -> list[tuple[str, int]]:
    return [(chunk.request_id, chunk.tokens) for chunk in batch.prefills]


def test_fcfs_decodes_first_then_arrival_with_a_cap() -> None:
    policy = make("fcfs", big=900, a=100, b=300, c=300)
    policy.start_decode("d", 70, 0.0, 0.0)
    batch = run(policy)
    assert batch.kind is BatchClass.MIXED
    assert batch.decodes == (Chunk("d", 1, 70),)
    assert shape(batch) == [("big", 400), ("a", 100), ("b", 300), ("c", 199)]
    policy.observe(batch, 0.1, 1.1)
    policy.add(PrefillRequest("old", -5.0, 50), 1.1)
    assert shape(run(policy)) == [("big", 400), ("c", 101), ("old", 50)], "those under way first"


def test_srpt_takes_the_least_left() -> None:
    config = PolicyConfig(max_batch_tokens=1000, long_chunk_tokens=400)
    policy = make("srpt", config, big=900, b=300, a=100, c=310)
    assert shape(run(policy)) == [("a", 100), ("b", 300), ("c", 310), ("big", 290)]


def test_hrrn_takes_the_highest_ratio() -> None:
    policy = make("hrrn")
    policy.add(PrefillRequest("old", 0.0, 800), 0.0)
    policy.add(PrefillRequest("new", 9.9, 100), 9.9)
    policy.add(PrefillRequest("mid", 9.0, 100), 9.9)
    assert shape(run(policy, 10.0)) == [("old", 400), ("mid", 100), ("new", 100)]


@pytest.mark.parametrize("name", BASELINES)
def test_pure_batches_carry_their_class(name: str) -> None:
    assert run(make(name, a=10, b=20)).kind is BatchClass.SHORT
    assert run(make(name, a=900)).kind is BatchClass.LONG
    assert run(make(name, a=10, b=900)).kind is BatchClass.MIXED
    policy = make(name)
    policy.start_decode("d", 70, 0.0, 0.0)
    assert run(policy).kind is BatchClass.DECODE


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_is_interrupted(name: str) -> None:
    policy = make(name, big=4000)
    batch = run(policy)
    policy.add(PrefillRequest("short", 1.0, 10, deadline=1.1), 1.0)
    assert policy.at_layer_boundary(1.05, batch) is None


@pytest.mark.parametrize("name", BASELINES)
def test_prefills_and_decodes_keep_each_other_in_the_batch(name: str) -> None:
    """With more of both than fits, each side has half of the places."""
    config = PolicyConfig(max_batch_requests=6)
    policy = make(name, config, **{f"p{n}": 10 for n in range(20)})
    for n in range(20):
        policy.start_decode(f"d{n}", 5, 0.0, 0.0)
    batch = run(policy)
    assert (len(batch.prefills), len(batch.decodes)) == (3, 3)


@pytest.mark.parametrize("name", ["fcfs", "hrrn", "srpt", "length-aware"])
def test_one_place_is_taken_in_turn(name: str) -> None:
    policy = make(name, PolicyConfig(max_batch_requests=1), **{f"p{n}": 10 for n in range(4)})
    policy.start_decode("d", 5, 0.0, 0.0)
    sides = []
    for _ in range(6):
        batch = run(policy)
        sides.append("p" if batch.prefills else "d")
        policy.observe(batch, 0.01, 1.0)
    assert "".join(sides) == "pdpdpd"


def test_predicted_waits_follow_the_order() -> None:
    sizes = {f"r{n}": 2000 for n in range(10)}
    assert make("fcfs", **sizes).predicted_wait(100, 0, 0.0) == pytest.approx(20.1)
    assert make("srpt", **sizes).predicted_wait(100, 0, 0.0) == pytest.approx(0.1)


def test_predicted_wait_counts_the_batch_under_way() -> None:
    policy = make("srpt", a=400)
    run(policy, 0.0)
    assert policy.predicted_wait(100, 0, 0.1) == pytest.approx(0.3 + 0.1)
