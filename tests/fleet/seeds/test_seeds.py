"""Routing, hand-over, failover and control of real fleets: one seed, one history."""

from __future__ import annotations

import pytest

from tests.fleet.seeds.world import play, replay_command

SEEDS = 200


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_whatever_happens_every_request_is_answered_once(first: int) -> None:
    for seed in range(first, first + 20):
        outcome = play(seed)
        assert not outcome.error, "\n".join(
            [*outcome.history[-60:], f"seed {seed}; all of it: {replay_command(seed)}"]
        )


def test_a_seed_has_one_history() -> None:
    first, second = play(7), play(7)
    assert first.history == second.history
    assert play(8).history != first.history
