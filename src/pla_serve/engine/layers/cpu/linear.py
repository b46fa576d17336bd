"""Linear layers for CPUs: weights are packed once, and read as float16 for few tokens if exact."""

from __future__ import annotations

from typing import Literal, cast

import torch

from pla_serve.engine.kernels.amx import Tiles, TileWeight
from pla_serve.engine.kernels.few import FEW_TOKENS, FewTokens, FewWeight
from pla_serve.engine.kernels.open import TORCH_ALONE, CpuKernels
from pla_serve.engine.layers.cpu.norm import FusedRMSNorm

PACKING_TOKENS = 256
"""Batch size that oneDNN packs weights for; the layout is good for smaller batches as well."""

AfterOne = Literal["none", "swish"]
AfterTwo = Literal["add", "mul"]


class PackedLinear(torch.nn.Module):
    """``nn.Linear`` with its weight in oneDNN's blocked layout.

    Stock linears call BLAS, which packs the weight again in every call: most of the time of a small
    batch. An activation, or a sum or product with another tensor, is computed while the result of
    the linear is still in the processor's cache.

    Weights that bfloat16 or float16 represents exactly, as most files have, are kept in that form
    as well, for few tokens: by kernels of this project, or if there are none by torch's for float16
    weights and float32 inputs (fbgemm). They are converted before they are multiplied, so results
    stay the same, and half as many bytes are read.

    Args:
        weight: (out, in).
        bias: (out,).
        kernels: used if they fit the weight.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kernels: CpuKernels = TORCH_ALONE,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self._few = kernels.few
        self.few = None if self._few is None else self._few.pack(weight)
        self._wide_bias = None if bias is None else bias.float()
        self.narrow = _pack_half(weight, bias) if self.few is None else None
        self._tiles = kernels.tiles if TileWeight.fits(weight) else None
        # Not parameters: packed tensors have no storage, which state_dict and .to() need.
        self.tiled = None if self._tiles is None else TileWeight(weight)
        self.packed = None
        if self.tiled is None or (self.narrow is None and self.few is None):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(
                weight.contiguous(), PACKING_TOKENS
            )

    @classmethod
    def of(cls, *linears: torch.nn.Linear, kernels: CpuKernels = TORCH_ALONE) -> PackedLinear:
        """Return one linear with the outputs of all these, one after another.

        Raises:
            ValueError: some have a bias and some have none.
        """
        weights = [linear.weight.data for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # packing copies it anyway
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise ValueError("linears with and without a bias cannot be joined")
        return cls(weight, torch.cat([bias.data for bias in biases]) if biases else None, kernels)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return self.then(inputs, "none")

    def then(self, inputs: torch.Tensor, after: AfterOne) -> torch.Tensor:
        """Return the linear with ``after`` applied to its result; swish is SiLU."""
        tokens = inputs.numel() // self.in_features
        if tokens == 0:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        if (few := self.few_for(tokens)) is not None:
            flat = inputs.reshape(tokens, self.in_features)
            outputs = few[0].linear(flat, few[1], self._wide_bias, after)
            return outputs.view(*inputs.shape[:-1], self.out_features)
        if self.narrow is not None and tokens <= FEW_TOKENS:
            outputs = _multiply_half(inputs, self.narrow)
            return torch.nn.functional.silu(outputs, inplace=True) if after == "swish" else outputs
        if (tiles := self.tiles_for(tokens)) is not None:
            flat = inputs.reshape(tokens, self.in_features)
            outputs = tiles[0].linear(flat, tiles[1], self.bias, after)
            return outputs.view(*inputs.shape[:-1], self.out_features)
        outputs = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, after, [], "")
        return cast("torch.Tensor", outputs)

    def few_for(self, tokens: int) -> tuple[FewTokens, FewWeight] | None:
        """Return the kernels for few tokens and the weight for them; None if others are faster."""
        if self._few is None or self.few is None or tokens > FEW_TOKENS:
            return None
        return self._few, self.few

    def tiles_for(self, tokens: int) -> tuple[Tiles, TileWeight] | None:
        """Return the matrix unit kernels and the weight for them; None if others are faster."""
        if self._tiles is None or self.tiled is None or tokens <= FEW_TOKENS:
            return None
        return self._tiles, self.tiled

    def of_normed(self, inputs: torch.Tensor, norm: FusedRMSNorm) -> torch.Tensor:
        """Return the linear of the norm of ``inputs`` (tokens, in)."""
        if (few := self.few_for(inputs.shape[0])) is not None:
            return few[0].linear(inputs, few[1], self._wide_bias, norm=norm)
        if (tiles := self.tiles_for(inputs.shape[0])) is not None:
            return tiles[0].linear(inputs, tiles[1], self.bias, norm=norm)
        return self.then(norm(inputs), "none")

    def with_other(
        self, inputs: torch.Tensor, other: torch.Tensor, after: AfterTwo
    ) -> torch.Tensor:
        """Return the linear's result plus or times ``other`` (tokens, out)."""
        if (few := self.few_for(inputs.shape[0])) is not None:
            return few[0].linear(inputs, few[1], self._wide_bias, after, other)
        if self.narrow is not None and inputs.shape[0] <= FEW_TOKENS:
            outputs = _multiply_half(inputs, self.narrow)
            return outputs.add_(other) if after == "add" else outputs.mul_(other)
        if (tiles := self.tiles_for(inputs.shape[0])) is not None:
            return tiles[0].linear(inputs, tiles[1], self.bias, after, other)
        multiply = torch.ops.mkldnn._linear_pointwise.binary
        return cast("torch.Tensor", multiply(inputs, other, self.packed, self.bias, after))


class GatedLinear(torch.nn.Module):
    """Gated part of an MLP: ``up(norm(x)) * SiLU(gate(norm(x)))``."""

    def __init__(
        self, gate: torch.nn.Linear, up: torch.nn.Linear, kernels: CpuKernels = TORCH_ALONE
    ) -> None:
        super().__init__()
        self.gate = PackedLinear.of(gate, kernels=kernels)
        self.up = PackedLinear.of(up, kernels=kernels)
        plain = self.gate.bias is None and self.up.bias is None
        few = self.gate.few, self.up.few
        same_kind = few[0] is not None and few[1] is not None and few[0].kind == few[1].kind
        self._few_together = plain and same_kind
        gates, ups = self.gate.tiled, self.up.tiled
        same = gates is not None and ups is not None and gates.parts == ups.parts
        self._together = same and plain

    def forward(self, inputs: torch.Tensor, norm: FusedRMSNorm | None) -> torch.Tensor:
        """Map (tokens, in) to (tokens, out); without ``norm``, inputs are taken as they are."""
        few = self.up.few_for(inputs.shape[0])
        if self._few_together and few is not None:
            return few[0].linear(inputs, few[1], gate=self.gate.few, norm=norm)
        tiles = self.up.tiles_for(inputs.shape[0])
        if self._together and tiles is not None:
            return tiles[0].linear(inputs, tiles[1], None, gate=self.gate.tiled, norm=norm)
        normed = inputs if norm is None else norm(inputs)
        return self.up.with_other(normed, self.gate.then(normed, "swish"), "mul")


def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch can multiply packed weights of this type on this processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack_half(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.ScriptObject | None:
    """Return the weight in float16; None if that is not exact or not faster."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if weight.dtype != torch.float32 or not fast:
        return None
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    if not torch.equal(weight.half().float(), weight):
        return None
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return packed


def _multiply_half(inputs: torch.Tensor, packed: torch.ScriptObject) -> torch.Tensor:
    outputs: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(inputs, packed)
    return outputs
