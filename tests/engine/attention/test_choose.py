"""A backend is taken only if it gives what the reference gives, and its refusal says why."""

from __future__ import annotations

from random import Random

import pytest
import torch

pytest.importorskip("triton")

from pla_serve.engine.attention.choose import choose_backend, probe
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.paged import PagedAttention, Tile
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.attention.tuning import variants
from pla_serve.engine.attention.varlen import rectangle
from pla_serve.engine.batch.flat import FlatBatch, Paged
from pla_serve.engine.device.capture import FixedPass, NoCapture
from pla_serve.engine.kv.cache import KVCache, KVShape
from tests.engine.attention.problems import make_problem

CPU = torch.device("cpu")
SHAPE = KVShape(3, 2, 16, torch.float32)


def test_backends_that_are_right_pass() -> None:
    for backend in (PaddedAttention(SdpaCpu()), PagedAttention(8)):
        assert probe(backend, SHAPE, 6, 16, CPU) is None
    narrow = KVShape(3, 1, 16, torch.bfloat16)
    assert probe(PagedAttention(1), narrow, 4, 16, CPU) is None


class Forgetful(SdpaCpu):
    """Misses the newest key of each sequence that has any history."""

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        right = super().attend(layer, query, cache, batch, scaling)
        return torch.cat([right[:-1], right[-1:] * 3])


class Greedy(PagedAttention):
    """Reads one key too many: NaN in poisoned memory."""

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        assert batch.paged is not None
        batch.paged.contexts.add_(1)
        try:
            return super().attend(layer, query, cache, batch, scaling)
        finally:
            batch.paged.contexts.sub_(1)


class Absent(SdpaCpu):
    def attend(self, *_: object) -> torch.Tensor:
        raise NotImplementedError("no kernel for this device\nat all")


def test_backends_that_are_wrong_are_found_out() -> None:
    assert "differ" in (probe(PaddedAttention(Forgetful()), SHAPE, 2, 16, CPU) or "")
    assert "differ" in (probe(Greedy(8), SHAPE, 2, 16, CPU) or "")
    assert "no kernel for this device" in (probe(Absent(), SHAPE, 2, 16, CPU) or "")


class Frozen(NoCapture):
    """Replays what was computed at the capture, as a graph does whose inputs were left outside."""

    def capture(self, run: FixedPass) -> FixedPass:
        output = run()
        return lambda: output


class Refusing(NoCapture):
    def capture(self, run: FixedPass) -> FixedPass:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_will_be_captured_is_tried_as_a_capture() -> None:
    def reason(capturer: NoCapture) -> str:
        return probe(PaddedAttention(SdpaCpu()), SHAPE, 6, 16, CPU, capturer) or ""

    assert reason(NoCapture()) == ""
    assert "captured and replayed, its results differ" in reason(Frozen())
    assert "it cannot be captured (RuntimeError: operation not" in reason(Refusing())
    assert "--no-graphs" in reason(Refusing())


def test_a_cpu_has_one_and_says_so() -> None:
    name, backend = choose_backend("auto", SHAPE, 2, 16, CPU)
    assert name == "sdpa"
    assert isinstance(backend, SdpaCpu)
    with pytest.raises(ValueError, match="triton needs a CUDA device"):
        choose_backend("triton", SHAPE, 2, 16, CPU)


def test_tables_as_rectangles() -> None:
    problem = make_problem(1, [(3, 9), (1, 0), (20, 4)], padding=(2, 1))
    table = rectangle(problem.batch)
    assert table.shape == (4, 6)
    for row, request in zip(table.tolist(), problem.requests, strict=False):
        blocks = [block for first, end in request.runs for block in range(first, end)]
        assert row[: len(blocks)] == blocks


@pytest.mark.parametrize("heads", [(28, 4), (40, 8), (32, 8), (9, 3), (16, 16), (64, 1)])
@pytest.mark.parametrize("processors", [108, 132])
def test_every_form_of_the_kernel_is_compiled_at_start(
    heads: tuple[int, int], processors: int
) -> None:
    """Whatever batch comes later finds its tile and its splits among those of the trial."""
    query_heads, kv_heads = heads
    group = query_heads // kv_heads
    backend = PagedAttention(processors)

    def form(lengths: list[tuple[int, int]]) -> tuple[Tile, int]:
        tokens = sum(new for new, _ in lengths)
        empty = torch.empty(0, dtype=torch.int32)
        paged = Paged(
            query_starts=empty,
            contexts=torch.empty(len(lengths)),
            table_starts=empty,
            table=empty,
            block_tokens=16,
            most_query=max(new for new, _ in lengths),
            most_context=max(new + history for new, history in lengths),
        )
        return backend.form(paged, tokens, group, kv_heads, torch.bfloat16)

    compiled = {form([one]) for one in variants(group)}
    rng = Random(0)
    for _ in range(3000):
        count = rng.choice((1, 1, 1, 2, 3, 8, 40))
        lengths = [
            (rng.choice((1, 1, rng.randint(1, 100), rng.randint(1, 8000))), rng.randint(0, 40_000))
            for _ in range(count)
        ]
        assert form(lengths) in compiled, lengths
