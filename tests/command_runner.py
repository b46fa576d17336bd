"""Runs ``pla-serve`` in the test process."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from pla_serve.cli import main


@dataclass(frozen=True, slots=True)
class CommandResult:
    """Exit status and output of one call."""

    exit_code: int
    stdout: str
    stderr: str
    output: str
    """Both streams, in the order in which they were written."""


class _Copied(io.StringIO):
    """A stream whose text also goes to another one."""

    def __init__(self, both: io.StringIO) -> None:
        super().__init__()
        self._both = both

    def write(self, text: str) -> int:
        self._both.write(text)
        return super().write(text)


def pla_serve(*words: str, env: Mapping[str, str] | None = None) -> CommandResult:
    """Call ``pla-serve`` with these words, and with ``env`` added to the environment."""
    both = io.StringIO()
    stdout, stderr = _Copied(both), _Copied(both)
    with (
        patch.dict(os.environ, env or {}),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            status: object = main(list(words))
        except SystemExit as end:
            status = end.code
    return CommandResult(
        status if isinstance(status, int) else int(status is not None),
        stdout.getvalue(),
        stderr.getvalue(),
        both.getvalue(),
    )
