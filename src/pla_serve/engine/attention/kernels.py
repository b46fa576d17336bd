"""Triton kernels: paged, ragged, causal attention with history and grouped query heads.

The grid depends on capacities only, and every length is read from device memory, so a captured
graph replays them for any batch that fits. With TRITON_INTERPRET=1 they run on a CPU.

A row of a tile is a pair of a token and a query head. The query heads of a KV head form a group and
share a tile, so keys are read once for all of them, and no row is wasted whatever the size of the
group. A program finds the sequence of its tile by bisection: sequence i owns the tiles from
``start[i] // tokens per tile + i`` on, up to one more than it needs.

The softmax is computed online in base 2 (Milakov and Gimelshein 2018; Dao et al. 2022), and the
splits of one context are merged by their log-sum-exps (flash-decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sequence_of(starts, sequences, tile, TILE_TOKENS: tl.constexpr):
    """Return the last sequence whose first tile is at or before ``tile``."""
    low: tl.int32 = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        first = tl.load(starts + middle) // TILE_TOKENS + middle
        if first <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _step(
    query,
    peak,
    total,
    sums,
    keys,
    values,
    table,
    key_at,
    seen,
    end,
    slot_stride,
    dims,
    scale,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add one block of keys to the running maximum, sum of exponentials and weighted values."""
    if MASKED:
        block = tl.load(table + key_at // BLOCK_TOKENS, mask=key_at < end, other=0)
    else:
        block = tl.load(table + key_at // BLOCK_TOKENS)
    slots = block.to(tl.int64) * BLOCK_TOKENS + key_at % BLOCK_TOKENS
    places = slots[:, None] * slot_stride + dims[None, :]
    if MASKED:
        inside = (key_at < end)[:, None] & (dims < HEAD)[None, :]
        key = tl.load(keys + places, mask=inside, other=0.0)
    elif HEAD == HEAD_PAD:
        key = tl.load(keys + places)
    else:
        key = tl.load(keys + places, mask=(dims < HEAD)[None, :], other=0.0)
    if WIDE:
        key = key.to(tl.float32)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where((key_at[None, :] <= seen[:, None]), scores, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, 1))
    if MASKED:
        base = tl.where(highest == float("-inf"), 0.0, highest)
    else:
        base = highest
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None]
    if MASKED:
        value = tl.load(values + places, mask=inside, other=0.0)
    elif HEAD == HEAD_PAD:
        value = tl.load(values + places)
    else:
        value = tl.load(values + places, mask=(dims < HEAD)[None, :], other=0.0)
    weights = weights.to(value.dtype)
    if WIDE:
        weights = weights.to(tl.float32)
        value = value.to(tl.float32)
    sums += tl.dot(weights, value, input_precision="ieee")
    return highest, total, sums


@triton.jit(
    # Without this, each capacity and each alignment of the lengths would be compiled separately.
    do_not_specialize=["sequences", "capacity", "least_part"],
    do_not_specialize_on_alignment=["starts", "contexts", "table_starts", "table"],
)
def attend_kernel(
    queries,
    keys,
    values,
    outputs,
    parts,
    part_lse,
    starts,
    contexts,
    table_starts,
    table,
    sequences,
    capacity,
    least_part,
    scale,
    query_token_stride,
    query_head_stride,
    slot_stride,
    kv_head_stride,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attend one tile of queries of one KV head to one split of their context.

    Grid: (capacity // (TILE_ROWS // GROUP) + sequences, KV heads, SPLITS).

    ``outputs`` is (capacity, query heads, HEAD); with SPLITS > 1 ``parts`` (SPLITS, capacity, query
    heads, HEAD) and ``part_lse`` (SPLITS, capacity, query heads), both float32, are written
    instead. ``scale`` includes the factor log2(e). A part of a context is ``least_part`` keys at
    least, so that short contexts are in fewer parts.
    WIDE multiplies in float32: the interpreter cannot multiply bfloat16.
    """
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP
    # Last tiles first: they have the longest contexts, and short ones fill the gaps at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = _sequence_of(starts, sequences, tile, TILE_TOKENS)
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    first = (tile - (start // TILE_TOKENS + sequence)) * TILE_TOKENS
    if first >= length:
        return
    context = tl.load(contexts + sequence)
    history = context - length
    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, HEAD_PAD)
    token = first + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    real = (rows < TILE_TOKENS * GROUP) & (token < length)
    at = (start + token).to(tl.int64)
    heads = tl.num_programs(1) * GROUP
    row_at = at * heads + head
    end = tl.minimum(history + first + TILE_TOKENS, context)
    pieces = tl.maximum(tl.cdiv(tl.cdiv(end, TILE_KEYS), SPLITS), tl.cdiv(least_part, TILE_KEYS))
    low = split * pieces * TILE_KEYS
    if SPLITS > 1:
        row_at += split.to(tl.int64) * capacity * heads
        if low >= end:
            tl.store(part_lse + row_at, tl.full([TILE_ROWS], float("-inf"), tl.float32), mask=real)
            return
    query_at = at * query_token_stride + head * query_head_stride
    inside = real[:, None] & (dims < HEAD)[None, :]
    query = tl.load(queries + query_at[:, None] + dims[None, :], mask=inside, other=0.0)
    if WIDE:
        query = query.to(tl.float32)

    seen = history + token
    high = tl.minimum(low + pieces * TILE_KEYS, end)
    # Keys that every row of the tile sees need no mask.
    clear = tl.minimum((history + first + 1) // TILE_KEYS * TILE_KEYS, high)
    clear = tl.maximum(clear, low)
    peak = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    sums = tl.zeros([TILE_ROWS, HEAD_PAD], tl.float32)
    own_table = table + tl.load(table_starts + sequence)
    own_keys = keys + kv_head.to(tl.int64) * kv_head_stride
    own_values = values + kv_head.to(tl.int64) * kv_head_stride
    for key in range(low, clear, TILE_KEYS):
        key_at = key + tl.arange(0, TILE_KEYS)
        peak, total, sums = _step(
            query, peak, total, sums, own_keys, own_values, own_table, key_at, seen, end,
            slot_stride, dims, scale, HEAD, HEAD_PAD, BLOCK_TOKENS, WIDE, False,
        )  # fmt: skip
    for key in range(clear, high, TILE_KEYS):
        key_at = key + tl.arange(0, TILE_KEYS)
        peak, total, sums = _step(
            query, peak, total, sums, own_keys, own_values, own_table, key_at, seen, high,
            slot_stride, dims, scale, HEAD, HEAD_PAD, BLOCK_TOKENS, WIDE, True,
        )  # fmt: skip

    safe = tl.where(total > 0, total, 1.0)
    result = sums / safe[:, None]
    if SPLITS == 1:
        place = outputs + row_at[:, None] * HEAD + dims[None, :]
        tl.store(place, result.to(outputs.dtype.element_ty), mask=inside)
    else:
        # Splits behind the end of a context write only their log-sum-exp, minus infinity.
        used = inside & (total > 0)[:, None]
        tl.store(parts + row_at[:, None] * HEAD + dims[None, :], result, mask=used)
        lse = tl.where(total > 0, peak + tl.log2(safe), float("-inf"))
        tl.store(part_lse + row_at, lse, mask=real)


@triton.jit(do_not_specialize=["sequences", "capacity"], do_not_specialize_on_alignment=["starts"])
def merge_kernel(
    parts,
    part_lse,
    outputs,
    starts,
    sequences,
    capacity,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the splits that ``attend_kernel`` wrote. Grid: (capacity, query heads)."""
    token = tl.program_id(0)
    if token >= tl.load(starts + sequences):
        return
    heads = tl.num_programs(1)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, HEAD_PAD)
    row = token.to(tl.int64) * heads + tl.program_id(1)
    rows = row + splits.to(tl.int64) * capacity * heads
    lse = tl.load(part_lse + rows)
    weights = tl.exp2(lse - tl.max(lse, 0))
    used = (weights > 0)[:, None] & (dims < HEAD)[None, :]
    values = tl.load(parts + rows[:, None] * HEAD + dims[None, :], mask=used, other=0.0)
    merged = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    place = outputs + row * HEAD + dims
    tl.store(place, merged.to(outputs.dtype.element_ty), mask=dims < HEAD)
