"""The attention backend ``triton``: our own kernels, which can be part of captured graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pla_serve.engine.attention.kernels import attend_kernel, merge_kernel
from pla_serve.engine.batch.flat import FlatBatch, Paged
from pla_serve.engine.kv.cache import KVCache

SPLITS = (16, 4)
"""Numbers of parts that a context may be split into; each is a kernel to compile, so few."""
LEAST_SPLIT = 128
"""Least keys in a part; smaller parts cost more to merge than they save."""
LEAST_SPLIT_OF_MANY = 512
"""The same where sequences alone give every multiprocessor two programs: there only long contexts
are split, so that nobody waits for the longest one."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch configuration of the attention kernel: size of a tile, warps and pipeline stages.

    ``rows`` is the number of query rows in a tile, one for each pair of a token and a query head of
    the same KV head. ``keys`` is the number of keys that one iteration of the loop over the context
    reads. With five ``stages`` or more, keys and values of the next iteration are loaded while this
    one computes: the block numbers that say where they lie take up two stages of their own.
    """

    rows: int
    keys: int
    warps: int
    stages: int


FEW_ROWS = Tile(rows=16, keys=64, warps=4, stages=5)
SOME_ROWS = Tile(rows=64, keys=64, warps=4, stages=5)
MANY_ROWS = Tile(rows=128, keys=64, warps=8, stages=5)
MANY_ROWS_CHOICES = (
    MANY_ROWS,
    Tile(rows=128, keys=64, warps=8, stages=7),
    Tile(rows=128, keys=64, warps=8, stages=3),
    Tile(rows=64, keys=64, warps=4, stages=5),
)
"""Tiles that `tuning` tries on a new device."""
FLOAT32_KEYS = 32
"""Keys of a tile for float32, which is multiplied without tensor cores: with more keys, or more
than the fewest rows, values do not fit the registers and go through memory."""


class PagedAttention:
    """Attention by the Triton kernels of `kernels`.

    Args:
        processors: multiprocessors of the device; contexts are split until all of them have work.
        many_rows: tile for long prefills.
    """

    def __init__(self, processors: int, many_rows: Tile = MANY_ROWS) -> None:
        self._processors = processors
        self._many_rows = many_rows

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`. Rows of padding are not written."""
        paged = batch.paged
        if paged is None:
            raise RuntimeError("this backend needs a batch that was staged for the device")
        keys, values = cache.keys[layer], cache.values[layer]
        heads, tokens, dim = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        kv_heads = cache.shape.heads
        group = heads // kv_heads
        sequences = len(paged.contexts)
        output = query.new_empty(tokens, heads, dim)
        tile, splits = self.form(paged, tokens, group, kv_heads, query.dtype)
        tiles = tokens // (tile.rows // group) + sequences
        many = sequences * kv_heads >= 2 * self._processors
        parts, lse = output, output
        if splits > 1:
            parts = query.new_empty(splits, tokens, heads, dim, dtype=torch.float32)
            lse = query.new_empty(splits, tokens, heads, dtype=torch.float32)
        padded = max(16, 1 << (dim - 1).bit_length())
        attend_kernel[(tiles, kv_heads, splits)](
            query, keys, values, output, parts, lse,
            paged.query_starts, paged.contexts, paged.table_starts, paged.table,
            sequences, tokens, LEAST_SPLIT_OF_MANY if many else LEAST_SPLIT,
            scaling / math.log(2),
            query.stride(1), query.stride(0), keys.stride(0), keys.stride(1),
            GROUP=group, HEAD=dim, HEAD_PAD=padded, BLOCK_TOKENS=paged.block_tokens,
            TILE_ROWS=tile.rows, TILE_KEYS=tile.keys, SPLITS=splits,
            WIDE=query.device.type == "cpu",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(tokens, heads)](
                parts, lse, output, paged.query_starts, sequences, tokens,
                HEAD=dim, HEAD_PAD=padded, SPLITS=splits, num_warps=2,
            )  # fmt: skip
        return output

    def form(
        self, paged: Paged, tokens: int, group: int, kv_heads: int, dtype: torch.dtype
    ) -> tuple[Tile, int]:
        """Return the tile for this batch, and into how many parts a context may be split.

        Both go by the longest query, or by the mean length if that is less: a captured shape gives
        a longest query that few of its batches have. Where queries are that short, as in decode
        steps, any context may be long, and a program that finds no keys in its part ends at once.
        So contexts are split whatever is known about them here.

        Args:
            tokens: capacity of the batch in new tokens.
            group: query heads of one KV head.
        """
        few, some, many = FEW_ROWS, SOME_ROWS, self._many_rows
        sequences = len(paged.contexts)
        rows = min(paged.most_query, -(-tokens // sequences)) * group
        chosen = few if rows <= few.rows else some if rows <= 8 * some.rows else many
        parts = paged.most_context // LEAST_SPLIT
        if chosen is not few:
            tiles = tokens // (max(chosen.rows, group) // group) + sequences
            parts = min(parts, 2 * self._processors // (tiles * kv_heads))
        elif parts >= SPLITS[-1]:
            parts = SPLITS[0]
        if dtype.itemsize >= 4:
            chosen = Tile(few.rows, FLOAT32_KEYS, few.warps, 1)
        if chosen.rows < group:
            chosen = Tile(1 << (group - 1).bit_length(), chosen.keys, chosen.warps, chosen.stages)
        return chosen, next((splits for splits in SPLITS if splits <= parts), 1)
