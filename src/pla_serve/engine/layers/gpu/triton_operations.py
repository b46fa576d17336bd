"""The operations of a fused layer by Triton kernels."""

from __future__ import annotations

import torch

from pla_serve.engine.layers.gpu.kernels import (
    gate_kernel,
    rms_norm_kernel,
    rotate_and_store_kernel,
)
from pla_serve.engine.layers.gpu.operations import Heads

GATE_BLOCK = 1024


class TritonOperations:
    """`Operations` with one kernel for each."""

    def rms_norm(self, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See `Operations`."""
        rows, width = inputs.shape
        outputs = torch.empty_like(inputs)
        block = 1 << (width - 1).bit_length()
        rms_norm_kernel[(rows,)](
            inputs, weight, outputs, width, epsilon, BLOCK=block, num_warps=_warps(block)
        )
        return outputs

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
        cos, sin = angles
        normed = heads.query_norm is not None and heads.key_norm is not None
        half = max(1, 1 << (heads.dim // 2 - 1).bit_length())
        rotate_and_store_kernel[(len(joint), heads.query + 2 * heads.kv)](
            joint,
            cos,
            sin,
            slots,
            keys,
            values,
            heads.query_norm if normed else joint,
            heads.key_norm if normed else joint,
            heads.epsilon,
            cos.stride(0),
            keys.stride(0),
            QUERY_HEADS=heads.query,
            KV_HEADS=heads.kv,
            DIM=heads.dim,
            HALF_PAD=half,
            NORM=normed,
            num_warps=1,
        )
        rows = joint.view(len(joint), -1, heads.dim)
        return rows[:, : heads.query].transpose(0, 1)

    def gate(self, joint: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        rows, width = joint.shape[0], joint.shape[1] // 2
        outputs = joint.new_empty(rows, width)
        gate_kernel[(rows, -(-width // GATE_BLOCK))](
            joint, outputs, width, BLOCK=GATE_BLOCK, num_warps=4
        )
        return outputs


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
