"""Linears of few tokens in the vector units. Their time is that of reading the weights."""

from __future__ import annotations

import ctypes

import torch

from pla_serve.engine.kernels.epilogue import After, Norm, last_arguments

FEW_TOKENS = 12
"""Most tokens for which reading weights takes longest."""
MULTIPLE = 16
"""Numbers of inputs must be multiples of this."""
KINDS = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights, in the order of the numbers that the kernel knows them by."""


SAMPLE = 4096
"""Numbers of a weight that are looked at first, which tells most types that cannot hold it."""


class FewWeight:
    """Weight (out, in) of a linear in panels, in the smallest type that holds it exactly.

    Args:
        weight: (out, in), as `narrowed` returns it.
        width: outputs in one panel (`FewTokens.width`).
    """

    def __init__(self, weight: torch.Tensor, width: int) -> None:
        self.outputs, self.inputs = weight.shape
        panels = weight.view(self.outputs // width, width, self.inputs)
        self.panels = panels.transpose(1, 2).contiguous()
        self.kind = KINDS.index(weight.dtype)


def narrowed(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` in the smallest of `KINDS` that represents all of its numbers exactly."""
    sample = weight.flatten()[:SAMPLE]
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(sample.to(dtype).to(weight.dtype), sample):
            narrow = weight.to(dtype)
            if torch.equal(narrow.to(weight.dtype), weight):
                return narrow
    return weight.float()


class FewTokens:
    """Calls into the compiled kernels of one level for linears of few tokens."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        library.vectors_width.restype = count
        self.width: int = library.vectors_width()
        self._few = library.vectors_few
        self._few.restype = None
        self._few.argtypes = [pointer, number, count, count, count, pointer, pointer, number]
        self._few.argtypes += [pointer, number, pointer, pointer, ctypes.c_float, pointer]

    def pack(self, weight: torch.Tensor) -> FewWeight | None:
        """Return the weight for `linear`; None if it does not fit, or would not be smaller."""
        outputs, inputs = weight.shape
        if inputs % MULTIPLE or outputs % self.width or weight.dtype not in KINDS[:2]:
            return None
        narrow = narrowed(weight)
        return None if narrow.dtype == torch.float32 else FewWeight(narrow, self.width)

    def linear(
        self,
        inputs: torch.Tensor,
        weight: FewWeight,
        bias: torch.Tensor | None = None,
        after: After = "none",
        other: torch.Tensor | None = None,
        *,
        gate: FewWeight | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        """Return the linear of ``inputs`` (tokens, in), float32 or bfloat16: (tokens, out).

        Args:
            bias: (out,) float32.
            after: operation on the result; "add" and "mul" take ``other`` (tokens, out).
            gate: if given, the result is multiplied by swish of the linear with this weight, which
                is of the same kind as ``weight``.
            norm: norm that is applied to the inputs first.
        """
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(inputs.shape[0], weight.outputs)
        other = None if other is None else other.contiguous()
        self._few(
            inputs.data_ptr(),
            inputs.dtype == torch.bfloat16,
            inputs.shape[0],
            weight.inputs,
            weight.outputs,
            weight.panels.data_ptr(),
            None if gate is None else gate.panels.data_ptr(),
            weight.kind,
            *last_arguments(bias, after, other, norm, outputs),
        )
        return outputs

    def is_right(self) -> bool:
        """Whether small linears agree with torch."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(FEW_TOKENS, 48, generator=generator)
        for dtype in (torch.bfloat16, torch.float16):
            weight = torch.randn(64, 48, generator=generator).to(dtype).float()
            packed = FewWeight(narrowed(weight), self.width)
            for count in (1, 3, FEW_TOKENS):
                right = inputs[:count] @ weight.t()
                if not torch.allclose(self.linear(inputs[:count], packed), right, 1e-4, 1e-4):
                    return False
        return True
