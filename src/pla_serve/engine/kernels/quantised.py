"""Linears whose weights stay quantised, as GGUF files have them, at every level (`levels`).

Inputs are rounded to 16-bit integers, whose unit is the largest of 32 neighbours divided by 32,767.
Products with the integers of the weights are exact then, and equal at every level, whatever other
tokens are in the batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from pla_serve.engine.kernels.epilogue import After, Norm, last_arguments
from pla_serve.engine.loading.formats import BY_NAME, WeightFormat
from pla_serve.engine.loading.tensors import Bytes


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class QuantisedMatrices:
    """Matrices of the same number of inputs, whose outputs follow each other.

    Args:
        matrices: format and bytes (rows, bytes of a row) of each. The bytes must not move or
            change; they may be part of a mapped file.
        inputs: weights in a row.
    """

    def __init__(self, matrices: Sequence[tuple[WeightFormat, Bytes]], inputs: int) -> None:
        self.inputs = inputs
        self.sizes = tuple(len(rows) for _, rows in matrices)
        self.outputs = sum(self.sizes)
        self._rows = [np.ascontiguousarray(rows) for _, rows in matrices]
        parts = [
            _Matrix(rows.ctypes.data, form.number, len(rows))
            for (form, _), rows in zip(matrices, self._rows, strict=True)
        ]
        self.table = (_Matrix * len(parts))(*parts)
        self.count = len(parts)
        self.bytes = sum(rows.nbytes for rows in self._rows)


class Quantised:
    """Calls into the compiled kernels of one level. `open.open_kernels` makes one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_long
        self._linear = library.quantised_linear
        self._linear.restype = None
        self._linear.argtypes = [pointer, count, count, pointer, pointer, count, pointer]
        self._linear.argtypes += [ctypes.c_int, pointer, pointer, ctypes.c_float, pointer]
        self._rows = library.quantised_rows
        self._rows.restype = None
        self._rows.argtypes = [pointer, count, pointer, count, pointer]
        self.layer = library.quantised_layer
        self.layer.restype = None
        self.layer.argtypes = [pointer, pointer, count, *[pointer] * 5, count, *[pointer] * 3]

    def linear(
        self,
        inputs: torch.Tensor,
        weights: QuantisedMatrices,
        bias: torch.Tensor | None,
        after: After = "none",
        other: torch.Tensor | None = None,
        *,
        gate: QuantisedMatrices | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        """Return the linear of ``inputs`` (tokens, in): (tokens, out), both float32.

        Args:
            after: operation on the result; "add" and "mul" take ``other`` (tokens, out).
            gate: if given, the result is multiplied by swish of the linear with these weights,
                which are matrices of the same sizes.
            norm: norm that is applied to the inputs first.
        """
        assert gate is None or gate.sizes == weights.sizes
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(inputs.shape[0], weights.outputs)
        other = None if other is None else other.contiguous()
        self._linear(
            inputs.data_ptr(),
            inputs.shape[0],
            weights.inputs,
            weights.table,
            None if gate is None else gate.table,
            weights.count,
            *last_arguments(bias, after, other, norm, outputs),
        )
        return outputs

    def rows(self, weights: QuantisedMatrices, ids: torch.Tensor) -> torch.Tensor:
        """Return rows ``ids`` (count,) int64 of one matrix: (count, in) float32."""
        assert weights.count == 1
        ids = ids.contiguous()
        made = torch.empty(len(ids), weights.inputs)
        self._rows(weights.table, weights.inputs, ids.data_ptr(), len(ids), made.data_ptr())
        return made

    def is_right(self) -> bool:
        """Whether small products agree with those of the weights that `rows` returns."""
        random = np.random.default_rng(0)
        inputs = torch.from_numpy(random.standard_normal((20, 512), dtype=np.float32))
        for form in BY_NAME.values():
            weights = QuantisedMatrices([(form, _example(form, 40, 512, random))], 512)
            exact = inputs.double() @ self.rows(weights, torch.arange(40)).double().t()
            for tokens in (1, 3, 20):
                got = self.linear(inputs[:tokens], weights, None)
                if (got - exact[:tokens]).abs().max() > 1e-4 * exact.abs().max():
                    return False
        return True


def _example(form: WeightFormat, outputs: int, inputs: int, random: np.random.Generator) -> Bytes:
    """Return random rows of a format. No scale is large, and none is no number."""
    count = outputs * inputs // form.weights
    blocks = random.integers(0, 256, (count, form.bytes), dtype=np.uint8)
    scales = np.frombuffer(np.array([0.02, 0.01], np.float16).tobytes(), np.uint8)
    where = slice(-2, None) if form.name == "Q6_K" else slice(0, 4)
    whole = form.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    if not whole and form.name != "Q6_K":
        where = slice(0, 2)
    blocks[:, where] = scales[: 4 if whole else 2]
    return blocks.reshape(outputs, -1)
