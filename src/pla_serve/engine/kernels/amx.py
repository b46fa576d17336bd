"""Float32 linears and attention on the matrix unit of a CPU (AMX), which multiplies bfloat16.

A float32 number is the sum of three bfloat16 numbers, so a float32 product is a sum of bfloat16
products. The kernels are the C++ files in `sources/amx/`; `open` compiles and loads them.
"""

from __future__ import annotations

import ctypes

import torch

from pla_serve.engine.kernels.epilogue import After, Norm, last_arguments

MULTIPLE = 32
"""Numbers of inputs and outputs of a linear must be multiples of this."""
PARTS = 3
"""Number of bfloat16 numbers that add up to any float32; weights of smaller types need fewer."""
KEYS = 256
"""Keys in one block of the scratch memory of attention; the same as in ``attention.cpp``."""
MOST_GROUPS = 32
"""Most query heads that may share a KV head."""


class TileWeight:
    """Weight (out, in) of a linear as bfloat16 parts, in the memory layout of the matrix unit."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        parts: list[torch.Tensor] = []
        rest = weight
        while len(parts) < 2 or (len(parts) < PARTS and rest.any()):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        self.parts = len(parts)
        blocks = [p.view(self.outputs // 16, 16, self.inputs // 32, 16, 2) for p in parts]
        ordered = [block.permute(0, 2, 3, 1, 4) for block in blocks]
        self.tiles = torch.stack(ordered, dim=2).contiguous()

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the kernel supports a linear with this weight."""
        sizes = all(size % MULTIPLE == 0 for size in weight.shape)
        return weight.dtype == torch.float32 and sizes


class Tiles:
    """Calls into the compiled AMX kernels. `open.open_kernels` makes one.

    Raises:
        OSError: the system does not grant the use of AMX, or the library is of another version.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        if library.tiles_open() != 0:
            raise OSError("the system does not grant the use of AMX")
        if library.tiles_keys() != KEYS:
            raise OSError("the kernel and its caller disagree about scratch memory")
        pointer, count = ctypes.c_void_p, ctypes.c_long
        self._linear = library.tiles_linear
        self._linear.restype = None
        self._linear.argtypes = [pointer, count, count, count, pointer, pointer, ctypes.c_int]
        self._linear.argtypes += [pointer, ctypes.c_int, pointer, pointer, ctypes.c_float, pointer]
        self._attention = library.tiles_attention
        self._attention.restype = None
        self._attention.argtypes = [pointer, count, count, pointer, pointer, *[count] * 7]
        self._attention.argtypes += [ctypes.c_float, pointer, pointer]

    def linear(
        self,
        inputs: torch.Tensor,
        weight: TileWeight,
        bias: torch.Tensor | None,
        after: After = "none",
        other: torch.Tensor | None = None,
        *,
        gate: TileWeight | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        """Return the linear of ``inputs`` (tokens, in): (tokens, out).

        Args:
            after: operation on the result; "add" and "mul" take ``other`` (tokens, out).
            gate: if given, the result is multiplied by swish of the linear with this weight, which
                has as many parts as ``weight``. There is no bias then.
            norm: norm that is applied to the inputs first.
        """
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(inputs.shape[0], weight.outputs)
        other = None if other is None else other.contiguous()
        self._linear(
            inputs.data_ptr(),
            inputs.shape[0],
            weight.inputs,
            weight.outputs,
            weight.tiles.data_ptr(),
            None if gate is None else gate.tiles.data_ptr(),
            weight.parts,
            *last_arguments(bias, after, other, norm, outputs),
        )
        return outputs

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        history: int,
        scaling: float,
    ) -> torch.Tensor:
        """Return the causal attention of new tokens after ``history`` tokens.

        Args:
            query: (heads, tokens, head dim).
            keys: (history + tokens, KV heads, head dim), with the same strides as ``values``. The
                last dimension is dense.

        Returns:
            (tokens, heads, head dim).
        """
        heads, tokens, dim = query.shape
        context, kv_heads, _ = keys.shape
        blocks = -(-context // KEYS)
        scratch = query.new_empty(2 * kv_heads * blocks * KEYS * dim * PARTS, dtype=torch.bfloat16)
        outputs = query.new_empty(tokens, heads, dim)
        self._attention(
            query.data_ptr(),
            query.stride(1),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            keys.stride(1),
            tokens,
            history,
            kv_heads,
            heads // kv_heads,
            dim,
            scaling,
            scratch.data_ptr(),
            outputs.data_ptr(),
        )
        return outputs

    @staticmethod
    def attends(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether `attention` supports heads of this number, size and type."""
        fits = head_dim % MULTIPLE == 0 and heads // kv_heads <= MOST_GROUPS
        return dtype == torch.float32 and fits

    def is_right(self) -> bool:
        """Whether small linears and a small attention agree with float64."""
        generator = torch.Generator().manual_seed(0)
        inputs, weight, gate = (torch.randn(n, 96, generator=generator) for n in (40, 64, 64))
        product = inputs.double() @ weight.double().t()
        linear = self.linear(inputs, TileWeight(weight), None)
        gated = self.linear(inputs, TileWeight(weight), None, gate=TileWeight(gate))
        swish = torch.nn.functional.silu(inputs.double() @ gate.double().t())
        query = torch.randn(2, 40, 32, generator=generator)
        keys, values = torch.randn(2, KEYS + 40, 1, 32, generator=generator)
        q, k, v = (part.double() for part in (query, keys[:, 0], values[:, 0]))
        mask = torch.ones(40, KEYS + 40, dtype=torch.bool).tril(KEYS)
        truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
        attended = self.attention(query, keys, values, KEYS, 0.5).transpose(0, 1)
        pairs = ((linear, product), (gated, product * swish), (attended, truth))
        return all(torch.allclose(got, exact.float(), 1e-4, 1e-3) for got, exact in pairs)
