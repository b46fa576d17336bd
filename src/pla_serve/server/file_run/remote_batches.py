"""Has the lines of a run answered by a server's own files and batches.

Nothing is kept here of what runs there: a batch carries a digest of its lines in its metadata, by
which the next run finds it.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from pla_serve.server.file_run.remote import RemoteServer, ServerGone
from pla_serve.server.file_run.run import FileRun
from pla_serve.server.offline.lines import read_line
from pla_serve.server.offline.records import BatchLine, LineAnswer

PART_LINES = 50_000
"""Most lines of one batch; it is OpenAI's bound."""
PART_BYTES = 100 * 2**20
MARK = "pla_serve_lines"
"""Name of the entry in a batch's metadata."""
WINDOW = "24h"
LIST_PAGES = 50
"""Pages of batches, 100 each, in which an earlier one is looked for."""
MOST_POLL_SECONDS = 10.0
ROUNDS = 3
"""Batches that are made of the same lines while some of them expire."""
RUNS = ("validating", "in_progress", "finalizing", "completed")


@dataclass(slots=True)
class LinePart:
    """Lines that are one batch: neighbours with one endpoint."""

    endpoint: str
    lines: list[BatchLine]
    mark: str


class _Row(msgspec.Struct):
    custom_id: str | None = None
    error: Any = None


class RemoteBatches:
    """Runs a file's lines as batches of one server, one after another."""

    def __init__(self, server: RemoteServer, run: FileRun, poll_seconds: float = 0.2) -> None:
        self._server = server
        self._run = run
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Have every line answered.

        Raises:
            OSError: the output cannot be written, the server is gone, or it fails a batch.
        """
        for part in await asyncio.to_thread(self._parts):
            for _ in range(ROUNDS):
                if not self._waiting(part):
                    break
                await self._answer(part)
            else:
                if left := len(self._waiting(part)):
                    raise ServerGone(f"{left} lines have no answer after {ROUNDS} batches")

    def _waiting(self, part: LinePart) -> list[BatchLine]:
        answered = self._run.output.answered
        return [line for line in part.lines if line.number not in answered]

    def _parts(self) -> list[LinePart]:
        """Divide the input. The parts are the same in each run, whatever has been answered."""
        parts: list[LinePart] = []
        size, digest = 0, hashlib.sha256()
        with self._run.input.path.open("rb") as file:
            for line in self._run.input.lines:
                file.seek(line.start)
                text = file.read(line.size)
                endpoint = read_line(text).url
                part = parts[-1] if parts else None
                full = part is None or (
                    len(part.lines) >= PART_LINES or size + line.size > PART_BYTES
                )
                if part is None or full or part.endpoint != endpoint:
                    size, digest = 0, hashlib.sha256()
                    part = LinePart(endpoint, [], "")
                    parts.append(part)
                part.lines.append(line)
                size += line.size
                digest.update(text.strip() + b"\n")
                part.mark = digest.hexdigest()
        return parts

    async def _answer(self, part: LinePart) -> None:
        """Find the batch of a part or make one, wait for its end, and write its answers."""
        batch = await self._find(part.mark) or await self._create(part)
        pause = self._poll_seconds
        while batch["status"] in RUNS[:-1]:
            counts = batch.get("request_counts") or {}
            self._run.progress.elsewhere(counts.get("completed", 0) + counts.get("failed", 0))
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, MOST_POLL_SECONDS)
            batch = await self._json("GET", f"/v1/batches/{batch['id']}")
        if batch["status"] == "failed":
            errors = (batch.get("errors") or {}).get("data") or []
            told = "; ".join(str(error.get("message")) for error in errors)
            raise ServerGone(f"the server failed {batch['id']}: {told or 'it does not say why'}")
        numbers = {line.custom_id: line.number for line in part.lines}
        files = [batch.get("output_file_id"), batch.get("error_file_id")]
        for file in filter(None, files):
            await self._take(file, numbers)
        await asyncio.to_thread(self._run.output.sync)
        for file in filter(None, [*files, batch.get("input_file_id")]):
            await self._server.ask("DELETE", f"/v1/files/{file}")  # best effort: it may stay

    async def _find(self, mark: str) -> dict[str, Any] | None:
        """Return an earlier run's batch of the same lines that runs, or whose files are there."""
        query: dict[str, Any] = {"limit": 100}
        for _ in range(LIST_PAGES):
            page = await self._json("GET", "/v1/batches", params=query)
            for batch in page["data"]:
                if (batch.get("metadata") or {}).get(MARK) == mark and batch["status"] in RUNS:
                    found: dict[str, Any] = batch
                    if await self._is_there(found):
                        return found
            if not page.get("has_more") or not page["data"]:
                return None
            query["after"] = page["data"][-1]["id"]
        return None

    async def _is_there(self, batch: dict[str, Any]) -> bool:
        files = (batch.get("output_file_id"), batch.get("error_file_id"))
        return all(
            [
                (await self._server.ask("GET", f"/v1/files/{file}")).status_code == 200
                for file in filter(None, files)
            ]
        )

    async def _create(self, part: LinePart) -> dict[str, Any]:
        content = await asyncio.to_thread(self._content, part)
        upload = {"file": ("input.jsonl", content)}
        file = await self._json("POST", "/v1/files", files=upload, data={"purpose": "batch"})
        wanted = {
            "input_file_id": file["id"],
            "endpoint": part.endpoint,
            "completion_window": WINDOW,
            "metadata": {MARK: part.mark},
        }
        return await self._json("POST", "/v1/batches", json=wanted)

    def _content(self, part: LinePart) -> bytes:
        texts = []
        with self._run.input.path.open("rb") as file:
            for line in self._waiting(part):
                file.seek(line.start)
                texts.append(file.read(line.size).strip() + b"\n")
        return b"".join(texts)

    async def _take(self, file: str, numbers: dict[str, int]) -> None:
        """Write the answers of a file; lines that the end of the window left have none."""
        found = await self._server.ask("GET", f"/v1/files/{file}/content")
        if found.status_code != 200:
            raise ServerGone(f"{file} cannot be had: status {found.status_code}")
        for text in found.content.splitlines():
            try:
                row = msgspec.json.decode(text, type=_Row)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise ServerGone(f"{file} has a line that cannot be read") from None
            number = numbers.get(row.custom_id or "")
            left = isinstance(row.error, dict) and row.error.get("code") == "batch_expired"
            if number is not None and not left:
                await self._run.write(LineAnswer(number, row.error is None, text))

    async def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """Raises:
        ServerGone: the server refuses, or does not answer in JSON.
        """
        try:
            found = await self._server.ask(method, path, **request)
        except httpx.TransportError as error:
            raise ServerGone(f"{method} {path}: {error or type(error).__name__}") from None
        if found.status_code != 200:
            raise ServerGone(f"{method} {path}: status {found.status_code}, {found.text[:200]}")
        try:
            body = found.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ServerGone(f"{method} {path}: the answer is no JSON object")
        return body
