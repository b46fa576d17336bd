"""A warm-up teaches the cost model, within the model's positions and a bounded time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.build.warm_up import BUDGET_SECONDS, warm_up
from pla_serve.policy.cost import CostModel


@dataclass
class SlowMachine:
    """Each launch and each token takes its time, on a clock of its own."""

    launch: float
    token: float
    now: float = 100.0
    seen: list[Sequence[SpanRequest]] = field(default_factory=list)

    def run(self, requests: Sequence[SpanRequest]) -> None:
        self.seen.append(requests)
        self.now += self.launch + self.token * sum(len(request.tokens) for request in requests)

    def clock(self) -> float:
        return self.now


def warm(machine: SlowMachine, chunk: int = 512, longest: int = 8192, blocks: int = 512) -> float:
    """The error of a prediction afterwards."""
    cost = CostModel()
    warm_up(
        machine.run,
        cost,
        chunk=chunk,
        longest=longest,
        blocks=blocks,
        block_tokens=16,
        device=torch.device("cpu"),
        clock=machine.clock,
    )
    return abs(cost.prefill_seconds(200, 0) / (machine.launch + 200 * machine.token) - 1)


def test_it_teaches_what_a_prefill_takes() -> None:
    assert warm(SlowMachine(0.002, 1e-4)) < 0.1


@pytest.mark.parametrize("longest", [100, 600, 8192])
def test_no_position_is_beyond_the_models(longest: int) -> None:
    machine = SlowMachine(0.002, 1e-4)
    warm(machine, longest=longest)
    assert all(r.history + len(r.tokens) <= longest for batch in machine.seen for r in batch)


def test_no_slot_is_beyond_the_memory() -> None:
    machine = SlowMachine(0.002, 1e-4)
    warm(machine, blocks=20)
    assert machine.seen
    assert all(end <= 20 for batch in machine.seen for r in batch for _, end in r.runs)


@pytest.mark.parametrize(("launch", "token"), [(0.2, 0.02), (0.01, 0.1), (2.0, 0.0)])
def test_a_slow_machine_is_ready_in_bounded_time(launch: float, token: float) -> None:
    machine = SlowMachine(launch, token)
    error = warm(machine, chunk=8192, longest=100_000, blocks=4096)
    assert machine.now - 100 < 1.5 * BUDGET_SECONDS
    assert error < 0.5
