"""Instances of a simulated fleet are told that they end, under streams that are longer than that.

As in test_seeds.py, every request must end once, with the tokens of an instance that never ends,
and leave nothing behind.
"""

from __future__ import annotations

from collections import Counter

from tests.fleet.seeds.world import World


class NoticeWorld(World):
    """No faults but notices that are long enough to leave."""

    faults = {"notice": 1}  # noqa: RUF012
    fault_rates = (0.3, 0.6)
    fleets = (["mixed"] * 4, ["mixed"] * 3)
    answers = (20, 150, 400)
    transfer_chance = 1.0
    graces = (3.0, 4.0, 6.0)


class HardWorld(NoticeWorld):
    """Notices among everything else that can happen."""

    faults = {**World.faults, "notice": 12}  # noqa: RUF012
    fault_rates = (1.0, 2.0)
    fleets = World.fleets
    graces = (0.5, 2.5, 4.0)


SEEDS = 5


def test_an_instance_that_was_told_is_empty_when_it_ends() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = NoticeWorld(seed)
        world.run()
        counts.update(world.counts)
    assert counts["notice"] >= 10
    assert counts["hand-over moved"] >= 10, counts
    assert counts["instance that ended with requests"] == 0, counts


def test_faults_in_the_middle_of_moves_cost_no_token() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = HardWorld(seed)
        world.run()
        counts.update(world.counts)
    assert counts["hand-over moved"] >= 2, counts
