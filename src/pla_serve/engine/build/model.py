"""Stage 2: the modules of one rank, loaded, checked and fused."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from pla_serve.engine.attention.interface import APART, IMPLEMENTATION
from pla_serve.engine.build.quantised import load_kept, quantise, stays_quantised
from pla_serve.engine.build.roofline import ModelSize
from pla_serve.engine.build.settings import RankSettings
from pla_serve.engine.kernels.open import TORCH_ALONE, CpuKernels, open_kernels
from pla_serve.engine.kv.cache import KVShape
from pla_serve.engine.layers import cpu, gpu
from pla_serve.engine.layers.cpu.quantised import copied_bytes, quantised_memory
from pla_serve.engine.loading import (
    AttentionShape,
    check_supported,
    decoder_layers,
    load_config,
    load_model,
    most_positions,
    resolve,
)
from pla_serve.engine.loading.mixtures import expert_count
from pla_serve.engine.parallel.ranks import agree
from pla_serve.engine.parallel.share import check_divides, share_of_heads
from pla_serve.engine.parallel.weights import load_share
from pla_serve.engine.transfer.layout import fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankModel:
    """One rank's share of the model. With one rank that is the whole model."""

    module: nn.Module
    layers: nn.ModuleList
    """Decoder layers in order. Layer boundaries lie between them."""
    query_heads: int
    """Query heads of this rank."""
    experts: int
    """Experts of each layer that has them; 0 for dense models."""
    windows: tuple[int | None, ...]
    """Window of each layer; see `AttentionShape`."""
    kv_shape: KVShape
    """Shape of one token's KV on this rank."""
    size: ModelSize
    """Parameters of this rank, counted before fusing."""
    positions: int
    """Most tokens that the model was made for."""
    vocab_size: int
    weights: str
    """Fingerprint of the weights (see `fingerprint`). Empty unless KV is exchanged."""
    kernels: CpuKernels
    """Kernels for the CPU. On other devices there are none."""
    quantised: dict[str, int]
    """Bytes of weights that stay quantised, by format."""


def build_model(settings: RankSettings) -> RankModel:
    """Load this rank's share of the model, and replace modules by faster ones with equal results.

    Raises:
        LoadingError: the model cannot be had, or is not supported.
        ValueError: its heads or layers cannot be divided over the ranks, or the CPU kernels that
            were asked for do not work here.
    """
    config, dtype = settings.config, settings.dtype
    on_cpu = settings.device.type == "cpu"
    kernels = open_kernels(config.cpu_kernels) if on_cpu else TORCH_ALONE
    model_config = load_config(settings.source)
    whole = check_supported(model_config)
    if settings.ranks.size > 1:
        check_divides(model_config, settings.ranks.size)
    share = share_of_heads(whole, settings.ranks.size)
    kv_shape = KVShape(share.layers, share.kv_heads, share.head_dim, dtype)
    module = _load(settings, whole, kernels)
    layers = decoder_layers(module, share.layers)
    # Parameters are counted and the weights are fingerprinted before fusing, which moves them.
    size = ModelSize.of(
        module,
        layers,
        attention_width=share.query_heads * share.head_dim,
        kv_bytes_per_token=kv_shape.bytes_per_token,
    )
    weights = fingerprint(module) if config.kv_transfer else ""
    _fuse(settings, module, layers, kernels)
    quantised = _report_quantised(module)
    return RankModel(
        module=module,
        layers=layers,
        query_heads=share.query_heads,
        experts=expert_count(model_config),
        windows=share.windows,
        kv_shape=kv_shape,
        size=size,
        positions=most_positions(model_config),
        vocab_size=int(model_config.vocab_size),
        weights=weights,
        kernels=kernels,
        quantised=quantised,
    )


def _load(settings: RankSettings, whole: AttentionShape, kernels: CpuKernels) -> nn.Module:
    """Load the modules of ``transformers`` with this rank's share of the weights."""
    config, source, dtype, device = (
        settings.config,
        settings.source,
        settings.dtype,
        settings.device,
    )
    if settings.ranks.size == 1:
        if stays_quantised(config, source, kernels) and kernels.quantised is not None:
            return load_kept(source, dtype, kernels.quantised, IMPLEMENTATION)
        if source.kept is not None:
            source = resolve(config.model, config.load_format)
        attention = APART if config.compile_layers else IMPLEMENTATION
        module = load_model(
            source, dtype, device, config.seed, attn_implementation=attention, checked=True
        )
        quantise(module, config, kernels)
        return module
    module = load_share(
        source,
        whole,
        dtype,
        device,
        config.seed,
        settings.ranks,
        attn_implementation=IMPLEMENTATION,
    )
    # A rank that failed to load is found out here. In a sum over the ranks it might not be.
    agree(settings.ranks, "loaded")
    return module


def _fuse(
    settings: RankSettings, module: nn.Module, layers: nn.ModuleList, kernels: CpuKernels
) -> None:
    """Replace decoder layers by fused ones, unless ``torch.compile`` is to have the stock ones."""
    compiles = settings.config.compile_layers
    fused = 0
    if settings.device.type == "cpu":
        fused = cpu.optimise(module, kernels, keep=layers if compiles else None)
    elif not compiles:
        fused = gpu.optimise(module, gpu.best_operations())
    if not compiles:
        log.info("fused %d of %d decoder layers", fused, len(layers))


def _report_quantised(module: nn.Module) -> dict[str, int]:
    """Log which weights stay quantised; return their bytes by format."""
    found = quantised_memory(module)
    if found:
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in found.items())
        copied = copied_bytes(module) / 2**20
        log.info("weights that stay quantised: %s; %.1f MiB of them reordered", sizes, copied)
    return found
