"""The ledger: slots of memory in which an engine publishes the progress of its offers.

Readers copy a slot in the same way as the KV itself, so the engine never has to answer them. A slot
says how far an offer is computed, and by its generation that the offer stands. A slot changes
before the blocks of its offer are freed. A reader that finds the generation unchanged *after* it
copied KV therefore knows that this KV had not been replaced.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SLOT_BYTES = 64
"""Size of a cache line, so that writes to one slot do not slow down another."""
_WORDS = SLOT_BYTES // 8
_LAYER_BITS = 16


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """Content of one slot. All of it stays true for as long as the slot has this generation."""

    generation: int
    whole: int
    """Number of leading tokens whose KV is computed in all layers."""
    chunk: int
    """Number of leading tokens whose KV is computed in the first ``layers`` layers."""
    layers: int

    def available(self, layer: int) -> int:
        """Return the number of leading tokens whose KV is computed in this layer."""
        return max(self.whole, self.chunk) if layer < self.layers else self.whole


class Slots:
    """``count`` rows of SLOT_BYTES each, at addresses that do not change; taken and given back."""

    def __init__(self, count: int) -> None:
        # One row more than asked for, so that the first can begin on a cache line.
        self._memory = np.zeros(((count + 1) * _WORDS,), dtype=np.int64)
        shift = (-self._memory.ctypes.data % SLOT_BYTES) // 8
        self.rows: npt.NDArray[np.int64] = self._memory[shift : shift + count * _WORDS].reshape(
            count, _WORDS
        )
        self._free = list(range(count - 1, -1, -1))

    def take(self) -> int | None:
        """Take a free row; None if there is none."""
        return self._free.pop() if self._free else None

    def give_back(self, row: int) -> None:
        self._free.append(row)

    @property
    def free(self) -> int:
        """Number of rows that are not taken."""
        return len(self._free)

    def address(self, row: int) -> int:
        return int(self.rows.ctypes.data) + row * SLOT_BYTES

    def region(self) -> tuple[int, int]:
        """Return address and size in bytes of all rows."""
        return self.address(0), self.rows.nbytes

    def read(self, row: int) -> LedgerReading | None:
        """Return the content of a row; None if it is half written, or was never written."""
        generation, whole, packed, check = (int(word) for word in self.rows[row, :4])
        if check != _check(generation, whole, packed):
            return None
        return LedgerReading(
            generation, whole, packed >> _LAYER_BITS, packed & ((1 << _LAYER_BITS) - 1)
        )

    def write(self, row: int, progress: LedgerReading) -> None:
        packed = (progress.chunk << _LAYER_BITS) | progress.layers
        check = _check(progress.generation, progress.whole, packed)
        # A reader that sees old and new words together finds that the checksum does not match.
        self.rows[row, :4] = (progress.generation, progress.whole, packed, check)


def _check(generation: int, whole: int, packed: int) -> int:
    """Return a checksum that is never 0, so that a row of zeros counts as never written."""
    return zlib.crc32(b"%d %d %d" % (generation, whole, packed)) | 1 << 32
