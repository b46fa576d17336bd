"""Answers the lines of a file that have no answer yet, several at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Protocol

from pla_serve.server.file_run.input import RunInput
from pla_serve.server.file_run.output import OutputFile
from pla_serve.server.file_run.progress import RunProgress
from pla_serve.server.offline.caller import Answered
from pla_serve.server.offline.lines import LineError, LineRequest, read_request
from pla_serve.server.offline.records import BatchLine, LineAnswer, answered_line, refused_line

MOST_ATTEMPTS = 3
"""Times that a line is sent which fails by a fault of the server; the last answer is kept."""
PAUSE_SECONDS = 1.0
"""Pause before a line is sent again, where the server names none; it doubles each time."""
MOST_PAUSE_SECONDS = 60.0


class SendsRequest(Protocol):
    """Sends one request, and waits for its whole answer."""

    async def __call__(self, request: LineRequest, id: str) -> Answered: ...


class FileRun:
    """One run over one input file.

    Attributes:
        input: what is asked.
        output: what has been answered; lines that have an answer are not run.
    """

    def __init__(self, input: RunInput, output: OutputFile, progress: RunProgress) -> None:
        self.input = input
        self.output = output
        self.progress = progress
        self._writing = asyncio.Lock()

    def waiting(self) -> list[BatchLine]:
        """Return the lines that have no answer, in their order."""
        return [line for line in self.input.lines if line.number not in self.output.answered]

    async def refuse_wrong_lines(self) -> None:
        """Write the errors of lines that cannot be run."""
        for answer in self.input.refused:
            await self.write(answer)

    async def write(self, answer: LineAnswer) -> None:
        """Append an answer, unless its line has one.

        Raises:
            OSError: the disk is full.
        """
        async with self._writing:  # the file is for one thread at a time
            if await asyncio.to_thread(self.output.add, answer):
                self.progress.answered(answer.text)

    async def send_all(self, send: SendsRequest, at_once: int) -> None:
        """Send the lines that have no answer, and write what comes.

        Raises:
            OSError: the input or the output cannot be used any more, or the server is gone.
        """
        lines = iter(self.waiting())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(self._send_some(send, lines))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _send_some(self, send: SendsRequest, lines: Iterator[BatchLine]) -> None:
        for line in lines:
            await self.write(await self._answer(send, line))

    async def _answer(self, send: SendsRequest, line: BatchLine) -> LineAnswer:
        try:
            request = await asyncio.to_thread(read_request, self.input.path, line)
        except LineError:
            message = "the input file was changed while it was read"
            return refused_line(line.number, line.custom_id, "input_file_changed", message)
        attempts, pause = 1, PAUSE_SECONDS
        while True:
            id = f"req-{uuid.uuid4().hex}"
            found = await send(request, id)
            if found.status < 500 and found.status != 429:
                break
            if found.status != 429:  # 429 is a matter of time, not of the line
                if attempts >= MOST_ATTEMPTS:
                    break
                attempts += 1
            await asyncio.sleep(min(found.retry_after or pause, MOST_PAUSE_SECONDS))
            pause = min(2 * pause, MOST_PAUSE_SECONDS)
        return answered_line(line.number, line.custom_id, found.status, id, found.body)
