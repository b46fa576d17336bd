"""Reads CSV with a header; names of columns ignore case and outer blanks."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator

from pla_serve.traces.rows import TraceError


class Table:
    """A CSV file as a dict for each data row. It can be iterated over once."""

    def __init__(self, file: Iterable[str]) -> None:
        self._lines = csv.reader(file)
        self.columns = [cell.strip().lower() for cell in next(self._lines, [])]

    def __iter__(self) -> Iterator[dict[str, str]]:
        """
        Raises:
            TraceError: a line has more or fewer cells than the header, or is no CSV.
        """
        wanted = len(self.columns)
        index = 0
        try:
            for cells in self._lines:
                if not cells:
                    continue
                if len(cells) != wanted:
                    raise TraceError(f"data row {index}: {_uneven(len(cells), wanted)}")
                yield dict(zip(self.columns, cells, strict=True))
                index += 1
        except csv.Error as error:
            raise TraceError(f"data row {index}: {error}") from None


def _uneven(cells: int, wanted: int) -> str:
    if cells > wanted:
        return f"more cells than columns ({cells}, {wanted}); are blocks with commas quoted?"
    return f"fewer cells than columns ({cells}, {wanted}); was the file cut off?"
