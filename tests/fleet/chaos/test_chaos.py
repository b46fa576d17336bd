"""A real fleet under faults, with an answer to every question known beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet.chaos import campaign
from tests.fleet.chaos.faults import Kind, draw


def test_faults_cost_no_answer_and_leak_nothing(tmp_path: Path) -> None:
    """Whoever dies or hangs, every answer is complete and the one that was expected.

    On a slow machine the last of the faults are left out, so that the test has an end.
    """
    plan = campaign.Plan(seed=6, faults=20, pause=0.2, seconds=45)
    result = campaign.run(plan, tmp_path)
    assert result.tally.problems == [], result.log
    assert result.leaks == [], result.log
    assert len(result.done) >= 3
    assert result.tally.answered >= 20


@pytest.mark.parametrize("seed", range(5))
def test_faults_follow_from_the_seed_and_are_of_all_kinds(seed: int) -> None:
    faults = draw(seed, 20, decodes=True, pause=0.5)
    assert faults == draw(seed, 20, decodes=True, pause=0.5)
    assert faults != draw(seed + 1, 20, decodes=True, pause=0.5)
    assert {fault.kind for fault in faults} == set(Kind)
