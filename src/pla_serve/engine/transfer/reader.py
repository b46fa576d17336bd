"""The reader: a thread beside the engine that drives all its pulls.

Commands go to the reader and reports come back through queues, so the engine never waits for it. A
failure of one pull ends that pull alone: its request is computed here instead.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque

from pla_serve.engine.transfer.layout import KVLayout
from pla_serve.engine.transfer.ledger import Slots
from pla_serve.engine.transfer.pull import Pull, PullReport, PullRequest
from pla_serve.engine.transfer.transport import KVTransport

log = logging.getLogger(__name__)

BUSY_SECONDS = 0.0002
"""Pause while a read is running: the transport moves bytes only when it is called."""
LOOK_SECONDS = 0.001
"""Pause between two looks at an offer while nothing new is computed."""
IDLE_SECONDS = 0.005
"""Pause without pulls: the longest that another engine waits when it connects to this one."""
ERROR_SECONDS = 0.5
"""Pause after an error that no pull is to blame for."""


class Reader:
    """Reads offers, and answers engines that connect to this one.

    `start`, `cancel` and `reports` belong to the engine's thread, `step` to the reader's.

    Args:
        rows: memory for looks. One pull runs for each row at most; others wait.
    """

    def __init__(self, transport: KVTransport, layout: KVLayout, rows: Slots) -> None:
        self._transport = transport
        self._layout = layout
        self._rows = rows
        self._commands: deque[PullRequest | int] = deque()
        self._reports: deque[PullReport] = deque()
        self._waiting: deque[PullRequest] = deque()
        self._pulls: dict[int, Pull] = {}
        self.seconds = 0.0
        """Counter: seconds in which there was something to read."""

    # Called by the engine's thread

    def start(self, request: PullRequest) -> None:
        """Begin to read an offer. `reports` returns its progress; the last report has ``ended``."""
        self._commands.append(request)

    def cancel(self, key: int) -> None:
        """Stop reading an offer. A last report that has ``ended`` still follows."""
        self._commands.append(key)

    def reports(self) -> list[PullReport]:
        """Return the reports since the last call."""
        taken: list[PullReport] = []
        while self._reports:
            taken.append(self._reports.popleft())
        return taken

    # Called by the reader's thread

    def step(self) -> float:
        """Drive all pulls as far as they go; return seconds until the next call is worth it."""
        self._take_commands()
        moved = False
        for pull in list(self._pulls.values()):
            moved |= self._move(pull)
        self._transport.progress()
        if moved or self._commands:
            return 0.0
        if any(pull.waits for pull in self._pulls.values()):
            return BUSY_SECONDS
        return LOOK_SECONDS if self._pulls else IDLE_SECONDS

    def _take_commands(self) -> None:
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
        """Cancel a pull that has no row yet; one that is unknown has ended already."""
        for request in self._waiting:
            if request.key == key:
                self._waiting.remove(request)
                self._reports.append(PullReport(key, request.skip, True, None, 0, 0))
                return

    def _move(self, pull: Pull) -> bool:
        """Drive one pull, and report if anything happened; returns whether it did."""
        try:
            moved = pull.step(self._transport)
        except Exception as error:  # whatever it is, it is the fault of this pull alone
            if pull.failure is None:
                log.exception("reading KV from another engine failed")
            pull.fail(f"{type(error).__name__}: {error}")
            moved = False
        if pull.ended:
            del self._pulls[pull.key]
            self._rows.give_back(pull.row)
        elif not moved:
            return False
        self._reports.append(pull.report())
        return True


class ReaderThread:
    """Thread that drives a reader until `close`, or until this object is garbage."""

    def __init__(self, reader: Reader) -> None:
        self._wake = threading.Event()
        closing = threading.Event()
        thread = threading.Thread(
            target=_run, args=(reader, self._wake, closing), name="kv-transfer", daemon=True
        )
        self._close = weakref.finalize(self, _stop, thread, self._wake, closing)
        thread.start()

    def wake(self) -> None:
        """Drive the reader at once: it has been given something to do."""
        self._wake.set()

    def close(self) -> None:
        """End the thread."""
        self._close()


def _run(reader: Reader, wake: threading.Event, closing: threading.Event) -> None:
    while not closing.is_set():
        began = time.perf_counter()
        try:
            pause = reader.step()
        except Exception:
            # Without this thread no read would ever end. Requests do not wait for it: they are
            # computed here after a second.
            log.exception("the thread that reads KV goes on after an error")
            closing.wait(ERROR_SECONDS)
            continue
        if pause < IDLE_SECONDS:
            reader.seconds += time.perf_counter() - began
        if pause:
            wake.wait(pause)
            wake.clear()


def _stop(thread: threading.Thread, wake: threading.Event, closing: threading.Event) -> None:
    closing.set()
    wake.set()
    thread.join(timeout=1.0)
