"""The vector kernels of every level, against float64."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.attention.vector import VectorAttention
from pla_serve.engine.kernels.amx import Tiles
from pla_serve.engine.kernels.vector import Vectors
from tests.engine.attention.problems import make_problem
from tests.engine.levels import NAMES, kernels_of


@pytest.fixture(scope="module", params=NAMES)
def vectors(request: pytest.FixtureRequest) -> Vectors:
    found = kernels_of(request.param).vectors
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("heads", [(4, 4, 32), (9, 3, 64), (5, 1, 80)])
def test_rotary_and_cache(
    vectors: Vectors, heads: tuple[int, int, int], tokens: int, dtype: torch.dtype
) -> None:
    queries, kv_heads, dim = heads
    torch.manual_seed(tokens)
    given = torch.randn(tokens, queries + 2 * kv_heads, dim).to(dtype)
    turn = torch.polar(torch.ones(tokens, 1, dim // 2), torch.randn(tokens, 1, dim // 2) * 50)
    slots = torch.randperm(100)[:tokens]
    keys, values = torch.full((2, 100, kv_heads, dim), torch.nan, dtype=dtype)
    pairs = given[:, :-kv_heads].float().reshape(tokens, -1, dim // 2, 2)
    turned = torch.view_as_complex(pairs) * turn
    expected = torch.view_as_real(turned).reshape(tokens, -1, dim).to(dtype)
    original = given.clone()
    vectors.rotary(given, turn, slots, keys, values)
    torch.testing.assert_close(given[:, :queries], expected[:, :queries])
    torch.testing.assert_close(keys[slots], expected[:, queries:])
    assert torch.equal(values[slots], original[:, -kv_heads:])
    others = torch.ones(100, dtype=torch.bool).index_fill(0, slots, False)
    assert keys[others].isnan().all()
    assert values[others].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 16), (3, 5, 48), (70, 576)])
def test_norm(vectors: Vectors, size: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs, weight = (torch.randn(size) * 3).to(dtype), torch.rand(size[-1]) + 0.5
    truth = torch.nn.functional.rms_norm(inputs.double(), [size[-1]], weight.double(), 1e-5)
    assert vectors.norms(inputs)
    assert not vectors.norms(inputs[..., :8])
    got = vectors.norm(inputs, weight, 1e-5)
    assert got.shape == inputs.shape
    torch.testing.assert_close(got, truth.to(dtype))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_attention_of_random_batches(vectors: Vectors, seed: int) -> None:
    rng = Random(seed)
    lengths = [
        (rng.choice((1, 1, 2, 7, 33, 90)), rng.choice((0, 0, 1, 31, 64, 97, 200)))
        for _ in range(rng.randint(1, 4))
    ]
    dtype = rng.choice((torch.float32, torch.bfloat16))
    problem = make_problem(
        seed,
        lengths,
        heads=rng.choice((1, 2, 3)),
        group=rng.choice((1, 3, 8)),
        dim=rng.choice((16, 48, 64, 80, 96, 128)),
        dtype=dtype,
    )
    backend = VectorAttention(vectors)
    got = backend.attend(0, problem.query, problem.cache, problem.batch, 0.2).double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - problem.expected(0.2)).abs().max() <= tolerance


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [[(1, 5000)], [(1, 4097), (3, 1100)], [(600, 900)]])
def test_attention_of_long_contexts(
    vectors: Vectors, lengths: list[tuple[int, int]], threads: int
) -> None:
    problem = make_problem(1, lengths, heads=2, group=3, dim=64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backend = VectorAttention(vectors)
        got = backend.attend(0, problem.query, problem.cache, problem.batch, 0.125).double()
    finally:
        torch.set_num_threads(before)
    assert (got - problem.expected(0.125)).abs().max() <= 5e-6


def test_attention_passes_on_what_is_no_number(vectors: Vectors) -> None:
    problem = make_problem(1, [(70, 0)], heads=1, group=2, dim=32)
    start, _ = problem.batch.spans[0].runs[0]
    problem.cache.keys[0][start, 0, 3] = torch.nan
    got = VectorAttention(vectors).attend(0, problem.query, problem.cache, problem.batch, 0.2)
    assert got.isnan().all()


def test_attention_takes_only_heads_that_fit() -> None:
    assert Vectors.attends(9, 3, 64, torch.float32)
    assert Vectors.attends(9, 3, 80, torch.bfloat16)
    assert not Vectors.attends(9, 3, 8, torch.float32)
    assert not Vectors.attends(9, 3, 272, torch.float32)
    assert not Vectors.attends(130, 2, 64, torch.float32)
    assert not Vectors.attends(9, 3, 64, torch.float16)


class CountedTiles(Tiles):
    """Stands for the matrix unit: remembers what it attended, and gives what torch gives."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        history: int,
        scaling: float,
    ) -> torch.Tensor:
        self.lengths.append(query.shape[1])
        mask = torch.ones(query.shape[1], len(keys), dtype=torch.bool).tril(history)
        parts = (query, keys.transpose(0, 1), values.transpose(0, 1))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(part.unsqueeze(0) for part in parts), attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return attended[0].transpose(0, 1)


@pytest.mark.parametrize("lengths", [[(70, 3)], [(1, 50), (64, 0), (63, 9), (100, 31)], [(5, 6)]])
def test_the_matrix_unit_takes_long_sequences_only(
    vectors: Vectors, lengths: list[tuple[int, int]]
) -> None:
    problem = make_problem(3, lengths, heads=2, group=3, dim=32)
    tiles = CountedTiles()
    got = VectorAttention(vectors, tiles).attend(
        0, problem.query, problem.cache, problem.batch, 0.2
    )
    assert tiles.lengths == [new for new, _ in lengths if new >= 64]
    assert (got.double() - problem.expected(0.2)).abs().max() <= 1e-5
