"""The shares of a model, on ranks that are threads, compute what the whole model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.attention.sdpa import SdpaReference
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.build.engine import EngineCore
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.device.capture import FixedPass, NoCapture
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers import cpu, gpu
from pla_serve.engine.layers.gpu.operations import TorchOperations
from pla_serve.engine.loading import (
    ModelSource,
    ModelUnavailable,
    UnsupportedModel,
    check_supported,
    decoder_layers,
    load_config,
)
from pla_serve.engine.parallel.agreed import AgreedCapture
from pla_serve.engine.parallel.ranks import agree, least
from pla_serve.engine.parallel.share import check_divides, share_of_heads
from pla_serve.engine.parallel.weights import load_share
from pla_serve.engine.run.runner import ModelRunner
from tests.engine.parallel.thread_ranks import Meeting, ThreadRanks, on_each

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 95,  # not divisible by 2 or 4
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, mlp_only_layers=[1]),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, head_dim=8),
}
TOKENS = ([5, 17, 3, 60, 22], [9, 1, 33])
KINDS = ("stock", "cpu", "gpu")
"""Which modules compute the layers."""


@pytest.fixture(params=sorted(CONFIGS))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSource:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # they begin as zeros, which would hide mistakes
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return ModelSource("x", tmp_path, "x")


def logits_of(model: nn.Module, shape: KVShape) -> torch.Tensor:
    """Return logits of two prompts, the second in two chunks, from the engine's runner."""
    for layer in decoder_layers(model, shape.layers):
        layer._forward_pre_hooks.clear()
    cache = KVCache(shape, 16, CPU)
    runner = ModelRunner(model, decoder_layers(model, shape.layers), cache, SdpaReference())

    def run(*requests: SpanRequest) -> torch.Tensor:
        return runner.forward(stage(requests, 4, DirectUploader()))

    first, second = TOKENS
    whole = run(SpanRequest(first, 0, [(0, 2)], True), SpanRequest(second[:2], 0, [(2, 3)], False))
    return torch.cat([whole, run(SpanRequest(second[2:], 2, [(2, 3)], True))])


def share(source: ModelSource, ranks: ThreadRanks, kind: str) -> tuple[nn.Module, KVShape]:
    whole = check_supported(load_config(source))
    heads = share_of_heads(whole, ranks.size)
    model = load_share(
        source, whole, torch.float32, CPU, 0, ranks, attn_implementation=IMPLEMENTATION
    )
    if kind == "cpu":
        cpu.optimise(model)
        fused = [isinstance(m, cpu.FusedLayer) for m in decoder_layers(model, whole.layers)]
        assert all(fused)
    elif kind == "gpu":
        count = gpu.optimise(model, TorchOperations())
        config = load_config(source)
        mixed = getattr(config, "num_experts", getattr(config, "num_local_experts", 0))
        dense = len(getattr(config, "mlp_only_layers", ())) if mixed else whole.layers
        assert count == (0 if getattr(config, "mlp_bias", False) else dense)
    return model, KVShape(whole.layers, heads.kv_heads, heads.head_dim, torch.float32)


def whole_logits(source: ModelSource) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [model(torch.tensor([tokens])).logits[0, -1] for tokens in TOKENS]


@pytest.mark.parametrize("size", [2, 4])
def test_shares_together_are_the_whole(source: ModelSource, size: int) -> None:
    expected = torch.stack(whole_logits(source))
    for kind in KINDS:
        got, *others = on_each(size, lambda ranks: logits_of(*share(source, ranks, kind)))  # noqa: B023
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        assert all(other.shape == got.shape for other in others)


def test_a_share_holds_no_more_than_its_part(source: ModelSource) -> None:
    whole = AutoModelForCausalLM.from_pretrained(source.folder)
    in_layers = sum(p.numel() for n, p in whole.named_parameters() if "proj.weight" in n)
    for model, _ in on_each(2, lambda ranks: share(source, ranks, "stock")):
        held = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
        }
        own = [p for n, p in model.named_parameters() if "proj" in n and n.endswith("weight")]
        assert sum(p.numel() for p in own) == in_layers // 2
        assert sum(p.untyped_storage().nbytes() for p in own) == 4 * in_layers // 2
        assert sum(held.values()) < 4 * sum(p.numel() for p in whole.parameters())


def test_dummy_weights_differ_where_they_are_divided(tmp_path: Path) -> None:
    CONFIGS["llama"]().save_pretrained(tmp_path)
    source = ModelSource("x", tmp_path, "x", dummy=True)

    def weights(rank: int) -> dict[str, nn.Parameter]:
        ranks = ThreadRanks(Meeting(2), rank, 2)  # one after the other: torch's seed is for all
        return dict(share(source, ranks, "stock")[0].named_parameters())

    one, other, again = weights(0), weights(1), weights(1)
    for name, parameter in one.items():
        assert torch.equal(other[name], again[name])
        if name != "lm_head.linear.weight":
            assert torch.equal(parameter, other[name]) == ("proj" not in name), name


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (LlamaConfig(**SIZES), 8, "num_key_value_heads is 4.*--tensor-parallel-size 1 or 2 or 4"),
        (LlamaConfig(**SIZES), 3, "num_attention_heads is 8.*size 1 or 2 can"),
        (LlamaConfig(**{**SIZES, "intermediate_size": 47}), 2, "intermediate_size is 47.*1 can"),
        (GPT2Config(), 2, "not for gpt2; leave out --tensor-parallel-size"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    config: PreTrainedConfig, size: int, message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        check_divides(config, size)


def test_refused_before_any_process_is_started(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", tensor_parallel_size=3, threads=1
    )
    with pytest.raises(UnsupportedModel, match="3 ranks cannot share"):
        EngineCore(config, inbox=list, emit=print)


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="--kv-transfer is not possible with --tensor-parallel"):
        EngineConfig(tensor_parallel_size=2, kv_transfer=True)
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1"):
        EngineConfig(tensor_parallel_size=0)


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    for tied, message in ((False, "lacks 1 weights.*lm_head"), (True, "another shape.*embed")):
        config = LlamaConfig(**SIZES, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        config.tie_word_embeddings = tied
        config.vocab_size = 96 if tied else 95
        config.save_pretrained(tmp_path)
        source = ModelSource("x", tmp_path, "x")
        with pytest.raises(UnsupportedModel, match=message):
            on_each(2, lambda ranks: share(source, ranks, "stock"))  # noqa: B023


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelUnavailable, match="cut short"):
        on_each(2, lambda ranks: share(ModelSource("x", tmp_path, "x"), ranks, "stock"))


def test_facts_at_start() -> None:
    assert on_each(3, lambda ranks: least(ranks, 10 - ranks.rank)) == [8, 8, 8]
    on_each(2, lambda ranks: agree(ranks, "the same"))
    with pytest.raises(RuntimeError, match="rank 0: 0; rank 1: 1"):
        on_each(2, lambda ranks: agree(ranks, str(ranks.rank)))


def test_a_capture_counts_if_it_works_on_each_rank() -> None:
    class Fails(NoCapture):
        def capture(self, run: FixedPass) -> FixedPass:
            raise RuntimeError("no memory left")

    def capture(ranks: ThreadRanks) -> str:
        inner = Fails() if ranks.rank else NoCapture()
        assert AgreedCapture(NoCapture(), ranks).capture(torch.ones)
        with pytest.raises(RuntimeError) as caught:
            AgreedCapture(inner, ranks).capture(torch.ones)
        return str(caught.value)

    assert set(on_each(2, capture)) == {"rank 1: RuntimeError: no memory left"}
