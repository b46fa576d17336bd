"""Chooses the attention backend at start: each candidate is compared with the reference first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch

from pla_serve.engine.attention.flashinfer import (
    FlashInferAttention,
    flashinfer_missing,
    make_wrappers,
)
from pla_serve.engine.attention.interface import AttentionBackend
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.sdpa import SdpaReference
from pla_serve.engine.attention.varlen import VarlenAttention, varlen_missing
from pla_serve.engine.attention.vector import attention_of
from pla_serve.engine.attention.window import WindowedAttention
from pla_serve.engine.batch.flat import FlatBatch, SpanRequest
from pla_serve.engine.batch.staging import Capacity, Scratch, capacity_of, pack, unpack
from pla_serve.engine.device.capture import Capturer
from pla_serve.engine.device.errors import first_line
from pla_serve.engine.device.marks import device_of
from pla_serve.engine.kernels.open import TORCH_ALONE, CpuKernels
from pla_serve.engine.kv.cache import KVCache, KVShape

log = logging.getLogger(__name__)

BackendName = Literal["auto", "sdpa", "varlen", "triton", "flashinfer"]
ON_CUDA: tuple[BackendName, ...] = ("varlen", "triton", "flashinfer", "sdpa")
"""Backends for CUDA in order of preference; those that can be captured come first."""
CAPTURABLE = frozenset({"varlen", "triton"})
"""Backends that read all lengths on the device; the others plan their work on the host."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Largest difference, as a share of the norm of the reference. Float32 products may use tf32."""
PROBE = ((1, 0), (1, 700), (70, 0), (37, 300), (130, 5))
"""Sequences of the trial as (new tokens, history): decode steps, prefills and re-prefills."""


def choose_backend(
    name: BackendName,
    shape: KVShape,
    query_heads: int,
    block_tokens: int,
    device: torch.device,
    kernels: CpuKernels = TORCH_ALONE,
    capturer: Capturer | None = None,
    windows: Sequence[int | None] = (),
) -> tuple[str, AttentionBackend]:
    """Return the name and the backend: the one asked for, or for ``auto`` the first that works.

    Args:
        name: as given to ``--attention-backend``.
        query_heads: query heads of this rank.
        kernels: for backends on the CPU.
        capturer: captures batches as graphs; None if no shapes will be captured.
        windows: see `AttentionShape`. With a window, ``sdpa`` is the only backend.

    Raises:
        ValueError: the backend that was asked for does not work here; the message says why.
    """
    if device.type == "cpu":
        if name not in ("auto", "sdpa"):
            raise ValueError(
                f"the attention backend {name} needs a CUDA device, and this engine runs on the "
                "CPU; leave out --attention-backend"
            )
        if windows:
            return "sdpa", _windowed(windows, lambda: attention_of(kernels))
        return "sdpa", attention_of(kernels)
    if windows:
        if name not in ("auto", "sdpa"):
            raise ValueError(
                f"the attention backend {name} has no sliding windows, and this model needs them; "
                "leave out --attention-backend"
            )
        return "sdpa", PaddedAttention(_windowed(windows, SdpaReference))
    reasons: list[str] = []
    for candidate in ON_CUDA if name == "auto" else (name,):
        made = _make(candidate, device)
        if not isinstance(made, str):
            captures = capturer if candidate in CAPTURABLE else None
            reason = probe(made, shape, query_heads, block_tokens, device, captures)
            if reason is None:
                if candidate == "triton":
                    made = _tuned(shape, query_heads, block_tokens, device)
                log.info("attention: %s%s", candidate, "".join(f"; {r}" for r in reasons))
                return candidate, made
            made = reason
        reasons.append(f"not {candidate}: {made}")
    raise ValueError(
        f"no attention backend works on this device ({'; '.join(reasons)})"
        + ("" if name == "auto" else "; leave out --attention-backend to have one chosen")
    )


def _windowed(
    windows: Sequence[int | None], make: Callable[[], AttentionBackend]
) -> WindowedAttention:
    sizes = ", ".join(map(str, sorted({window for window in windows if window is not None})))
    log.info(
        "attention: %d of %d layers have a sliding window (%s tokens); prompts longer than that "
        "are attended there by torch with a mask, all else as in the other layers",
        sum(window is not None for window in windows),
        len(windows),
        sizes,
    )
    return WindowedAttention(windows, make)


def _make(name: BackendName, device: torch.device) -> AttentionBackend | str:
    """Return the backend, or a text that says why it cannot be had."""
    if name == "varlen":
        return varlen_missing() or VarlenAttention()
    if name == "triton":
        if find_spec("triton") is None:
            return "Triton is not installed"
        from pla_serve.engine.attention.paged import PagedAttention

        return PagedAttention(torch.cuda.get_device_properties(device).multi_processor_count)
    if name == "flashinfer":
        return flashinfer_missing() or PaddedAttention(
            FlashInferAttention(device_of(device), lambda: make_wrappers(device))
        )
    return PaddedAttention(SdpaReference())


def _tuned(
    shape: KVShape, query_heads: int, block_tokens: int, device: torch.device
) -> AttentionBackend:
    from pla_serve.engine.attention.tuning import tuned

    return tuned(shape, query_heads, block_tokens, device)


def probe(
    backend: AttentionBackend,
    shape: KVShape,
    query_heads: int,
    block_tokens: int,
    device: torch.device,
    capturer: Capturer | None = None,
) -> str | None:
    """Compare a backend with the reference on random inputs.

    All KV that belongs to no sequence is NaN, so that a read beyond a context shows. With a
    ``capturer`` the backend is also captured, and replayed with other KV.

    Returns:
        Text that says what is wrong with the backend; None if nothing is.
    """
    generator = torch.Generator().manual_seed(0)
    cache, batch = _problem(shape, block_tokens, device)
    tokens = len(batch.tokens)
    query = torch.randn(query_heads, tokens, shape.head_dim, generator=generator)
    query = query.to(device=device, dtype=shape.dtype)
    scaling = shape.head_dim**-0.5

    def attend() -> torch.Tensor:
        # A new batch object, because each captured batch is one, and backends cache by it.
        return backend.attend(0, query, cache, replace(batch), scaling)

    def differs(run: Callable[[], torch.Tensor]) -> str | None:
        _fill(cache, batch, generator)
        wide = KVCache(KVShape(1, shape.heads, shape.head_dim, torch.float32), cache.slots, device)
        wide.keys[0], wide.values[0] = cache.keys[0].float(), cache.values[0].float()
        expected = PaddedAttention(SdpaReference()).attend(0, query.float(), wide, batch, scaling)
        real = sum(span.length for span in batch.spans)
        difference = (run()[:real].float() - expected[:real]).norm() / expected[:real].norm()
        if not difference <= TOLERANCE[shape.dtype]:
            return f"results differ from the reference by {float(difference):.2g} of their norm"
        return None

    try:
        reason = differs(attend)
        if reason is not None:
            return f"its {reason}"
    except Exception as error:  # libraries raise anything on a device that they do not support
        return first_line(error)
    if capturer is None:
        return None
    try:
        reason = differs(capturer.capture(attend))
    except Exception as error:
        return f"it cannot be captured ({first_line(error)}); --no-graphs does without"
    return reason and f"captured and replayed, its {reason}; --no-graphs does without"


def _fill(cache: KVCache, batch: FlatBatch, generator: torch.Generator) -> None:
    """Write random KV for all sequences."""
    for span in batch.spans:
        for start, end in span.runs:
            size = (end - start, *cache.keys[0].shape[1:])
            for memory in (cache.keys[0], cache.values[0]):
                memory[start:end] = torch.randn(size, generator=generator).to(memory)


def _problem(shape: KVShape, block_tokens: int, device: torch.device) -> tuple[KVCache, FlatBatch]:
    """Return a padded batch of `PROBE` in every second block of a cache full of NaN."""
    requests: list[SpanRequest] = []
    block = 1
    for new, history in PROBE:
        count = -(-(new + history) // block_tokens)
        runs = [(block + 2 * i, block + 2 * i + 1) for i in range(count)]
        block += 2 * count
        requests.append(SpanRequest([0] * new, history, runs, True))
    one_layer = KVShape(1, shape.heads, shape.head_dim, shape.dtype)
    cache = KVCache(one_layer, (block + 1) * block_tokens, device)
    for memory in (cache.keys[0], cache.values[0]):
        memory.fill_(torch.nan)
    need = capacity_of(requests, block_tokens)
    capacity = Capacity(need.tokens + 5, need.sequences + 2, need.outputs + 2, need.entries + 8)
    numbers, spans = pack(requests, capacity, block_tokens, Scratch(0, block_tokens))
    buffer = torch.zeros(capacity.size, dtype=torch.int32)
    buffer[: len(numbers)] = torch.from_numpy(numbers)
    most = max(new + history for new, history in PROBE)
    batch = unpack(
        buffer.to(device), capacity, spans, block_tokens, most_query=130, most_context=most
    )
    return cache, batch
