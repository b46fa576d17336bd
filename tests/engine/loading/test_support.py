"""Which models are honoured. What is accepted must compute right in pieces; the rest has a name."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedConfig

from pla_serve.engine.loading import (
    AttentionShape,
    UnsupportedModel,
    check_config,
    check_supported,
    decoder_layers,
)
from tests.engine.loading import tiny

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GPT2 = {"n_positions": 64, "n_inner": 48}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

ACCEPTED = [
    ("Llama", {}),
    ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16}),
    ("Mistral", {"sliding_window": None}),
    ("SmolLM3", {"no_rope_layer_interval": 2}),
    ("Olmo2", {}),
    ("Granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    ("Phi3", {"sliding_window": None}),
    ("Gemma", {}),
    ("Cohere", {}),
    ("Glm4", {"partial_rotary_factor": 0.5}),
    ("Starcoder2", {"sliding_window": None}),
    ("GPTNeoX", {}),
    ("GPT2", GPT2),
    ("Arcee", {}),
    ("Helium", {}),
    ("SeedOss", {}),
    ("Ernie4_5", {}),
    ("HunYuanDenseV1", {}),
    ("Nemotron", {}),
    ("Olmo", {}),
    ("Glm", {}),
    ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("Mistral", {"sliding_window": 6}),
    ("Mistral", {"sliding_window": 1}),
    ("Mistral", {"sliding_window": 10**9}),
    ("Ministral", {"sliding_window": 6}),
    ("Exaone4", {"sliding_window": 6}),
    ("Phi3", {"sliding_window": 6}),
    ("Starcoder2", {"sliding_window": 6}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("Cohere2", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    ("Gemma3Text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    ("Mixtral", {"num_local_experts": 4}),
    ("Mixtral", {"num_local_experts": 4, "sliding_window": 6}),
    ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 20}),
    ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0]}),
    ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    ("Qwen3Moe", {**EXPERTS, "num_experts": 1, "num_experts_per_tok": 1}),
    ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 5}),
    ("FlexOlmo", {"num_experts": 5, "num_experts_per_tok": 2}),
    ("GraniteMoe", {"num_local_experts": 4, "residual_multiplier": 0.5}),
    ("GraniteMoeShared", {"num_local_experts": 4, "shared_intermediate_size": 20}),
    ("Olmo3", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
]

TOKENS = torch.arange(20, 40)[None] * 7 % 300
CUTS = (0, 7, 8, 20)


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(value) or "plain"


@pytest.mark.parametrize(("family", "changes"), ACCEPTED, ids=name_of)
def test_an_accepted_model_computes_the_same_in_pieces(
    family: str, changes: dict[str, Any]
) -> None:
    """Chunks with explicit positions on top of KV kept by us give what one stock pass gives."""
    settings = tiny.config(family, **changes)
    shape = check_supported(settings)
    assert shape.layers == 2
    assert shape.query_heads == 4

    stock = tiny.model(copy.deepcopy(settings))
    with torch.no_grad():
        expected = stock(input_ids=TOKENS, use_cache=False).logits
        pieces = _in_pieces(stock, shape)
    torch.testing.assert_close(pieces, expected, atol=1e-4, rtol=1e-4)


def _in_pieces(model: Any, shape: AttentionShape) -> torch.Tensor:
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        scaling: float | None = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        assert key.shape[1::2] == (shape.kv_heads, shape.head_dim)
        before = kept.get(module.layer_idx)
        if before is not None:
            key, value = torch.cat((before[0], key), 2), torch.cat((before[1], value), 2)
        kept[module.layer_idx] = (key, value)
        lower = key.shape[2] - query.shape[2]
        allowed = torch.ones(query.shape[2], key.shape[2]).tril(lower).bool()
        if shape.windows and (window := shape.windows[module.layer_idx]) is not None:
            allowed = allowed.triu(lower - window + 1)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None

    AttentionInterface.register("pla_test_pieces", attention)
    model.set_attn_implementation("pla_test_pieces")
    logits = [
        model(
            input_ids=TOKENS[:, start:end],
            position_ids=torch.arange(start, end)[None],
            use_cache=False,
        ).logits
        for start, end in itertools.pairwise(CUTS)
    ]
    return torch.cat(logits, 1)


REFUSED = [
    ("Mistral", {"sliding_window": 0}, "mask of 0 tokens"),
    ("Mistral", {"sliding_window": -3}, "mask of -3 tokens"),
    ("Gemma3Text", {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
    ("Gemma3Text", {"attn_logit_softcapping": 30.0}, "soft-capping"),
    ("Gemma2", {}, "soft-capping"),
    ("Gemma3Text", {"use_bidirectional_attention": True}, "causal"),
    ("Gemma2", {"layer_types": ["full_attention"] * 2}, "soft-capping"),
    ("Llama4Text", {}, "experts"),
    ("DeepseekV3", {}, "experts"),
    ("MiniCPM3", {}, "latent attention"),
    ("GptOss", {}, "experts"),
    ("Qwen3Moe", {**EXPERTS, "num_experts_per_tok": 7}, "choose 7 of 6 experts"),
    ("Phimoe", {}, "experts"),
    ("Glm4Moe", {}, "experts"),
    ("T5", {}, "encoder-decoder"),
    ("Bart", {}, "encoder-decoder"),
    ("Bloom", {}, "cannot be replaced"),
    ("Mpt", {}, "attn_config"),
    ("Falcon", {"alibi": True}, "ALiBi"),
    ("GPTJ", {}, "cannot be replaced"),
    ("Mamba", {}, "linear_attention"),
    ("Jamba", {}, "experts"),
    ("Qwen3_5Text", {}, "linear_attention"),
    ("RecurrentGemma", {}, "linear_attention"),
    ("Rwkv", {}, "cannot be replaced"),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
    ("DiffLlama", {}, "exactly once"),
    ("Bert", {"is_decoder": False}, "causal"),
    ("Mllama", {}, "vision_config"),
    ("Gemma3", {}, "vision_config"),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("Llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED, ids=name_of)
def test_a_refusal_names_architecture_and_reason(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    settings = tiny.config(family, **changes)
    with pytest.raises(UnsupportedModel, match="is not supported") as refusal:
        check_supported(settings)
    message = str(refusal.value)
    assert reason in message
    assert settings.model_type in message
    assert "Llama, Qwen2, Qwen3" in message  # the cure


def test_longrope_is_refused_from_the_config_alone() -> None:
    """The factors of this rotary embedding depend on the longest sequence of a batch."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32, **factors}
    settings = tiny.config("Phi3", sliding_window=None, rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match="longrope"):
        check_config(settings)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"sliding_window": 4}, "sliding_window"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"something_new": 1}, "something_new"),
        ({"is_causal": False}, "not causal"),
    ],
    ids=name_of,
)
def test_what_a_layer_asks_of_its_attention_decides_not_the_config(
    monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], reason: str
) -> None:
    """A model that passes something new to its attention is refused, though no field says so."""
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs, **extra)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(UnsupportedModel, match=reason):
        check_supported(tiny.config("Llama"))


def test_a_convolution_beside_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.LlamaMLP.__init__

    def init(self: Any, settings: PreTrainedConfig) -> None:
        stock(self, settings)
        self.mixer = torch.nn.Conv1d(4, 4, 3)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)
    with pytest.raises(UnsupportedModel, match="mixes tokens outside attention"):
        check_supported(tiny.config("Llama"))


def test_the_check_leaves_the_config_as_it_was() -> None:
    settings = tiny.config("Llama")
    before = settings.to_dict(), settings._attn_implementation
    check_supported(settings)
    assert (settings.to_dict(), settings._attn_implementation) == before


def test_a_nonsense_config_is_refused_not_a_crash() -> None:
    with pytest.raises(UnsupportedModel, match="cannot build it"):
        check_supported(tiny.config("Llama", intermediate_size=-1))


def test_the_layers_are_found_in_order() -> None:
    model = tiny.model(tiny.config("Qwen3"))
    assert list(decoder_layers(model, 2)) == list(model.model.layers)
    with pytest.raises(UnsupportedModel, match="0 lists of 5"):
        decoder_layers(model, 5)
