"""Shorts wait for those that answer the batch that has just ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.echo import WINDOW, EchoWindow
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import PrefillRequest, Run, Wait
from tests.policy.driving import CONFIG, PROFILE, add, make

HOLD = WINDOW * PROFILE.per_launch


def echoing(share: int) -> EchoWindow:
    """After 40 batches of four answers each, of which so many were answered at once."""
    window = EchoWindow(CostModel(PROFILE))
    for second in range(40):
        window.ended(float(second), 4)
        for _ in range(share):
            window.arrived(second + HOLD / 2)
        window.arrived(second + 0.5)  # too late for an echo
    window.ended(40.0, 4)
    return window


def test_until_those_that_come_back_are_there() -> None:
    window = echoing(2)
    assert window.until(40.0, 1) == pytest.approx(40.0 + HOLD)
    window.arrived(40.0)
    assert window.until(40.0, 2) is not None
    window.arrived(40.0)
    assert window.until(40.0, 3) is None, "nobody else is expected"


def test_not_without_echoes_and_not_for_long() -> None:
    assert echoing(0).until(40.0, 1) is None
    window = echoing(4)
    assert window.until(40.0 + HOLD, 1) is None
    assert window.until(40.0, 1) is not None
    assert window.until(40.0, 1000) is None, "too many would wait"


def test_not_before_it_has_seen_some() -> None:
    window = EchoWindow(CostModel(PROFILE))
    for second in range(10):
        window.ended(float(second), 1)
        window.arrived(float(second))
    assert window.until(9.0, 1) is None


def clients(policy: LengthAware, rounds: int) -> list[int]:
    """Two clients that send the next short prompt with each answer; shorts of each batch.

    They begin out of step.
    """
    now, sizes, number = 0.0, list[int](), 0
    add(policy, "first", 20, now)
    running = policy.next(now)
    add(policy, "second", 20, now)
    for _ in range(rounds):
        assert isinstance(running, Run)
        batch = running.batch
        sizes.append(len(batch.prefills))
        now += CostModel(PROFILE).seconds(batch)
        policy.observe(batch, 0.0, now)
        decision = policy.next(now)
        for _ in batch.prefills:  # their next ones come when the device has been given its work
            number += 1
            policy.add(PrefillRequest(f"r{number}", now, 20), now)
        if isinstance(decision, Wait):
            assert decision.until <= now + HOLD + 1e-9
            decision = policy.next(now)
        running = decision if isinstance(decision, Run) else policy.next(now)
    return sizes


@pytest.mark.parametrize(
    ("config", "mixed", "together"),
    [
        (CONFIG, True, True),
        (CONFIG, False, False),
        (replace(CONFIG, express_wait_seconds=0.0), True, False),
    ],
)
def test_clients_out_of_step_come_together(
    config: PolicyConfig, mixed: bool, together: bool
) -> None:
    """Only where both classes are served, and only if shorts may be held back at all."""
    policy = make(config)
    for n in range(20):
        add(policy, f"seen{n}", 500 if mixed else 50)
        policy.remove(f"seen{n}")
    assert (clients(policy, 60)[-1] == 2) is together
