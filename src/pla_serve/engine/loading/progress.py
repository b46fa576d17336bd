"""Tells the user what takes time. Downloads and conversions draw their own bars on stderr."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console


class LoadingProgress(Protocol):
    """Where steps that take time are announced."""

    @property
    def bars(self) -> bool:
        """Whether downloads may draw progress bars on stderr."""
        ...

    def say(self, text: str) -> None:
        """A step begins."""
        ...


class ConsoleProgress:
    """One line per step on stderr; bars where stderr is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @property
    def bars(self) -> bool:
        return self._console.is_terminal

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


class NoLoadingProgress:
    """For tests, and for callers that show their own."""

    bars = False

    def say(self, text: str) -> None:
        del text
