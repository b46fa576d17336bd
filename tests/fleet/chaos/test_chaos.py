"""A real fleet under faults, with an answer to every question known beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.fleet.chaos import campaign
from tests.fleet.chaos.deaths import Death, unexplained
from tests.fleet.chaos.faults import Kind, draw
from tests.fleet.chaos.load import GivenUp


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


LINE = (
    "[router] ERROR router: request cmpl-1-0 failed: given up, because 2 instances ended with it; "
    "before that: http://127.0.0.1:81 was lost: killed; http://127.0.0.1:82 was lost: killed "
    "(request chaos-7)"
)


@pytest.mark.parametrize(
    ("deaths", "explained"),
    [
        ([Death(81, 10.0), Death(82, 12.0)], True),
        ([Death(81, 8.0), Death(82, 12.0)], True),
        ([Death(81, 10.0), Death(83, 12.0)], False),
        ([Death(81, 10.0), Death(82, 14.0)], False),
        ([Death(81, 1.0), Death(82, 12.0)], False),
        ([Death(82, 12.0)], False),
        ([], False),
    ],
)
def test_only_two_deaths_under_a_request_explain_that_it_was_given_up(
    deaths: list[Death], explained: bool
) -> None:
    one = GivenUp("chaos-7", 9.0, 13.0, "given up")
    assert (unexplained([one], deaths, LINE) == []) == explained
    assert unexplained([replace(one, id="chaos-8")], deaths, LINE) != []
