"""Takes an upload, as ``multipart/form-data``, to disk as it arrives."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from pla_serve.server.errors import ApiError, invalid, over_capacity, unavailable, unsupported
from pla_serve.server.offline.records import StoredFile
from pla_serve.server.offline.store import NewFile, OfflineStore, disk_full

PURPOSE = "batch"
"""The one purpose of files that clients may upload."""
MOST_BOUNDARY = 200
MOST_FIELD_BYTES = 64
"""Longest value of a field that is no file."""
MOST_PARTS = 8
MOST_NAME = 255
MARGIN_BYTES = 64 * 2**10
"""Bytes that the parts and their heads may take beside the file."""
PIECE_BYTES = 256 * 2**10
"""Pieces of a body are gathered to this size, so that a thread is called once for each."""
MOST_UPLOADS = 16
"""Uploads at once, of all clients; one owner has at most half of them."""
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


class Uploads:
    """Takes the uploads of one server.

    Args:
        seconds: time for one body.
    """

    def __init__(self, store: OfflineStore, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._running: Counter[str] = Counter()

    async def take(self, request: Request, owner: str) -> StoredFile:
        """Read the file of a request to its end, and keep it.

        Raises:
            ApiError: 400 malformed, 408 too slow, 413 too large or over quota, 415 no form, 429 and
                503 too many at once, 507 the disk is full.
        """
        store = self._store
        boundary = _boundary(request.headers.get("content-type", ""))
        most = store.options.max_file_bytes
        declared = request.headers.get("content-length", "")
        size = int(declared[:18]) if declared.isdecimal() else 0
        if size > most + MARGIN_BYTES:
            raise _too_large(most)
        store.check_space(size)
        with self._counted(owner):
            await store.run(lambda database: database.check_quota(owner, 0))
            form = UploadForm(store, boundary, most)
            try:
                return await self._keep(request, form, owner)
            except OSError:
                raise disk_full() from None
            finally:
                store.writers.submit(form.abandon)

    async def _keep(self, request: Request, form: UploadForm, owner: str) -> StoredFile:
        store = self._store
        try:
            async with asyncio.timeout(self._seconds):
                pieces = bytearray()
                async for part in request.stream():
                    pieces += part
                    if len(pieces) >= PIECE_BYTES:
                        await self._feed(form, bytes(pieces))
                        pieces.clear()
                await self._feed(form, bytes(pieces))
        except TimeoutError:
            raise ApiError(408, f"the file did not arrive within {self._seconds:g} s") from None
        file = await store.write(form.finish)
        record = file.record(owner, PURPOSE, form.name, store.now())
        await store.run(lambda database: database.add_file(record))
        form.kept = True
        return record

    async def _feed(self, form: UploadForm, data: bytes) -> None:
        self._store.check_space()
        await self._store.write(lambda: form.feed(data))

    @contextmanager
    def _counted(self, owner: str) -> Iterator[None]:
        if self._running.total() >= MOST_UPLOADS:
            raise unavailable("too many files are being uploaded; try again", 1.0)
        if self._running[owner] >= MOST_UPLOADS // 2:
            raise over_capacity("too many files of yours are being uploaded", 1.0)
        self._running[owner] += 1
        try:
            yield
        finally:
            self._running[owner] -= 1


class UploadForm:
    """Parses one form, and writes its file. Its methods run in threads, one at a time."""

    def __init__(self, store: OfflineStore, boundary: bytes, most: int) -> None:
        self.name = "file"
        """The client's name of the file, made fit to be shown."""
        self.kept = False
        """Whether the database knows the file now."""
        self._store = store
        self._most = most
        self._lock = threading.Lock()
        self._abandoned = False
        self._file: NewFile | None = None
        self._fields: dict[str, bytes] = {}
        self._part = ""
        self._parts = 0
        self._head: dict[bytes, bytes] = {}
        self._label = self._value = b""
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part,
                "on_header_field": self._on_label,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_head,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Parse more of the body.

        Raises:
            ApiError: 400 or 413, what is wrong with it.
            OSError: the disk is full.
        """
        with self._lock:
            if self._abandoned or not data:
                return
            try:
                self._parser.write(data)
            except MultipartParseError as error:
                raise invalid(f"the form cannot be read: {error}") from None

    def finish(self) -> NewFile:
        """Return the file, durable on disk.

        Raises:
            ApiError: 400, the form is not whole, or not one of a file with a purpose.
            OSError: the disk is full.
        """
        with self._lock:
            if not self._ended:
                raise invalid("the form ends in the middle")
            if self._file is None:
                raise invalid("the form has no file", "file")
            if "purpose" not in self._fields:
                raise invalid("the form has no purpose", "purpose")
            self._file.keep()
            return self._file

    def abandon(self) -> None:
        """Remove what was written, unless it was kept."""
        with self._lock:
            self._abandoned = True
            if self._file is not None and not self.kept:
                self._file.discard()

    def _on_part(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise invalid(f"the form has more than {MOST_PARTS} parts")
        self._head = {}

    def _on_label(self, data: bytes, start: int, end: int) -> None:
        self._label += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        self._head[self._label.lower()] = self._value
        self._label = self._value = b""

    def _on_head(self) -> None:
        _, options = parse_options_header(self._head.get(b"content-disposition"))
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part == "file":
            if self._file is not None:
                raise invalid("the form has two files", "file")
            self.name = shown_name(options.get(b"filename", b"").decode("utf-8", "replace"))
            self._file = self._store.begin_file()
        elif self._part != "purpose":
            raise unsupported(self._part[:100] or "a part without a name")
        elif "purpose" in self._fields:
            raise invalid("the form has two purposes", "purpose")
        else:
            self._fields["purpose"] = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            assert self._file is not None
            if self._file.size + end - start > self._most:
                raise _too_large(self._most)
            self._file.write(data[start:end])
            return
        value = self._fields["purpose"] + data[start:end]
        if len(value) > MOST_FIELD_BYTES or not PURPOSE.encode().startswith(value):
            raise invalid(f"files are kept for the purpose {PURPOSE!r} only", "purpose")
        self._fields["purpose"] = value

    def _on_end(self) -> None:
        self._ended = True
        if self._fields.get("purpose") not in (None, PURPOSE.encode()):
            raise invalid(f"files are kept for the purpose {PURPOSE!r} only", "purpose")


def shown_name(given: str) -> str:
    """Return the last part of a path, on one line and not too long.

    >>> shown_name("../../etc/passwd")
    'passwd'
    """
    name = _UNSHOWN.sub("", re.split(r"[/\\]", given)[-1])[:MOST_NAME].strip()
    return name if name.strip(".") else "file"


def _boundary(content_type: str) -> bytes:
    """Raises:
    ApiError: 415, the body is no form; 400, its boundary is not usable.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise ApiError(415, "send the file as Content-Type: multipart/form-data")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= MOST_BOUNDARY:
        raise invalid(f"the form needs a boundary of 1 to {MOST_BOUNDARY} characters")
    return boundary


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the file is larger than {most} bytes", code="request_too_large")
