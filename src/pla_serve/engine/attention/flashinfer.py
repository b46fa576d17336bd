"""The attention backend ``flashinfer``: FlashInfer's paged attention (CUDA, float16 or bfloat16).

FlashInfer plans the work of a batch on the host (``plan``), and every layer then runs that plan,
which lives in the buffers of a wrapper. Batches are nested here: express work is planned while a
long prefill is between two of its layers. So there are several wrappers, and a batch whose plan was
overwritten is planned again.

``plan`` writes into pinned memory and enqueues a copy to the device. The next plan of the same
wrapper must not write there before that copy is done, so it waits for a mark behind the copy, as
the ring of `PinnedUploader` does.

One kind of wrapper serves prefills and decode steps. FlashInfer's wrapper for decode steps runs the
same kernels if query heads share KV heads, and mixed batches would need both kinds.

FlashInfer's mode for CUDA graphs is not used: it needs a wrapper for each captured shape, and a
plan before each replay. Our own kernels need neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Protocol

import torch

from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.device.marks import Device, DeviceMark
from pla_serve.engine.kv.cache import KVCache

WRAPPERS = 4
"""Number of batches that have a plan at one time; each takes 8 MiB of device and pinned memory."""
WORKSPACE_BYTES = 384 * 2**20
"""Memory for partial results of split contexts. All wrappers share it: calls do not overlap."""
LAYOUT = "NHD"
"""FlashInfer's name for pages of shape (tokens, heads, dim), as in `KVCache`."""


class Wrapper(Protocol):
    """The methods of ``flashinfer.BatchPrefillWithPagedKVCacheWrapper`` that are called here."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None: ...

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor: ...


def flashinfer_missing() -> str | None:
    """Return why FlashInfer cannot be used; None if it can."""
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed (pip install flashinfer-python)"
    try:
        import flashinfer
    except Exception as error:  # the libraries that it loads raise anything
        return f"FlashInfer cannot be imported ({type(error).__name__}: {error})"
    if not hasattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper"):
        return "this FlashInfer has no BatchPrefillWithPagedKVCacheWrapper"
    return None


def make_wrappers(device: torch.device) -> list[Wrapper]:
    """Return WRAPPERS wrappers that share one workspace."""
    import flashinfer

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    kind: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    return [kind(workspace, LAYOUT) for _ in range(WRAPPERS)]


@dataclass(slots=True, eq=False)
class _Slot:
    """A wrapper and the batch whose plan it holds."""

    wrapper: Wrapper
    batch: FlatBatch | None = None
    scaling: float = 0.0
    copied: DeviceMark | None = None
    """Mark behind the copy of the plan to the device."""


class FlashInferAttention:
    """Attention by FlashInfer, for batches without padding; `PaddedAttention` adds support for it.

    Args:
        make: makes the wrappers; called once, at the first batch.
    """

    def __init__(self, device: Device, make: Callable[[], Sequence[Wrapper]]) -> None:
        self._device = device
        self._make = make
        self._slots: deque[_Slot] = deque()
        """Slots in the order of their last use, the latest last."""

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        if batch.paged is None:
            raise RuntimeError("this backend needs a batch that was staged for the device")
        slot = self._slot(batch, scaling)
        if slot.batch is not batch or slot.scaling != scaling:
            self._plan(slot, query, cache, batch, scaling)
        keys, values = cache.keys[layer], cache.values[layer]
        pages = (-1, batch.paged.block_tokens, *keys.shape[1:])
        return slot.wrapper.run(query.transpose(0, 1), (keys.view(pages), values.view(pages)))

    def _slot(self, batch: FlatBatch, scaling: float) -> _Slot:
        """Return the slot with the plan of this batch, or else the least recently used one."""
        if not self._slots:
            self._slots.extend(_Slot(wrapper) for wrapper in self._make())
        planned = (s for s in self._slots if s.batch is batch and s.scaling == scaling)
        slot = next(planned, self._slots[0])
        if slot is not self._slots[-1]:
            self._slots.remove(slot)
            self._slots.append(slot)
        return slot

    def _plan(
        self, slot: _Slot, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> None:
        """Plan a batch from numbers that the host has; nothing is read back from the device."""
        assert batch.paged is not None
        if slot.copied is not None:
            slot.copied.wait()
        slot.batch = None  # in case planning raises
        block = batch.paged.block_tokens
        contexts = [span.history + span.length for span in batch.spans]
        pages = [-(-context // block) for context in contexts]
        slot.wrapper.plan(
            self._host([0, *accumulate(span.length for span in batch.spans)]),
            self._host([0, *accumulate(pages)]),
            batch.paged.table[: sum(pages)],
            self._host([(context - 1) % block + 1 for context in contexts]),
            query.shape[0],
            cache.shape.heads,
            cache.shape.head_dim,
            block,
            causal=True,
            sm_scale=scaling,
            q_data_type=query.dtype,
            kv_data_type=cache.shape.dtype,
        )
        slot.copied = self._device.record()
        slot.batch, slot.scaling = batch, scaling

    def _host(self, numbers: list[int]) -> torch.Tensor:
        """Return an int32 tensor on the host, pinned if there is a CUDA device to copy to."""
        made = torch.tensor(numbers, dtype=torch.int32)
        return made.pin_memory() if self._device.torch_device.type == "cuda" else made
