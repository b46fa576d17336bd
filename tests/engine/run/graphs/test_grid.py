"""Padded to a captured shape, a batch gives what it gives alone, and touches nobody's KV."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, Scratch, stage
from pla_serve.engine.device.capture import FixedPass, NoCapture
from pla_serve.engine.kv.blocks import BlockRun, extend_runs
from pla_serve.engine.kv.cache import KVCache
from pla_serve.engine.run.graphs.grid import HOT, GridLimits, ShapeGrid
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.policy.shapes.choice import choose_shapes, parse_shapes
from pla_serve.policy.shapes.ladder import Shape
from tests.engine.tiny import BLOCK, MAX_BLOCKS, SAMPLE, VOCABULARY, padded_runner

CPU = torch.device("cpu")
SCRATCH = Scratch(MAX_BLOCKS * BLOCK, BLOCK)
SHAPES = [Shape(1, 1), Shape(4, 4), Shape(8, 1), Shape(24, 3), Shape(48, 8)]


def make_grid(
    runner: ModelRunner,
    shapes: list[Shape] = SHAPES,
    capturer: NoCapture | None = None,
    cap: float = 1.0,
) -> ShapeGrid:
    limits = GridLimits(BLOCK, SCRATCH, 512, 64, cap)
    grid = ShapeGrid(
        runner, capturer or NoCapture(), DirectUploader(), shapes, lambda t, b: t + b, limits, CPU
    )
    grid.capture_all()
    return grid


def poison(cache: KVCache) -> None:
    for memory in (*cache.keys, *cache.values):
        memory.fill_(torch.nan)


def requests_of(rng: Random, lengths: list[tuple[int, int]]) -> list[SpanRequest]:
    """Sequences over scattered blocks; their histories have yet to be computed."""
    blocks = rng.sample(range(MAX_BLOCKS), MAX_BLOCKS)
    made = []
    for new, history in lengths:
        runs: list[BlockRun] = []
        extend_runs(runs, [blocks.pop() for _ in range(-(-(new + history) // BLOCK))])
        tokens = [rng.randrange(VOCABULARY) for _ in range(history + new)]
        made.append((tokens, SpanRequest(tokens[history:], history, runs, rng.random() < 0.8)))
    return made


def compute_histories(runner: ModelRunner, made) -> None:  # type: ignore[no-untyped-def]
    for tokens, request in made:
        if request.history:
            before = SpanRequest(tokens[: request.history], 0, request.runs, True)
            runner.forward(stage([before], BLOCK, DirectUploader()))


@pytest.mark.parametrize("name", SAMPLE)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from((0, 1, 3, 4, 5, 17))), min_size=1, max_size=5
    ),
)
def test_poison_and_compare(name: str, seed: int, lengths: list[tuple[int, int]]) -> None:
    """Logits and KV equal those of the batch without padding; all other KV stays poisoned."""
    rng = Random(seed)
    runner = padded_runner(name)
    cache = runner._cache
    made = requests_of(rng, lengths)
    requests = [request for _, request in made]
    outcomes = []
    for padded, carry in ((False, False), (True, False), (False, True), (True, True)):
        poison(cache)
        compute_histories(runner, made)
        batch, carried = carry_some(rng, requests) if carry else (requests, None)
        if padded:
            logits = make_grid(runner).forward(batch, carried)
            assert logits is not None
            logits = logits.clone()
        else:
            logits = runner.forward(stage(batch, BLOCK, DirectUploader(), carried))
        live = [memory[: SCRATCH.first].clone() for memory in (*cache.keys, *cache.values)]
        outcomes.append((logits, live))
    expected, kv = outcomes[0]
    for got, kv_got in outcomes[1:]:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for before, after in zip(kv, kv_got, strict=True):
            assert torch.equal(before.isnan(), after.isnan()), "padding wrote to somebody's KV"
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4, equal_nan=True)


def carry_some(rng: Random, requests: list[SpanRequest]) -> tuple[list[SpanRequest], torch.Tensor]:
    """The same batch, with some single tokens that the host does not know; among the carried ones
    are rows without a token and rows that nobody asks for."""
    carried = [rng.choice((-2, -1, 5)) for _ in range(rng.randint(1, 4))]
    batch = []
    for request in requests:
        if len(request.tokens) == 1 and rng.random() < 0.7:
            row = rng.randint(0, len(carried))
            carried.insert(row, request.tokens[0])
            batch = [
                replace(r, carried=r.carried + 1)
                if r.carried is not None and r.carried >= row
                else r
                for r in batch
            ]
            request = replace(request, tokens=[VOCABULARY - 1], carried=row)
        batch.append(request)
    return batch, torch.tensor(carried)


def test_each_batch_takes_the_cheapest_shape_and_is_counted() -> None:
    grid = make_grid(padded_runner("llama"))
    rng = Random(0)
    for lengths in ([(1, 0)], [(2, 0)], [(1, 0)] * 3, [(30, 0)]):
        assert grid.forward([r for _, r in requests_of(rng, lengths)]) is not None
    assert grid.counts.replays == {"1x1": 1, "4x4": 2, "48x8": 1}
    assert (grid.counts.real_tokens, grid.counts.padding_tokens) == (36, 2 + 1 + 18)


def test_reasons_are_counted() -> None:
    runner = padded_runner("llama")
    rng = Random(0)
    grid = make_grid(runner)
    for lengths in ([(49, 0)], [(1, 0)] * 9):
        assert grid.forward([r for _, r in requests_of(rng, lengths)]) is None
    capped = make_grid(runner, cap=0.3)
    assert capped.forward([r for _, r in requests_of(rng, [(9, 0)])]) is None
    assert grid.counts.fallbacks == {"too_long": 1, "too_many": 1}
    assert capped.counts.fallbacks == {"padding": 1}
    assert make_grid(runner, []).forward([r for _, r in requests_of(rng, [(1, 0)])]) is None


def test_a_shape_that_is_often_missed_is_captured_in_a_quiet_moment() -> None:
    grid = make_grid(padded_runner("llama"), [Shape(8, 2)])
    [(_, request)] = requests_of(Random(0), [(30, 0)])
    for _ in range(HOT):
        assert not grid.capture_hot()
        assert grid.forward([request]) is None
    assert grid.capture_hot()
    assert grid.shapes == (Shape(8, 2), Shape(32, 1))
    assert grid.forward([request]) is not None
    assert not grid.capture_hot()


class Breaking(NoCapture):
    def __init__(self) -> None:
        self.order: list[int] = []

    def capture(self, run: FixedPass) -> FixedPass:
        rows = len(run())
        self.order.append(rows)
        if rows == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run


def test_largest_first_and_a_shape_that_cannot_be_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    capturer = Breaking()
    grid = make_grid(padded_runner("llama"), SHAPES, capturer)
    assert capturer.order == [8, 3, 1, 4, 1]
    assert Shape(24, 3) not in grid.shapes
    assert len(grid.shapes) == len(SHAPES) - 1
    assert "24 tokens, 3 requests cannot be captured" in caplog.text


def test_shapes_by_name() -> None:
    def cost(tokens: int, batch: int) -> float:
        return max(5e-3, 2e-5 * tokens) + 1e-7 * tokens + 1e-6 * batch

    def choose(text: str) -> tuple[Shape, ...]:
        return choose_shapes(text, most_tokens=512, most_batch=32, cost=cost)

    assert choose("64x4, 8x1") == (Shape(64, 4), Shape(8, 1))
    paper = choose("paper")
    assert Shape(512, 2) in paper  # 256 tokens each of 2 requests
    for shapes in (paper, choose("auto")):
        assert {Shape(1, 1), Shape(2, 2), Shape(32, 32)} <= set(shapes)
        assert max(s.tokens for s in shapes) == 512
        assert max(s.batch for s in shapes) == 32
    with pytest.raises(ValueError, match="larger than any batch"):
        choose("1024x4")
    for bad in ("64", "x", "0x4", "64x", "64x4,,"):
        with pytest.raises(ValueError, match="no shape"):
            parse_shapes(bad)
