"""Small tensors between host and device, without making the host wait for the device."""

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
    """(n,) on the device. On CUDA through pinned memory: a plain copy waits for all work so far."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """The values on the host, once the device has come to this point."""
    if values.device.type != "cuda":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
