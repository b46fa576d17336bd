"""Faster CPU modules in place of stock ones; same parameters, same results up to rounding."""

from __future__ import annotations

import torch

PACKING_TOKENS = 256
"""Batch size that oneDNN packs weights for; layouts for larger ones serve small ones as well."""


class PackedLinear(torch.nn.Module):
    """``nn.Linear`` with its weight in oneDNN's blocked layout.

    Plain CPU linears go to BLAS, which repacks the weight in every call and so wastes most of the
    time of a batch of a few tokens.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        # A plain attribute: packed tensors have no storage, which state_dict and .to() would want.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, PACKING_TOKENS)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if inputs.numel() == 0:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.packed, self.bias, "none", [], ""
        )
        return outputs


class FusedRMSNorm(torch.nn.Module):
    """Root-mean-square norm in one kernel; ``weight`` is shared with the stock module."""

    def __init__(self, norm: torch.nn.Module, epsilon: float) -> None:
        super().__init__()
        weight = norm.weight
        assert isinstance(weight, torch.nn.Parameter)
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., dim) to the same."""
        return torch.nn.functional.rms_norm(inputs, self.weight.shape, self.weight, self.epsilon)


def optimise(model: torch.nn.Module) -> None:
    """Replace the modules of ``model``, on the CPU, that have a faster equal."""
    with torch.no_grad():
        _replace(model)


def _replace(parent: torch.nn.Module) -> None:
    for name, child in parent.named_children():
        if type(child) is torch.nn.Linear and _packs(child.weight.dtype):
            setattr(parent, name, PackedLinear(child))
        elif (epsilon := _rms_epsilon(child)) is not None:
            setattr(parent, name, FusedRMSNorm(child, epsilon))
        else:
            _replace(child)


def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, multiplies packed weights."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _rms_epsilon(module: torch.nn.Module) -> float | None:
    """Epsilon of a plain RMS norm, None for any other module.

    Told by trial rather than by name: some architectures add one to the weight or scale otherwise.
    """
    epsilon = getattr(module, "variance_epsilon", None)
    weight = getattr(module, "weight", None)
    if not isinstance(epsilon, float) or not isinstance(weight, torch.nn.Parameter):
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, *weight.shape, generator=generator).to(weight.dtype)
    expected = module(probe).float()
    fused = torch.nn.functional.rms_norm(probe, weight.shape, weight, epsilon).float()
    tolerance = 8 * torch.finfo(weight.dtype).eps
    return epsilon if torch.allclose(fused, expected, rtol=tolerance, atol=tolerance) else None
