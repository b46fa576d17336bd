"""What the device can do and what the model asks of it: where predictions of time start.

The warm-up fits them to the engine itself; but it runs what the start says that there is time for,
and what it does not run keeps its start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pla_serve.policy.cost import CostProfile

OPERATIONS_PER_LAYER = 30
"""Calls from Python into torch, roughly: what a pass costs however few its tokens are."""
REPEATS = 3
"""Of each measurement; the first one pays for what happens once, the best one counts."""
MATRIX = {"cpu": (128, 1024), "cuda": (4096, 4096)}
"""Rows and width of the product that is timed: some milliseconds, or enough to fill the device."""
COPY_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""More than caches hold."""
OPERATIONS = 100
"""Small operations in a row, so that a coarse clock will do."""
LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on the device, in the type that the model computes with."""

    flops: float
    """Operations a second in a matrix product; an addition and a multiplication are two."""
    bytes_per_second: float
    """Read or written."""
    operation_seconds: float
    """From Python, of an operation that has next to nothing to do."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What one pass asks for, apart from its tokens."""

    layers: int
    attention_width: int
    """Query heads times head size."""
    kv_bytes_per_token: int
    """Over all layers."""
    layer_parameters: int
    """Of all decoder layers: each token passes through them."""
    head_parameters: int
    """Of the output matrix: only tokens whose logits are wanted do."""
    bytes_each: int

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        *,
        attention_width: int,
        kv_bytes_per_token: int,
    ) -> ModelSize:
        """Counts parameters; before modules are replaced by others that keep them elsewhere."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        return cls(
            layers=len(layers),
            attention_width=attention_width,
            kv_bytes_per_token=kv_bytes_per_token,
            layer_parameters=sum(parameter.numel() for parameter in layers.parameters()),
            head_parameters=0 if head is None else head.weight.numel(),
            bytes_each=next(layers.parameters()).element_size(),
        )


def measure(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> Ceilings:
    """One matrix product, one copy and a row of small operations: tens of milliseconds."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    rows, width = MATRIX[kind]
    left = torch.ones(rows, width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    scalar = torch.ones(1, device=device)

    def small() -> None:
        for _ in range(OPERATIONS):
            torch.add(scalar, 1)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS):
            _wait_for(device)
            started = clock()
            work()
            _wait_for(device)
            times.append(clock() - started)
        return max(min(times), LEAST_SECONDS)

    with torch.inference_mode():
        return Ceilings(
            flops=2 * rows * width * width / best(lambda: torch.mm(left, right)),
            bytes_per_second=2 * COPY_BYTES[kind] / best(lambda: target.copy_(source)),
            operation_seconds=best(small) / OPERATIONS,
        )


def starting_profile(size: ModelSize, ceilings: Ceilings) -> CostProfile:
    """The roofline of this model on this device."""
    profile = CostProfile.roofline(
        parameters=size.layer_parameters,
        weight_bytes=(size.layer_parameters + size.head_parameters) * size.bytes_each,
        attention_width=size.attention_width,
        layers=size.layers,
        kv_bytes_per_token=size.kv_bytes_per_token,
        flops=ceilings.flops,
        bytes_per_second=ceilings.bytes_per_second,
        launch_seconds=size.layers * OPERATIONS_PER_LAYER * ceilings.operation_seconds,
    )
    return replace(profile, per_sequence=2 * size.head_parameters / ceilings.flops)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
