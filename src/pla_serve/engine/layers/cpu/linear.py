"""Linear layers for a CPU: weights laid out once, and read at half the width for few tokens."""

from __future__ import annotations

from typing import Literal, cast

import torch

from pla_serve.engine.layers.amx import Tiles, TileWeight
from pla_serve.engine.layers.cpu.norm import FusedRMSNorm

PACKING_TOKENS = 256
"""Batch size that oneDNN packs weights for; layouts for larger ones serve small ones as well."""
FEW_TOKENS = 12
"""Up to here a linear is bound by reading its weights, and half-width ones win."""

AfterOne = Literal["none", "swish"]
AfterTwo = Literal["add", "mul"]


class PackedLinear(torch.nn.Module):
    """``nn.Linear`` with its weight in oneDNN's blocked layout.

    Plain CPU linears go to BLAS, which repacks the weight in every call and so wastes most of the
    time of a batch of a few tokens. What follows a linear, an activation or the sum or product with
    another tensor, is done while its result is still in the cache.

    Weights that float16 holds exactly, as those of most GGUF files, are kept in that form too, if
    this build of torch multiplies it with float32 inputs (fbgemm): a step of few tokens is bound by
    reading weights. They are widened before they are multiplied, so nothing is lost.

    Args:
        weight: (out, in).
        bias: (out,).
        tiles: multiplies more tokens than a few, where the weight fits it.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.narrow = _pack_half(weight, bias)
        self._tiles = tiles if TileWeight.fits(weight) else None
        # Plain attributes: packed tensors have no storage, which state_dict and .to() would want.
        self.tiled = None if self._tiles is None else TileWeight(weight)
        self.packed = None
        if self.tiled is None or self.narrow is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(
                weight.contiguous(), PACKING_TOKENS
            )

    @classmethod
    def of(cls, *linears: torch.nn.Linear, tiles: Tiles | None = None) -> PackedLinear:
        """One linear whose outputs are those of all these, one behind the other."""
        weight = torch.cat([linear.weight.data for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise ValueError("linears with and without a bias cannot be joined")
        return cls(weight, torch.cat([bias.data for bias in biases]) if biases else None, tiles)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return self.then(inputs, "none")

    def then(self, inputs: torch.Tensor, after: AfterOne) -> torch.Tensor:
        """The linear, and ``after`` (swish is SiLU) on its result."""
        tokens = inputs.numel() // self.in_features
        if tokens == 0:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        if self.narrow is not None and tokens <= FEW_TOKENS:
            outputs = _multiply_half(inputs, self.narrow)
            return torch.nn.functional.silu(outputs, inplace=True) if after == "swish" else outputs
        if (tiles := self.tiles_for(tokens)) is not None:
            flat = inputs.reshape(tokens, self.in_features)
            outputs = tiles[0].linear(flat, tiles[1], self.bias, after)
            return outputs.view(*inputs.shape[:-1], self.out_features)
        outputs = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, after, [], "")
        return cast("torch.Tensor", outputs)

    def tiles_for(self, tokens: int) -> tuple[Tiles, TileWeight] | None:
        """What multiplies so many tokens, with the weight as it takes it; None if others do."""
        if self._tiles is None or self.tiled is None or tokens <= FEW_TOKENS:
            return None
        return self._tiles, self.tiled

    def of_normed(self, inputs: torch.Tensor, norm: FusedRMSNorm) -> torch.Tensor:
        """The linear of the norm of ``inputs`` (tokens, in)."""
        if (tiles := self.tiles_for(inputs.shape[0])) is not None:
            return tiles[0].linear(inputs, tiles[1], self.bias, norm=norm)
        return self.then(norm(inputs), "none")

    def with_other(
        self, inputs: torch.Tensor, other: torch.Tensor, after: AfterTwo
    ) -> torch.Tensor:
        """The linear's result plus or times ``other``, of the same shape (tokens, out)."""
        if self.narrow is not None and inputs.shape[0] <= FEW_TOKENS:
            outputs = _multiply_half(inputs, self.narrow)
            return outputs.add_(other) if after == "add" else outputs.mul_(other)
        if (tiles := self.tiles_for(inputs.shape[0])) is not None:
            return tiles[0].linear(inputs, tiles[1], self.bias, after, other)
        multiply = torch.ops.mkldnn._linear_pointwise.binary
        return cast("torch.Tensor", multiply(inputs, other, self.packed, self.bias, after))


class GatedLinear(torch.nn.Module):
    """Two linears of the norm of the same inputs, the second times SiLU of the first."""

    def __init__(
        self, gate: torch.nn.Linear, up: torch.nn.Linear, tiles: Tiles | None = None
    ) -> None:
        super().__init__()
        self.gate = PackedLinear.of(gate, tiles=tiles)
        self.up = PackedLinear.of(up, tiles=tiles)
        gates, ups = self.gate.tiled, self.up.tiled
        same = gates is not None and ups is not None and gates.parts == ups.parts
        self._together = same and self.gate.bias is None and self.up.bias is None

    def forward(self, inputs: torch.Tensor, norm: FusedRMSNorm) -> torch.Tensor:
        """(tokens, in) to (tokens, out)."""
        tiles = self.up.tiles_for(inputs.shape[0])
        if self._together and tiles is not None:
            return tiles[0].linear(inputs, tiles[1], None, gate=self.gate.tiled, norm=norm)
        normed = norm(inputs)
        return self.up.with_other(normed, self.gate.then(normed, "swish"), "mul")


def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, multiplies packed weights."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack_half(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.ScriptObject | None:
    """None if it would not be exact, or not be faster."""
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
