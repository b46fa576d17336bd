"""The runner on a store of its own, with endpoints and a disk that do as the test says."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from pla_serve.server.errors import ApiError
from pla_serve.server.offline.caller import Answered
from pla_serve.server.offline.database import MOST_LIVE_BATCHES, Database
from pla_serve.server.offline.lines import LineRequest
from pla_serve.server.offline.metrics import OfflineMetrics
from pla_serve.server.offline.records import OfflineBatch, new_batch_id
from pla_serve.server.offline.runner import MOST_ATTEMPTS, BatchRunner
from pla_serve.server.offline.store import FolderError, NewFile, OfflineStore
from pla_serve.server.offline_options import OfflineOptions
from tests.server.offline.batch_client import CHAT, OVER, chat_line, jsonl
from tests.server.server_harness import DEADLINE

GOOD = Answered(200, b'{"ok": true}', None)


class Door:
    """A gate for the runner."""

    def __init__(self) -> None:
        self.open = True
        self.owners = {"me", "you"}

    def is_open(self) -> bool:
        return self.open

    def may_run(self, owner: str) -> bool:
        return owner in self.owners


class Bench:
    """A store in ``folder``, and a runner whose lines are answered by ``answers``."""

    def __init__(
        self,
        folder: Path,
        answers: Callable[[str, str], Awaitable[Answered]],
        **options: float,
    ) -> None:
        self.now = 1000.0
        self.free = 10**12
        self.door = Door()
        self.calls: list[tuple[str, str]] = []
        self.due: list[bool] = []
        self._answers = answers
        self.store = OfflineStore(
            OfflineOptions(folder, batch_free_mib=1, **options),  # type: ignore[arg-type]
            clock=lambda: self.now,
            free_bytes=lambda _: self.free,
        )
        self.runner = BatchRunner(
            self.store,
            self._call,
            self.door,
            OfflineMetrics(CollectorRegistry(), "m"),
            most_body_bytes=1000,
            rest_seconds=0.01,
        )

    async def _call(self, owner: str, request: LineRequest, id: str, due: bool) -> Answered:
        text = json.loads(request.body)["messages"][0]["content"]
        self.calls.append((owner, text))
        self.due.append(due)
        return await self._answers(owner, text)

    async def submit(self, texts: list[str], owner: str = "me", seconds: int = 3600) -> str:
        file = await self.store.write(self.store.begin_file)
        lines = [chat_line(str(i), text) for i, text in enumerate(texts)]
        await self.store.write(lambda: file.write(jsonl(lines)))
        await self.store.write(file.keep)
        record = file.record(owner, "batch", "in", 1000)
        batch = OfflineBatch(
            0, new_batch_id(), owner, "validating", CHAT, file.id, "1h", None, 1000, 1000 + seconds
        )

        def add(database: Database) -> None:
            database.add_file(record)
            database.add_batch(batch)

        await self.store.run(add)
        self.runner.wake()
        return batch.id

    async def batch(self, id: str, owner: str = "me") -> OfflineBatch:
        batch = await self.store.run(lambda database: database.batch(owner, id))
        assert batch is not None
        return batch

    async def begun(self, id: str, owner: str = "me") -> None:
        """Wait until the lines of a batch are known."""
        async with asyncio.timeout(DEADLINE):
            while (await self.batch(id, owner)).status != "in_progress":
                await asyncio.sleep(0.002)

    async def over(self, id: str, owner: str = "me") -> OfflineBatch:
        async with asyncio.timeout(DEADLINE):
            while (batch := await self.batch(id, owner)).status not in OVER:
                self.runner.wake()
                await asyncio.sleep(0.002)
        return batch

    def lines(self, file: str | None) -> list[dict[str, object]]:
        assert file is not None
        return [json.loads(line) for line in self.store.path(file).read_bytes().splitlines()]


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[None]:
    task = asyncio.create_task(bench.runner.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        bench.store.close()


async def good(owner: str, text: str) -> Answered:
    return GOOD


def test_a_full_disk_loses_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The database cannot grow while answers come; they are kept until it can."""

    async def main() -> None:
        bench = Bench(tmp_path, good)
        async with running(bench):
            bench.door.open = False
            id = await bench.submit(["x" * 100] * 200)
            await bench.begun(id)

            def bound(pages: int) -> Callable[[Database], int]:
                def work(database: Database) -> int:
                    query = "PRAGMA page_count"
                    (count,) = database._connection.execute(query).fetchone()
                    database._connection.execute(f"PRAGMA max_page_count = {count + pages}")
                    return int(count)

                return work

            await bench.store.run(bound(3))
            bench.door.open = True
            bench.runner.wake()
            async with asyncio.timeout(DEADLINE):
                while "waits for the disk" not in caplog.text:
                    await asyncio.sleep(0.002)
            stuck = await bench.batch(id)
            assert stuck.done < 200
            await bench.store.run(bound(10**6))
            batch = await bench.over(id)
        assert (batch.status, batch.done, batch.failed) == ("completed", 200, 0)
        ids = [line["custom_id"] for line in bench.lines(batch.output_file)]
        assert ids == [str(i) for i in range(200)]
        assert len(bench.calls) == 200

    asyncio.run(main())


def test_a_full_disk_at_the_end_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output file cannot be written twice; what was begun is removed, and nothing is lost."""
    keep, faults = NewFile.keep, iter([OSError(errno.ENOSPC, "full")] * 2)

    def fails_at_first(file: NewFile) -> None:
        if (fault := next(faults, None)) is not None:
            raise fault
        keep(file)

    async def main() -> None:
        bench = Bench(tmp_path, good)
        async with running(bench):
            bench.door.open = False
            id = await bench.submit(["a", "b"])
            monkeypatch.setattr(NewFile, "keep", fails_at_first)
            bench.door.open = True
            batch = await bench.over(id)
            files = {path.name for path in (tmp_path / "files").iterdir()}
        assert (batch.status, batch.done) == ("completed", 2)
        assert next(faults, None) is None
        assert files == {batch.input_file, batch.output_file}

    asyncio.run(main())


def test_no_line_starts_without_space(tmp_path: Path) -> None:
    async def main() -> None:
        bench = Bench(tmp_path, good)
        bench.free = 0
        async with running(bench):
            id = await bench.submit(["a"])
            await bench.begun(id)
            assert not bench.runner._may_start(due=False)
            assert not bench.calls
            bench.free = 10**12
            assert (await bench.over(id)).status == "completed"

    asyncio.run(main())


def test_faults_of_ours_are_tried_again_a_few_times(tmp_path: Path) -> None:
    async def main() -> None:
        seen: list[str] = []

        async def answers(owner: str, text: str) -> Answered:
            seen.append(text)
            if text == "raises":
                raise RuntimeError
            if text == "busy" and seen.count("busy") < 5:
                return Answered(429, b"{}", 0.001)
            if text == "once" and seen.count("once") == 1:
                return Answered(503, b'{"error": 1}', None)
            return Answered(500, b'{"error": 2}', None) if text == "always" else GOOD

        bench = Bench(tmp_path, answers)
        async with running(bench):
            batch = await bench.over(await bench.submit(["raises", "busy", "once", "always"]))
        assert (batch.done, batch.failed) == (2, 2)
        assert seen.count("raises") == seen.count("always") == MOST_ATTEMPTS
        assert (seen.count("once"), seen.count("busy")) == (2, 5)
        assert {each["custom_id"] for each in bench.lines(batch.error_file)} == {"0", "3"}

    asyncio.run(main())


def test_owners_take_turns_within_the_bound(tmp_path: Path) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        most = now = 0

        async def answers(owner: str, text: str) -> Answered:
            nonlocal most, now
            now += 1
            most = max(most, now)
            await gate.wait()
            now -= 1
            return GOOD

        bench = Bench(tmp_path, answers, batch_lines_at_once=4)
        bench.door.open = False
        async with running(bench):
            first = await bench.submit(["a"] * 50)
            second = await bench.submit(["b"] * 50, owner="you")
            await bench.begun(first)
            await bench.begun(second, "you")
            bench.door.open = True
            bench.runner.wake()
            async with asyncio.timeout(DEADLINE):
                while len(bench.calls) < 4:
                    await asyncio.sleep(0.002)
            assert sorted(bench.calls) == [("me", "a")] * 2 + [("you", "b")] * 2
            gate.set()
            await bench.over(first)
            await bench.over(second, "you")
        assert most == 4

    asyncio.run(main())


def test_batches_of_keys_that_are_gone_wait_and_expire(tmp_path: Path) -> None:
    async def main() -> None:
        bench = Bench(tmp_path, good)
        bench.door.owners = {"you"}
        async with running(bench):
            id = await bench.submit(["a"], seconds=100)
            other = await bench.submit(["b"], owner="you")
            await bench.over(other, "you")
            assert bench.calls == [("you", "b")]
            bench.now += 100
            batch = await bench.over(id)
        assert (batch.status, batch.failed) == ("expired", 1)

    asyncio.run(main())


def test_unfinished_batches_of_an_owner_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        bench = Bench(tmp_path, good)
        for _ in range(MOST_LIVE_BATCHES):
            await bench.submit(["a"])
        with pytest.raises(ApiError, match="wait for one"):
            await bench.submit(["a"])
        await bench.submit(["a"], owner="you")
        bench.store.close()

    asyncio.run(main())


@pytest.mark.parametrize("broken", ["a file", "no database", "another version"])
def test_folders_that_cannot_be_used(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "batches"
    if broken == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
    if broken == "no database":
        (folder / "batches.sqlite").write_bytes(b"no database" * 1000)
    if broken == "another version":
        with closing(sqlite3.connect(folder / "batches.sqlite")) as connection:
            connection.execute("PRAGMA user_version = 99")
    for _ in range(2):  # the lock is let go
        with pytest.raises(FolderError, match="--batch-dir") as error:
            OfflineStore(OfflineOptions(folder))
        assert "another server" not in str(error.value)


def test_an_input_file_that_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        bench = Bench(tmp_path, good)
        bench.door.open = False
        async with running(bench):
            begun = await bench.submit(["a"])
            await bench.begun(begun)
            bench.store.path((await bench.batch(begun)).input_file).unlink()
            bench.door.open = True
            batch = await bench.over(begun)
            assert (batch.status, batch.failed) == ("completed", 1)
            (line,) = bench.lines(batch.error_file)
            assert line["error"]["code"] == "input_file_missing"  # type: ignore[index]

    asyncio.run(main())


def test_lines_become_due_as_late_as_possible(tmp_path: Path) -> None:
    """Those that starved are sent again, as requests of clients, beside others that starve."""

    async def main() -> None:
        starves = asyncio.Event()

        async def never_idle(owner: str, text: str) -> Answered:
            if not bench.due[-1]:
                await starves.wait()
            return GOOD

        bench = Bench(tmp_path, never_idle, batch_lines_at_once=2)
        async with running(bench):
            other = await bench.submit(["x"] * 3, seconds=100_000)
            id = await bench.submit(["a"] * 5, owner="you", seconds=1000)
            async with asyncio.timeout(DEADLINE):
                while len(bench.calls) < 2:
                    await asyncio.sleep(0.002)
            bench.now += 899
            bench.runner.wake()
            for _ in range(20):
                await asyncio.sleep(0.002)
            assert bench.due == [False] * 2
            bench.now += 1
            batch = await bench.over(id, "you")
            assert (batch.status, batch.done) == ("completed", 5)
            assert bench.due.count(True) == 5
            starves.set()
            assert (await bench.over(other)).done == 3

    asyncio.run(main())


def test_a_line_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    """Whoever runs beside it fails with it once; after that it runs alone."""
    running_now: list[str] = []

    async def dies(owner: str, text: str) -> Answered:
        running_now.append(text)
        await asyncio.sleep(0.002)
        fatal = "kills" in running_now
        running_now.remove(text)
        return Answered(500, b"{}", None) if fatal else GOOD

    async def main() -> None:
        bench = Bench(tmp_path, dies)
        async with running(bench):
            batch = await bench.over(await bench.submit(["a", "kills", "b", "kills", "c"]))
        assert (batch.done, batch.failed) == (3, 2)

    asyncio.run(main())
