"""The operations between the matrix products of a fused layer; this file has them in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Heads:
    """Layout of one row of the joint product: query heads, then key heads, then value heads."""

    query: int
    kv: int
    dim: int
    query_norm: torch.Tensor | None
    """Weight (dim,) of the norm of each query head; None for models without such norms."""
    key_norm: torch.Tensor | None
    epsilon: float


class Operations(Protocol):
    """Operations of a fused layer on contiguous tensors."""

    def rms_norm(self, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return the RMS norm of ``inputs`` (tokens, hidden), computed in float32."""
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
        """Apply norms and the rotary embedding, and write keys and values to the cache.

        Args:
            joint: (tokens, all heads * dim); overwritten.
            angles: cos and sin, each (tokens, dim).
            slots: (tokens,) int64: where the KV of each token goes.
            keys: memory of the layer (slots, KV heads, dim), as is ``values``.

        Returns:
            Queries (query heads, tokens, dim); they may share memory with ``joint``.
        """
        ...

    def gate(self, joint: torch.Tensor) -> torch.Tensor:
        """Return SiLU of the first half of (tokens, 2 * width) times the second half."""
        ...


class TorchOperations:
    """The operations in plain torch, on any device: the reference for kernels."""

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
