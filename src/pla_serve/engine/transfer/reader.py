"""Drives all pulls of one engine, in a thread beside it; the two talk through queues."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque

from pla_serve.engine.transfer.layout import KVLayout
from pla_serve.engine.transfer.ledger import Slots
from pla_serve.engine.transfer.pull import Pull, PullReport, PullRequest
from pla_serve.engine.transfer.transport import KVTransport

BUSY_SECONDS = 0.0002
"""Pause while a read is under way: the transport moves only when it is asked."""
LOOK_SECONDS = 0.001
"""Between two looks at an offer of which nothing new was computed."""
IDLE_SECONDS = 0.005
"""How long another engine that connects waits for this one at most."""


class Reader:
    """Reads offers, and lets others read. ``step`` and what it calls belong to one thread.

    Args:
        rows: for looks; as many pulls can run at once, the others wait.
    """

    def __init__(self, transport: KVTransport, layout: KVLayout, rows: Slots) -> None:
        self._transport = transport
        self._layout = layout
        self._rows = rows
        self._commands: deque[PullRequest | int] = deque()
        self._reports: deque[PullReport] = deque()
        self._waiting: deque[PullRequest] = deque()
        self._pulls: dict[int, Pull] = {}
        self.crash: Exception | None = None
        self.seconds = 0.0
        """Counter: time in which there was something to read."""

    # The engine's side

    def start(self, request: PullRequest) -> None:
        """Read what is offered; `reports` tells how it goes, until one of them has ``ended``."""
        self._commands.append(request)

    def cancel(self, key: int) -> None:
        """Read no more; a report that it has ended still comes."""
        self._commands.append(key)

    def reports(self) -> list[PullReport]:
        """What is new.

        Raises:
            RuntimeError: the thread has crashed, so that no read will ever be reported as ended.
        """
        if self.crash is not None:
            raise RuntimeError("the thread that reads KV has crashed") from self.crash
        taken: list[PullReport] = []
        while self._reports:
            taken.append(self._reports.popleft())
        return taken

    # The thread's side

    def step(self) -> float:
        """Move everything as far as it goes; seconds until it is worth doing again."""
        self._obey()
        moved = False
        for pull in list(self._pulls.values()):
            moved |= self._move(pull)
        self._transport.progress()
        if moved or self._commands:
            return 0.0
        if any(pull.waits for pull in self._pulls.values()):
            return BUSY_SECONDS
        return LOOK_SECONDS if self._pulls else IDLE_SECONDS

    def _obey(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, PullRequest):
                self._waiting.append(command)
            elif command in self._pulls:
                self._pulls[command].cancel()
            else:
                self._forget(command)
        while self._waiting and (row := self._rows.take()) is not None:
            request = self._waiting.popleft()
            self._pulls[request.key] = Pull(request, self._layout, self._rows, row)

    def _forget(self, key: int) -> None:
        """Cancelled before it had a row; unknown if its end is on the way to the engine."""
        for request in self._waiting:
            if request.key == key:
                self._waiting.remove(request)
                self._reports.append(PullReport(key, request.skip, True, None, 0, 0))
                return

    def _move(self, pull: Pull) -> bool:
        moved = pull.step(self._transport)
        if pull.ended:
            del self._pulls[pull.key]
            self._rows.give_back(pull.row)
        elif not moved:
            return False
        self._reports.append(pull.report())
        return True


class ReaderThread:
    """Runs a reader until it is closed, garbage, or the interpreter ends."""

    def __init__(self, reader: Reader) -> None:
        self._wake = threading.Event()
        closing = threading.Event()
        thread = threading.Thread(
            target=_run, args=(reader, self._wake, closing), name="kv-transfer", daemon=True
        )
        self._close = weakref.finalize(self, _stop, thread, self._wake, closing)
        thread.start()

    def wake(self) -> None:
        """There is something new to do."""
        self._wake.set()

    def close(self) -> None:
        """End the thread."""
        self._close()


def _run(reader: Reader, wake: threading.Event, closing: threading.Event) -> None:
    while not closing.is_set():
        began = time.perf_counter()
        try:
            pause = reader.step()
        except Exception as error:
            reader.crash = error
            return
        if pause < IDLE_SECONDS:
            reader.seconds += time.perf_counter() - began
        if pause:
            wake.wait(pause)
            wake.clear()


def _stop(thread: threading.Thread, wake: threading.Event, closing: threading.Event) -> None:
    closing.set()
    wake.set()
    thread.join(timeout=1.0)
