"""Measures the device, and derives the first predictions of time from that: a roofline.

The warm-up then fits the predictions to batches that really ran. The roofline still matters: it
says which batches there is time for in the warm-up, and it stays in use for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pla_serve.engine.layers.cpu.experts import ExpertMlps
from pla_serve.engine.layers.cpu.quantised import QuantisedLinear
from pla_serve.engine.loading.mixtures import chosen_share, is_experts
from pla_serve.policy.cost import CostProfile

OPERATIONS_PER_LAYER = 30
"""Calls from Python into torch for one layer, roughly. A pass of one token makes them as well."""
REPEATS = 3
"""Repetitions of each measurement. The best one counts, since the first pays for one-time work."""
MATRIX = {"cpu": (128, 1024), "cuda": (4096, 4096)}
"""Rows and width of the timed matrix product, by kind of device: large enough to fill it."""
COPY_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Bytes of the copy that is timed, by kind of device: more than caches hold."""
OPERATIONS = 100
"""Small operations that are timed in a row, so that a coarse clock will do."""
LEAST_SECONDS = 1e-9
"""Shortest time of a measurement, for clocks that do not move during it."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Speed of the device in the dtype of the model."""

    flops: float
    """Floating-point operations per second of a matrix product. A multiply-add counts as two."""
    bytes_per_second: float
    """Bytes per second that a copy reads and writes, both counted."""
    operation_seconds: float
    """Seconds that a call of the smallest torch operation takes in Python."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model that the time of a forward pass depends on."""

    layers: int
    attention_width: int
    """Number of query heads times head dimension."""
    kv_bytes_per_token: int
    """Bytes of one token's keys and values over all layers."""
    layer_parameters: int
    """Parameters of all decoder layers that a token passes through: of a mixture of experts those
    of as many experts as a token chooses. One token reads no more than that."""
    head_parameters: int
    """Parameters of the output matrix. Only tokens whose logits are wanted pass through it."""
    bytes_each: float
    """Bytes of one parameter, on average."""

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        *,
        attention_width: int,
        kv_bytes_per_token: int,
    ) -> ModelSize:
        """Count the parameters of a model whose modules have not been fused yet."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        body, outputs = _size(layers), (0, 0) if head is None else _size(head)
        mixed = sum(_size(part)[0] for part in layers.modules() if _is_mixture(part))
        idle = round(mixed * (1 - chosen_share(model.config)))
        return cls(
            layers=len(layers),
            attention_width=attention_width,
            kv_bytes_per_token=kv_bytes_per_token,
            layer_parameters=body[0] - idle,
            head_parameters=outputs[0],
            bytes_each=(body[1] + outputs[1]) / (body[0] + outputs[0]),
        )


def _is_mixture(module: torch.nn.Module) -> bool:
    return is_experts(module) or isinstance(module, ExpertMlps)


def _size(module: torch.nn.Module) -> tuple[int, int]:
    """Return the number of parameters, quantised ones included, and their bytes."""
    floats = list(module.parameters())
    kept = [part for part in module.modules() if isinstance(part, QuantisedLinear)]
    count = sum(part.numel() for part in floats) + sum(part.weight_count for part in kept)
    size = sum(part.numel() * part.element_size() for part in floats)
    return count, size + sum(part.matrices.bytes for part in kept)


def measure(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> Ceilings:
    """Time a matrix product, a copy and small operations. Takes tens of milliseconds.

    Args:
        clock: monotonic seconds.
    """
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
    """Return the roofline of a model on a device, as coefficients of the cost model."""
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
