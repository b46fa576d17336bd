"""A policy that is asked for the next batch while the one before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Chunk,
    PrefillPolicy,
    PrefillRequest,
    Run,
    Wait,
)
from pla_serve.policy.registry import POLICIES, create_policy

REQUESTS = 12
OUTPUT = 3
"""Tokens of each request."""


class Pipeline:
    """An executor that computes batches whole; ``depth`` 1 is one batch ahead, 0 waits.

    Holds what is handed out against what is left of each request.
    """

    def __init__(self, policy: PrefillPolicy, cost: CostModel, depth: int, parts: bool) -> None:
        self.policy = policy
        self._cost = cost
        self._depth = depth
        self._parts = parts
        self._out: list[tuple[Batch, float]] = []
        self.prompts: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.made: dict[str, int] = {}
        self.batches: list[Batch] = []

    def add(self, name: str, tokens: int, now: float) -> None:
        self.prompts[name] = tokens
        self.computed[name] = self.made[name] = 0
        self.policy.add(PrefillRequest(name, now, tokens), now)

    def step(self, now: float) -> bool:
        """False if there is nothing left to do."""
        decision = self.policy.next(now)
        if isinstance(decision, Run):
            batch = decision.batch
            seconds = self._cost.seconds(batch)
            self.batches.append(batch)
            for chunk in (*batch.prefills, *batch.decodes):
                assert chunk.history == self.computed[chunk.request_id]
            if not self._parts:
                self.policy.observe(batch, seconds, now)
                self._end(batch, now)
                return True
            while len(self._out) >= max(1, self._depth):
                self._measure(now)
            self.policy.dispatched(batch, now)
            self._end(batch, now)
            self._out.append((batch, seconds))
            if not self._depth:
                self._measure(now)
            return True
        if self._out:
            self._measure(now)
            return True
        return isinstance(decision, Wait)

    def _measure(self, now: float) -> None:
        self.policy.measured(*self._out.pop(0), now)

    def _end(self, batch: Batch, now: float) -> None:
        for chunk in (*batch.prefills, *batch.decodes):
            name = chunk.request_id
            self.computed[name] += chunk.tokens
            if not chunk.completes:
                continue
            self.made[name] += 1
            if self.made[name] == OUTPUT:
                self.policy.remove(name)
            elif self.made[name] == 1:
                self.policy.start_decode(name, self.computed[name], now, now)


def arrivals(rng: Random) -> Iterator[tuple[int, str, int]]:
    step = 0
    for number in range(REQUESTS):
        step += rng.choice((0, 0, 1, 3))
        yield step, f"r{number}", rng.choice((1, 7, 30, 100, 700))


def run(name: str, seed: int, *, depth: int, parts: bool) -> Pipeline:
    cost = CostModel()
    config = PolicyConfig(
        boundary_tokens=32, max_batch_tokens=256, max_batch_requests=4, long_chunk_tokens=128
    )
    pipeline = Pipeline(create_policy(name, config, cost), cost, depth, parts)
    waiting = list(arrivals(Random(seed)))
    now = 0.0
    for step in range(2000):
        now += 0.01
        while waiting and waiting[0][0] <= step:
            _, request_id, tokens = waiting.pop(0)
            pipeline.add(request_id, tokens, now)
        if not pipeline.step(now) and not waiting:
            return pipeline
    raise AssertionError("it does not end")


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_two_parts_are_one_observation(name: str, seed: int) -> None:
    """Told in two breaths or in one, the same is decided. (Times are as predicted, since one
    baseline charges a batch before it is measured.)"""
    whole = run(name, seed, depth=0, parts=False)
    parts = run(name, seed, depth=0, parts=True)
    assert parts.batches == whole.batches


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_everyone_is_served_once_by_an_executor_that_is_ahead(name: str, seed: int) -> None:
    ahead = run(name, seed, depth=1, parts=True)
    assert set(ahead.made.values()) == {OUTPUT}
    for request_id, tokens in ahead.prompts.items():
        assert ahead.computed[request_id] == tokens + OUTPUT - 1
    state = ahead.policy.state(1e9)
    assert (state.short_requests, state.long_requests, state.decoding_requests) == (0, 0, 0)


def test_the_share_of_longs_is_of_what_the_device_takes() -> None:
    """It is told of a batch when that is enqueued, which takes no time, and of its end later."""
    cost = CostModel()
    share = 0.5
    policy = create_policy("length-aware", PolicyConfig(long_share=share), cost)
    names = count()
    now = ends = 0.0
    taken = {BatchClass.SHORT: 0.0, BatchClass.LONG: 0.0}
    asked: dict[str, float] = {}
    waits: list[float] = []
    running: tuple[Batch, float, float] | None = None

    def ask(tokens: int) -> None:
        name = f"{tokens}-{next(names)}"
        asked[name] = now
        policy.add(PrefillRequest(name, now, tokens), now)

    for tokens in (400, 250) * 4:
        ask(tokens)
    for _ in range(300):
        decision = policy.next(now)
        assert isinstance(decision, Run)
        batch = decision.batch
        seconds = cost.seconds(batch)
        ends = max(ends, now) + seconds
        policy.dispatched(batch, now)
        taken[batch.kind] += seconds
        for chunk in batch.prefills:
            if chunk.completes:
                policy.remove(chunk.request_id)
                size, began = int(chunk.request_id.partition("-")[0]), asked.pop(chunk.request_id)
                if size < 256:
                    waits.append(ends - began)
                ask(size)
        if running is not None:
            before, took, now = running
            policy.measured(before, took, now)
        running = (batch, seconds, ends)
    assert taken[BatchClass.LONG] / sum(taken.values()) == pytest.approx(share, abs=0.1)
    assert max(waits) < 20 * cost.seconds(Batch(BatchClass.LONG, (Chunk("", 400, 0),)))
