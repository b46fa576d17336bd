"""What a fused layer does between its matrix products: in plain torch, or in one kernel each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Heads:
    """How one row of the joint product is divided: query heads, key heads, value heads."""

    query: int
    kv: int
    dim: int
    query_norm: torch.Tensor | None
    """(dim,), for models that normalise each head of queries and keys."""
    key_norm: torch.Tensor | None
    epsilon: float


class Operations(Protocol):
    """Works in place where it says so; all tensors are contiguous."""

    def rms_norm(self, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """(tokens, hidden) to the same, in float32 inside."""
        ...

    def rotate_and_store(
        self,
        joint: torch.Tensor,
        heads: Heads,
        angles: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Queries (heads, tokens, dim) of ``joint`` (tokens, heads * dim), which is overwritten.

        Norms where there are some, and the rotary embedding by ``angles`` (cos, sin), each (tokens,
        dim). Keys and values go to ``slots`` of the layer's memory (slots, kv heads, dim).
        """
        ...

    def gate(self, joint: torch.Tensor) -> torch.Tensor:
        """(tokens, 2 * width) to (tokens, width): SiLU of the first half times the second."""
        ...


class TorchOperations:
    """The reference, on any device."""

    def rms_norm(self, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See `Operations`."""
        return torch.nn.functional.rms_norm(
            inputs.float(), weight.shape, weight.float(), epsilon
        ).to(inputs.dtype)

    def rotate_and_store(
        self,
        joint: torch.Tensor,
        heads: Heads,
        angles: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """See `Operations`."""
        rows = joint.view(len(joint), -1, heads.dim)
        query, key, value = torch.split(rows, [heads.query, heads.kv, heads.kv], 1)
        if heads.query_norm is not None and heads.key_norm is not None:
            query = self.rms_norm(query, heads.query_norm, heads.epsilon)
            key = self.rms_norm(key, heads.key_norm, heads.epsilon)
        keys.index_copy_(0, slots, _rotate(key, angles))
        values.index_copy_(0, slots, value)
        return _rotate(query, angles).transpose(0, 1)

    def gate(self, joint: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        gate, up = joint.chunk(2, -1)
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(joint.dtype)


def _rotate(heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = (part.float().unsqueeze(1) for part in angles)
    first, second = heads.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (heads.float() * cos + turned * sin).to(heads.dtype)
