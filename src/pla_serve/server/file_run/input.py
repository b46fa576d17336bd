"""The input file of a run: its lines in order, and what is wrong with the wrong ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pla_serve.server.offline.lines import BESIDE_BODY, ENDPOINTS, InputReader
from pla_serve.server.offline.records import BatchLine, LineAnswer


@dataclass(slots=True)
class RunInput:
    """Lines of one input file.

    Attributes:
        refused: answers to lines that cannot be run.
    """

    path: Path
    lines: list[BatchLine] = field(default_factory=list)
    refused: list[LineAnswer] = field(default_factory=list)

    @property
    def custom_ids(self) -> dict[int, str | None]:
        """``custom_id`` of each line that is not empty, by its number."""
        found: dict[int, str | None] = {line.number: line.custom_id for line in self.lines}
        for answer in self.refused:
            found[answer.number] = msgspec.json.decode(answer.text, type=_Named).custom_id
        return found


class _Named(msgspec.Struct):
    custom_id: str | None


def read_input(path: Path, most_body_bytes: int) -> RunInput:
    """Read all lines of a file. Their bodies stay on disk.

    Raises:
        OSError: the file cannot be read.
    """
    found = RunInput(path)
    reader = InputReader(path, ENDPOINTS, sys.maxsize, most_body_bytes + BESIDE_BODY)
    try:
        while (portion := reader.portion()) is not None:
            found.lines += portion.lines
            found.refused += portion.refused
    finally:
        reader.close()
    return found
