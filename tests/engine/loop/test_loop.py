"""What the loop owes to policy and clients in its corners: aborts, refreshes, nested time."""

from __future__ import annotations

import pytest
import torch

from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.kv.manager import BlockTable
from pla_serve.engine.run.runner import AtBoundary
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, PrefillPolicy, PrefillRequest
from pla_serve.policy.registry import create_policy
from tests.engine import tiny
from tests.engine.chaos import ChaosPolicy
from tests.engine.test_outputs import assert_at_rest
from tests.engine.tiny import Engine, expected, make_engine

CROWD = {f"c{i}": tuple(range(1 + i, 1 + i + size)) for i, size in enumerate((2, 30, 9, 41))}
"""More than fits in 20 blocks: some wait for memory, and some lose it."""
VICTIM = tuple(range(50, 80))
AGAIN = (9, 8, 7, 6, 5)
TOKENS = 6
STRIDE = 3
"""Every third moment is tried: all kinds of them, in a third of the time."""


def make_policy(name: str) -> PrefillPolicy:
    if name == "chaos":
        return ChaosPolicy(4, express=0.5)
    config = PolicyConfig(boundary_tokens=12, long_chunk_tokens=16, max_batch_tokens=32)
    return create_policy(name, config, CostModel())


def crowd_with_abort(policy: str, poll: int) -> tuple[Engine, bool, int]:
    """Abort x at this poll of the inbox and ask for x anew in the next breath.

    Returns the engine, whether that moment came, and the tokens that x had then.
    """
    engine = make_engine("llama", make_policy(policy), blocks=20)
    polls = 0
    had = 0

    def interfere() -> None:
        nonlocal polls, had
        polls += 1
        if polls == poll:
            had = len(engine.tokens("x"))
            engine.abort("x")
            engine.add("x", AGAIN, max_tokens=TOKENS)

    engine.on_poll.append(interfere)
    for index, (request_id, prompt) in enumerate(CROWD.items()):
        engine.add(request_id, prompt, max_tokens=TOKENS)
        if index == 1:
            engine.add("x", VICTIM, max_tokens=TOKENS)
    engine.run()
    return engine, polls >= poll, had


@pytest.mark.parametrize("policy", ["chaos", "length-aware", "fcfs"])
def test_abort_at_any_moment(policy: str) -> None:
    states: set[str] = set()
    poll = 1
    while True:
        engine, came, had = crowd_with_abort(policy, poll)
        if not came:
            break
        for request_id, prompt in CROWD.items():
            assert engine.tokens(request_id) == expected("llama", prompt, TOKENS)
        old, new = engine.tokens("x")[:had], engine.tokens("x")[had:]
        assert old == expected("llama", VICTIM, TOKENS)[:had]
        if engine.rejected("x") is None:
            states.add("gone")
            assert new == expected("llama", AGAIN, TOKENS)
        else:
            states.add("in flight")
            assert new == (), "an aborted request gets no further output"
        assert_at_rest(engine)
        poll += STRIDE
    assert states == {"gone", "in flight"}


class Recorder(ChaosPolicy):
    """Counts what it is told."""

    def __init__(self, express: float = 0.0) -> None:
        super().__init__(0, express)
        self.adds: list[PrefillRequest] = []
        self.observed: list[tuple[Batch, float]] = []

    def add(self, request: PrefillRequest, now: float) -> None:
        super().add(request, now)
        self.adds.append(request)

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        super().observe(batch, seconds, now)
        self.observed.append((batch, seconds))


def test_numbers_are_told_again_only_if_they_changed() -> None:
    policy = Recorder()
    engine = make_engine("llama", policy)
    for request_id, prompt in (("same", [1] * 9), ("other", [2] * 9)):
        engine.add(request_id, prompt, max_tokens=1)
    engine.loop._inbox.take()
    assert [(a.id, a.history) for a in policy.adds] == [("same", 0), ("other", 0)]
    kv, table = engine.parts.kv, BlockTable()
    kv.reserve([1] * 9, table)
    kv.remember([1] * 9, 9, table)
    engine.loop._requests.refresh()
    assert [(a.id, a.history) for a in policy.adds[2:]] == [("same", 8)]


def test_no_second_is_told_twice() -> None:
    policy = Recorder(express=0.8)
    engine = make_engine("llama", policy)
    for request_id, prompt in CROWD.items():
        engine.add(request_id, prompt, max_tokens=TOKENS)
    started = engine.clock()
    engine.run()
    assert engine.loop._telemetry.express_batches > 5, "the test is too easy"
    assert sum(seconds for _, seconds in policy.observed) < engine.clock() - started
    assert all(seconds > 0 for _, seconds in policy.observed)


def test_a_failure_inside_a_nested_batch_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llama", Recorder(express=1.0))
    runner = tiny.runner("llama")
    forward, depth = runner.forward, 0

    def fail_inside(batch: FlatBatch, at_boundary: AtBoundary | None = None) -> torch.Tensor:
        nonlocal depth
        if depth:
            raise RuntimeError("out of memory")
        depth += 1
        return forward(batch, at_boundary)

    monkeypatch.setattr(runner, "forward", fail_inside)
    for request_id, prompt in CROWD.items():
        engine.add(request_id, prompt)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.run()
    assert runner._at_boundary is None


def test_a_broken_row_ends_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llama", make_policy("fcfs"))
    runner = tiny.runner("llama")
    forward = runner.forward

    def break_a_row(batch: FlatBatch, at_boundary: AtBoundary | None = None) -> torch.Tensor:
        logits = forward(batch, at_boundary).clone()
        rows = batch.tokens[batch.outputs]
        logits[rows == 77] = torch.nan
        return logits

    monkeypatch.setattr(runner, "forward", break_a_row)
    engine.add("broken", [5, 6, 77])
    engine.add("sound", [5, 6, 7])
    engine.run()
    last = engine.outputs("broken")[-1]
    assert (last.tokens, last.finish_reason) == ([], "error")
    assert last.error is not None
    assert "NaN" in last.error
    assert engine.tokens("sound") == expected("llama", (5, 6, 7), 8)
    assert_at_rest(engine)
