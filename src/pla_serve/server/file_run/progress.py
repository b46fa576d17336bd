"""Shows how far a run is: lines, tokens a second, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SAY_SECONDS = 30.0
"""A line is printed this often where no bar can be drawn."""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Response(msgspec.Struct):
    status_code: int
    body: _Body = msgspec.field(default_factory=_Body)


class _Answer(msgspec.Struct):
    response: _Response | None = None


class RunProgress:
    """A bar on a terminal, and a line now and then elsewhere. A context manager.

    Args:
        total: lines that the run has to answer.
        known: lines that an earlier run has answered.
    """

    def __init__(
        self,
        total: int,
        known: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = self.failed = 0
        """Lines that this run has answered, and those of them that have an error."""
        self.tokens = 0
        """Tokens of prompts and answers of these lines, as the answers count them."""
        self._total = total
        self._clock = clock
        self._began = self._said = clock()
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed:.0f} of {task.total:.0f} lines"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total + known, completed=known, rate="")
        self._known = known

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def answered(self, text: bytes) -> None:
        """Count the answer to one line, given as a line of the output."""
        good, tokens = _read(text)
        self.done += 1
        self.failed += not good
        self.tokens += tokens
        self._show(self._known + self.done)

    def elsewhere(self, lines: int) -> None:
        """Show ``lines`` more than those that this run has written: a server has answered them."""
        self._show(self._known + self.done + lines)

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def summary(self) -> str:
        """What the run has done, in one line."""
        seconds = self._clock() - self._began
        errors = f" ({self.failed} with an error)" if self.failed else ""
        return f"{self.done} lines answered{errors} in {seconds:.0f} s, {self._rate()}"

    def _rate(self) -> str:
        seconds = self._clock() - self._began
        return f"{self.tokens / seconds:.0f} tokens/s" if seconds else "0 tokens/s"

    def _show(self, lines: int) -> None:
        self._bar.update(self._task, completed=lines, rate=self._rate())
        now = self._clock()
        if not self._console.is_terminal and now - self._said >= SAY_SECONDS:
            self._said = now
            here = max(lines - self._known, 1)
            left = (self._total - here) * (now - self._began) / here
            total = self._total + self._known
            self.say(f"{lines} of {total} lines, {self._rate()}, about {left:.0f} s left")


def _read(text: bytes) -> tuple[bool, int]:
    """Return whether an answer is good, and its tokens; 0 if it does not count them."""
    try:
        response = msgspec.json.decode(text, type=_Answer).response
    except msgspec.DecodeError:  # another server's body, of a form of its own
        return True, 0
    if response is None:
        return False, 0
    usage = response.body.usage or _Usage()
    tokens = usage.prompt_tokens + usage.completion_tokens + usage.input_tokens
    return response.status_code < 300, tokens + usage.output_tokens
