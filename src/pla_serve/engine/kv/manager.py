"""Who has which KV blocks: reserve for a prompt, grow by a token, give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pla_serve.engine.kv.blocks import BlockPool, BlockRun, extend_runs
from pla_serve.engine.kv.prefix import PrefixTree

GROWTH_BLOCKS = 16
"""Free blocks that a new sequence would like behind it, so that its context stays one run."""


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens."""

    blocks: list[int] = field(default_factory=list)
    inserted: int = 0
    """Leading blocks that the prefix cache has been told of."""
    _runs: list[BlockRun] = field(default_factory=list)
    _in_runs: int = 0
    """Leading blocks that ``_runs`` covers."""

    def runs(self) -> list[BlockRun]:
        """The blocks as the fewest runs of neighbours; costs only what was added since."""
        extend_runs(self._runs, self.blocks[self._in_runs :])
        self._in_runs = len(self.blocks)
        return self._runs

    def forget_runs(self) -> None:
        """Other blocks have taken the place of some."""
        self._runs = []
        self._in_runs = 0


class KVManager:
    """Blocks for sequences, shared by prefix; all counts are in blocks unless named tokens."""

    def __init__(self, blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        self.block_tokens = block_tokens
        self.blocks = blocks
        self._pool = BlockPool(blocks)
        self._tree = PrefixTree(self._pool, block_tokens)
        self._prefix_cache = prefix_cache

    @property
    def available(self) -> int:
        """Blocks that are free or can be evicted."""
        return self._pool.free + self._tree.evictable

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit if one sequence had all blocks."""
        return self.blocks * self.block_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens in the prefix cache."""
        return len(self._tree) * self.block_tokens

    @property
    def version(self) -> int:
        """Changes whenever ``cached_prefix`` may answer differently."""
        return self._tree.version

    def cached_prefix(self, tokens: Sequence[int]) -> int:
        """Leading tokens whose KV is cached; at least the last token is always left to compute."""
        if not self._prefix_cache:
            return 0
        return len(self._tree.match(tokens, len(tokens) - 1)) * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def reserve(self, tokens: Sequence[int], table: BlockTable, *, spare: int = 0) -> int | None:
        """Give ``table`` (empty) blocks for all of ``tokens``, cached ones first.

        Returns the tokens whose KV is there already, or None, with nothing changed, if fewer than
        ``spare`` blocks would be left.
        """
        assert not table.blocks
        shared: list[int] = []
        if self._prefix_cache:
            shared = self._tree.hold(tokens, len(tokens) - 1)
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
        """Have ``table`` hold at least ``tokens`` tokens; False, with nothing changed, if full."""
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
        """Tell the prefix cache of the first ``computed`` tokens, in whole blocks.

        Where it knows them by another block, ``table`` gets that one in place of its own. A batch
        under way may read ``table`` (``in_use``): then nothing is told from such a block on, until
        a later call.
        """
        whole = computed // self.block_tokens
        if not self._prefix_cache or whole <= table.inserted:
            return
        if in_use:
            whole = self._tree.first_known(tokens, table.blocks, table.inserted, whole)
        if self._tree.insert(tokens, table.blocks, table.inserted, whole):
            table.forget_runs()
        table.inserted = whole

    def pin(self, blocks: Sequence[int]) -> None:
        """Hold blocks of a sequence that holds them itself; ``unpin`` before it lets them go."""
        self._pool.hold(blocks)

    def pin_cached(self, tokens: Sequence[int]) -> list[int]:
        """Hold the blocks of the longest cached prefix of ``tokens``, in whole blocks."""
        return self._tree.hold(tokens, len(tokens)) if self._prefix_cache else []

    def unpin(self, blocks: Sequence[int]) -> None:
        """Let go of blocks that were pinned together, in the same order."""
        self._tree.release(blocks)

    def release(self, table: BlockTable) -> None:
        """Give back all blocks of ``table``; what the prefix cache knows stays until evicted."""
        self._tree.release(table.blocks)
        table.blocks = []
        table.inserted = 0
        table.forget_runs()

    def _ensure_free(self, count: int) -> None:
        short = count - self._pool.free
        if short > 0:
            freed = self._tree.evict(short)
            assert freed == short, "the count of evictable blocks is wrong"
