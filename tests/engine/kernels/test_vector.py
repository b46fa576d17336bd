"""The vector kernels of every level, against float64."""

from __future__ import annotations

import pytest
import torch

from pla_serve.engine.kernels.vector import Vectors
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
