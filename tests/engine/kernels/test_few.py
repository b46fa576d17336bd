"""Linears of few tokens at every level, against float64."""

from __future__ import annotations

import pytest
import torch

from pla_serve.engine.kernels.few import FEW_TOKENS, FewTokens, narrowed
from pla_serve.engine.layers.cpu import FusedRMSNorm, PackedLinear
from pla_serve.engine.layers.cpu.linear import GatedLinear
from tests.engine.levels import NAMES, kernels_of


@pytest.fixture(scope="module", params=NAMES)
def level(request: pytest.FixtureRequest) -> str:
    kernels_of(request.param)
    return str(request.param)


@pytest.fixture
def few(level: str) -> FewTokens:
    found = kernels_of(level).few
    assert found is not None
    return found


def random(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (576, 160), (1536, 64)])
def test_as_exact_as_float32(
    few: FewTokens, shape: tuple[int, int], kind: torch.dtype, threads: int
) -> None:
    inputs, outputs = shape
    weight = random(outputs, inputs).to(kind).float()
    packed = few.pack(weight)
    assert packed is not None
    bias = random(outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in range(1, FEW_TOKENS + 1):
            x, other = random(tokens, inputs), random(tokens, outputs)
            product = x.double() @ weight.double().t() + bias
            truths = {
                "none": product,
                "swish": torch.nn.functional.silu(product),
                "add": product + other,
                "mul": product * other,
            }
            for after, truth in truths.items():
                got = few.linear(x, packed, bias, after, other)  # type: ignore[arg-type]
                assert (got - truth).abs().max() <= 3e-6 * truth.abs().max() + 1e-6, after
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, FEW_TOKENS])
def test_norm_before_and_gate_beside(level: str, tokens: int, dtype: torch.dtype) -> None:
    kernels = kernels_of(level)
    ups, gates = (torch.nn.Linear(96, 64, bias=False).requires_grad_(False) for _ in range(2))
    for linear in (ups, gates):
        linear.weight.copy_(random(64, 96).bfloat16())
        linear.to(dtype)
    norm = FusedRMSNorm(torch.rand(96) + 0.5, 1e-5)
    gated = GatedLinear(gates, ups, kernels)
    x = (random(tokens, 96) * 3).to(dtype)
    got = gated(x, norm)
    normed = torch.nn.functional.rms_norm(x.double(), [96], norm.weight.double(), 1e-5)
    gate = torch.nn.functional.silu(normed @ gates.weight.double().t())
    truth = normed @ ups.weight.double().t() * gate
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert got.dtype == dtype
    assert (got - truth).abs().max() <= tolerance * truth.abs().max()


def test_a_token_does_not_depend_on_the_others_by_more_than_rounding(few: FewTokens) -> None:
    weight = random(64, 576).bfloat16().float()
    packed = few.pack(weight)
    assert packed is not None
    x = random(FEW_TOKENS, 576)
    together = few.linear(x, packed)
    for token in range(FEW_TOKENS):
        alone = few.linear(x[token : token + 1], packed)
        torch.testing.assert_close(alone[0], together[token], rtol=1e-5, atol=1e-4)


def test_only_weights_that_are_smaller_and_fit(few: FewTokens) -> None:
    assert few.pack(random(64, 64)) is None
    assert few.pack(random(64, 40).bfloat16()) is None
    assert few.pack(random(40, 64).bfloat16()) is None
    assert few.pack(random(64, 64).half()) is None, "activations are of other types"
    assert narrowed(random(4, 4).half().float() * 2**-8).dtype == torch.float16
    assert narrowed(random(4, 4).bfloat16().float() * 2**60).dtype == torch.bfloat16
    late = random(100, 100).bfloat16().float()
    late[-1, -1] += 2**-20
    assert narrowed(late) is late


def test_linears_take_it_for_few_tokens_only(level: str) -> None:
    linear = PackedLinear(random(64, 64).bfloat16().float(), None, kernels_of(level))
    assert linear.few_for(FEW_TOKENS) is not None
    assert linear.few_for(FEW_TOKENS + 1) is None
    x = random(1, FEW_TOKENS, 64)
    assert linear(x).shape == x.shape
