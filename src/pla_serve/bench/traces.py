"""Readers of recorded traffic: Mooncake's JSONL and this project's CSV.

A trace holds counts, times and block numbers, no text. A reader turns lines into rows; `replay`
makes a workload of them. A further format is one more function in `_reader`.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MOONCAKE_BLOCK = 512


class TraceError(ValueError):
    """The file is not a trace that can be read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace, in the file's order."""

    index: int
    arrival: float | None
    input_tokens: int
    output_tokens: int
    session: str | None = None
    cached_tokens: int | None = None
    think: float | None = None
    blocks: tuple[range, ...] | None = None
    block_tokens: int | None = None
    """Tokens in one block, where the format fixes it."""


def read_rows(path: Path, most: int | None = None) -> list[Row]:
    """The first ``most`` requests of a file.

    Raises:
        TraceError: the file is missing, empty or malformed.
    """
    read = _reader(path)
    try:
        with _open(path) as file:
            rows = list(itertools.islice(read(file), most))
    except OSError as error:
        raise TraceError(f"cannot read {path.name}: {error.strerror or error}") from None
    except (UnicodeDecodeError, EOFError) as error:
        raise TraceError(f"{path.name} is not a text file, plain or gzip: {error}") from None
    if not rows:
        raise TraceError(f"{path.name} holds no requests")
    return rows


def _reader(path: Path) -> Callable[[IO[str]], Iterator[Row]]:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in (".jsonl", ".json"):
        return _mooncake
    if suffix == ".csv":
        return _project_csv
    raise TraceError(f"{path.name}: a trace ends in .jsonl or .csv, with or without .gz")


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open()


def _mooncake(file: Iterable[str]) -> Iterator[Row]:
    """``{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`` a line."""
    start: float | None = None
    for index, line in enumerate(line for line in file if line.strip()):
        try:
            entry = json.loads(line)
            time = float(entry["timestamp"]) / 1000
            start = time if start is None else start
            ids = tuple(range(int(i), int(i) + 1) for i in entry.get("hash_ids") or ())
            yield Row(
                index,
                time - start,
                _at_least_one(entry["input_length"]),
                _at_least_one(entry["output_length"]),
                blocks=ids or None,
                block_tokens=MOONCAKE_BLOCK,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise TraceError(f"request {index + 1}: not a Mooncake line ({error!r})") from None


def _project_csv(file: Iterable[str]) -> Iterator[Row]:
    """Columns by name; an empty or missing cell is unknown."""
    table = csv.DictReader(file)
    if not {"input_tokens", "output_tokens"} <= set(table.fieldnames or ()):
        raise TraceError("a trace needs the columns input_tokens and output_tokens")
    earlier: list[tuple[range, ...]] = []
    for index, cells in enumerate(table):
        try:
            if None in cells:
                raise ValueError("more cells than columns; are blocks with commas quoted?")
            blocks = cells.get("blocks")
            earlier.append(_decode_blocks(blocks, earlier) if blocks else ())
            yield Row(
                index,
                _number(cells.get("arrival_s")),
                _at_least_one(cells["input_tokens"]),
                _at_least_one(cells["output_tokens"] or 1),
                cells.get("session_id") or None,
                int(cells["cached_prefix_tokens"]) if cells.get("cached_prefix_tokens") else None,
                _number(cells.get("think_s")),
                earlier[-1] or None,
            )
        except (ValueError, TypeError, IndexError) as error:
            raise TraceError(f"data row {index}: {error}") from None


def _decode_blocks(text: str, earlier: list[tuple[range, ...]]) -> tuple[range, ...]:
    """``J:K|a-b,c``: the first K ids of data row J, then the ids a to b and c."""
    before, bar, after = text.partition("|")
    if not bar:
        raise ValueError(f"blocks need a bar, as in 0:3|7-9: {text!r}")
    ranges: list[range] = []
    if before:
        row, _, count = before.partition(":")
        ranges += _first(earlier[int(row)], int(count))
    for part in after.split(",") if after else ():
        low, _, high = part.partition("-")
        ranges.append(range(int(low), int(high or low) + 1))
    return tuple(ranges)


def _first(ranges: tuple[range, ...], count: int) -> Iterator[range]:
    for run in ranges:
        if count <= 0:
            return
        yield run[:count]
        count -= len(run)
    if count > 0:
        raise ValueError(f"blocks refer to {count} more than the row that they name has")


def _at_least_one(value: object) -> int:
    count = int(str(value))
    if count < 0:
        raise ValueError(f"a count must not be negative: {count}")
    return max(count, 1)


def _number(cell: str | None) -> float | None:
    return float(cell) if cell else None
