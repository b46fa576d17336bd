"""Time budgets, and results that are on disk as soon as they are there."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Cut(Exception):
    """A part has used up its time."""


@dataclass
class Report:
    """Rows for people, numbers for machines.

    Every part runs within its budget and the whole within ``deadline``; a part that fails or is cut
    says so in its place, and the next one runs.
    """

    path: Path
    deadline: float
    """On `time.monotonic`."""
    content: dict[str, Any]
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    part_name: str = ""
    part_ends: float = 0.0

    def check(self) -> None:
        """Call between the steps of a part.

        Raises:
            Cut: its time, or that of the whole run, is used up.
        """
        if time.monotonic() > min(self.part_ends, self.deadline):
            raise Cut

    def left(self) -> float:
        """Seconds that the part has left."""
        return min(self.part_ends, self.deadline) - time.monotonic()

    def row(self, what: str, value: str, target: str = "", met: bool | None = None) -> None:
        """A line of the table; ``met`` says whether the target was."""
        verdict = "" if met is None else "met" if met else "MISSED"
        self.rows.append((what, value, target, verdict))
        print(f"  {what}: {value} {f'({target}: {verdict})' if target else ''}", flush=True)

    def save(self, key: str, value: Any) -> None:
        """Keep a result of the running part, and write everything so far."""
        self.content["parts"].setdefault(self.part_name, {})[key] = value
        self._write()

    def run(self, name: str, seconds: float, part: Callable[[], None]) -> None:
        """Run a part within a budget; never raises but for an interrupt."""
        began = time.monotonic()
        self.part_name, self.part_ends = name, began + seconds
        entry = self.content["parts"].setdefault(name, {})
        if began > self.deadline - min(10.0, seconds / 2):
            entry["status"] = "not run: no time was left"
            self.row(name, entry["status"])
            self._write()
            return
        print(f"[{name}]", flush=True)
        entry["status"] = "complete"
        try:
            part()
        except Cut:
            entry["status"] = f"cut after {time.monotonic() - began:.0f} s"
            self.row(name, entry["status"])
        except Exception as error:
            lines = str(error).splitlines() or [""]
            entry["status"] = f"failed: {type(error).__name__}: {lines[0][:300]}"
            entry["traceback"] = traceback.format_exc(limit=-8)
            self.row(name, entry["status"])
            print(entry["traceback"], flush=True)
        entry["seconds"] = round(time.monotonic() - began, 1)
        self._write()

    def table(self) -> str:
        """All rows."""
        widths = [max((len(row[i]) for row in self.rows), default=0) for i in range(3)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
            for row in self.rows
        )

    def _write(self) -> None:
        self.content["rows"] = [list(row) for row in self.rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
