"""The first predictions come from the machine and the model, not from a constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import isfinite

import pytest
import torch

from pla_serve.engine.build.roofline import (
    COPY_BYTES,
    MATRIX,
    OPERATIONS,
    OPERATIONS_PER_LAYER,
    Ceilings,
    ModelSize,
    measure,
    starting_profile,
)
from pla_serve.engine.loading import decoder_layers
from pla_serve.policy.cost import CostModel
from tests.engine.tiny import SIZES, reference_model

CPU = torch.device("cpu")
SIZE = ModelSize(
    layers=30,
    attention_width=576,
    kv_bytes_per_token=46_080,
    layer_parameters=106_000_000,
    head_parameters=28_000_000,
    bytes_each=4,
)
LAPTOP = Ceilings(flops=1e11, bytes_per_second=1e10, operation_seconds=2e-6)


def ticking(step: float) -> Callable[[], float]:
    ticks = count()
    return lambda: next(ticks) * step


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_parameters_are_those_that_tokens_pass_through(name: str) -> None:
    """qwen3 here shares its output matrix with the embedding; llama has one of its own."""
    model = reference_model(name)
    layers = decoder_layers(model, SIZES["num_hidden_layers"])  # type: ignore[arg-type]
    size = ModelSize.of(model, layers, attention_width=32, kv_bytes_per_token=7)
    vocabulary, hidden = SIZES["vocab_size"], SIZES["hidden_size"]
    matrices = 1 if name == "qwen3" else 2
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert size.head_parameters == vocabulary * hidden  # type: ignore[operator]
    assert size.layer_parameters == whole - matrices * size.head_parameters - hidden  # type: ignore[operator]
    assert (size.layers, size.attention_width, size.kv_bytes_per_token) == (3, 32, 7)
    assert size.bytes_each == 4


def test_a_token_passes_through_the_experts_that_it_chooses() -> None:
    model = reference_model("mixtral")  # each token chooses 2 of 4
    layers = decoder_layers(model, SIZES["num_hidden_layers"])  # type: ignore[arg-type]
    size = ModelSize.of(model, layers, attention_width=32, kv_bytes_per_token=7)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    whole = sum(p.numel() for p in layers.parameters())
    assert size.layer_parameters == whole - experts // 2
    assert size.bytes_each == 4


def test_rates_follow_from_work_and_time() -> None:
    ceilings = measure(CPU, torch.float32, ticking(0.25))
    rows, width = MATRIX["cpu"]
    assert ceilings.flops == pytest.approx(2 * rows * width**2 / 0.25)
    assert ceilings.bytes_per_second == pytest.approx(2 * COPY_BYTES["cpu"] / 0.25)
    assert ceilings.operation_seconds == pytest.approx(0.25 / OPERATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clock_too_coarse_does_no_harm(dtype: torch.dtype) -> None:
    ceilings = measure(CPU, dtype, lambda: 1.0)
    profile = starting_profile(SIZE, ceilings)
    assert isfinite(profile.per_token)
    assert profile.per_launch > 0


def test_the_best_of_several_counts() -> None:
    times = iter([0, 9, 10, 11, 20, 25] + [30, 31] * 6)
    ceilings = measure(CPU, torch.float32, lambda: float(next(times)))
    rows, width = MATRIX["cpu"]
    assert ceilings.flops == pytest.approx(2 * rows * width**2 / 1)


def test_a_profile_is_the_roofline_of_the_model() -> None:
    profile = starting_profile(SIZE, LAPTOP)
    assert profile.per_token == pytest.approx(2 * 106e6 / 1e11)
    assert profile.per_attention == pytest.approx(4 * 30 * 576 / 1e11)
    assert profile.per_kv == pytest.approx(46_080 / 1e10)
    assert profile.per_sequence == pytest.approx(2 * 28e6 / 1e11)
    assert profile.per_launch == pytest.approx(134e6 * 4 / 1e10 + 30 * OPERATIONS_PER_LAYER * 2e-6)


def test_a_gpu_and_a_larger_model_start_where_they_are() -> None:
    gpu = Ceilings(flops=4e14, bytes_per_second=2e12, operation_seconds=5e-6)
    large = replace(SIZE, layer_parameters=10**10)
    small, fast, big = (
        CostModel(starting_profile(size, ceilings)).prefill_seconds(2048, 0)
        for size, ceilings in ((SIZE, LAPTOP), (SIZE, gpu), (large, LAPTOP))
    )
    assert fast < small / 100
    assert big > 50 * small
