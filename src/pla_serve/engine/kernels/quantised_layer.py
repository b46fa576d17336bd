"""A decoder layer of quantised weights in one call, for the few tokens of a decode step."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from pla_serve.engine.kernels.epilogue import Norm
from pla_serve.engine.kernels.quantised import Quantised, QuantisedMatrices
from pla_serve.engine.kernels.vector import SpanTable

MOST_TOKENS = 8
"""Most tokens of a call. With more, the time that calls take does not matter."""


class _Product(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_double))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _Product),
        ("out", _Product),
        ("gate", _Product),
        ("up", _Product),
        ("down", _Product),
        ("before_attention", _Norm),
        ("before_mlp", _Norm),
        ("query_heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


@dataclass(frozen=True, slots=True)
class WeightsAndBias:
    """One product of a layer."""

    matrices: QuantisedMatrices
    bias: torch.Tensor | None = None
    """(out,) float32."""

    def record(self) -> _Product:
        """Return what the kernel reads."""
        m = self.matrices
        parts = ctypes.cast(m.table, ctypes.c_void_p)
        bias = None if self.bias is None else self.bias.data_ptr()
        return _Product(parts, m.count, m.inputs, m.outputs, bias)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Products and norms of a decoder layer without norms of queries and keys."""

    qkv: WeightsAndBias
    """Queries, keys and values, with the two elements of a head that the rotary embedding turns
    together as neighbours."""
    out: WeightsAndBias
    gate: WeightsAndBias
    up: WeightsAndBias
    down: WeightsAndBias
    before_attention: Norm
    before_mlp: Norm
    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float


class QuantisedLayer:
    """Calls into the compiled kernel that runs a decoder layer of quantised weights as a whole.

    Args:
        kernels: kernels of the level in use.
        weights: weights of the layer. Their memory must not move while this object is used.
    """

    def __init__(self, kernels: Quantised, weights: LayerWeights) -> None:
        w = weights
        self._weights = weights  # they are kept alive, because the record has their addresses
        norms = [_Norm(n.weight.data_ptr(), n.epsilon) for n in (w.before_attention, w.before_mlp)]
        products = [part.record() for part in (w.qkv, w.out, w.gate, w.up, w.down)]
        sizes = (w.query_heads, w.kv_heads, w.head_dim)
        self._record = _Layer(*products, *norms, *sizes, w.scaling)
        self._address = ctypes.addressof(self._record)
        outputs = (part.matrices.outputs for part in (w.qkv, w.out, w.up))
        room = sum(outputs) + w.query_heads * w.head_dim
        self._scratch = torch.empty(MOST_TOKENS * room)
        self._call = kernels.layer

    def __call__(
        self,
        hidden: torch.Tensor,
        turn: torch.Tensor,
        slots: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
        table: SpanTable,
    ) -> torch.Tensor:
        """Return the output (tokens, width) of the layer, and write the KV of its tokens.

        Args:
            hidden: (tokens, width) float32, of at most MOST_TOKENS tokens.
            turn: as in `Vectors.rotary`, as is ``slots``.
            memory: keys and values of the layer (slots, KV heads, head dim), float32.
            table: of all sequences of the batch.
        """
        tokens = len(hidden)
        assert tokens <= MOST_TOKENS
        hidden, turn = hidden.contiguous(), turn.contiguous()
        outputs = torch.empty_like(hidden)
        self._call(
            self._address,
            hidden.data_ptr(),
            tokens,
            turn.data_ptr(),
            slots.data_ptr(),
            memory[0].data_ptr(),
            memory[1].data_ptr(),
            table.spans.data_ptr(),
            len(table.spans),
            table.runs.data_ptr(),
            self._scratch.data_ptr(),
            outputs.data_ptr(),
        )
        return outputs
