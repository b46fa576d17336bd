"""Reads this project's CSV: counts, times and block numbers, with columns by name."""

from __future__ import annotations

from collections.abc import Iterator

from pla_serve.traces.blocks import decode_blocks
from pla_serve.traces.rows import Row, TraceError, at_least_one, number
from pla_serve.traces.table import Table

COLUMNS = frozenset({"input_tokens"})
"""Column that every such file has. Others are arrival_s, session_id, turn, output_tokens,
cached_prefix_tokens, think_s and blocks. Without output_tokens answers have one token."""


def project_csv(table: Table) -> Iterator[Row]:
    """Yield the rows of a table. An empty or missing cell is unknown; other columns are ignored.

    Raises:
        TraceError: a row cannot be read.
    """
    earlier: list[tuple[range, ...]] = []
    for index, cells in enumerate(table):
        try:
            blocks = cells.get("blocks")
            earlier.append(decode_blocks(blocks, earlier) if blocks else ())
            cached, turn = cells.get("cached_prefix_tokens"), cells.get("turn")
            yield Row(
                index,
                number(cells.get("arrival_s")),
                at_least_one(cells["input_tokens"]),
                at_least_one(cells.get("output_tokens") or 1),
                session=cells.get("session_id") or None,
                cached_tokens=int(cached) if cached else None,
                think=number(cells.get("think_s")),
                blocks=earlier[-1] or None,
                turn=int(turn) if turn else None,
            )
        except ValueError as error:
            raise TraceError(f"data row {index}: {error}") from None
