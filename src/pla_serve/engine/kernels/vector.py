"""Kernels for the vector units of a CPU, which exist at every level (`levels`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pla_serve.engine.batch.flat import Span
from pla_serve.engine.kv.blocks import BlockRun

NUMBERS = (torch.float32, torch.bfloat16)
"""Types that the kernels read and write; they compute in float32."""
MULTIPLE = 16
"""Sizes of heads must be multiples of this."""
MOST_DIM = 256
"""Largest size of a head; the same as in ``attention.cpp``."""
MOST_GROUPS = 64
"""Most query heads that may share a KV head; ``attention.cpp`` has room for more."""


class SpanTable(NamedTuple):
    """Lengths and KV slots of the sequences of a batch, as the attention kernel reads them."""

    spans: torch.Tensor
    """(sequences, 5) int64: first new token in the batch, new tokens, history, first run, runs."""
    runs: torch.Tensor
    """(runs, 2) int64: KV slots of history and new tokens, as runs (first, end) of neighbours."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> SpanTable:
        """Return the table of a batch with these spans, of which there is at least one."""
        rows: list[tuple[int, ...]] = []
        runs: list[BlockRun] = []
        for span in spans:
            rows.append((span.start, span.length, span.history, len(runs), len(span.runs)))
            runs += span.runs
        return cls(torch.tensor(rows), torch.tensor(runs))


class Vectors:
    """Calls into the compiled vector kernels of one level. `open.open_kernels` makes one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_long
        self._rotary = library.vectors_rotary
        self._rotary.restype = None
        self._rotary.argtypes = [pointer, ctypes.c_int, *[count] * 4, *[pointer] * 4]
        self._norm = library.vectors_norm
        self._norm.restype = None
        self._norm.argtypes = [pointer, ctypes.c_int, count, count, pointer, ctypes.c_float]
        self._norm.argtypes += [pointer]
        self._attention = library.vectors_attention
        self._attention.restype = None
        self._attention.argtypes = [pointer, count, count, pointer, pointer, ctypes.c_int, pointer]
        self._attention.argtypes += [count, pointer, *[count] * 3, ctypes.c_float, pointer]

    @staticmethod
    def turns(head_dim: int, dtype: torch.dtype) -> bool:
        """Whether `rotary` supports heads of this size and type."""
        return dtype in NUMBERS and head_dim % MULTIPLE == 0

    def rotary(
        self,
        heads: torch.Tensor,
        turn: torch.Tensor,
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Apply the rotary embedding, and write keys and values to their slots.

        Args:
            heads: (tokens, query heads + 2 * KV heads, head dim), float32 or bfloat16: queries,
                keys and values. Queries are rotated in place.
            turn: (tokens, 1, head dim / 2), complex64: factor of each pair of neighbours.
            slots: (tokens,) int64.
            keys: memory of the layer (slots, KV heads, head dim) of the same type, as is
                ``values``.

        All tensors are contiguous.
        """
        tokens, count, dim = heads.shape
        kv_heads = keys.shape[1]
        assert turn.shape[-1] * 2 == dim
        assert slots.dtype == torch.int64
        assert heads.dtype == keys.dtype == values.dtype
        assert all(part.is_contiguous() for part in (heads, turn, slots, keys, values))
        self._rotary(
            heads.data_ptr(),
            heads.dtype == torch.bfloat16,
            tokens,
            count - 2 * kv_heads,
            kv_heads,
            dim,
            turn.data_ptr(),
            slots.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
        )

    @staticmethod
    def norms(inputs: torch.Tensor) -> bool:
        """Whether `norm` supports these inputs."""
        fits = inputs.shape[-1] % MULTIPLE == 0 and inputs.dtype in NUMBERS
        return fits and inputs.is_contiguous()

    def norm(self, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return the root-mean-square norm of ``inputs`` (..., dim), times ``weight`` (dim,)."""
        dim = inputs.shape[-1]
        outputs = torch.empty_like(inputs)
        self._norm(
            inputs.data_ptr(),
            inputs.dtype == torch.bfloat16,
            inputs.numel() // dim,
            dim,
            weight.data_ptr(),
            epsilon,
            outputs.data_ptr(),
        )
        return outputs

    @staticmethod
    def attends(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether `attention` supports heads of this number, size and type."""
        fits = head_dim % MULTIPLE == 0 and head_dim <= MOST_DIM
        return dtype in NUMBERS and fits and heads // kv_heads <= MOST_GROUPS

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: SpanTable,
        scaling: float,
        output: torch.Tensor,
    ) -> None:
        """Write the causal attention of the new tokens of some sequences, computed in float32.

        Args:
            query: (heads, tokens, head dim), float32 or bfloat16. The last dimension is dense.
            keys: memory of a layer (slots, KV heads, head dim), contiguous, of the same type, as
                is ``values``. KV of the new tokens is there already.
            output: (tokens, heads, head dim), contiguous, of the same type. Only the rows of
                sequences in ``table`` are written.
        """
        heads, tokens, dim = query.shape
        kv_heads = keys.shape[1]
        assert query.stride(2) == 1
        assert query.dtype == keys.dtype == values.dtype == output.dtype
        assert keys.is_contiguous()
        assert values.is_contiguous()
        assert output.is_contiguous()
        assert output.shape == (tokens, heads, dim)
        self._attention(
            query.data_ptr(),
            query.stride(1),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            query.dtype == torch.bfloat16,
            table.spans.data_ptr(),
            len(table.spans),
            table.runs.data_ptr(),
            kv_heads,
            heads // kv_heads,
            dim,
            scaling,
            output.data_ptr(),
        )

    def is_right(self) -> bool:
        """Whether the kernels agree with torch on small problems."""
        return self._turns_right() and self._norms_right() and self._attends_right()

    def _norms_right(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        inputs, weight = torch.randn(17, 48, generator=generator), torch.arange(48.0)
        right = torch.nn.functional.rms_norm(inputs, [48], weight, 0.1)
        return torch.allclose(self.norm(inputs, weight, 0.1), right, 1e-4, 1e-4)

    def _attends_right(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(4, 30, 32, generator=generator)
        keys, values = torch.randn(2, 140, 2, 32, generator=generator)
        slots = torch.cat((torch.arange(20, 140), torch.arange(10)))
        mask = torch.ones(30, 130, dtype=torch.bool).tril(100)
        parts = (keys[slots].transpose(0, 1), values[slots].transpose(0, 1))
        right = torch.nn.functional.scaled_dot_product_attention(
            query, *parts, attn_mask=mask, scale=0.5, enable_gqa=True
        ).transpose(0, 1)
        table = SpanTable(torch.tensor([[0, 30, 100, 0, 2]]), torch.tensor([[20, 140], [0, 10]]))
        got = torch.empty(30, 4, 32)
        self.attention(query, keys, values, table, 0.5, got)
        return torch.allclose(got, right, 1e-4, 1e-4)

    def _turns_right(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        heads = torch.randn(3, 4, 32, generator=generator)
        angles = torch.randn(3, 1, 16, generator=generator)
        turn = torch.polar(torch.ones_like(angles), angles)
        expected = torch.view_as_real(torch.view_as_complex(heads.view(3, 4, 16, 2)) * turn)
        expected, given = expected.view(3, 4, 32), heads.clone()
        keys, values = torch.zeros(2, 5, 1, 32)
        slots = torch.tensor([4, 0, 2])
        self.rotary(given, turn, slots, keys, values)
        pairs = (
            (given[:, :2], expected[:, :2]),
            (keys[slots], expected[:, 2:3]),
            (values[slots], heads[:, 3:]),
        )
        return all(torch.allclose(got, right, 1e-5, 1e-5) for got, right in pairs)
