"""Layers whose tokens see the latest tokens only, against plain arithmetic in float64."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.attention.choose import choose_backend
from pla_serve.engine.attention.interface import AttentionBackend
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.sdpa import SdpaCpu, SdpaReference
from pla_serve.engine.attention.vector import attention_of
from pla_serve.engine.attention.window import MOST_PIECE, WindowedAttention, cut
from pla_serve.engine.kv.cache import KVShape
from tests.engine.attention.problems import CPU, Problem, make_problem
from tests.engine.levels import NAMES, kernels_of

LENGTHS = ((1, 0), (1, 3), (1, 90), (2, 0), (2, 60), (7, 1), (20, 0), (33, 50), (5, 4))


def right(problem: Problem, window: int) -> torch.Tensor:
    """(real tokens, heads, dim) float64: each token over the latest ``window`` tokens."""
    outputs = []
    cache = problem.cache
    for span in problem.batch.spans:
        slots = torch.cat([torch.arange(start, end) for start, end in span.runs])
        groups = problem.query.shape[0] // cache.shape.heads
        for token in range(span.length):
            end = span.history + token + 1
            seen = slots[max(0, end - window) : end]
            keys = cache.keys[0][seen].double().repeat_interleave(groups, 1)
            values = cache.values[0][seen].double().repeat_interleave(groups, 1)
            query = problem.query[:, span.start + token].double()
            weights = (torch.einsum("hd,shd->hs", query, keys) * 0.3).softmax(-1)
            outputs.append(torch.einsum("hs,shd->hd", weights, values))
    return torch.stack(outputs)


def attend(backend: AttentionBackend, problem: Problem) -> torch.Tensor:
    return backend.attend(0, problem.query, problem.cache, problem.batch, 0.3)


@pytest.mark.parametrize("level", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    window=st.sampled_from((1, 2, 4, 5, 17, 40, 1000)),
    group=st.sampled_from((1, 3)),
)
def test_each_token_sees_its_window(level: str, seed: int, window: int, group: int) -> None:
    """Memory that belongs to no sequence is NaN, so one key too many shows."""
    rng = Random(seed)
    problem = make_problem(seed, rng.choices(LENGTHS, k=rng.randint(1, 5)), group=group)
    kernels = kernels_of(level)
    backend = WindowedAttention([window], lambda: attention_of(kernels))
    torch.testing.assert_close(
        attend(backend, problem).double(), right(problem, window), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("window", [100, 200, 700])
def test_prompts_of_several_windows_and_pieces(window: int) -> None:
    problem = make_problem(1, [(3 * MOST_PIECE + 5, 300), (1, 900), (700, 0)])
    backend = WindowedAttention([window], SdpaCpu)
    torch.testing.assert_close(
        attend(backend, problem).double(), right(problem, window), rtol=1e-4, atol=1e-5
    )


def test_bfloat16_and_padding() -> None:
    problem = make_problem(2, [(40, 3), (1, 70)], dtype=torch.bfloat16, padding=(3, 1))
    for make in (SdpaReference, SdpaCpu):
        got = attend(PaddedAttention(WindowedAttention([9], make)), problem)[: problem.real]
        torch.testing.assert_close(got.double(), right(problem, 9), rtol=0.05, atol=0.02)


def test_a_layer_without_a_window_sees_all_and_batches_alternate() -> None:
    problems = [make_problem(seed, [(30, 8), (1, 50)]) for seed in (3, 4)]
    backend = WindowedAttention([None], SdpaCpu)
    mixed = WindowedAttention([6, None, 6], SdpaCpu)
    for problem in (*problems, *problems):
        plain = attend(SdpaCpu(), problem)
        assert torch.equal(attend(backend, problem), plain)
        for _ in range(2):
            torch.testing.assert_close(
                attend(mixed, problem).double(), right(problem, 6), rtol=1e-4, atol=1e-5
            )


def test_parts_of_runs() -> None:
    runs = [(48, 80), (144, 147)]
    assert cut(runs, 30, 34) == ((78, 80), (144, 146))
    assert cut(runs, 0, 35) == ((48, 80), (144, 147))
    assert cut(runs, 32, 33) == ((144, 145),)
    assert cut(runs, 5, 5) == ()


def test_windows_choose_a_backend_that_has_them(caplog: pytest.LogCaptureFixture) -> None:
    shape = KVShape(2, 2, 16, torch.float32)
    with caplog.at_level("INFO"):
        name, backend = choose_backend("auto", shape, 2, 16, CPU, windows=(512, None))
    assert name == "sdpa"
    assert isinstance(backend, WindowedAttention)
    assert "1 of 2 layers have a sliding window (512 tokens)" in caplog.text
    with pytest.raises(ValueError, match="triton has no sliding windows"):
        choose_backend("triton", shape, 2, 16, torch.device("cuda"), windows=(512, None))
    name, backend = choose_backend("auto", shape, 2, 16, torch.device("cuda"), windows=(512, None))
    assert name == "sdpa"
    assert isinstance(backend, PaddedAttention)
