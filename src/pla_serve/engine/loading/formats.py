"""Formats of quantised weights as GGUF files have them, of those that kernels can multiply."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A format of weights: rows of blocks with small integers and the scales they share."""

    name: str
    number: int
    """Number of the format in GGUF files."""
    weights: int
    """Weights of one block. The length of a row is a multiple of it."""
    bytes: int
    """Bytes of one block."""

    def row_bytes(self, inputs: int) -> int:
        """Return the bytes of a row of ``inputs`` weights."""
        return inputs // self.weights * self.bytes


FORMATS = (
    WeightFormat("Q4_0", 2, 32, 18),
    WeightFormat("Q4_1", 3, 32, 20),
    WeightFormat("Q5_0", 6, 32, 22),
    WeightFormat("Q5_1", 7, 32, 24),
    WeightFormat("Q8_0", 8, 32, 34),
    WeightFormat("Q4_K", 12, 256, 144),
    WeightFormat("Q5_K", 13, 256, 176),
    WeightFormat("Q6_K", 14, 256, 210),
)
"""Formats that are kept as they are. K formats of rows that are no multiple of 256 do not exist:
llama-quantize writes Q5_0, Q5_1 or Q8_0 there."""
BY_NAME = {form.name: form for form in FORMATS}
FLOATS = ("F32", "F16", "BF16")
"""Formats of GGUF files that are not quantised."""
