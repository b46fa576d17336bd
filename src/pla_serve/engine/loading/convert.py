"""Converts a GGUF file to a folder of safetensors, config and tokenizer.

This runs as a process of its own, ``convert FILE FOLDER [settings]`` (see `gguf`). transformers
reads the file. Settings that transformers is known to lose are restored here, and files with
settings that might be lost are refused, because they would be served wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pla_serve.engine.loading import spm
from pla_serve.engine.loading.errors import UnsupportedModel
from pla_serve.engine.loading.rope import ROPE_FACTORS, rope_scaling
from pla_serve.engine.loading.tensors import write_list

SETTINGS = "settings"
"""Third argument, if the weights stay in the file."""
REFUSED = 3
"""Exit status of a refusal; the reason is the last line of standard output, as JSON."""

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Architectures whose conversion is tested against the original weights."""

REQUIRED = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
}
UNDERSTOOD = REQUIRED | {
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
"""Metadata keys that are read. A file with any other key is refused, because the key describes
something that would be lost (sliding windows, experts, ...)."""

DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r")
"""Byte-level tokenizers that split numbers into single digits."""
PLAIN_BYTE_LEVEL = ("default", "gpt-2")

SAMPLE = "It's 1984, and 0x7F+23 = 150?\n\n\tdef f(x):  # naïve 漢字 🙂\n        return x\r\n"


def convert(path: Path, folder: Path, *, weights: bool = True) -> None:
    """Fill ``folder`` from the GGUF file at ``path``.

    Args:
        weights: whether to write the weights. Otherwise the folder lists where they lie in the
            file (`tensors`).

    Raises:
        UnsupportedModel: the file is refused; the message continues a sentence about the file.
    """
    metadata, tensors = _read(path)
    config = _config(path, metadata)
    scaling = rope_scaling(config, metadata, tensors)
    if scaling is not None:
        config.rope_parameters = {**config.rope_parameters, **scaling}
    needed = {name: tensor for name, tensor in tensors.items() if name != ROPE_FACTORS}
    if weights:
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
            dtype=_dtype(tensors),
        )
        _require_all_read(model, info, needed)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        _require_same_count(model, needed)
        write_list(path, needed, folder)
    _save_model(model, metadata, folder, weights=weights)
    _save_tokenizer(path, metadata, folder)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata without arrays, and the tensors by name."""
    try:
        reader = GGUFReader(path)
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1
        }
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, OverflowError, OSError) as error:
        raise UnsupportedModel(f"it is broken or cut short ({error}).") from error
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF architecture {architecture!r} is not converted; "
            f"{', '.join(ARCHITECTURES)} are. Serve its safetensors instead."
        )
    if (parts := metadata.get("split.count", 1)) > 1:
        raise UnsupportedModel(f"it is one of {parts} parts: merge them with llama-gguf-split.")
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix) for key in reader.fields if key.startswith(prefix)}
    if missing := sorted(REQUIRED - keys):
        raise UnsupportedModel(f"its metadata lacks {', '.join(missing)}.")
    if unknown := sorted(keys - UNDERSTOOD - _harmless(metadata, prefix)):
        raise UnsupportedModel(
            f"its metadata sets {', '.join(unknown)}, which the conversion would lose. "
            "Serve its safetensors instead."
        )
    return metadata, tensors


def _harmless(metadata: dict[str, Any], prefix: str) -> set[str]:
    """Return keys that are set to a value that switches the feature off."""
    nothing = {
        "attention.sliding_window": (0,),
        "expert_count": (0,),
    }
    return {key for key, values in nothing.items() if metadata.get(prefix + key) in values}


def _config(path: Path, metadata: dict[str, Any]) -> Any:
    """Return the config as transformers reads it, with lost settings restored."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    prefix = f"{metadata['general.architecture']}."
    # transformers' default head size for Qwen may differ from that of the file, which llama.cpp
    # takes from a key or from the number of heads.
    per_head = metadata[prefix + "embedding_length"] // metadata[prefix + "attention.head_count"]
    config.head_dim = metadata.get(prefix + "attention.key_length", per_head)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(prefix + key, config.head_dim) != config.head_dim:
            raise UnsupportedModel(f"its {key} is not the size of a head ({config.head_dim}).")
    # The file has a float32: 9.999999747378752e-06 stands for 1e-05.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    return config


def _dtype(tensors: dict[str, Any]) -> torch.dtype:
    """Return the dtype in which the weights are saved.

    Files of floats keep their type. Quantised weights become float16, whose rounding (2**-11) is
    far below theirs, and which takes half the space of float32.
    """
    types = {tensor.tensor_type for tensor in tensors.values() if len(tensor.shape) > 1}
    if types == {GGMLQuantizationType.F32}:
        return torch.float32
    if types <= {GGMLQuantizationType.F32, GGMLQuantizationType.BF16}:
        return torch.bfloat16
    return torch.float16


def _require_all_read(model: Any, info: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Check that the file and the model have the same weights.

    transformers ignores tensors whose names it does not know, such as biases.
    """
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
        raise UnsupportedModel(f"it lacks weights that the model needs: {', '.join(names[:5])}.")
    _require_same_count(model, tensors)


def _require_same_count(model: Any, tensors: dict[str, Any]) -> None:
    """Check that the file holds as many weights as the model has."""
    held = sum(int(tensor.n_elements) for tensor in tensors.values())
    used = sum(parameter.numel() for parameter in model.parameters())
    if held != used:
        extra = [name for name in tensors if not name.startswith(("blk.", "token_embd", "output"))]
        raise UnsupportedModel(
            f"it holds {held} weights of which the model would use {used}"
            f"{' (not used: ' + ', '.join(extra) + ')' if extra else ''}. "
            "Serve its safetensors instead."
        )


def _save_model(model: Any, metadata: dict[str, Any], folder: Path, *, weights: bool) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    # Chat models may have one token that ends a text and another that ends a turn.
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    model.generation_config.eos_token_id = known[0] if len(known) == 1 else known or None
    # The weights are floats now; with a quantization config they could not be loaded again.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model.hf_quantizer = None
    if weights:
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)


def _save_tokenizer(path: Path, metadata: dict[str, Any], folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    kind, split = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2":
        if split in DIGITS_ALONE:
            # transformers does not know how these split text and uses GPT-2's rule, which keeps
            # digits together: the model would get numbers that it was not trained on.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        elif split not in GGUF_PRE_TOKENIZER_SPLITS and split not in PLAIN_BYTE_LEVEL:
            raise UnsupportedModel(
                f"how its tokenizer splits text ({split!r}) is not known here. "
                "Serve its safetensors, which bring their tokenizer."
            )
    elif kind == "llama":
        spm.restore(tokenizer.backend_tokenizer, spm.metadata_of(path))
    tokenizer.model_max_length = metadata[f"{metadata['general.architecture']}.context_length"]
    tokenizer.save_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(folder)
    if saved(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise UnsupportedModel("its tokenizer does not survive saving. Serve its safetensors.")


def main(file: str, folder: str, what: str = "all") -> int:
    """Convert, print the reason of a refusal, and return 0 or REFUSED."""
    try:
        convert(Path(file), Path(folder), weights=what != SETTINGS)
    except UnsupportedModel as error:
        print(json.dumps({"unsupported": str(error)}))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
