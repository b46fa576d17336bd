"""Announces steps of loading that take time; downloads draw bars of their own on stderr."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console


class LoadingProgress(Protocol):
    """Announces steps that take time."""

    @property
    def bars(self) -> bool:
        """Whether downloads may draw progress bars on stderr."""
        ...

    def say(self, text: str) -> None:
        """Announce a step that begins."""
        ...


class ConsoleProgress:
    """Prints a line for each step to stderr, and allows bars if stderr is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @property
    def bars(self) -> bool:
        return self._console.is_terminal

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


class NoLoadingProgress:
    """Announces nothing."""

    bars = False

    def say(self, text: str) -> None:
        del text
