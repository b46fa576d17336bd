"""The prefix cache: a radix tree whose edges are whole blocks of tokens.

Each sequence has a *scope*, and finds blocks of the same scope only. The scope is part of the key
of a sequence's first block, so the tree holds one subtree for each scope, side by side.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from pla_serve.engine.kv.blocks import BlockPool

Key = tuple[object, ...]
"""Tokens of one block; for the first block of a sequence, its scope and the tokens."""


@dataclass(slots=True, eq=False)
class _Node:
    key: Key
    block: int
    parent: _Node | None
    children: dict[Key, _Node] = field(default_factory=dict)
    last_used: int = 0
    """Tick at which a sequence gave the block back last."""
    offered: bool = False
    """Whether the block is in the heap of candidates for eviction."""


class PrefixTree:
    """Maps token prefixes of a scope to the blocks that hold their KV.

    The tree is a holder of every block in it. A block that only the tree holds can be evicted:
    leaves first, and among them the least recently used. A sequence that holds a block holds all
    blocks before it as well, so that evictable blocks always form whole subtrees.

    Example, with blocks of two tokens:

        pool = BlockPool(8)
        tree = PrefixTree(pool, 2)
        tree.insert([1, 2, 3, 4], pool.allocate(2), 0, 2, "tenant a")
        tree.match([1, 2, 9, 9], 4, "tenant a")     # the first of these two blocks
        tree.match([1, 2, 9, 9], 4, "tenant b")     # []
    """

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._root = _Node((), -1, None)
        self._by_block: dict[int, _Node] = {}
        self._evictable = 0
        self._tick = 0
        self._leaves: list[tuple[int, int]] = []
        """Heap of (last_used, block): candidates for eviction, checked again when they come up."""
        self.version = 0
        """Number that changes whenever `match` may return something else than before."""

    def __len__(self) -> int:
        """Number of blocks in the tree."""
        return len(self._by_block)

    @property
    def evictable(self) -> int:
        """Number of blocks that only the tree holds."""
        return self._evictable

    def match(self, tokens: Sequence[int], limit: int, scope: str) -> list[int]:
        """Return the blocks of the longest cached prefix of ``tokens[:limit]``."""
        return [node.block for node in self._path(tokens, limit, scope)]

    def hold(self, tokens: Sequence[int], limit: int, scope: str) -> list[int]:
        """Return the same blocks as `match`, and make the caller a holder; see `release`."""
        path = self._path(tokens, limit, scope)
        for node in path:
            if self._pool.holders(node.block) == 1:
                self._evictable -= 1
        blocks = [node.block for node in path]
        self._pool.hold(blocks)
        return blocks

    def insert(
        self, tokens: Sequence[int], blocks: list[int], start: int, stop: int, scope: str
    ) -> bool:
        """Cache ``blocks[start:stop]`` as the KV of ``tokens``, so that each prefix is stored once.

        The caller holds all of ``blocks``, and those before ``start`` are cached already. If the
        tree has the same tokens in another block, ``blocks`` is changed in place: the caller then
        holds that block, and its own is freed.

        Returns:
            Whether ``blocks`` changed.
        """
        node = self._by_block[blocks[start - 1]] if start else self._root
        changed = False
        for index in range(start, stop):
            block = blocks[index]
            key = self._key(tokens, index, scope)
            child = node.children.get(key)
            if child is None:
                child = _Node(key, block, node)
                node.children[key] = child
                self._by_block[block] = child
                self._pool.hold((block,))
                self.version += 1
            elif child.block != block:
                if self._pool.holders(child.block) == 1:
                    self._evictable -= 1
                self._pool.hold((child.block,))
                self._pool.release((block,))
                blocks[index] = child.block
                changed = True
            node = child
        return changed

    def first_known(
        self, tokens: Sequence[int], blocks: list[int], start: int, stop: int, scope: str
    ) -> int:
        """Return the first index at which `insert` would change ``blocks``; ``stop`` if none."""
        node = self._by_block[blocks[start - 1]] if start else self._root
        for index in range(start, stop):
            child = node.children.get(self._key(tokens, index, scope))
            if child is None:
                return stop
            if child.block != blocks[index]:
                return index
            node = child
        return stop

    def release(self, blocks: Sequence[int]) -> None:
        """Stop holding these blocks of one sequence, given in the order of its tokens."""
        self._tick += 1
        for block in reversed(blocks):
            self._pool.release((block,))
            node = self._by_block.get(block)
            if node is not None:
                node.last_used = self._tick
                if self._pool.holders(block) == 1:
                    self._evictable += 1
                    self._offer(node)

    def evict(self, count: int) -> int:
        """Free up to ``count`` blocks that only the tree holds; return the number freed."""
        freed = 0
        while freed < count and self._leaves:
            last_used, block = heapq.heappop(self._leaves)
            node = self._by_block[block]
            node.offered = False
            if node.last_used == last_used and self._is_free_leaf(node):
                self._drop(node)
                freed += 1
            else:
                self._offer(node)
        return freed

    def _offer(self, node: _Node) -> None:
        """Put ``node`` into the heap if it can be evicted; call it whenever that may change."""
        if not node.offered and self._is_free_leaf(node):
            node.offered = True
            heapq.heappush(self._leaves, (node.last_used, node.block))

    def _is_free_leaf(self, node: _Node) -> bool:
        return node.parent is not None and not node.children and self._pool.holders(node.block) == 1

    def _drop(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del self._by_block[node.block]
        self._pool.release((node.block,))
        self._evictable -= 1
        self.version += 1
        self._offer(parent)

    def _path(self, tokens: Sequence[int], limit: int, scope: str) -> list[_Node]:
        path: list[_Node] = []
        node = self._root
        for index in range(min(limit, len(tokens)) // self._block_tokens):
            child = node.children.get(self._key(tokens, index, scope))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _key(self, tokens: Sequence[int], index: int, scope: str) -> Key:
        start = index * self._block_tokens
        own = tokens[start : start + self._block_tokens]
        return (scope, *own) if index == 0 else tuple(own)
