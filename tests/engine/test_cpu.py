"""Faster modules give what the stock ones give."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig

from pla_serve.engine.cpu import FusedRMSNorm, PackedLinear, optimise
from tests.engine.tiny import SIZES, reference_model


@pytest.mark.parametrize("tokens", [0, 1, 3, 64, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear(tokens: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    linear = torch.nn.Linear(48, 40, bias=bias, dtype=dtype).requires_grad_(False)
    inputs = torch.randn(1, tokens, 48, dtype=dtype)
    packed = PackedLinear(linear)(inputs)
    assert packed.shape == (1, tokens, 40)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(packed, linear(inputs), rtol=tolerance, atol=tolerance)


def test_a_llama_is_replaced_throughout() -> None:
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


def test_weights_are_not_kept_twice() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).requires_grad_(False)
    weight = weakref.ref(model[0].weight)
    optimise(model)
    gc.collect()
    assert weight() is None
