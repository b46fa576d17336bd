"""What one engine tells the readers of its KV, in memory that they read like the KV itself.

A slot says how far an offer has been computed, and that it stands. Nobody has to answer a reader:
one that finds the offer standing *after* it read some KV knows that this KV was not replaced
before it was read, because a slot is changed before the blocks behind it are given back.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SLOT_BYTES = 64
"""A cache line: slots do not disturb each other."""
_WORDS = SLOT_BYTES // 8
_LAYER_BITS = 16


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """One reading of a slot. Each of its claims stays true as long as the generation stands."""

    generation: int
    whole: int
    """Leading tokens whose KV is there in all layers."""
    chunk: int
    """Leading tokens whose KV is there in the first ``layers`` layers."""
    layers: int

    def available(self, layer: int) -> int:
        """Leading tokens whose KV is there in this layer."""
        return max(self.whole, self.chunk) if layer < self.layers else self.whole


class Slots:
    """Rows of SLOT_BYTES at addresses that do not change."""

    def __init__(self, count: int) -> None:
        # One row more than asked, so that the first can begin on a cache line.
        self._memory = np.zeros(((count + 1) * _WORDS,), dtype=np.int64)
        shift = (-self._memory.ctypes.data % SLOT_BYTES) // 8
        self.rows: npt.NDArray[np.int64] = self._memory[shift : shift + count * _WORDS].reshape(
            count, _WORDS
        )
        self._free = list(range(count - 1, -1, -1))

    def take(self) -> int | None:
        """A free row; None if there is none."""
        return self._free.pop() if self._free else None

    def give_back(self, row: int) -> None:
        self._free.append(row)

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    def address(self, row: int) -> int:
        return int(self.rows.ctypes.data) + row * SLOT_BYTES

    def region(self) -> tuple[int, int]:
        """Address and bytes of all rows."""
        return self.address(0), self.rows.nbytes

    def read(self, row: int) -> LedgerReading | None:
        """What a row holds; None if it is caught in the middle of a change, or was never set."""
        generation, whole, packed, check = (int(word) for word in self.rows[row, :4])
        if check != _check(generation, whole, packed):
            return None
        return LedgerReading(
            generation, whole, packed >> _LAYER_BITS, packed & ((1 << _LAYER_BITS) - 1)
        )

    def write(self, row: int, progress: LedgerReading) -> None:
        packed = (progress.chunk << _LAYER_BITS) | progress.layers
        check = _check(progress.generation, progress.whole, packed)
        # In any order: a reader that sees a mixture sees a wrong check.
        self.rows[row, :4] = (progress.generation, progress.whole, packed, check)


def _check(generation: int, whole: int, packed: int) -> int:
    """Never what a row of zeros holds."""
    return zlib.crc32(b"%d %d %d" % (generation, whole, packed)) | 1 << 32
