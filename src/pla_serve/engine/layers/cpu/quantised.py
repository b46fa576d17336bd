"""Modules for CPUs whose weights stay quantised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pla_serve.engine.kernels.quantised import Quantised, QuantisedMatrices
from pla_serve.engine.layers.cpu.linear import AfterOne, AfterTwo
from pla_serve.engine.layers.cpu.norm import FusedRMSNorm
from pla_serve.engine.loading.formats import WeightFormat
from pla_serve.engine.loading.tensors import Bytes


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A matrix of quantised weights, perhaps with its rows in another order than they lie."""

    format: WeightFormat
    inputs: int
    rows: Bytes
    """(out, bytes of a row)"""
    order: torch.Tensor | None = None
    """Row i of the matrix is row ``order[i]`` of ``rows``. None: as they lie."""

    @property
    def outputs(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def reordered(self, order: torch.Tensor) -> QuantisedWeight:
        """Return the matrix whose row i is row ``order[i]`` of this one."""
        both = order if self.order is None else self.order[order]
        same = torch.equal(both, torch.arange(len(both)))
        return replace(self, order=None if same else both)

    def in_order(self) -> Bytes:
        """Return the rows in the order of the matrix: a copy, unless that is how they lie."""
        return self.rows if self.order is None else self.rows[self.order.numpy()]


class QuantisedLinear(torch.nn.Module):
    """``nn.Linear`` with quantised weights, or several with the same inputs, one after another.

    Args:
        kernels: kernels that multiply them.
        weights: matrices of the same number of inputs.
        bias: (out,) of all outputs.
    """

    def __init__(
        self,
        kernels: Quantised,
        weights: list[QuantisedWeight],
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.weights = weights
        self.in_features = weights[0].inputs
        self.out_features = sum(weight.outputs for weight in weights)
        self.bias = None if bias is None else torch.nn.Parameter(bias.float(), requires_grad=False)
        parts = [(weight.format, weight.in_order()) for weight in weights]
        self.matrices = QuantisedMatrices(parts, self.in_features)

    def get_extra_state(self) -> torch.Tensor:
        """Return a sample of the quantised bytes, by which models can be told apart."""
        parts = [
            weight.rows.reshape(-1)[:: max(1, weight.rows.size // 256)] for weight in self.weights
        ]
        return torch.from_numpy(np.concatenate(parts))

    @property
    def weight_count(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    @classmethod
    def joined(cls, *linears: QuantisedLinear) -> QuantisedLinear:
        """Return one linear with the outputs of all these, one after another.

        Raises:
            ValueError: some have a bias and some have none.
        """
        biases = [linear.bias.data for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise ValueError("linears with and without a bias cannot be joined")
        weights = [weight for linear in linears for weight in linear.weights]
        return cls(linears[0].kernels, weights, torch.cat(biases) if biases else None)

    def reordered(self, rows: torch.Tensor) -> QuantisedLinear:
        """Return the linear whose output i is output ``rows[i]`` of this one, of one matrix."""
        (weight,) = self.weights
        bias = None if self.bias is None else self.bias.data[rows]
        return QuantisedLinear(self.kernels, [weight.reordered(rows)], bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return self.then(inputs, "none")

    def then(self, inputs: torch.Tensor, after: AfterOne) -> torch.Tensor:
        """Return the linear with ``after`` applied to its result; swish is SiLU."""
        flat = inputs.reshape(-1, self.in_features).float()
        outputs = self.kernels.linear(flat, self.matrices, self.bias, after)
        return outputs.view(*inputs.shape[:-1], self.out_features).to(inputs.dtype)

    def of_normed(self, inputs: torch.Tensor, norm: FusedRMSNorm) -> torch.Tensor:
        """Return the linear of the norm of ``inputs`` (tokens, in)."""
        outputs = self.kernels.linear(inputs.float(), self.matrices, self.bias, norm=norm)
        return outputs.to(inputs.dtype)

    def with_other(
        self, inputs: torch.Tensor, other: torch.Tensor, after: AfterTwo
    ) -> torch.Tensor:
        """Return the linear's result plus or times ``other`` (tokens, out)."""
        outputs = self.kernels.linear(
            inputs.float(), self.matrices, self.bias, after, other.float()
        )
        return outputs.to(inputs.dtype)


class QuantisedGate(torch.nn.Module):
    """Gated part of an MLP: ``up(norm(x)) * SiLU(gate(norm(x)))``.

    Raises:
        ValueError: a linear has a bias, or their sizes differ.
    """

    def __init__(self, gate: QuantisedLinear, up: QuantisedLinear) -> None:
        super().__init__()
        if gate.bias is not None or up.bias is not None:
            raise ValueError("a gated MLP with biases has no quantised form")
        if gate.matrices.sizes != up.matrices.sizes:
            raise ValueError("the gate and what it gates differ in size")
        self.gate, self.up = gate, up

    def forward(self, inputs: torch.Tensor, norm: FusedRMSNorm | None) -> torch.Tensor:
        """Map (tokens, in) to (tokens, out); without ``norm``, inputs are taken as they are."""
        kernels, gate = self.up.kernels, self.gate.matrices
        outputs = kernels.linear(inputs.float(), self.up.matrices, None, gate=gate, norm=norm)
        return outputs.to(inputs.dtype)


class QuantisedEmbedding(torch.nn.Module):
    """``nn.Embedding`` whose rows are quantised; they may be those of the output matrix.

    Args:
        linear: linear with one row for each token.
        dtype: type of the result.
    """

    def __init__(self, linear: QuantisedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self._dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids (...) int64 to their rows (..., hidden)."""
        rows = self.linear.kernels.rows(self.linear.matrices, ids.reshape(-1))
        return rows.view(*ids.shape, -1).to(self._dtype)


def quantised_memory(model: torch.nn.Module) -> dict[str, int]:
    """Return the bytes of quantised weights by format; weights that are used twice count once."""
    found: dict[int, tuple[str, int]] = {}
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            for weight in module.weights:
                start = weight.rows.__array_interface__["data"][0]
                found[start] = (weight.format.name, weight.rows.nbytes)
    total: dict[str, int] = {}
    for name, size in found.values():
        total[name] = total.get(name, 0) + size
    return dict(sorted(total.items()))


def copied_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights that are copied, because their rows are in another order."""
    linears = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    weights = [weight for linear in linears for weight in linear.weights]
    return sum(weight.rows.nbytes for weight in weights if weight.order is not None)
