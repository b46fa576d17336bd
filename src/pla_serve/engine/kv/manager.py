"""The KV manager: it gives sequences blocks, and keeps those of finished ones as prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pla_serve.engine.kv.blocks import BlockPool, BlockRun, extend_runs
from pla_serve.engine.kv.prefix import PrefixTree

GROWTH_BLOCKS = 16
"""Free blocks that are left behind a new sequence if possible, so that it can grow in place."""


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens."""

    blocks: list[int] = field(default_factory=list)
    scope: str = ""
    """Part of the prefix cache that the sequence shares blocks with (`AddRequest.cache_scope`)."""
    inserted: int = 0
    """Number of leading blocks that are in the prefix cache."""
    _runs: list[BlockRun] = field(default_factory=list)
    _in_runs: int = 0
    """Number of leading blocks that ``_runs`` covers."""
    _numbers: NDArray[np.int32] = field(default_factory=lambda: np.empty(16, dtype=np.int32))
    """The blocks as numbers, with room for more."""
    _in_numbers: int = 0
    """Number of leading blocks that ``_numbers`` holds."""

    def runs(self) -> list[BlockRun]:
        """Return the blocks as few runs of neighbours, in time that grows with new blocks only."""
        extend_runs(self._runs, self.blocks[self._in_runs :])
        self._in_runs = len(self.blocks)
        return self._runs

    def numbers(self) -> NDArray[np.int32]:
        """Return the blocks as (blocks,) int32, in time that grows with new blocks only.

        It is a view: it stays true until blocks are replaced or given back.
        """
        count, known = len(self.blocks), self._in_numbers
        if count > len(self._numbers):
            wider = np.empty(2 * count, dtype=np.int32)
            wider[:known] = self._numbers[:known]
            self._numbers = wider
        if count > known:
            self._numbers[known:count] = self.blocks[known:]
            self._in_numbers = count
        return self._numbers[:count]

    def forget_layout(self) -> None:
        """Build runs and numbers anew at the next call: some blocks have been replaced."""
        self._runs = []
        self._in_runs = self._in_numbers = 0


class KVManager:
    """Gives KV blocks to sequences, and shares them between sequences with the same prefix.

    All counts are in blocks unless their name says tokens. A sequence uses it in this order:

        kv = KVManager(blocks=1000, block_tokens=16)
        table = BlockTable()
        cached = kv.reserve(prompt, table)      # tokens that need no prefill; None: no memory
        ...                                     # prefill of prompt[cached:]
        kv.remember(prompt, len(prompt), table)
        kv.grow(table, len(prompt) + 1)         # before each decode step
        kv.release(table)
    """

    def __init__(self, blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        self.block_tokens = block_tokens
        self.blocks = blocks
        self._pool = BlockPool(blocks)
        self._tree = PrefixTree(self._pool, block_tokens)
        self._prefix_cache = prefix_cache

    @property
    def available(self) -> int:
        """Number of blocks that are free or can be evicted."""
        return self._pool.free + self._tree.evictable

    @property
    def free(self) -> int:
        """Number of blocks that nobody holds, the prefix cache included."""
        return self._pool.free

    @property
    def capacity_tokens(self) -> int:
        """Number of tokens that fit if one sequence has all blocks."""
        return self.blocks * self.block_tokens

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the prefix cache."""
        return len(self._tree) * self.block_tokens

    @property
    def version(self) -> int:
        """Number that changes whenever `cached_prefix` may return something else than before."""
        return self._tree.version

    def cached_prefix(self, tokens: Sequence[int], scope: str, most: int | None = None) -> int:
        """Return the number of leading tokens whose KV is cached in this scope.

        Args:
            most: tokens that may count. None for all but the last one, which is always computed,
                because its logits are needed.
        """
        if not self._prefix_cache:
            return 0
        most = len(tokens) - 1 if most is None else most
        return len(self._tree.match(tokens, most, scope)) * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def reserve(
        self,
        tokens: Sequence[int],
        table: BlockTable,
        *,
        spare: int = 0,
        most_cached: int | None = None,
    ) -> int | None:
        """Give an empty ``table`` blocks for all of ``tokens``: cached ones first, then new ones.

        Args:
            most_cached: tokens that may have cached blocks; None for all but the last.
            spare: blocks that have to be left for others.

        Returns:
            The number of leading tokens whose KV is cached; None, with nothing changed, if fewer
            than ``spare`` blocks would be left.
        """
        assert not table.blocks
        shared: list[int] = []
        if self._prefix_cache:
            most = len(tokens) - 1 if most_cached is None else most_cached
            shared = self._tree.hold(tokens, most, table.scope)
        wanted = self.blocks_for(len(tokens)) - len(shared)
        if wanted + spare > self.available:
            self._tree.release(shared)
            return None
        self._ensure_free(wanted)
        last = shared[-1] if shared else None
        table.blocks = shared + self._pool.allocate(wanted, after=last, room=GROWTH_BLOCKS)
        table.inserted = len(shared)
        return len(shared) * self.block_tokens

    def grow(self, table: BlockTable, tokens: int) -> bool:
        """Give ``table`` blocks until it has room for ``tokens`` tokens.

        Returns:
            False, with nothing changed, if there is not enough memory.
        """
        wanted = self.blocks_for(tokens) - len(table.blocks)
        if wanted <= 0:
            return True
        if wanted > self.available:
            return False
        self._ensure_free(wanted)
        last = table.blocks[-1] if table.blocks else None
        table.blocks += self._pool.allocate(wanted, after=last, room=GROWTH_BLOCKS)
        return True

    def remember(
        self, tokens: Sequence[int], computed: int, table: BlockTable, *, in_use: bool = False
    ) -> None:
        """Put the whole blocks among the first ``computed`` tokens into the prefix cache.

        If the cache has the same tokens in another block, ``table`` gets that block instead of its
        own. While a running batch reads ``table`` (``in_use``) no block of it may be replaced: then
        caching stops before the first such block, and a later call goes on there.
        """
        whole = computed // self.block_tokens
        if not self._prefix_cache or whole <= table.inserted:
            return
        if in_use:
            whole = self._tree.first_known(tokens, table.blocks, table.inserted, whole, table.scope)
        if self._tree.insert(tokens, table.blocks, table.inserted, whole, table.scope):
            table.forget_layout()
        table.inserted = whole

    def pin(self, blocks: Sequence[int]) -> None:
        """Hold blocks that a sequence holds as well; `unpin` gives them up."""
        self._pool.hold(blocks)

    def pin_cached(self, tokens: Sequence[int], scope: str) -> list[int]:
        """Hold and return the blocks of the longest prefix of ``tokens`` cached in this scope."""
        return self._tree.hold(tokens, len(tokens), scope) if self._prefix_cache else []

    def unpin(self, blocks: Sequence[int]) -> None:
        """Give up blocks that were pinned together, in the same order."""
        self._tree.release(blocks)

    def release(self, table: BlockTable) -> None:
        """Give back all blocks of ``table``; those in the prefix cache stay there until evicted."""
        self._tree.release(table.blocks)
        table.blocks = []
        table.inserted = 0
        table.forget_layout()

    def _ensure_free(self, count: int) -> None:
        short = count - self._pool.free
        if short > 0:
            freed = self._tree.evict(short)
            assert freed == short, "the count of evictable blocks is wrong"
