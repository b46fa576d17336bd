from __future__ import annotations

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import POLICIES, create_policy


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
        ("decode_share", 1.5),
        ("express_burst_seconds", -1.0),
        ("patience", -0.1),
        ("patience", float("nan")),
        ("express_burst_seconds", float("inf")),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        PolicyConfig(**{field: value})  # type: ignore[arg-type]
