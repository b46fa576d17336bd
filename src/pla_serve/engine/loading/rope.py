"""Reads how a GGUF file scales its rotary embedding, as ``rope_parameters`` of transformers.

llama.cpp writes linear and YaRN scaling as metadata. For Llama 3.1 and later it writes a tensor
instead, by which each frequency is divided; from that the parameters are found again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from pla_serve.engine.loading.errors import UnsupportedModel

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of (head size / 2,) float32: each rotary frequency is divided by its factor."""
LLAMA3_ORIGINALS = (8192, 4096, 16384, 32768, 2048)
"""Contexts before scaling that are tried; every published Llama 3.1 to 3.3 has the first."""
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
MOST_DEVIATION = 1e-4
"""Largest relative difference between the factors in a file and those of the parameters."""


def rope_scaling(
    config: PreTrainedConfig, metadata: dict[str, Any], tensors: dict[str, Any]
) -> dict[str, Any] | None:
    """Return entries for ``config.rope_parameters``; None if the file scales nothing.

    Raises:
        UnsupportedModel: the scaling is of a kind that transformers would compute otherwise.
    """
    if ROPE_FACTORS in tensors:
        return llama3_scaling(config, np.asarray(tensors[ROPE_FACTORS].data, np.float64))
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    kind = metadata.get(prefix + "type", "none")
    if kind == "none":
        return None
    factor = metadata.get(prefix + "factor")
    if kind not in ("linear", "yarn") or factor is None:
        raise UnsupportedModel(
            f"it scales its rotary embedding by {kind!r} with factor {factor}; linear and yarn "
            "with a factor are converted. Serve its safetensors instead."
        )
    found: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    original = metadata.get(prefix + "original_context_length")
    if kind == "yarn" and original is not None:
        found["original_max_position_embeddings"] = int(original)
    return found


def llama3_scaling(config: PreTrainedConfig, factors: NDArray[np.float64]) -> dict[str, Any]:
    """Return parameters of transformers' ``llama3`` scaling that give these factors.

    Raises:
        UnsupportedModel: none of the known settings gives them.
    """
    base = float(config.rope_parameters["rope_theta"])
    size = 2 * len(factors)
    for original in LLAMA3_ORIGINALS:
        expected = llama3_factors(base, size, float(factors.max()), original)
        if np.allclose(expected, factors, rtol=MOST_DEVIATION, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": float(factors.max()),
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedModel(
        f"it divides its rotary frequencies by factors up to {factors.max():g} that are not those "
        "of Llama 3.1. Serve its safetensors instead."
    )


def llama3_factors(base: float, size: int, factor: float, original: int) -> NDArray[np.float64]:
    """Return the divisor of each of the ``size / 2`` frequencies (Llama 3.1's published rule).

    Wavelengths below a fourth of the original context stay, those above it are stretched by
    ``factor``, and between the two the rule goes over smoothly.
    """
    wavelengths = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
    smooth = (original / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    between = 1 / ((1 - smooth) / factor + smooth)
    short, long = wavelengths < original / LLAMA3_HIGH, wavelengths > original / LLAMA3_LOW
    return np.where(short, 1.0, np.where(long, factor, between))
