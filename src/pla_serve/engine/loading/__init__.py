"""Finds a model, checks that the engine computes it right, and loads it.

The API server calls `resolve`, `load_config`, `load_tokenizer` and `eos_token_ids`. The engine
process gets the resulting `ModelSource` and calls `load_model`.

    source = resolve("Qwen/Qwen2.5-0.5B-Instruct")
    model = load_model(source, torch.float32, torch.device("cpu"), seed=0)
"""

from pla_serve.engine.loading.config import (
    eos_token_ids,
    load_config,
    load_tokenizer,
    most_positions,
    vocab_size,
)
from pla_serve.engine.loading.errors import LoadingError, ModelUnavailable, UnsupportedModel
from pla_serve.engine.loading.finder import resolve
from pla_serve.engine.loading.progress import ConsoleProgress, LoadingProgress, NoLoadingProgress
from pla_serve.engine.loading.source import ModelSource
from pla_serve.engine.loading.support import (
    AttentionShape,
    check_config,
    check_supported,
    decoder_layers,
)
from pla_serve.engine.loading.weights import load_model, resolve_device, resolve_dtype

__all__ = [
    "AttentionShape",
    "ConsoleProgress",
    "LoadingError",
    "LoadingProgress",
    "ModelSource",
    "ModelUnavailable",
    "NoLoadingProgress",
    "UnsupportedModel",
    "check_config",
    "check_supported",
    "decoder_layers",
    "eos_token_ids",
    "load_config",
    "load_model",
    "load_tokenizer",
    "most_positions",
    "resolve",
    "resolve_device",
    "resolve_dtype",
    "vocab_size",
]
