"""Memory that the system gives when it is first written, for a KV cache that grows with its use."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from math import prod

import torch

POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14 and later: pages are given now, their content stays."""


class SystemMemory:
    """A tensor of zeros on the CPU whose pages take no memory until they are written.

    Unlike memory of ``torch.zeros``, it never comes from what the allocator keeps, which is
    resident already.

    Args:
        size: shape of the tensor.
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype) -> None:
        count = prod(size)
        self._map = mmap.mmap(
            -1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without large pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        if count:
            self.tensor = torch.frombuffer(self._map, dtype=dtype, count=count).view(size)
        else:
            self.tensor = torch.empty(size, dtype=dtype)
        self._populates = sys.platform == "linux"

    def populate(self, first: int, end: int) -> bool:
        """Have the bytes from ``first`` until ``end`` given by the system now.

        Their content does not change. Returns False if the system cannot do that; then they are
        given at their first write, as all others.
        """
        page = mmap.PAGESIZE
        start, stop = first // page * page, min(-(-end // page) * page, len(self._map))
        if not self._populates or start >= stop:
            return self._populates
        try:
            self._map.madvise(POPULATE_WRITE, start, stop - start)
        except (OSError, ValueError):
            self._populates = False
        return self._populates

    def release(self) -> None:
        """Give all pages back: the tensor is zeros again, and takes memory as it is written.

        On a system other than Linux pages and content stay as they are.
        """
        if sys.platform == "linux":
            with suppress(OSError):  # pages that somebody has locked
                self._map.madvise(mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Give the system back what has been freed and the allocator of glibc keeps."""
    with suppress(OSError, AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).malloc_trim(0)
