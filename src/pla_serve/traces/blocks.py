"""Block ids of prompts: their form in this project's CSV, and what is cached of a prompt."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from pla_serve.traces.rows import Row, TraceError

_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def decode_blocks(text: str, earlier: Sequence[tuple[range, ...]]) -> tuple[range, ...]:
    """Read the blocks of a row: ``J:K|a-b,c`` is the first K ids of data row J, then a to b and c.

    Args:
        earlier: blocks of all earlier rows, from row 0.

    Raises:
        ValueError: the text is not of this form, or row J has fewer than K ids.
    """
    before, bar, after = text.partition("|")
    if not bar:
        raise ValueError(f"blocks need a bar, as in 0:3|7-9: {text!r}")
    ranges: list[range] = []
    if before:
        row, _, count = before.partition(":")
        if not 0 <= int(row) < len(earlier):
            raise ValueError(f"blocks refer to row {row}, which is not before this one")
        ranges += _first(earlier[int(row)], int(count))
    for part in after.split(",") if after else ():
        low, _, high = part.partition("-")
        first, last = int(low), int(high or low)
        if ranges and ranges[-1].stop == first:
            ranges[-1] = range(ranges[-1].start, last + 1)  # fewer ranges for the rows to come
        else:
            ranges.append(range(first, last + 1))
    return tuple(ranges)


def _first(ranges: tuple[range, ...], count: int) -> Iterator[range]:
    for run in ranges:
        if count <= 0:
            return
        yield run if len(run) <= count else run[:count]
        count -= len(run)
    if count > 0:
        raise ValueError(f"blocks refer to {count} more than the row that they name has")


def block_size(rows: Sequence[Row], name: str) -> int | None:
    """Infer the tokens in one block; None for a trace without blocks.

    The size is the smallest power of two that explains the number of blocks of every row, rounded
    up or down.

    Raises:
        TraceError: no size fits all rows.
    """
    if rows[0].block_tokens is not None:
        return rows[0].block_tokens
    sizes = [(row.input_tokens, sum(map(len, row.blocks))) for row in rows if row.blocks]
    if not sizes:
        return None
    for size in _SIZES:
        if all(n in (tokens // size, -(-tokens // size)) for tokens, n in sizes):
            return size
    raise TraceError(
        f"{name}: the block size cannot be inferred from the counts; "
        "give --block-tokens, or :block-tokens=N after the name"
    )


class SeenBlocks:
    """Blocks of earlier prompts, to tell how much of a new prompt is cached.

    Ids are kept as sorted disjoint intervals, so that a prompt costs a few look-ups for each of its
    ranges and not one for each of its blocks.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, blocks: Iterable[range]) -> int:
        """Add the blocks of a prompt, and return how many leading ones were seen before."""
        known, leading = 0, True
        for run in blocks:
            if leading:
                seen = self._begins(run)
                known += seen
                leading = seen == len(run)
            if not leading:
                self._insert(run.start, run.stop)
        return known

    def _begins(self, run: range) -> int:
        place = bisect_right(self._starts, run.start) - 1
        if place < 0:
            return 0
        return max(0, min(self._stops[place], run.stop) - run.start)

    def _insert(self, start: int, stop: int) -> None:
        # All intervals that touch the new one become one with it.
        low = bisect_left(self._stops, start)
        high = bisect_right(self._starts, stop)
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]
