"""How much of each prompt the prompts before it hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pla_serve.traces.blocks import SeenBlocks
from pla_serve.traces.rows import Row


def recount_cached(rows: Sequence[Row]) -> list[Row]:
    """Rows with ``cached_tokens`` that the rows before them account for, in this order.

    To be called after rows were left out or put in another order. With blocks: those seen before,
    whole. Without: what the row says, but not more than its session's prompt and answer before it;
    where a session begins, all that it says (a system prompt), and nothing if its first turns were
    left out. At most what the row says, where it says anything. The last token is always new.
    """
    seen = SeenBlocks()
    sent: dict[str, int] = {}
    recounted = []
    for row in rows:
        said = row.cached_tokens
        if row.blocks and row.block_tokens:
            known = seen.add(row.blocks) * row.block_tokens
        elif row.session in sent:
            known = sent[row.session]
        else:
            known = (said or 0) if row.turn is None or row.turn == 1 else 0
        cached = min(known, known if row.blocks and said is None else said or 0)
        cached = min(cached, row.input_tokens - 1)
        if row.session is not None:
            sent[row.session] = row.input_tokens + row.output_tokens
        recounted.append(row if cached == said else replace(row, cached_tokens=cached))
    return recounted
