"""Faster modules give what the stock ones give."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, OlmoConfig

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.batch.flat import SpanRequest, last_tokens
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.layers.cpu import FusedLayer, FusedRMSNorm, PackedLinear, optimise
from pla_serve.engine.layers.cpu.layer import TurningRotary
from pla_serve.engine.layers.cpu.linear import FEW_TOKENS
from pla_serve.engine.layers.cpu.probe import same_results
from tests.engine.tiny import BLOCK, CONFIGS, FUSED, SIZES, new_runner, reference_model

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def linear_of(weight: torch.Tensor, bias: bool) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    linear.requires_grad_(False).weight.copy_(weight)
    return linear


@pytest.mark.parametrize("tokens", [0, 1, 3, FEW_TOKENS, FEW_TOKENS + 1, 64, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "exact in float16"])
def test_packed_linear(tokens: int, bias: bool, kind: str) -> None:
    torch.manual_seed(tokens)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    weight = torch.randn(40, 48, dtype=dtype)
    linear = linear_of(weight.half().float() if "exact" in kind else weight, bias)
    packed = PackedLinear.of(linear)
    inputs = torch.randn(tokens, 48, dtype=dtype)
    other = torch.randn(tokens, 40, dtype=dtype)
    plain = linear(inputs)
    expected = {
        "plain": plain,
        "swish": torch.nn.functional.silu(plain),
        "add": plain + other,
        "mul": plain * other,
    }
    got = {
        "plain": packed(inputs.unsqueeze(0))[0],
        "swish": packed.then(inputs, "swish"),
        "add": packed.with_other(inputs, other, "add"),
        "mul": packed.with_other(inputs, other, "mul"),
    }
    for name, value in expected.items():
        tolerance = TOLERANCE[dtype] * (1 + other.abs().max().item() if tokens else 1)
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_half_width_weights_only_where_nothing_is_lost() -> None:
    exact = torch.randn(8, 8).half().float()
    for weight in (exact + 2**-20, exact * 2**20, exact.bfloat16()):
        assert PackedLinear(weight, None).narrow is None
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert PackedLinear(exact, None).narrow is not None


@pytest.mark.parametrize("bias", [True, False])
def test_joined_linears(bias: bool) -> None:
    linears = [linear_of(torch.randn(n, 16), bias) for n in (8, 3, 5)]
    inputs = torch.randn(20, 16)
    expected = torch.cat([linear(inputs) for linear in linears], dim=-1)
    torch.testing.assert_close(PackedLinear.of(*linears)(inputs), expected)
    with pytest.raises(ValueError, match="bias"):
        PackedLinear.of(linear_of(torch.randn(2, 16), not bias), *linears)


def engine_model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=IMPLEMENTATION, dtype=dtype
    )
    for index, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:  # norms are ones and biases zeros, which would hide mistakes
            generator = torch.Generator().manual_seed(index)
            parameter.data += torch.rand(parameter.shape, generator=generator).to(dtype)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_layers_are_fused(name: str, dtype: torch.dtype) -> None:
    """`optimise` compares each with the stock layer first; tests of outputs run the result."""
    model = engine_model(name, dtype)
    optimise(model)
    assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)
    assert isinstance(model.lm_head, PackedLinear)


def test_a_layer_that_computes_otherwise_is_told_apart() -> None:
    model = engine_model("llama")
    stock = model.model.layers[0]
    rotary = TurningRotary(model.model.rotary_emb)
    with torch.no_grad():
        assert same_results(stock, FusedLayer(stock), rotary)
        for change in ("act_fn", "head_order", "scaling"):
            fused = FusedLayer(stock)
            if change == "act_fn":
                stock.mlp.act_fn, kept = torch.nn.GELU(), stock.mlp.act_fn
            elif change == "head_order":
                fused.out = PackedLinear(stock.self_attn.o_proj.weight.roll(8, 1), None)
            else:
                fused.scaling *= 1.5
            assert not same_results(stock, fused, rotary), change
            if change == "act_fn":
                stock.mlp.act_fn = kept


def test_a_layer_that_is_built_otherwise_is_left_alone() -> None:
    """Olmo has layer norms without weights."""
    config = OlmoConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION).eval()
    optimise(model.requires_grad_(False))
    assert not [m for m in model.modules() if isinstance(m, FusedLayer)]
    assert not [m for m in model.modules() if type(m) is torch.nn.Linear]


def test_a_llama_with_another_attention_is_replaced_part_by_part() -> None:
    model = type(reference_model("llama"))(reference_model("llama").config).eval()
    model.load_state_dict(reference_model("llama").state_dict())
    optimise(model.requires_grad_(False))
    assert not [m for m in model.modules() if type(m) is torch.nn.Linear]
    assert sum(isinstance(m, FusedRMSNorm) for m in model.modules()) == 7
    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, reference_model("llama")(ids).logits)


def test_a_norm_that_differs_is_left_alone() -> None:
    """Gemma's adds one to its weight."""
    model = AutoModelForCausalLM.from_config(GemmaConfig(**SIZES, head_dim=8)).eval()
    optimise(model.requires_grad_(False))
    assert not [m for m in model.modules() if isinstance(m, FusedRMSNorm)]


def test_a_processor_without_bfloat16_keeps_its_plain_linears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for dtype, packed in ((torch.float32, True), (torch.bfloat16, False)):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, dtype=dtype)).requires_grad_(False)
        optimise(model)
        assert isinstance(model[0], PackedLinear) == packed
    model = engine_model("llama", torch.bfloat16)
    optimise(model)
    assert not [m for m in model.modules() if isinstance(m, FusedLayer | PackedLinear)]


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_weights_are_not_kept_twice(name: str) -> None:
    if name == "llama":
        model = engine_model(name)
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    else:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8)).requires_grad_(False)
        weight = weakref.ref(model[0].weight)
    optimise(model)
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("name", FUSED)
def test_the_last_layer_computes_wanted_tokens_only(name: str) -> None:
    whole, picking = new_runner(name), new_runner(name)
    for module in whole._model.modules():
        if isinstance(module, FusedLayer):
            assert module.is_last == (module.layer_idx == 2)
            module.is_last = False
    requests = [
        SpanRequest([5, 6, 7, 8, 9], 0, [(0, 2)], True),
        SpanRequest([3] * 9, 0, [(4, 7)], False),
        SpanRequest([4], 0, [(8, 9)], True),
    ]
    for asked in (requests, requests[1:2]):
        batch = stage(asked, BLOCK, DirectUploader())
        wanted = last_tokens(batch)
        assert wanted is not None
        assert [(span.length, span.history) for span in wanted.spans] == [(1, 4), (1, 0)][
            : len(batch.outputs)
        ]
        expected, got = (runner.forward(batch) for runner in (whole, picking))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for slots in (span.runs for span in batch.spans):
            for start, end in slots:
                kept, written = (r._cache.keys[2][start:end] for r in (whole, picking))
                torch.testing.assert_close(written, kept)
    decode = stage([SpanRequest([4], 0, [(8, 9)], True)], BLOCK, DirectUploader())
    assert last_tokens(decode) is None
