"""Options of offline batches: where they are kept, and how much one API key may keep."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from pla_serve.flags import Flag
from pla_serve.policy.knobs import check_knobs

OFFLINE = "Offline batches"
"""Panel of these flags."""


@dataclass(frozen=True, slots=True)
class OfflineOptions:
    """Options of `/v1/files` and `/v1/batches`.

    Raises:
        ValueError: a field is out of range, or is given without ``batch_dir``.
    """

    batch_dir: Annotated[
        Path | None,
        Flag(
            "Folder in which /v1/files and /v1/batches keep files, batches and answers; it is made "
            "if it is not there. Without it these endpoints refuse.",
            panel=OFFLINE,
        ),
    ] = None
    batch_lines_at_once: Annotated[
        int, Flag("Lines of offline batches that run at once.", least=1, most=4096, panel=OFFLINE)
    ] = 32
    max_batch_lines: Annotated[
        int, Flag("Most lines of one offline batch.", least=1, panel=OFFLINE)
    ] = 50_000
    max_batch_file_mib: Annotated[
        float, Flag("Largest file that a client may upload.", unit="MiB", above=0, panel=OFFLINE)
    ] = 200.0
    max_batch_key_gib: Annotated[
        float,
        Flag(
            "Most that the files of one API key take, or of all clients where there are no keys; "
            "beyond it uploads and new batches are refused (413).",
            unit="GiB",
            above=0,
            panel=OFFLINE,
        ),
    ] = 10.0
    batch_free_mib: Annotated[
        float,
        Flag(
            "Space that stays free on the disk of --batch-dir: with less, uploads and new batches "
            "are refused (507) and no line starts.",
            unit="MiB",
            least=0,
            panel=OFFLINE,
        ),
    ] = 1024.0

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.batch_dir is None:
            for field in fields(self):
                if getattr(self, field.name) != field.default:
                    flag = "--" + field.name.replace("_", "-")
                    raise ValueError(f"{flag} does nothing without --batch-dir; give both or none")

    @property
    def max_file_bytes(self) -> int:
        """Largest file that a client may upload."""
        return int(self.max_batch_file_mib * 2**20)

    @property
    def max_key_bytes(self) -> int:
        """Most bytes that the files of one API key take."""
        return int(self.max_batch_key_gib * 2**30)

    @property
    def free_bytes(self) -> int:
        """Bytes that stay free on the disk."""
        return int(self.batch_free_mib * 2**20)
