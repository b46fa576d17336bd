"""Reads the traces of BurstGPT (HPMLL/BurstGPT, arXiv 2401.17644)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pla_serve.traces.rows import Row, TraceError, at_least_one, number
from pla_serve.traces.table import Table

COLUMNS = frozenset({"timestamp", "request tokens", "response tokens"})


def burstgpt(table: Table) -> Iterator[Row]:
    """Yield the rows of a table with the columns Timestamp, Request tokens and Response tokens.

    Timestamps are seconds. The third release also has Session ID (empty for API calls) and Elapsed
    time (seconds until the answer was complete). Failed requests, which have no response tokens,
    are kept with an answer of one token; the files named ``without_fails`` have none. The trace
    does not say what was cached. Think time is the time since the session's previous answer, or 0
    if that was not complete yet.

    Raises:
        TraceError: a row cannot be read.
    """
    start: float | None = None
    turns: Counter[str] = Counter()
    answered: dict[str, float] = {}
    for index, cells in enumerate(table):
        try:
            time = float(cells["timestamp"])
            start = time if start is None else start
            session = cells.get("session id", "").strip() or None
            before, turn = None, None
            if session is not None:
                turns[session] += 1
                turn = turns[session]
                before = answered.pop(session, None)
                elapsed = number(cells.get("elapsed time"))
                if elapsed is not None:
                    answered[session] = time + elapsed
            yield Row(
                index,
                time - start,
                at_least_one(cells["request tokens"]),
                at_least_one(cells["response tokens"]),
                session=session,
                think=None if before is None else max(0.0, time - before),
                turn=turn,
            )
        except ValueError as error:
            raise TraceError(f"data row {index}: {error}") from None
