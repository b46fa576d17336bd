"""What a linear kernel does before and after its product, in the same call."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

After = Literal["none", "swish", "add", "mul"]
"""Operation on the result of a linear; "add" and "mul" take another tensor of its shape."""
_AFTER: dict[After, int] = {"none": 0, "swish": 1, "add": 2, "mul": 3}
"""Numbers of the operations, as `enum After` of the C++ files has them."""


class Norm(Protocol):
    """Parameters of a root-mean-square norm."""

    @property
    def weight(self) -> torch.Tensor:
        """Factors (in,), float32."""
        ...

    @property
    def epsilon(self) -> float:
        """Number that is added to the mean square."""
        ...


def last_arguments(
    bias: torch.Tensor | None,
    after: After,
    other: torch.Tensor | None,
    norm: Norm | None,
    outputs: torch.Tensor,
) -> tuple[int | float | None, ...]:
    """Return the arguments with which the calls of all linear kernels end.

    The caller keeps the tensors, which are contiguous, until the call returns.

    Args:
        bias: (out,) float32.
        other: (tokens, out) for ``after``.
        norm: norm that is applied to the inputs first.
        outputs: (tokens, out), to which the result is written.
    """
    return (
        None if bias is None else bias.data_ptr(),
        _AFTER[after],
        None if other is None else other.data_ptr(),
        None if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.epsilon,
        outputs.data_ptr(),
    )
