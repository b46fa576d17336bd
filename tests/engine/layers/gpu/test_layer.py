"""Fused layers against stock models, with torch's operations and with the Triton kernels."""

from __future__ import annotations

import logging
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers import gpu
from pla_serve.engine.layers.gpu.operations import Heads, Operations, TorchOperations
from pla_serve.engine.layers.gpu.triton_operations import TritonOperations
from pla_serve.engine.loading import decoder_layers
from pla_serve.engine.run.runner import ModelRunner
from tests.engine.run.graphs.test_grid import compute_histories, requests_of
from tests.engine.tiny import BLOCK, CONFIGS, FUSED_DENSE, MAX_BLOCKS, reference_model, runner

CPU = torch.device("cpu")


@pytest.mark.parametrize("operations", [TorchOperations(), TritonOperations()])
@pytest.mark.parametrize("name", FUSED_DENSE)
def test_a_fused_model_gives_the_same_logits(name: str, operations: Operations) -> None:
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION).eval()
    model.load_state_dict(reference_model(name).state_dict())
    model.requires_grad_(False)
    assert gpu.optimise(model, operations) == config.num_hidden_layers
    layers = decoder_layers(model, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
    shape = KVShape(config.num_hidden_layers, 2, head_dim, torch.float32)
    cache = KVCache(shape, MAX_BLOCKS * BLOCK, CPU)
    fused = ModelRunner(model, layers, cache, PaddedAttention(SdpaCpu()))
    made = requests_of(Random(3), [(7, 5), (1, 9), (12, 0)])
    batch = stage([request for _, request in made], BLOCK, DirectUploader())
    results = []
    for which in (runner(name), fused):
        compute_histories(which, made)
        results.append(which.forward(batch))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_built_otherwise_stays() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation=IMPLEMENTATION)
    layers = decoder_layers(model, 3)
    layers[1].mlp.extra = torch.nn.Linear(2, 2)
    layers[2].input_layernorm.register_forward_hook(lambda module, args, output: output + 1)
    stock = list(layers)
    assert gpu.optimise(model, TorchOperations()) == 1
    assert [now is then for now, then in zip(layers, stock, strict=True)] == [False, True, True]


class NoCompiler(TorchOperations):
    """Triton where there is no C compiler."""

    def rms_norm(self, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")


def test_kernels_that_do_not_run_are_replaced_by_torch(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation=IMPLEMENTATION)
    layers = decoder_layers(model, 3)
    with caplog.at_level(logging.WARNING):
        assert gpu.optimise(model, NoCompiler()) == 3
    assert all(type(layer._operations) is TorchOperations for layer in layers)
    assert [record.getMessage() for record in caplog.records] == [
        "the kernels of fused layers do not run here, torch's are used: "
        "RuntimeError: Failed to find C compiler. Please specify via CC"
    ]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 5),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    dim=st.sampled_from((4, 16, 20)),
    normed=st.booleans(),
    width=st.sampled_from((3, 64, 1030)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_kernels_equal_torch(
    seed: int,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    normed: bool,
    width: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    slow, fast = TorchOperations(), TritonOperations()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size).to(dtype)

    inputs, weight, joint = random(tokens, width), random(width), random(tokens, 2 * width)
    torch.testing.assert_close(
        fast.rms_norm(inputs, weight, 1e-6), slow.rms_norm(inputs, weight, 1e-6), **close
    )
    torch.testing.assert_close(fast.gate(joint), slow.gate(joint), **close)

    query, kv = heads
    norms = (random(dim), random(dim)) if normed else (None, None)
    division = Heads(query, kv, dim, *norms, 1e-6)
    angles = torch.rand(tokens, dim)
    turns = (angles.cos().to(dtype), angles.sin().to(dtype))
    rows = random(tokens, (query + 2 * kv) * dim)
    slots = torch.randperm(9)[:tokens]
    outcomes = []
    for operations in (slow, fast):
        keys, values = torch.full((2, 9, kv, dim), torch.nan, dtype=dtype)
        queries = operations.rotate_and_store(rows.clone(), division, turns, slots, keys, values)
        outcomes.append((queries, keys, values))
    for expected, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, **close, equal_nan=True)
