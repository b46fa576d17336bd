"""The KV cache's memory: it grows with use, ahead of need, and keeps what is in it."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from pla_serve.engine.kv import cache as kv_cache
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.kv.system_memory import SystemMemory

SHAPE = KVShape(layers=4, heads=2, head_dim=64, dtype=torch.float32)
CPU = torch.device("cpu")
MIB = 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def ready(cache: KVCache) -> int:
    """Do all work of idle times; returns how many steps that were."""
    steps = 0
    while cache.make_ready():
        steps += 1
        assert steps < 1000
    return steps


def use(cache: KVCache, slots: list[int]) -> None:
    at = torch.tensor(slots)
    cache.note_use(at)
    for layer in range(SHAPE.layers):
        rows = at.float().view(-1, 1, 1).expand(-1, SHAPE.heads, SHAPE.head_dim) + layer
        cache.write(layer, at, rows, -rows)


def test_memory_comes_with_use() -> None:
    """A cache of 1 GiB takes little at rest, and what its slots take when they are written."""
    before = resident()
    cache = KVCache(SHAPE, 2**30 // SHAPE.bytes_per_token, CPU)
    assert resident() - before < 64 * MIB
    count = 128 * MIB // SHAPE.bytes_per_token
    use(cache, list(range(count)))
    assert resident() - before > 100 * MIB


@pytest.mark.skipif(
    not SystemMemory((1,), torch.uint8).populate(0, 1),
    reason="Linux 5.14 gives memory ahead of use",
)
def test_memory_is_given_ahead_of_use_while_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "AHEAD_BYTES", 64 * MIB)
    before = resident()
    cache = KVCache(SHAPE, 2**30 // SHAPE.bytes_per_token, CPU)
    assert ready(cache) >= 2 * SHAPE.layers
    first = resident() - before
    assert 60 * MIB < first < 160 * MIB
    assert ready(cache) == 0
    use(cache, [48 * MIB // SHAPE.bytes_per_token])
    assert ready(cache) >= 2 * SHAPE.layers
    assert resident() - before > first


def test_nothing_is_lost_when_memory_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that were written before keep their KV, also those in pages that are given again."""
    monkeypatch.setattr(kv_cache, "AHEAD_BYTES", 5 * SHAPE.bytes_per_token)
    cache = KVCache(SHAPE, 97, CPU)
    written: list[int] = []
    for slot in (3, 0, 11, 40, 12, 96, 95):
        use(cache, [slot])
        written.append(slot)
        ready(cache)
        for layer in range(SHAPE.layers):
            assert [float(cache.keys[layer][s, 1, 5]) - layer for s in written] == written
            assert [-float(cache.values[layer][s, 0, 63]) - layer for s in written] == written
    assert not cache.make_ready()


def test_a_system_that_gives_no_memory_ahead_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def refuse(self: SystemMemory, first: int, end: int) -> bool:
        asked.append((first, end))
        return False

    monkeypatch.setattr(SystemMemory, "populate", refuse)
    cache = KVCache(SHAPE, 1000, CPU)
    ready(cache)
    assert len(asked) == 1
    use(cache, [0, 999])
    assert float(cache.keys[0][999, 0, 0]) == 999.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_system_memory_is_zero_and_may_be_empty(dtype: torch.dtype) -> None:
    memory = SystemMemory((3, 5), dtype)
    assert not memory.tensor.any()
    assert memory.tensor.dtype is dtype
    assert SystemMemory((0, 5), dtype).tensor.shape == (0, 5)
    memory.tensor += 1
    memory.populate(0, 1)
    memory.populate(4, 3)
    memory.populate(0, 10**9)
    assert bool((memory.tensor == 1).all())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the pages")
def test_a_cache_that_forgets_gives_its_memory_back() -> None:
    """Also twice, with work of idle times half done; then it grows as a new one does."""
    cache = KVCache(SHAPE, 2**30 // SHAPE.bytes_per_token, CPU)
    use(cache, list(range(128 * MIB // SHAPE.bytes_per_token)))
    cache.make_ready()
    held = resident()
    cache.forget()
    assert held - resident() > 100 * MIB
    cache.forget()
    assert not any(bool(part.any()) for part in (cache.keys[0][:9], cache.values[-1][:9]))
    use(cache, [7])
    assert float(cache.keys[1][7, 0, 0]) == 8.0
    if SystemMemory((1,), torch.uint8).populate(0, 1):
        assert ready(cache) >= 2 * SHAPE.layers
    assert float(cache.keys[1][7, 0, 0]) == 8.0


def test_pages_that_cannot_be_given_back_stay() -> None:
    """A kernel that refuses, for locked pages say, leaves a cache that works."""
    cache = KVCache(SHAPE, 97, CPU)
    use(cache, [3])

    class Locked:
        def madvise(self, *_: int) -> None:
            raise OSError("locked")

    for memory in cache._memories:
        memory._map = Locked()  # type: ignore[assignment]
    cache.forget()
    assert float(cache.keys[0][3, 0, 0]) == 3.0
    use(cache, [96])
    assert float(cache.keys[2][96, 0, 0]) == 98.0
