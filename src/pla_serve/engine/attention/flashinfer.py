"""FlashInfer's paged attention, where that package is installed (CUDA, float16 or bfloat16).

FlashInfer lays out the work of a batch on the host (``plan``), and every layer then runs it. A
plan lives in its wrapper's buffers. Batches nest here: an express batch is planned while a long
prefill is between two of its layers. So there are a few wrappers, and a batch that has lost its
plan to others is planned again.

``plan`` writes what it found into pinned memory and asks for an asynchronous copy of it. The next
plan of that wrapper must not write there before the device has come to the copy: it waits for a
mark behind it, as the ring of `PinnedUploader` does.

One wrapper serves prefills and decode steps: the one that FlashInfer has for decode steps alone
runs the same kernels where query heads share KV heads, and mixed batches would need both.

Its CUDA-graph mode is not used: it wants a wrapper for each captured shape, and a plan before each
replay. The project's own kernels need neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Protocol

import torch

from pla_serve.engine.attention.cache import KVCache
from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.run.device import Device, DeviceMark

WRAPPERS = 4
"""Batches that keep their plan at the same time; 8 MiB each on the device and in pinned memory."""
WORKSPACE_BYTES = 384 * 2**20
"""For partial results of split contexts; used within one call, so all wrappers share it."""
LAYOUT = "NHD"
"""Pages are (tokens, heads, dim), as in `KVCache`."""


class Wrapper(Protocol):
    """What is used of ``flashinfer.BatchPrefillWithPagedKVCacheWrapper``."""

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
    """Why there is no FlashInfer to use, or None."""
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed (pip install flashinfer-python)"
    try:
        import flashinfer
    except Exception as error:  # it loads libraries of its own, which fail in ways of their own
        return f"FlashInfer cannot be imported ({type(error).__name__}: {error})"
    if not hasattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper"):
        return "this FlashInfer has no BatchPrefillWithPagedKVCacheWrapper"
    return None


def make_wrappers(device: torch.device) -> list[Wrapper]:
    """WRAPPERS of them around one workspace."""
    import flashinfer

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    kind: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    return [kind(workspace, LAYOUT) for _ in range(WRAPPERS)]


@dataclass(slots=True, eq=False)
class _Slot:
    """A wrapper, and the batch that it is planned for."""

    wrapper: Wrapper
    batch: FlatBatch | None = None
    scaling: float = 0.0
    copied: DeviceMark | None = None
    """Behind the copy of the plan to the device."""


class FlashInferAttention:
    """Attention by FlashInfer over batches without padding (`PaddedAttention` takes care of it).

    Args:
        make: makes the wrappers; called once, when attention is first asked for.
    """

    def __init__(self, device: Device, make: Callable[[], Sequence[Wrapper]]) -> None:
        self._device = device
        self._make = make
        self._slots: deque[_Slot] = deque()
        """The one used last comes last."""

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See AttentionBackend."""
        if batch.paged is None:
            raise RuntimeError("this backend needs a batch that was staged for the device")
        slot = self._slot(batch, scaling)
        if slot.batch is not batch or slot.scaling != scaling:
            self._plan(slot, query, cache, batch, scaling)
        keys, values = cache.keys[layer], cache.values[layer]
        pages = (-1, batch.paged.block_tokens, *keys.shape[1:])
        return slot.wrapper.run(query.transpose(0, 1), (keys.view(pages), values.view(pages)))

    def _slot(self, batch: FlatBatch, scaling: float) -> _Slot:
        """The slot that is planned for this batch, else the one that was not used for longest."""
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
        """From the host's numbers: nothing is read back from the device."""
        assert batch.paged is not None
        if slot.copied is not None:
            slot.copied.wait()
        slot.batch = None  # should the plan fail
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
        """int32 on the host; pinned where there is a device to copy to."""
        made = torch.tensor(numbers, dtype=torch.int32)
        return made.pin_memory() if self._device.torch_device.type == "cuda" else made
