"""Counts how much of each prompt earlier prompts have put into a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pla_serve.traces.blocks import SeenBlocks
from pla_serve.traces.rows import Row


def recount_cached(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with new ``cached_tokens``, as the rows before them explain in this order.

    Needed after rows were left out or put in another order. For a row with blocks these are the
    tokens of its leading blocks that were seen before. For one without they are at most the
    previous prompt and answer of its session; at the start of a session all that the row says (a
    system prompt), and none if the first turns were left out. They are never more than what the row
    says, where it says anything, and the last token is always new.
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
