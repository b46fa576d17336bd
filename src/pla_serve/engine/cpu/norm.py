"""Root-mean-square norms in few passes over memory."""

from __future__ import annotations

import torch


class FusedRMSNorm(torch.nn.Module):
    """Root-mean-square norm; ``weight`` is shared with the stock module.

    Torch has no single CPU kernel for it: its own version makes eight calls, this one five, of
    which three go over the whole input.
    """

    def __init__(self, norm: torch.nn.Module, epsilon: float) -> None:
        super().__init__()
        weight = norm.weight
        assert isinstance(weight, torch.nn.Parameter)
        self.weight = weight
        self._epsilon = torch.tensor(epsilon)
        self._per_element = 1 / weight.shape[-1]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., dim) to the same."""
        lengths = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=torch.float32)
        scales = torch.addcmul(self._epsilon, lengths, lengths, value=self._per_element).rsqrt_()
        return torch.mul(inputs, scales).mul_(self.weight).to(inputs.dtype)


def rms_epsilon(module: torch.nn.Module) -> float | None:
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
