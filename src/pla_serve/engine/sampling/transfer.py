"""Copies small tensors between host and device without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray


def to_device(
    values: Sequence[float] | Sequence[int] | NDArray[Any],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """Return ``values`` as a tensor (n,) on the device.

    On CUDA the copy goes through pinned memory: an ordinary one waits for all enqueued work.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host, valid once the device has finished it."""
    if values.device.type != "cuda":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
