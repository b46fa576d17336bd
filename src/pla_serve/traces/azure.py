"""Reads Azure's LLM inference traces (Azure/AzurePublicDataset) of 2023 and 2024."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from pla_serve.traces.rows import Row, TraceError, at_least_one
from pla_serve.traces.table import Table

COLUMNS = frozenset({"timestamp", "contexttokens", "generatedtokens"})


def azure(table: Table) -> Iterator[Row]:
    """Yield the rows of a table with the columns TIMESTAMP, ContextTokens and GeneratedTokens.

    Times are written ``2023-11-16 18:15:46.6805900`` in the first year and
    ``2024-05-12 00:00:00.003+00:00``, or without the fraction, in the second. A time without a zone
    is UTC. The traces have no sessions.

    Raises:
        TraceError: a row cannot be read.
    """
    start: datetime | None = None
    for index, cells in enumerate(table):
        try:
            time = datetime.fromisoformat(cells["timestamp"].strip())
            time = time if time.tzinfo else time.replace(tzinfo=UTC)
            start = time if start is None else start
            yield Row(
                index,
                (time - start).total_seconds(),
                at_least_one(cells["contexttokens"]),
                at_least_one(cells["generatedtokens"]),
            )
        except ValueError as error:
            raise TraceError(f"data row {index}: {error}") from None
