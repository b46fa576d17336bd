from __future__ import annotations

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, Idle, PrefillPolicy, PrefillRequest, Run
from pla_serve.policy.registry import POLICIES, create_policy
from pla_serve.policy.temporal import PrefillFirst


def test_every_name_makes_a_fresh_policy() -> None:
    assert {"length-aware", "fcfs", "hrrn", "srpt"} <= set(POLICIES)
    for name in POLICIES:
        policy: PrefillPolicy = create_policy(name, PolicyConfig(), CostModel())
        assert policy is not create_policy(name, PolicyConfig(), CostModel())
        assert policy.waits_as_short(10, 0)


def test_knobs_may_stand_in_the_name() -> None:
    policy = create_policy("fcfs:boundary_tokens=5", PolicyConfig(), CostModel())
    assert policy.waits_as_short(5, 0)
    assert not policy.waits_as_short(6, 0)


@pytest.mark.parametrize("name", [*POLICIES, "laps:window_seconds=0"])
@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("tokens", [50, 5000])
@pytest.mark.parametrize("decodes", [0, 2])
def test_a_batch_that_was_left_because_all_were_aborted(
    name: str, temporal: bool, tokens: int, decodes: int
) -> None:
    """It is observed with no chunks, and leaves no trace."""
    config, cost = PolicyConfig(), CostModel()
    policy = create_policy(name, config, cost)
    if temporal:
        policy = PrefillFirst(policy, config, cost)
    for number in range(decodes):
        policy.start_decode(f"d{number}", 100, 0.0, 0.0)
    policy.add(PrefillRequest("a", 0.0, tokens), 0.0)
    policy.add(PrefillRequest("b", 0.0, tokens), 0.0)
    batch = handed_out(policy, 0.1)
    for request_id in ("a", "b", *(f"d{number}" for number in range(decodes))):
        policy.remove(request_id)
    policy.observe(Batch(batch.kind), 0.1, 0.2)

    assert policy.next(0.2) == Idle()
    state = policy.state(0.2)
    assert (state.short_requests, state.long_requests, state.decoding_requests) == (0, 0, 0)
    assert (state.short_tokens, state.long_tokens, state.seconds) == (0, 0, 0)
    unused = create_policy(name, config, cost).predicted_wait(tokens, 0, 0.2)
    assert policy.predicted_wait(tokens, 0, 0.2) == pytest.approx(unused)

    policy.add(PrefillRequest("a", 0.3, tokens), 0.3)
    left = tokens
    while left:
        batch = handed_out(policy, 0.4)
        policy.observe(batch, 0.1, 0.5)
        left -= batch.prefills[0].tokens
    assert policy.state(0.5).seconds == 0


def handed_out(policy: PrefillPolicy, now: float) -> Batch:
    """The next batch."""
    decision = policy.next(now)
    assert isinstance(decision, Run)
    return decision.batch


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'lifo'.*length-aware, fcfs, hrrn, srpt"):
        create_policy("lifo", PolicyConfig(), CostModel())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch_tokens", 0),
        ("max_batch_requests", 0),
        ("long_chunk_tokens", 0),
        ("boundary_tokens", -1),
        ("long_share", 0.0),
        ("long_share", 1.0),
        ("itl_slo_ms", 0.5),
        ("express_burst_seconds", -1.0),
        ("patience", -0.1),
        ("patience", float("nan")),
        ("express_burst_seconds", float("inf")),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        PolicyConfig(**{field: value})  # type: ignore[arg-type]
