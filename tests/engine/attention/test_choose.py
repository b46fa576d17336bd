"""A backend is taken only if it gives what the reference gives, and its refusal says why."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.engine.attention.problems import make_problem

from pla_serve.engine.attention.cache import KVCache, KVShape
from pla_serve.engine.attention.choose import choose_backend, probe
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.paged import PagedAttention
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.attention.varlen import rectangle
from pla_serve.engine.forward import FlatBatch

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
