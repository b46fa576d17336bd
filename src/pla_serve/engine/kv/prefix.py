"""The prefix cache: a radix tree whose edges are whole blocks of tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from pla_serve.engine.kv.blocks import BlockPool

Key = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Node:
    key: Key
    block: int
    parent: _Node | None
    children: dict[Key, _Node] = field(default_factory=dict)
    last_used: int = 0
    """When it was given back last."""
    offered: bool = False
    """It is in the heap of candidates for eviction, at most once."""


class PrefixTree:
    """Maps token prefixes to blocks that hold their KV.

    The tree is a holder of every block in it. A block that only the tree holds can be evicted,
    leaves first, least recently used first. Whoever holds a block of a path holds all blocks
    before it too, so the evictable blocks under any node form whole subtrees.
    """

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._root = _Node((), -1, None)
        self._by_block: dict[int, _Node] = {}
        self._evictable = 0
        self._tick = 0
        self._leaves: list[tuple[int, int]] = []
        """Heap of (last_used, block): blocks offered for eviction, checked when they come up."""
        self.version = 0
        """Changes whenever a match may have changed."""

    def __len__(self) -> int:
        """Blocks in the tree."""
        return len(self._by_block)

    @property
    def evictable(self) -> int:
        """Blocks that only the tree holds."""
        return self._evictable

    def match(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Blocks of the longest cached prefix of ``tokens[:limit]``, in whole blocks."""
        return [node.block for node in self._path(tokens, limit)]

    def hold(self, tokens: Sequence[int], limit: int) -> list[int]:
        """``match``, and the caller becomes a holder of these blocks (see ``release``)."""
        path = self._path(tokens, limit)
        for node in path:
            if self._pool.holders(node.block) == 1:
                self._evictable -= 1
        blocks = [node.block for node in path]
        self._pool.hold(blocks)
        return blocks

    def insert(self, tokens: Sequence[int], blocks: list[int], start: int, stop: int) -> bool:
        """Cache ``blocks[start:stop]`` as the KV of those blocks of ``tokens``.

        The caller holds all of ``blocks``, and those before ``start`` are cached already. Where the
        tree knows the same tokens by another block, the caller gets to hold that one and its own is
        freed: ``blocks`` is changed in place. So one prefix is stored once. Returns whether it
        changed.
        """
        node = self._by_block[blocks[start - 1]] if start else self._root
        changed = False
        for index in range(start, stop):
            block = blocks[index]
            key = self._key(tokens, index)
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

    def first_known(self, tokens: Sequence[int], blocks: list[int], start: int, stop: int) -> int:
        """Where `insert` would put another block in place of the caller's; ``stop`` if nowhere."""
        node = self._by_block[blocks[start - 1]] if start else self._root
        for index in range(start, stop):
            child = node.children.get(self._key(tokens, index))
            if child is None:
                return stop
            if child.block != blocks[index]:
                return index
            node = child
        return stop

    def release(self, blocks: Sequence[int]) -> None:
        """The caller stops holding these blocks of one sequence, given in order."""
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
        """Free up to ``count`` blocks that only the tree holds; returns how many it freed."""
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
        """Make ``node`` a candidate if it is one; called whenever it may have become one."""
        if not node.offered and self._is_free_leaf(node):
            node.offered = True
            heapq.heappush(self._leaves, (node.last_used, node.block))

    def _is_free_leaf(self, node: _Node) -> bool:
        return node is not self._root and not node.children and self._pool.holders(node.block) == 1

    def _drop(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del self._by_block[node.block]
        self._pool.release((node.block,))
        self._evictable -= 1
        self.version += 1
        self._offer(parent)

    def _path(self, tokens: Sequence[int], limit: int) -> list[_Node]:
        path: list[_Node] = []
        node = self._root
        for index in range(min(limit, len(tokens)) // self._block_tokens):
            child = node.children.get(self._key(tokens, index))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _key(self, tokens: Sequence[int], index: int) -> Key:
        start = index * self._block_tokens
        return tuple(tokens[start : start + self._block_tokens])
