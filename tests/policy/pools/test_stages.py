"""Between prefill and decode: one at a time, never to and fro, never the last one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.pools.balance import ClassDemand
from pla_serve.policy.pools.protocol import Pool, PoolReport
from pla_serve.policy.pools.stages import StageController, StageOptions

pools = st.lists(st.sampled_from([Pool.SHORT, Pool.LONG, Pool.DECODE]), min_size=1, max_size=12)
loads = st.floats(0, 12)


def reports(members: list[Pool], decode: float) -> list[PoolReport]:
    """``decode``: KV in use, in full instances, spread evenly."""
    decoders = max(1, members.count(Pool.DECODE))
    usage = min(1.0, decode / decoders)
    return [
        PoolReport(f"i{n}", pool, kv_usage=usage if pool is Pool.DECODE else 0.0)
        for n, pool in enumerate(members)
    ]


@given(pools, loads, loads, loads)
def test_under_demands_that_stay_moves_end_and_no_pool_is_emptied(
    members: list[Pool], short: float, long: float, decode: float
) -> None:
    demands = {Pool.SHORT: ClassDemand(0.0, short), Pool.LONG: ClassDemand(0.0, long)}
    controller, directions = StageController(), []
    for _ in range(30):
        moves = controller.decide(reports(members, decode), demands)
        assert len(moves) <= 1
        if not moves:
            break
        (move,) = moves
        place = int(move.instance_id[1:])
        assert members[place] is move.source
        assert members.count(move.source) > 1
        members[place] = move.target
        directions.append(move.target is Pool.DECODE)
    else:
        raise AssertionError("it does not come to rest")
    # A lost decode pool, or a lost class, is repaired first; from there it goes one way.
    assert len(set(directions[1:])) <= 1


def test_nothing_moves_while_one_drains() -> None:
    crowd = reports([Pool.SHORT, Pool.SHORT, Pool.LONG], 0.0)
    idle = {Pool.SHORT: ClassDemand(0.0, 0.0), Pool.LONG: ClassDemand(0.0, 0.0)}
    assert len(StageController().decide(crowd, idle)) == 1
    crowd[0] = PoolReport("i0", Pool.SHORT, draining=True)
    assert not StageController().decide(crowd, idle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full": 0.5}, "0 < spare < full <= 1"),
        ({"spare": 0.0}, "0 < spare < full <= 1"),
        ({"horizon_seconds": 0.0}, "horizon_seconds must be positive"),
        ({"min_decode": 0}, "min_decode must be at least 1"),
    ],
)
def test_options_are_checked(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StageOptions(**changes)  # type: ignore[arg-type]
