"""Root-mean-square norms for CPUs, in few passes over memory."""

from __future__ import annotations

import torch

from pla_serve.engine.kernels.vector import Vectors


class FusedRMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in float32.

    Torch has no single kernel for it on a CPU. Its own version makes eight calls; without
    ``vectors`` this one makes five, of which three read the whole input.

    Args:
        weight: (dim,).
        epsilon: number that is added to the mean square.
        vectors: kernels that do it in one pass.
    """

    def __init__(
        self, weight: torch.Tensor, epsilon: float, vectors: Vectors | None = None
    ) -> None:
        super().__init__()
        self._vectors = vectors
        self.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        self.epsilon = epsilon
        self._added = torch.tensor(epsilon)
        self._per_element = 1 / weight.shape[-1]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the norm of ``inputs`` (..., dim)."""
        if self._vectors is not None and self._vectors.norms(inputs):
            return self._vectors.norm(inputs, self.weight, self.epsilon)
        wide = inputs.float()
        lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scales = torch.addcmul(self._added, lengths, lengths, value=self._per_element).rsqrt_()
        return torch.mul(wide, scales).mul_(self.weight).to(inputs.dtype)


def rms_epsilon(module: torch.nn.Module) -> float | None:
    """Return epsilon if ``module`` is a plain RMS norm; None for any other module.

    The module is run and compared, because some architectures have a norm of that name that adds
    one to the weight or scales in another way.
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
