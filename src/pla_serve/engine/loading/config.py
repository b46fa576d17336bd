"""Reads config, tokenizer and end tokens of a model, which the API server needs."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pla_serve.engine.loading.errors import ModelUnavailable, UnsupportedModel
from pla_serve.engine.loading.source import ModelSource, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_config(source: ModelSource) -> PreTrainedConfig:
    """Return the config of a model.

    Raises:
        ModelUnavailable: there is no config file.
        UnsupportedModel: the config is broken, or transformers does not know its model type.
    """
    path = source.folder / source.config_file
    content = read_json(path)
    if "model_type" not in content:
        raise UnsupportedModel(f"{path} names no model_type, so it is not a model's config.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # unknown types, remote code, values that fail validation
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UnsupportedModel(
            f"transformers cannot use {path} (model_type {content['model_type']!r}): {reason[0]} "
            "A newer transformers may know this model; code from its repository is never run."
        ) from error
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # for a loss in training, which would cost time here
    return config


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """Return the fast tokenizer, with the chat template if the model has one.

    None is for random weights without tokenizer files: prompts must be token ids then.

    Raises:
        UnsupportedModel: there are no tokenizer files, they are broken, or have no fast tokenizer.
    """
    if not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        if source.dummy:
            return None
        raise UnsupportedModel(
            f"{source.folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}). "
            "Copy the tokenizer files of the model there."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UnsupportedModel(
            f"The tokenizer in {source.folder} cannot be loaded: {reason[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"The tokenizer in {source.folder} ({type(tokenizer).__name__}) is not a fast one. "
            "Add a tokenizer.json, as transformers' save_pretrained writes it."
        )
    return tokenizer


def vocab_size(source: ModelSource) -> int | None:
    """Return the number of token ids of a model, or None if transformers does not know its type.

    It may be larger than the tokenizer's, because embeddings are often padded.
    """
    try:
        config = load_config(source).get_text_config()
    except (ModelUnavailable, UnsupportedModel):
        return None
    found = getattr(config, "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else None


def eos_token_ids(source: ModelSource) -> tuple[int, ...]:
    """Return the ids that end a text, ascending.

    They come from the generation config and from the tokenizer, because some chat models name their
    end of turn in one of the two only. The model's config is read if the generation config names
    none.
    """
    found: set[int] = set()
    for name in ("generation_config.json", source.config_file):
        path = source.folder / name
        if not found and path.is_file():
            found = _ids(read_json(path).get("eos_token_id"))
    return tuple(sorted(found | _tokenizer_eos(source)))


def most_positions(config: PreTrainedConfig) -> int:
    """Return the most tokens of a sequence, with a scaled rotary embedding taken into account.

    A config that scales by a factor may name the positions before scaling, as Qwen2.5's do
    (YaRN, factor 4: 32,768 positions become 131,072), or after it, as Llama 3.1's.
    """
    positions = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor <= 1:
        return positions
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or positions
        return max(positions, int(original * factor))
    if rope.get("rope_type") == "linear":
        return int(positions * factor)
    return positions


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {one for one in values if isinstance(one, int) and one >= 0}


def _tokenizer_eos(source: ModelSource) -> set[int]:
    """Return the id of the tokenizer's end token as its files name it; empty if they name none."""
    settings = source.folder / "tokenizer_config.json"
    name = read_json(settings).get("eos_token") if settings.is_file() else None
    if isinstance(name, dict):
        name = name.get("content")
    if not isinstance(name, str):
        return set()
    path = source.folder / "tokenizer.json"
    if not path.is_file():
        decoder = read_json(settings).get("added_tokens_decoder") or {}
        return {int(id) for id, token in decoder.items() if token.get("content") == name}
    content = read_json(path)
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    if name in added:
        return _ids(added[name])
    vocabulary = (content.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict):
        return _ids(vocabulary.get(name, -1))
    return {place for place, entry in enumerate(vocabulary or ()) if entry[0] == name}
