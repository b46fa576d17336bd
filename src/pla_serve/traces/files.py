"""Reads trace files of all known formats; the content of a file tells its format."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from pla_serve.traces import azure, burstgpt, project_csv
from pla_serve.traces.mooncake import mooncake
from pla_serve.traces.rows import Row, TraceError
from pla_serve.traces.sharegpt import CountTokens, about_four_characters, sharegpt
from pla_serve.traces.table import Table

_TABLES = (
    (project_csv.COLUMNS, project_csv.project_csv),
    (azure.COLUMNS, azure.azure),
    (burstgpt.COLUMNS, burstgpt.burstgpt),
)
_COMPANION = frozenset({"trace", "models", "contexts"})
_SHAREGPT = '"conversations"'
_PEEK = 65536
"""Characters at the start of a file by which its format is recognised."""


def read_rows(
    path: Path, most: int | None = None, count_tokens: CountTokens = about_four_characters
) -> list[Row]:
    """Read the first ``most`` requests of a file, plain or gzip, in its order.

    Arrivals count from the earliest one.

    Args:
        count_tokens: counts the tokens of texts, for formats that hold texts and no counts.

    Raises:
        TraceError: the file is missing, empty or malformed; the message names file and row.
    """
    try:
        beginning = _peek(path)
        with _open(path) as file:
            rows = list(itertools.islice(_rows(beginning, file, count_tokens), most))
    except OSError as error:
        raise TraceError(f"cannot read {path.name}: {error.strerror or error}") from None
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise TraceError(f"{path.name} is not a text file, plain or gzip: {error}") from None
    except TraceError as error:
        raise TraceError(f"{path.name}: {error}") from None
    if not rows:
        raise TraceError(f"{path.name} holds no requests")
    return _from_zero(rows)


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"
    if packed:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _peek(path: Path) -> str:
    with _open(path) as file:
        return file.read(_PEEK).lstrip()


def _rows(beginning: str, file: IO[str], count_tokens: CountTokens) -> Iterator[Row]:
    if beginning.startswith("[") or (beginning.startswith("{") and _SHAREGPT in beginning):
        return sharegpt(file, count_tokens)
    if beginning.startswith("{"):
        return mooncake(file)
    return _table_rows(Table(file)) if beginning else iter(())


def _table_rows(table: Table) -> Iterator[Row]:
    columns = frozenset(table.columns)
    for wanted, read in _TABLES:
        if wanted <= columns:
            return read(table)
    if columns >= _COMPANION:
        raise TraceError(
            "this is the companion of a trace, one line a session, and holds no requests; "
            "give the file whose name lacks _sessions"
        )
    raise TraceError(
        "not a known trace. A CSV needs the columns input_tokens (and, as far as known, "
        "output_tokens, arrival_s, session_id, ...), or TIMESTAMP, ContextTokens and "
        "GeneratedTokens (Azure), or Timestamp, Request tokens and Response tokens (BurstGPT); "
        "it has " + (", ".join(table.columns[:8]) or "none")
    )


def _from_zero(rows: list[Row]) -> list[Row]:
    """Shift arrivals so that the earliest is 0, where a later line has an earlier time."""
    first = min((row.arrival for row in rows if row.arrival is not None), default=0.0)
    if first >= 0:
        return rows
    return [
        row if row.arrival is None else replace(row, arrival=row.arrival - first) for row in rows
    ]
