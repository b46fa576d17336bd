"""Reads Mooncake's traces (kvcache-ai/Mooncake, FAST 2025 release)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from pla_serve.traces.rows import Row, TraceError, at_least_one

BLOCK_TOKENS = 512


def mooncake(file: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line.

    Example: ``{"timestamp": 274, "input_length": 699, "output_length": 52, "hash_ids": [46, 47]}``,
    in milliseconds and with a hash for each block of 512 tokens.

    Raises:
        TraceError: a line is not of this form.
    """
    start: float | None = None
    for index, line in enumerate(line for line in file if line.strip()):
        try:
            entry = json.loads(line)
            time = float(entry["timestamp"]) / 1000
            start = time if start is None else start
            blocks = _runs(map(int, entry.get("hash_ids") or ()))
            yield Row(
                index,
                time - start,
                at_least_one(entry["input_length"]),
                at_least_one(entry["output_length"]),
                blocks=blocks or None,
                block_tokens=BLOCK_TOKENS,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise TraceError(f"request {index + 1}: not a Mooncake line ({error!r})") from None


def _runs(ids: Iterable[int]) -> tuple[range, ...]:
    """Return ids as ranges, in their order; ids that count up are one range."""
    runs: list[range] = []
    for block in ids:
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return tuple(runs)
