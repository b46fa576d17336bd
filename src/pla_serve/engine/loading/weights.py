"""Loads a model with its weights, from safetensors or random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pla_serve.engine.config import DType
from pla_serve.engine.loading.config import load_config
from pla_serve.engine.loading.errors import ModelUnavailable, UnsupportedModel
from pla_serve.engine.loading.source import ModelSource, require_weights, some
from pla_serve.engine.loading.support import check_supported


def resolve_device(device: str) -> torch.device:
    """Return the torch device of this name; ``auto`` is cuda if there is one, and cpu otherwise.

    Raises:
        ValueError: the device is not on this machine, or torch knows no such name.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no torch device; try auto, cpu or cuda.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{device} was asked for, but torch finds no CUDA device; use cpu.")
    return chosen


def resolve_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """Return the torch dtype of this name; ``auto`` is float32 on a CPU and bfloat16 elsewhere.

    Most CPUs compute bfloat16 slowly.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if dtype == "float32" else torch.bfloat16


def load_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    attn_implementation: str = "sdpa",
    checked: bool = False,
) -> torch.nn.Module:
    """Return a causal language model of transformers in eval mode, without gradients.

    Args:
        seed: seed of random weights; equal seeds give equal weights on one kind of device.
        attn_implementation: name of a function in transformers' ``AttentionInterface``.
        checked: whether `check_supported` has accepted the config already.

    Raises:
        UnsupportedModel: this engine would not compute it right.
        ModelUnavailable: weight files are missing or broken.
    """
    config = load_config(source)
    if not checked:
        check_supported(config)
    if source.dummy:
        model = _random(config, dtype, device, seed, attn_implementation)
    else:
        with _no_progress_bars():
            model = _read(source, dtype, device, attn_implementation)
    model.requires_grad_(False)
    return model.eval()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off transformers' progress bars: reading takes seconds, and stderr may be a log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _random(
    config: object, dtype: torch.dtype, device: torch.device, seed: int, attention: str
) -> torch.nn.Module:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(seed)
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model.to(device)


def _read(
    source: ModelSource, dtype: torch.dtype, device: torch.device, attention: str
) -> torch.nn.Module:
    require_weights(source.folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelUnavailable(
            f"The weights in {source.folder} cannot be loaded ({type(error).__name__}: {error}). "
            "If a file is cut short, fetch the model again."
        ) from error
    # transformers replaces missing weights by random numbers, and only warns.
    if missing := sorted(str(key) for key in info["missing_keys"]):
        raise UnsupportedModel(
            f"{source.folder} lacks {len(missing)} weights of {type(model).__name__}: "
            f"{some(missing)}."
        )
    if mismatched := sorted(str(key[0]) for key in info["mismatched_keys"]):
        raise UnsupportedModel(
            f"{len(mismatched)} weights in {source.folder} have another shape than its config "
            f"says: {some(mismatched)}."
        )
    loaded: torch.nn.Module = model
    return loaded
