"""A warm-up that goes on while the engine is idle takes nothing that a request wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, cast

import pytest

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.build.recalibration import FEW_TOKENS, LONGEST_LAYER_SECONDS, Recalibration
from pla_serve.engine.build.stored_profile import ProfileStore
from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.run.executor import Executor
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
from tests.engine.build.test_stored_profile import CEILINGS, KEY, ROOFLINE

LAYERS = 4
TOKENS_EACH = 16


class FakeExecutor:
    """Takes the seconds that ``costs`` says, on its own clock, a layer after the other."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.now = 0.0
        self.batches: list[list[SpanRequest]] = []
        self.layers = 0
        self.forgotten = 0

    def forward(self, requests: Sequence[SpanRequest], at_boundary: Callable[[], None]) -> None:
        self.batches.append(list(requests))
        chunks = tuple(Chunk(str(i), len(r.tokens), r.history) for i, r in enumerate(requests))
        seconds = self.costs.seconds(Batch(BatchClass.MIXED, prefills=chunks))
        for _ in range(LAYERS):
            at_boundary()
            self.layers += 1
            self.now += seconds / LAYERS

    def end_warm_up(self) -> None:
        self.forgotten += 1


class Setup:
    def __init__(self, folder: Path, *, slower: float = 1.0, blocks: int = 512) -> None:
        self.kv = KVManager(blocks, TOKENS_EACH)
        quick = replace(ROOFLINE, per_launch=1e-3, per_token=1e-5)
        real = CostModel(CostProfile(*(slower * unit for unit in astuple(quick))))
        self.executor = FakeExecutor(real)
        self.cost = CostModel(quick)
        self.store = ProfileStore(folder, KEY, CEILINGS, ROOFLINE)
        self.work = Recalibration(
            cast("Executor", self.executor),
            self.kv,
            self.cost,
            self.store,
            chunk=512,
            longest=2048,
            layers=LAYERS,
            clock=lambda: self.executor.now,
        )

    def finish(self) -> int:
        """Run all that is left, and return the number of steps."""
        steps = 0
        while self.work.active:
            self.work.step(lambda: False)
            steps += 1
            assert steps < 100
        return steps


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_a_profile_that_holds_is_left_alone(setup: Setup) -> None:
    assert setup.work.active
    assert setup.finish() == len(setup.executor.batches) / 2  # each batch runs twice
    assert not setup.work.active
    assert not setup.store.path.exists()
    assert setup.kv.free == setup.kv.blocks
    assert setup.executor.forgotten == 1


def test_a_wrong_profile_is_corrected_and_stored(tmp_path: Path) -> None:
    setup = Setup(tmp_path, slower=3.0)
    setup.finish()
    expected = setup.executor.costs.prefill_seconds(128, 0)
    assert setup.cost.prefill_seconds(128, 0) == pytest.approx(expected, rel=0.2)
    assert setup.store.path.exists()


def test_a_request_waits_for_one_layer(setup: Setup) -> None:
    """A batch is left at the boundary after the arrival, and runs again when all is idle."""
    arrived = iter([False, False, True])
    setup.work.step(lambda: next(arrived))
    assert setup.work.active
    assert setup.executor.layers == 2
    assert setup.kv.free == setup.kv.blocks
    left = setup.executor.batches[-1]
    setup.work.step(lambda: False)
    assert setup.executor.batches[-1] == left


def test_cached_prefixes_stay(setup: Setup) -> None:
    """The KV of ended requests is neither evicted nor written to."""
    kept = 500 * TOKENS_EACH
    table = BlockTable()
    assert setup.kv.reserve(range(kept), table) == 0
    setup.kv.remember(range(kept), kept, table)
    held = set(table.blocks)
    setup.kv.release(table)
    setup.finish()
    assert setup.kv.cached_tokens == kept
    used = {
        block
        for batch in setup.executor.batches
        for request in batch
        for first, end in request.runs
        for block in range(first, end)
    }
    assert used
    assert not used & held
    assert setup.executor.forgotten == 0


def test_no_batch_with_long_layers_runs(tmp_path: Path) -> None:
    """Those of few tokens do, so that a profile that predicts too long times is found out."""
    setup = Setup(tmp_path)
    slow = CostModel(replace(ROOFLINE, per_launch=2 * LAYERS * LONGEST_LAYER_SECONDS))
    setup.work = Recalibration(
        cast("Executor", setup.executor), setup.kv, slow, setup.store,
        chunk=512, longest=2048, layers=LAYERS, clock=lambda: setup.executor.now,
    )  # fmt: skip
    setup.work.step(lambda: False)
    assert sum(len(r.tokens) for r in setup.executor.batches[0]) <= FEW_TOKENS
    setup.finish()
    assert slow.prefill_seconds(128, 0) < LONGEST_LAYER_SECONDS


def test_short_models_and_small_caches_are_respected(tmp_path: Path) -> None:
    setup = Setup(tmp_path, blocks=10)
    setup.finish()
    batches: list[Any] = setup.executor.batches
    assert batches
    assert all(len(r.runs) and max(end for _, end in r.runs) <= 10 for b in batches for r in b)
