"""Kernels for the vector units of a CPU, which exist at every level (`levels`)."""

from __future__ import annotations

import ctypes

import torch

NUMBERS = (torch.float32, torch.bfloat16)
"""Types that the kernels read and write; they compute in float32."""
MULTIPLE = 16
"""Sizes of heads must be multiples of this."""


class Vectors:
    """Calls into the compiled vector kernels of one level. `open.open_kernels` makes one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_long
        self._rotary = library.vectors_rotary
        self._rotary.restype = None
        self._rotary.argtypes = [pointer, ctypes.c_int, *[count] * 4, *[pointer] * 4]

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

    def is_right(self) -> bool:
        """Whether the kernels agree with torch on a small problem."""
        return self._turns_right()

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
