"""Tiny models of many families, made on the spot, and their GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def config(family: str, **changes: Any) -> PreTrainedConfig:
    """A small config of the class ``<family>Config``."""
    kind = getattr(transformers, f"{family}Config")
    sizes = {
        key: size for key, size in SIZES.items() if not hasattr(kind, key) or _can_set(kind, key)
    }
    return kind(**{**sizes, **changes})


def _can_set(kind: type, key: str) -> bool:
    return not isinstance(getattr(kind, key), property)


def model(settings: PreTrainedConfig, seed: int = 0) -> Any:
    """Random weights, large enough that a wrong one shows, norms and biases included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
        for parameter in made.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


Quantise = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]

SPECIALS = ("<|start|>", "<|end|>", "<|turn|>")


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """A byte-level vocabulary of SIZES['vocab_size'] tokens: tokens, GGUF types, merges."""
    merges = ["1 9", "19 8", "198 4", "h e", "l l", "Ġ w"]
    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    unused = [f"unused{n}" for n in range(SIZES["vocab_size"] - len(tokens))]
    kinds = [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)) + [5] * len(unused)
    return tokens + unused, kinds, merges


def write_gguf(
    path: Path,
    source: Any,
    *,
    pre: str = "smollm",
    add_tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    quantise: Quantise | None = None,
    **extra_keys: Any,
) -> None:
    """Write the file that llama.cpp's converter writes for ``source``, in float32.

    ``add_tokenizer`` writes another tokenizer than the byte-level one of `vocabulary`.
    ``quantise`` returns the bytes and the format of a matrix, given its name and weights.
    """
    arch = source.config.model_type
    settings = source.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    writer.add_key_length(settings.head_dim)
    writer.add_value_length(settings.head_dim)
    for key, value in extra_keys.items():
        name = f"{arch}.{key.replace('__', '.')}"
        _adder(writer, value)(name, value)
    if add_tokenizer is None:
        _add_tokenizer(writer, pre)
    else:
        add_tokenizer(writer)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
        settings.num_hidden_layers,
    )
    for name, tensor in source.state_dict().items():
        if name == "lm_head.weight" and settings.tie_word_embeddings:
            continue
        base, suffix = name.rsplit(".", 1)
        data = _permuted(name, tensor.numpy(), settings) if arch == "llama" else tensor.numpy()
        data, kind = np.ascontiguousarray(data), None
        if quantise is not None and data.ndim == 2:
            data, kind = quantise(name, data)
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", data, raw_dtype=kind)
    if (factors := _rope_factors(settings)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adder(writer: gguf.GGUFWriter, value: object) -> Any:
    if isinstance(value, str):
        return writer.add_string
    return writer.add_float32 if isinstance(value, float) else writer.add_uint32


def _rope_factors(settings: PreTrainedConfig) -> np.ndarray | None:
    """llama.cpp's converter: Llama 3's scaled frequencies as divisors of the plain ones."""
    if settings.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, "cpu")
    base = settings.rope_parameters["rope_theta"]
    plain = base ** (-np.arange(0, settings.head_dim, 2) / settings.head_dim)
    return (plain / scaled.numpy()).astype(np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens, kinds, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m.content }}<|turn|>{% endfor %}")


def _permuted(name: str, weight: np.ndarray, settings: PreTrainedConfig) -> np.ndarray:
    """llama.cpp keeps the two halves of each rotary pair next to each other."""
    if "q_proj" in name:
        heads = settings.num_attention_heads
    elif "k_proj" in name:
        heads = settings.num_key_value_heads
    else:
        return weight
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
