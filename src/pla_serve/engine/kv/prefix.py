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
        """Heap of (last_used, block): candidates for eviction, checked when they come up."""
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
        self._tick += 1
        for node in path:
            node.last_used = self._tick
            if self._pool.holders(node.block) == 1:
                self._evictable -= 1
        blocks = [node.block for node in path]
        self._pool.hold(blocks)
        return blocks

    def insert(self, tokens: Sequence[int], blocks: list[int]) -> None:
        """Cache ``blocks``, held by the caller, as the KV of the whole blocks of ``tokens``.

        Where the tree knows the same tokens by another block, the caller gets to hold that one and
        its own is freed: ``blocks`` is changed in place. So one prefix is stored once.
        """
        self._tick += 1
        node = self._root
        for index, block in enumerate(blocks):
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
            child.last_used = self._tick
            node = child

    def release(self, blocks: Sequence[int]) -> None:
        """The caller stops holding these blocks of one sequence, given in order."""
        for block in reversed(blocks):
            self._pool.release((block,))
            node = self._by_block.get(block)
            if node is not None and self._pool.holders(block) == 1:
                self._evictable += 1
                if not node.children:
                    heapq.heappush(self._leaves, (node.last_used, block))

    def evict(self, count: int) -> int:
        """Free up to ``count`` blocks that only the tree holds; returns how many it freed."""
        freed = 0
        while freed < count and self._leaves:
            last_used, block = heapq.heappop(self._leaves)
            node = self._by_block.get(block)
            if node is None or node.children or self._pool.holders(block) != 1:
                continue
            if node.last_used != last_used:
                heapq.heappush(self._leaves, (node.last_used, block))
                continue
            self._drop(node)
            freed += 1
        return freed

    def _drop(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del self._by_block[node.block]
        self._pool.release((node.block,))
        self._evictable -= 1
        self.version += 1
        if parent.block >= 0 and not parent.children and self._pool.holders(parent.block) == 1:
            heapq.heappush(self._leaves, (parent.last_used, parent.block))

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
