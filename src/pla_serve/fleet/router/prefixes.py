"""A record of what each instance is believed to cache, made from what was sent there."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK = 16
"""Tokens in one block of the record; matches are rounded to the instance's own blocks."""
USED_SLACK = 1024
"""Blocks of old uses that an instance's record may keep beside four times those that it holds."""
BLOCK_BYTES = BLOCK * array("q").itemsize
DEFAULT_CAPACITY = 2**17
"""Tokens that an instance is believed to keep that does not say how many."""


class Chain:
    """Hashes of a growing token sequence, one for each whole block and all that is before it.

    Equal hashes are taken for equal tokens of the same cache scope: a collision makes one
    prediction wrong, no more. The hash is Python's for bytes, which each process salts, so that no
    client can make collisions.
    """

    __slots__ = ("_start", "_tail", "common", "hashes")

    def __init__(self, tokens: Sequence[int], cache_scope: str = "", common: int = 0) -> None:
        """
        Args:
            common: leading tokens that every instance is known to have cached.
        """
        self.common = common
        self.hashes: list[int] = []
        self._start = hash(cache_scope)
        self._tail = b""
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        self.extend_bytes(array("q", tokens).tobytes())

    def extend_bytes(self, tokens: bytes) -> None:
        """Append tokens that are packed as native 64-bit integers."""
        data = self._tail + tokens if self._tail else tokens
        whole = len(data) - len(data) % BLOCK_BYTES
        if whole:
            last = self.hashes[-1] if self.hashes else self._start
            append = self.hashes.append
            for at in range(0, whole, BLOCK_BYTES):
                last = hash((last, data[at : at + BLOCK_BYTES]))
                append(last)
            data = data[whole:]
        self._tail = data


@dataclass(slots=True)
class PrefixMark:
    """One prompt in the record of one instance, to take back or to confirm."""

    stamp: int
    new: list[int]
    """Blocks that were not there before."""
    before: list[int]
    """Times of last use of the leading blocks that were there before, in the order of the prompt.
    The list ends at the first block that had not been computed."""


@dataclass(slots=True, eq=False)
class _Kept:
    """Blocks that one instance is believed to cache."""

    bit: int
    capacity: int
    """Most blocks."""
    blocks: dict[int, int] = field(default_factory=dict)
    """Hash to the stamp of its last use."""
    uses: deque[tuple[int, list[int], int]] = field(default_factory=deque)
    """Uses, oldest first: stamp, hashes, and how many of these, from the beginning, may still have
    this stamp. Blocks that were used again later are skipped when their turn comes."""
    used: int = 0
    """Blocks in ``uses``, those included that were used again later."""
    pending: set[int] = field(default_factory=set)
    """Stamps of prompts that are not prefilled yet."""


class PrefixRecord:
    """Believed prefix caches of all instances. They bound its memory: about 150 bytes a block.

    A prompt is recorded when it is sent, so that the next one with the same beginning follows it.
    Blocks of one prompt are used from its end to its beginning, so that ends go first.
    """

    def __init__(self) -> None:
        self._instances: dict[str, _Kept] = {}
        self._by_bit: dict[int, str] = {}
        self._holders: dict[int, int] = {}
        """Hash to one bit for each instance that keeps the block."""
        self._stamp = 0

    def __len__(self) -> int:
        """Return the number of blocks over all instances."""
        return sum(len(kept.blocks) for kept in self._instances.values())

    def join(self, name: str, capacity_tokens: int) -> None:
        """Add an instance, or change the capacity of a known one; 0 means unknown."""
        capacity = max(1, (capacity_tokens or DEFAULT_CAPACITY) // BLOCK)
        kept = self._instances.get(name)
        if kept is None:
            free = next(n for n in range(len(self._by_bit) + 1) if 1 << n not in self._by_bit)
            kept = self._instances[name] = _Kept(1 << free, capacity)
            self._by_bit[kept.bit] = name
        kept.capacity = capacity
        self._trim(kept)

    def clear(self, name: str) -> None:
        """Note that an instance's cache is empty; unknown names are ignored."""
        kept = self._instances.get(name)
        if kept is not None:
            for block in kept.blocks:
                self._drop(kept, block)
            kept.blocks.clear()
            kept.uses.clear()
            kept.used = 0
            kept.pending.clear()

    def leave(self, name: str) -> None:
        """Forget an instance that will not come back; unknown names are ignored."""
        self.clear(name)
        kept = self._instances.pop(name, None)
        if kept is not None:
            del self._by_bit[kept.bit]

    def match(self, chain: Chain) -> dict[str, int]:
        """Return the leading tokens of a prompt that each instance holds, in whole blocks."""
        found: dict[str, int] = {}
        holders, here = self._holders, -1
        depth = 0
        for depth, block in enumerate(chain.hashes):
            known = holders.get(block, 0)
            if known is here:
                continue
            now = here & known
            if now != here:
                if here != -1:
                    self._note(found, here & ~now, depth)
                if not now:
                    return found
                here = known if now == known else now
        if here != -1:
            self._note(found, here, depth + 1)
        return found

    def insert(self, name: str, chain: Chain) -> PrefixMark:
        """Record that an instance is sent a prompt. `confirm` or `undo` must follow.

        Raises:
            KeyError: it has not joined.
        """
        kept = self._instances[name]
        mark = self._use(kept, chain)
        kept.pending.add(mark.stamp)
        return mark

    def extend(self, name: str, chain: Chain, recorded: int = 0) -> None:
        """Note that an instance also holds the blocks of a chain from the ``recorded``-th on.

        Unknown names are ignored.
        """
        kept = self._instances.get(name)
        if kept is not None and recorded < len(chain.hashes):
            self._stamp += 1
            self._write(kept, chain.hashes[recorded:] if recorded else chain.hashes)

    def confirm(self, name: str, mark: PrefixMark, cached_tokens: int | None) -> None:
        """Note that a prompt was prefilled, with so many of its tokens cached (None: unknown).

        If that is less than was believed, whatever was used no later than the first block that was
        missing is gone as well: the cache there holds less than thought.
        """
        kept = self._instances.get(name)
        if kept is None or mark.stamp not in kept.pending:
            return
        kept.pending.discard(mark.stamp)
        if cached_tokens is None:
            return
        first = -(-cached_tokens // BLOCK) + 1  # a block of doubt: the last token is computed anew
        if first < len(mark.before):
            floor = mark.before[first]
            while kept.uses and kept.uses[0][0] <= floor:
                self._evict(kept, kept.uses[0][2])

    def undo(self, name: str, mark: PrefixMark) -> None:
        """Take back a prompt that will not be prefilled there; blocks used since are kept."""
        kept = self._instances.get(name)
        if kept is None or mark.stamp not in kept.pending:
            return
        kept.pending.discard(mark.stamp)
        for block in mark.new:
            if kept.blocks.get(block) == mark.stamp:
                del kept.blocks[block]
                self._drop(kept, block)

    def _use(self, kept: _Kept, chain: Chain) -> PrefixMark:
        """Stamp the blocks of a chain, and return what a mark needs to know of before."""
        self._stamp += 1
        before: list[int] = []
        stamp_of, pending = kept.blocks.get, kept.pending
        for block in chain.hashes:
            used = stamp_of(block)
            if used is None or used in pending:
                break
            before.append(used)
        return PrefixMark(self._stamp, self._write(kept, chain.hashes), before)

    def _write(self, kept: _Kept, hashes: list[int]) -> list[int]:
        """Give blocks the newest stamp; returns those that were not there."""
        stamp, blocks = self._stamp, kept.blocks
        if len(hashes) > kept.capacity:
            hashes = hashes[: kept.capacity]
        new = [block for block in hashes if block not in blocks]
        holders, bit = self._holders, kept.bit
        for block in new:
            known = holders.get(block)  # of a thousand instances a mask is large: one is shared
            holders[block] = bit if known is None else known | bit
        blocks.update(dict.fromkeys(hashes, stamp))
        if hashes:
            kept.uses.append((stamp, hashes, len(hashes)))
            kept.used += len(hashes)
        self._trim(kept)
        return new

    def _trim(self, kept: _Kept) -> None:
        while len(kept.blocks) > kept.capacity:
            self._evict(kept, len(kept.blocks) - kept.capacity)
        if kept.used > 4 * len(kept.blocks) + USED_SLACK:
            self._compact(kept)

    def _evict(self, kept: _Kept, most: int) -> None:
        """Drop up to ``most`` blocks of the oldest use, from the end of its prompt."""
        stamp, hashes, count = kept.uses.popleft()
        kept.used -= count
        blocks = kept.blocks
        while count and most:
            count -= 1
            block = hashes[count]
            if blocks.get(block) == stamp:
                del blocks[block]
                self._drop(kept, block)
                most -= 1
        if count:
            kept.uses.appendleft((stamp, hashes, count))
            kept.used += count

    def _compact(self, kept: _Kept) -> None:
        """Forget the blocks of each use that were used again later."""
        blocks, uses = kept.blocks, kept.uses
        kept.uses = deque()
        for stamp, hashes, count in uses:
            still = [block for block in hashes[:count] if blocks.get(block) == stamp]
            if still:
                kept.uses.append((stamp, still, len(still)))
        kept.used = len(blocks)

    def _drop(self, kept: _Kept, block: int) -> None:
        known = self._holders[block]
        if known == kept.bit:
            del self._holders[block]
        else:
            self._holders[block] = known & ~kept.bit

    def _note(self, found: dict[str, int], bits: int, blocks: int) -> None:
        while bits:
            bit = bits & -bits
            bits ^= bit
            found[self._by_bit[bit]] = blocks * BLOCK
