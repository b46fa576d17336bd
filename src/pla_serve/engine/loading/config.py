"""Config, tokenizer and end tokens of a model: what the API server needs, without its weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pla_serve.engine.loading.errors import UnsupportedModel
from pla_serve.engine.loading.source import ModelSource, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The transformers config.

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
    return config


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The fast tokenizer, with the chat template if the model has one.

    None only for random weights without tokenizer files: then prompts must be token ids.

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


def eos_token_ids(source: ModelSource) -> tuple[int, ...]:
    """The ids that end a text, ascending, from the generation config and the config.

    The generation config counts first: chat models list their end of turn only there.
    """
    for name in ("generation_config.json", source.config_file):
        path = source.folder / name
        if path.is_file() and (ids := _ids(read_json(path).get("eos_token_id"))):
            return ids
    return ()


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(sorted({one for one in values if isinstance(one, int) and one >= 0}))
