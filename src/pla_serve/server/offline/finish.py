"""Writes the output and error files of a batch."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pla_serve.server.offline.database import Database
from pla_serve.server.offline.records import (
    BatchStatus,
    LineAnswer,
    OfflineBatch,
    StoredFile,
    refused_line,
)
from pla_serve.server.offline.store import NewFile, OfflineStore

PORTION = 64
"""Answers that are read from the database and written in one go."""
EXPIRED = "the completion window ended before this line was run"


async def finish(store: OfflineStore, batch: OfflineBatch, status: BatchStatus) -> None:
    """Write the files of a batch none of whose lines runs any more, and end it as ``status``.

    Raises:
        OSError, sqlite3.Error: the disk is full; nothing has changed, and it may be called again.
    """
    expired = status == "expired"
    written: list[NewFile] = []
    try:
        output = await _write(store, batch, written, _answers(store, batch, good=True))
        errors = await _write(
            store, batch, written, _answers(store, batch, good=False, expired=expired)
        )
        await store.run(
            lambda database: database.finish(batch, status, store.now(), output, errors)
        )
        written.clear()
    finally:
        for file in written:
            await store.write(file.discard)


async def _write(
    store: OfflineStore,
    batch: OfflineBatch,
    written: list[NewFile],
    answers: AsyncIterator[list[LineAnswer]],
) -> StoredFile | None:
    """Write answers to a file, which is added to ``written``; None if there are none."""
    file: NewFile | None = None
    good = True
    async for portion in answers:
        if file is None:
            file = await store.write(store.begin_file)
            written.append(file)
            good = portion[0].good
        text = b"".join(each.text + b"\n" for each in portion)
        await store.write(lambda file=file, text=text: file.write(text))  # type: ignore[misc]
    if file is None:
        return None
    await store.write(file.keep)
    name = f"{batch.id}_{'output' if good else 'error'}.jsonl"
    return file.record(batch.owner, "batch_output", name, store.now())


async def _answers(
    store: OfflineStore, batch: OfflineBatch, *, good: bool, expired: bool = False
) -> AsyncIterator[list[LineAnswer]]:
    """Yield the answers of one kind, and after them errors for lines that were never run."""
    after = 0

    def answers(database: Database) -> list[LineAnswer]:
        return database.answers(batch, good=good, after=after, most=PORTION)

    while portion := await store.run(answers):
        after = portion[-1].number
        yield portion
    after = 0

    def unanswered(database: Database) -> list[LineAnswer]:
        lines = database.waiting_lines(batch, after, PORTION)
        return [refused_line(e.number, e.custom_id, "batch_expired", EXPIRED) for e in lines]

    while expired and (portion := await store.run(unanswered)):
        after = portion[-1].number
        yield portion
