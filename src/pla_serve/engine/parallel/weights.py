"""Loads one rank's share of a model, and reads no other weights.

``transformers`` can divide a model too (``tp_plan="auto"``), but it adds the sums to modules that
the engine replaces by fused ones. Here a share is a stock model with fewer heads, so that all code
for whole models works on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pla_serve.engine.loading import (
    AttentionShape,
    ModelSource,
    ModelUnavailable,
    UnsupportedModel,
    decoder_layers,
    load_config,
)
from pla_serve.engine.loading.source import INDEX, read_json, require_weights, some
from pla_serve.engine.loading.stock import rotary_owner
from pla_serve.engine.parallel.modules import GatheredHead, join, vocabulary
from pla_serve.engine.parallel.ranks import Ranks
from pla_serve.engine.parallel.share import share_of_config
from pla_serve.engine.parallel.stored import is_of_experts, stored_names

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3")
"""Linears whose outputs are divided over the ranks."""
COLUMNS = ("o_proj", "down_proj", "w2")
"""Linears whose inputs are divided over the ranks; rank 0 alone adds a bias."""
HEAD = "lm_head.weight"
SINGLE = "model.safetensors"


def load_share(
    source: ModelSource,
    attention: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    ranks: Ranks,
    *,
    attn_implementation: str,
) -> nn.Module:
    """Load this rank's share of each layer, joined to the shares of the other ranks.

    Each rank has all embeddings and norms; the output matrix is divided by rows. Dummy weights are
    equal for equal seed and number of ranks.

    Args:
        attention: heads of the whole model.

    Raises:
        UnsupportedModel: weights are missing, or not of the shape that the config says.
        ModelUnavailable: a file is missing or broken.
    """
    config = load_config(source)
    share = share_of_config(config, attention, ranks.size)
    if source.dummy:
        model = _random(share, dtype, device, seed, ranks, attn_implementation)
    else:
        require_weights(source.folder)
        model = _build(share, dtype, torch.device("meta"), attn_implementation)
        try:
            _fill(model, source.folder, config, dtype, device, ranks)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelUnavailable(
                f"The weights in {source.folder} cannot be loaded ({type(error).__name__}: "
                f"{error}). If a file is cut short, fetch the model again."
            ) from error
    join(model, decoder_layers(model, attention.layers), ranks)
    model.requires_grad_(False)
    loaded: nn.Module = model.eval()
    return loaded


def _build(config: object, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def _random(
    config: object,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    ranks: Ranks,
    attention: str,
) -> Any:
    """Make a model with random weights: undivided ones are equal on all ranks, others differ."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = _build(config, dtype, device, attention)
        torch.manual_seed(seed * ranks.size + ranks.rank)
        for name, parameter in model.named_parameters():
            linear = name.split(".")[-2] in ROWS + COLUMNS and name.endswith("weight")
            if linear or is_of_experts(name):
                with torch.no_grad():
                    parameter.normal_(0.0, float(model.config.initializer_range))
    start, end = vocabulary(model.config.vocab_size, ranks.rank, ranks.size)
    rows = model.lm_head.weight.data[start:end]
    tied = bool(model.config.tie_word_embeddings)
    _set_head(model, rows if tied else rows.clone(), ranks)
    return model


def _fill(
    model: Any,
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Read the weights of the share into a model on the meta device."""
    reader = _Reader(folder, dtype, device)
    tied = bool(config.tie_word_embeddings)
    wanted = {name: value for name, value in model.state_dict().items() if name != HEAD}
    stored = {name: stored_names(config, name) for name in wanted}
    needed = [each for names in stored.values() for each in names] + ([] if tied else [HEAD])
    if missing := sorted(reader.missing(needed)):
        raise UnsupportedModel(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {some(missing)}."
        )
    found = {
        name: _share_of_experts(reader, names, int(wanted[name].shape[0]), ranks)
        if is_of_experts(name)
        else _share(reader, names[0], ranks)
        for name, names in stored.items()
    }
    width = model.lm_head.in_features
    start, end = vocabulary(config.vocab_size, ranks.rank, ranks.size)
    head = None if tied else reader.read(HEAD, lambda whole: whole[start:end])
    shapes = {name: (tuple(found[name].shape), tuple(wanted[name].shape)) for name in wanted}
    if head is not None:
        shapes[HEAD] = (reader.shape(HEAD), (config.vocab_size, width))
    if wrong := sorted(name for name, (got, right) in shapes.items() if got != right):
        raise UnsupportedModel(
            f"{len(wrong)} weights in {folder} have another shape than its config says: "
            f"{some(wrong)}."
        )
    model.load_state_dict(found, strict=False, assign=True)
    if head is None:
        head = model.get_input_embeddings().weight.data[start:end]
    _set_head(model, head, ranks)
    # The rotary embedding is computed, not read, so it has to be made again with memory.
    owner: Any = rotary_owner(model)
    assert owner is not None, f"{type(model).__name__} has one rotary embedding"
    owner.rotary_emb = type(owner.rotary_emb)(model.config).to(device)
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if empty:
        raise UnsupportedModel(
            f"{type(model).__name__} has parts that are in no file: {some(empty)}"
        )


def _set_head(model: Any, rows: torch.Tensor, ranks: Ranks) -> None:
    """Put a head with the rows of this rank into the model."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = rows.shape
    linear.weight = nn.Parameter(rows, requires_grad=False)
    model.lm_head = GatheredHead(linear, ranks, int(model.config.vocab_size))


def _share(reader: _Reader, name: str, ranks: Ranks) -> torch.Tensor:
    """Read this rank's part of a weight."""
    rank, size = ranks.rank, ranks.size
    owner, _, kind = name.rpartition(".")
    linear = owner.rpartition(".")[2]
    if linear in ROWS:
        rows = reader.shape(name)[0]
        return reader.read(
            name, lambda whole: whole[rows * rank // size : rows * (rank + 1) // size]
        )
    if linear in COLUMNS and kind == "weight":
        columns = reader.shape(name)[1]
        part = slice(columns * rank // size, columns * (rank + 1) // size)
        return reader.read(name, lambda whole: whole[:, part])
    read = reader.read(name, lambda whole: whole[:])
    return torch.zeros_like(read) if linear in COLUMNS and rank else read


def _share_of_experts(
    reader: _Reader, names: list[str], experts: int, ranks: Ranks
) -> torch.Tensor:
    """Read this rank's part of each expert into one tensor (experts, out, in)."""
    parts = [_share(reader, name, ranks) for name in names]
    return torch.cat(parts).view(experts, -1, parts[0].shape[1])


class _Reader:
    """Reads parts of weights from the safetensors files of a folder; opens each file once."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self._places: dict[str, str] = dict(read_json(folder / INDEX).get("weight_map", {}))
        else:
            self._places = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    def missing(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self._places]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(self._places[name]).get_slice(name).get_shape())

    def read(self, name: str, part: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Return ``part`` of a weight, such as ``lambda whole: whole[:8]``; only that is read."""
        mapped = part(self._file(self._places[name]).get_slice(name))
        return mapped.to(self._device, self._dtype, copy=True)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(self._folder / name, framework="pt")
            self._files[name] = opened
        return self._files[name]
