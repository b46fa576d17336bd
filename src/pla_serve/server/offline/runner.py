"""Runs offline batches: reads their input, sends their lines to the engine, ends them.

Lines run in the time that online requests leave (`policy.harvest`). Those of a batch whose
completion window comes to its end are *due*: they are sent as requests of clients are.

All that it knows is in the store, so a new process goes on where the last one was killed. A line
that ran then is run again; an answer counts once it is in the database, and there is one for each
line.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from pla_serve.server.errors import failed
from pla_serve.server.offline.caller import Answered
from pla_serve.server.offline.database import Database
from pla_serve.server.offline.finish import finish
from pla_serve.server.offline.line_queue import BatchQueue, LineQueue
from pla_serve.server.offline.lines import (
    BESIDE_BODY,
    InputReader,
    LineError,
    LineRequest,
    read_request,
)
from pla_serve.server.offline.metrics import OfflineMetrics
from pla_serve.server.offline.records import (
    BatchLine,
    BatchStatus,
    LineAnswer,
    OfflineBatch,
    answered_line,
    refused_line,
)
from pla_serve.server.offline.store import OfflineStore

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
"""Times that a line is run which fails by a fault of ours; the last answer is kept."""
LOOK_SECONDS = 1.0
"""Batches are looked at this often if nothing happens: for their expiry, and the disk."""
REST_SECONDS = 5.0
"""How long everything rests after the disk refused something."""

DUE_SHARE = 0.1
"""Part of its completion window in which a batch is due, at the latest."""
DUE_MARGIN = 2.0
"""A batch is due earlier if its lines, at the pace of the last ones, take so many times as long."""
PACE_MEMORY = 0.1
"""Weight of one more line in the pace."""

CallsLine = Callable[[str, LineRequest, str, bool], Awaitable[Answered]]
"""Given an owner, a request, its id, and whether it is due, as `LineCaller.call`."""


class Gate(Protocol):
    """Says when the machine may be given lines."""

    def is_open(self) -> bool:
        """Whether a line may start now: the engine is up."""
        ...

    def may_run(self, owner: str) -> bool:
        """Whether lines of this owner can be run at all: its key is one of this server."""
        ...


class BatchRunner:
    """Runs the batches of one store. Belongs to one event loop.

    Args:
        most_body_bytes: largest body of a request.
        rest_seconds: as `REST_SECONDS`.
    """

    def __init__(
        self,
        store: OfflineStore,
        call: CallsLine,
        gate: Gate,
        metrics: OfflineMetrics,
        *,
        most_body_bytes: int,
        rest_seconds: float = REST_SECONDS,
    ) -> None:
        self._store = store
        self._call = call
        self._gate = gate
        self._metrics = metrics
        self._most_line_bytes = most_body_bytes + BESIDE_BODY
        self._rest_seconds = rest_seconds
        self._queue = LineQueue(store)
        self._running: dict[asyncio.Task[None], str] = {}
        """Tasks of lines, with the ids of their batches."""
        self._due: set[str] = set()
        """Ids of batches that are due."""
        self._held: tuple[BatchQueue, BatchLine] | None = None
        """A line that failed by a fault of ours, which waits until no other runs."""
        self._alone = False
        """Whether such a line runs."""
        self._line_seconds = 0.0
        """Mean time of a line, of late."""
        self._wake = asyncio.Event()
        self._rests_until = 0.0

    def wake(self) -> None:
        """Look at all batches again: something has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Run until cancelled. Lines that run then have no answer, and are run again later."""
        try:
            while True:
                self._wake.clear()
                try:
                    await self._turn()
                except Exception:
                    log.exception("offline batches rest for %g s", self._rest_seconds)
                    self._rest(self._rest_seconds)
                    await asyncio.sleep(self._rest_seconds)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._wake.wait()
        finally:
            await self._end_lines(None)

    async def _turn(self) -> None:
        """Do for each batch what its state asks for, and start lines."""
        for batch in await self._store.run(lambda database: database.live_batches()):
            if batch.status == "validating":
                await self._read(batch)
            elif batch.status == "cancelling":
                await self._end(batch, "cancelled")
            elif batch.status == "finalizing" or batch.answered:
                await self._end(batch, "completed" if batch.answered else "expired")
            elif self._store.now() >= batch.expires:
                await self._end(batch, "expired")
        batches = [
            batch
            for batch in await self._store.run(lambda database: database.live_batches())
            if batch.status == "in_progress" and self._gate.may_run(batch.owner)
        ]
        self._metrics.waiting(sum(each.total - each.done - each.failed for each in batches))
        self._queue.update(batches)
        await self._note_due(batches)
        for due in (True, False):
            some = [batch for batch in batches if (batch.id in self._due) == due]
            while self._may_start(due) and (found := await self._next(some)) is not None:
                self._start(*found)

    def _may_start(self, due: bool) -> bool:
        """Whether one more line may run, of batches that are due or of others."""
        rested = asyncio.get_running_loop().time() >= self._rests_until
        running = sum((id in self._due) == due for id in self._running.values())
        room = running < self._store.options.batch_lines_at_once
        ready = rested and room and not self._alone
        return ready and self._gate.is_open() and self._store.has_space()

    async def _next(self, batches: Sequence[OfflineBatch]) -> tuple[BatchQueue, BatchLine] | None:
        """Return the next line that may start now.

        One that has failed by a fault of ours runs alone: if it ends the engine each time, it takes
        no other line with it again.
        """
        if self._held is None:
            found = await self._queue.next(batches)
            if found is None or not found[1].attempts:
                return found
            self._held = found
        if self._running:
            return None
        held, self._held = self._held, None
        return held if held[0].batch.id in {batch.id for batch in batches} else None

    async def _note_due(self, batches: Sequence[OfflineBatch]) -> None:
        """Find batches that have become due; their lines that run are sent again, as due ones."""
        self._due &= {batch.id for batch in batches}
        for batch in batches:
            if batch.id not in self._due and self._store.now() >= self._due_at(batch):
                log.info("%s is due: its lines run as requests of clients", batch.id)
                self._due.add(batch.id)
                await self._end_lines(batch.id)

    def _due_at(self, batch: OfflineBatch) -> float:
        """Return the time from which the lines of a batch no longer wait for idle time."""
        left = batch.total - batch.done - batch.failed
        seconds = left * self._line_seconds / self._store.options.batch_lines_at_once
        window = batch.expires - batch.created
        return batch.expires - max(DUE_SHARE * window, DUE_MARGIN * seconds)

    def _rest(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._rests_until = max(self._rests_until, loop.time() + seconds)

    # The input file

    async def _read(self, batch: OfflineBatch) -> None:
        """Enter the lines of a batch's input file in the database, from the beginning."""
        store = self._store
        await store.run(lambda database: database.forget_lines(batch))
        path, most = store.path(batch.input_file), store.options.max_batch_lines
        try:
            reader = await store.write(
                lambda: InputReader(path, (batch.endpoint,), most, self._most_line_bytes)
            )
        except FileNotFoundError:
            await self._fail(batch, "input_file_missing", "the input file is no longer there")
            return
        try:
            lines = 0
            while (portion := await store.write(reader.portion)) is not None:
                found = portion
                lines += len(found.lines) + len(found.refused)
                await store.run(lambda db, f=found: db.add_lines(batch, f.lines, f.refused))  # type: ignore[misc]
        except ValueError as error:
            await self._fail(batch, "too_many_lines", str(error))
            return
        finally:
            await store.write(reader.close)
        if lines == 0:
            await self._fail(batch, "empty_file", "the input file has no lines")
            return
        await self._move(batch, "in_progress", ("validating",))

    async def _fail(self, batch: OfflineBatch, code: str, message: str) -> None:
        """End a batch that cannot be begun."""
        faults = [{"code": code, "message": message, "line": None, "param": "input_file_id"}]
        now = self._store.now()

        def fail(database: Database) -> None:
            database.forget_lines(batch)
            database.change_status(batch, "failed", now, only_from=("validating",), errors=faults)

        await self._store.run(fail)

    async def _move(
        self, batch: OfflineBatch, status: BatchStatus, only_from: tuple[BatchStatus, ...]
    ) -> bool:
        now = self._store.now()
        return await self._store.run(
            lambda database: database.change_status(batch, status, now, only_from=only_from)
        )

    # The end of a batch

    async def _end(self, batch: OfflineBatch, status: BatchStatus) -> None:
        """End the lines that still run, and write the files."""
        self.wake()
        if status != "cancelled" and not await self._move(
            batch, "finalizing", ("in_progress", "finalizing")
        ):
            return  # its owner has just cancelled it
        await self._end_lines(batch.id)
        await finish(self._store, batch, status)
        log.info("%s is %s", batch.id, status)

    async def _end_lines(self, batch: str | None) -> None:
        """Cancel the running lines of one batch, or all."""
        tasks = {task for task, id in self._running.items() if batch in (None, id)}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # Lines

    def _start(self, queue: BatchQueue, line: BatchLine) -> None:
        queue.running.add(line.number)
        self._alone = line.attempts > 0
        task = asyncio.get_running_loop().create_task(self._run_line(queue.batch, line))
        self._running[task] = queue.batch.id
        self._metrics.running(len(self._running))

        def ended(task: asyncio.Task[None]) -> None:
            queue.running.discard(line.number)
            del self._running[task]
            self._alone = False
            self._metrics.running(len(self._running))
            self.wake()

        task.add_done_callback(ended)

    async def _run_line(self, batch: OfflineBatch, line: BatchLine) -> None:
        """Run one line, and keep its answer however long the disk refuses it."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = await self._answer(batch, line)
        self._line_seconds += PACE_MEMORY * (loop.time() - began - self._line_seconds)
        while True:
            try:
                if answer is None:
                    await self._store.run(lambda db: db.count_attempt(batch, line.number))
                    self._metrics.line("retried")
                elif await self._store.run(lambda db: db.answer(batch, answer)):
                    self._metrics.line("answered" if answer.good else "failed")
                return
            except sqlite3.Error as error:
                log.error("an answer waits for the disk: %s", error)
                self._rest(self._rest_seconds)
                await asyncio.sleep(self._rest_seconds)

    async def _answer(self, batch: OfflineBatch, line: BatchLine) -> LineAnswer | None:
        """Return the answer to a line; None if it failed by a fault of ours and is to run again.

        A line that the server refuses for want of capacity is sent again from here.
        """
        path, id = self._store.path(batch.input_file), f"req-{uuid.uuid4().hex}"
        number, custom_id = line.number, line.custom_id
        try:
            request = await self._store.write(lambda: read_request(path, line))
        except (FileNotFoundError, LineError):
            message = "the input file was removed or changed on the server's disk"
            return refused_line(number, custom_id, "input_file_missing", message)
        while True:
            try:
                found = await self._call(batch.owner, request, id, batch.id in self._due)
            except Exception:
                log.exception("line %d of %s failed", number, batch.id)
                fault = failed("internal error; the server's log says more")
                found = Answered(500, msgspec.json.encode(fault.body()), None)
            if found.status == 429:
                pause = found.retry_after or 1.0
                self._rest(pause)
                await asyncio.sleep(pause)
                continue
            if found.status >= 500 and line.attempts + 1 < MOST_ATTEMPTS:
                self._rest(found.retry_after or 0.0)
                return None
            return answered_line(number, custom_id, found.status, id, found.body)
