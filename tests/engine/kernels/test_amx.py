"""The matrix unit's float32 kernels: as exact as float32, never in the way where it lacks."""

from __future__ import annotations

import pytest
import torch

from pla_serve.engine.kernels.amx import Tiles, TileWeight
from pla_serve.engine.kernels.open import CpuKernels
from pla_serve.engine.layers.cpu import FusedRMSNorm, PackedLinear
from pla_serve.engine.layers.cpu.linear import FEW_TOKENS
from tests.engine.levels import kernels_of


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    found = kernels_of("amx").tiles
    assert found is not None
    return found


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 32, 32), (13, 64, 96), (33, 576, 160), (300, 1536, 64)])
def test_as_exact_as_float32(
    tiles: Tiles, shape: tuple[int, int, int], threads: int, exact: bool
) -> None:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x, w, b, other = (
        torch.randn(*size, generator=generator)
        for size in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    w = w.half().float() if exact else w
    weight = TileWeight(w)
    assert weight.parts == (2 if exact else 3)
    after = {
        "none": lambda y: y,
        "swish": torch.nn.functional.silu,
        "add": lambda y: y + other.to(y.dtype),
        "mul": lambda y: y * other.to(y.dtype),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, function in after.items():
            truth = function(x.double() @ w.double().t() + b)
            plain = function(torch.nn.functional.linear(x, w, b))
            got = tiles.linear(x, weight, b, name, other)  # type: ignore[arg-type]
            scale = truth.abs().max().item()
            error, usual = ((y - truth).abs().max().item() / scale for y in (got, plain))
            assert error <= 2 * usual + 1e-6, name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 32, 32), (13, 64, 96), (300, 576, 160), (600, 1536, 64)])
def test_norm_before_and_gate_beside(
    tiles: Tiles, shape: tuple[int, int, int], threads: int
) -> None:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x, up, gate = (
        torch.randn(size, inputs, generator=generator) * scale
        for size, scale in ((rows, 3), (outputs, 1), (outputs, 0.1))
    )
    norm = FusedRMSNorm(torch.rand(inputs, generator=generator) + 0.5, 1e-5)

    def stock(kind: torch.dtype) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(x.to(kind), [inputs], norm.weight.to(kind), 1e-5)
        return normed @ up.to(kind).t() * torch.nn.functional.silu(normed @ gate.to(kind).t())

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = tiles.linear(x, TileWeight(up), None, gate=TileWeight(gate), norm=norm)
    finally:
        torch.set_num_threads(before)
    truth = stock(torch.float64)
    scale = truth.abs().max().item()
    error, usual = ((y - truth).abs().max().item() / scale for y in (got, stock(torch.float32)))
    assert error <= 2 * usual + 1e-6


def test_a_row_does_not_depend_on_the_others(tiles: Tiles) -> None:
    x, weight = torch.randn(200, 576), TileWeight(torch.randn(64, 576))
    together = tiles.linear(x, weight, None)
    for start, end in ((0, 13), (13, 77), (77, 200)):
        assert torch.equal(tiles.linear(x[start:end], weight, None), together[start:end])


def test_large_and_small_numbers_survive(tiles: Tiles) -> None:
    x = torch.tensor([[1e30, 1e-30, -1e30, 1.0] * 8])
    weight = torch.eye(32)
    torch.testing.assert_close(tiles.linear(x, TileWeight(weight), None), x, rtol=1e-7, atol=0)
    extreme = torch.tensor([[-200.0, -50.0, 50.0, 200.0] * 8])
    torch.testing.assert_close(
        tiles.linear(extreme, TileWeight(weight), None, "swish"), torch.nn.functional.silu(extreme)
    )


def test_only_sizes_that_fit_take_it(tiles: Tiles) -> None:
    for size in ((48, 64), (64, 48)):
        assert PackedLinear(torch.randn(size), None, CpuKernels("amx", tiles)).tiled is None
    odd = PackedLinear(torch.randn(64, 64).bfloat16(), None, CpuKernels("amx", tiles))
    assert odd.tiled is None
    linear = PackedLinear(torch.randn(64, 64).half().float(), None, CpuKernels("amx", tiles))
    assert linear.tiled is not None
    x = torch.randn(1, FEW_TOKENS + 1, 64)
    assert linear(x).shape == x.shape


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 0), (33, 0), (64, 31), (100, 156), (300, 500)])
@pytest.mark.parametrize("heads", [(4, 4, 32), (6, 2, 64)])
def test_attention_as_exact_as_float32(
    tiles: Tiles, heads: tuple[int, int, int], sizes: tuple[int, int], threads: int
) -> None:
    (queries, kv_heads, dim), (tokens, history) = heads, sizes
    generator = torch.Generator().manual_seed(tokens)
    joined = torch.randn(tokens, queries + 3, dim, generator=generator) * 3
    query = joined[:, :queries].transpose(0, 1)
    memory = torch.randn(2, history + tokens + 7, kv_heads, dim, generator=generator)
    keys, values = memory[:, 7:]
    mask = torch.ones(tokens, history + tokens, dtype=torch.bool).tril(history)

    def stock(dtype: torch.dtype) -> torch.Tensor:
        parts = (query, keys.transpose(0, 1), values.transpose(0, 1))
        q, k, v = (part.to(dtype).unsqueeze(0) for part in parts)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True
        )
        return attended[0].transpose(0, 1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = tiles.attention(query, keys, values, history, 0.2)
    finally:
        torch.set_num_threads(before)
    truth = stock(torch.float64)
    error, usual = ((y - truth).abs().max().item() for y in (got, stock(torch.float32)))
    assert error <= 2 * usual + 1e-6


def test_attention_passes_on_what_is_no_number(tiles: Tiles) -> None:
    query, keys, values = torch.randn(1, 70, 32), torch.randn(70, 1, 32), torch.randn(70, 1, 32)
    keys[40, 0, 3] = torch.nan
    attended = tiles.attention(query, keys, values, 0, 0.2)
    assert attended[:40].isfinite().all()
    assert attended[40:].isnan().all()


def test_attention_takes_only_heads_that_fit() -> None:
    wide = torch.float32
    assert Tiles.attends(9, 3, 64, wide)
    assert not Tiles.attends(9, 3, 48, wide)
    assert not Tiles.attends(64, 1, 64, wide)
    assert not Tiles.attends(9, 3, 64, torch.bfloat16)
