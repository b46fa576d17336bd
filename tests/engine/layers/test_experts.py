"""The experts of a mixture compute what the stock module computes, whoever shares the batch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.kernels.open import TORCH_ALONE
from pla_serve.engine.layers.cpu import ExpertMlps, optimise
from pla_serve.engine.layers.cpu.experts import experts_of
from tests.engine.levels import NAMES, kernels_of
from tests.engine.tiny import MIXTURES, SIZES

EXPERTS, CHOSEN = 7, 3
CONFIG = Qwen3MoeConfig(
    **SIZES, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=16
)


def stock_model(dtype: torch.dtype = torch.float32, name: str | None = None) -> Any:
    config = MIXTURES[name]() if name else CONFIG
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=IMPLEMENTATION
    )
    return model.eval().requires_grad_(False)


def stock_experts(dtype: torch.dtype = torch.float32) -> Any:
    return stock_model(dtype).model.layers[0].mlp.experts


def problem(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weights, choices = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOSEN)
    return torch.randn(tokens, 32, generator=generator).to(dtype), choices, weights.to(dtype)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["torch", *NAMES])
def test_results_are_those_of_the_stock_module(level: str, dtype: torch.dtype, tokens: int) -> None:
    stock = stock_experts(dtype)
    kernels = TORCH_ALONE if level == "torch" else kernels_of(level)
    made = experts_of(stock, kernels)
    assert made is not None
    given = problem(tokens, dtype)
    got = made(*given)
    assert got.dtype == dtype
    expected = stock(*given) if tokens else given[0]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    scale = float(expected.abs().max()) if tokens else 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


def test_all_tokens_may_choose_the_same_experts() -> None:
    stock = stock_experts()
    made = experts_of(stock, TORCH_ALONE)
    assert made is not None
    hidden, _, weights = problem(20, torch.float32)
    same = torch.tensor([[6, 0, 2]]).expand(20, -1)
    torch.testing.assert_close(
        made(hidden, same, weights), stock(hidden, same, weights), rtol=1e-4, atol=1e-4
    )


def test_what_is_not_a_number_stays_with_its_token() -> None:
    """Padding may be anything, and shares experts with real tokens."""
    made = experts_of(stock_experts(), TORCH_ALONE)
    assert made is not None
    hidden, choices, weights = problem(9, torch.float32)
    clean = made(hidden, choices, weights)
    hidden[4] = torch.nan
    got = made(hidden, choices, weights)
    assert got[4].isnan().all()
    others = [token for token in range(9) if token != 4]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("change", ["is_transposed", "has_bias", "has_post_expert_norm"])
def test_experts_of_another_form_stay_as_they_are(change: str) -> None:
    stock = stock_experts()
    setattr(stock, change, True)
    assert experts_of(stock, TORCH_ALONE) is None


def test_experts_that_compute_otherwise_stay_as_they_are() -> None:
    stock = stock_experts()
    stock.act_fn = nn.GELU()
    assert experts_of(stock, TORCH_ALONE) is None


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_each_family_gets_them_and_its_own_are_freed(name: str) -> None:
    model = stock_model(name=name)
    stacked = [weakref.ref(p) for n, p in model.named_parameters() if n.endswith("gate_up_proj")]
    optimise(model)
    gc.collect()
    found = [module for module in model.modules() if isinstance(module, ExpertMlps)]
    assert len(found) == len(stacked) > 1
    assert not any(weight() is not None for weight in stacked)
