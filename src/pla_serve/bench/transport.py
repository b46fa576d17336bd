"""An HTTP/1.1 client that costs little for each portion of a stream, because it shares the machine
with the server that it measures. httptools parses; this module keeps connections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools
import msgspec

IDLE_SECONDS = 2.0
"""Longest time that a connection stays idle and is still used; servers close idle connections after
five seconds or more."""


class RequestTransport(Protocol):
    """Posts a body and streams the answer. Tests use a scripted one."""

    def post(
        self, path: str, body: bytes
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """Return the status and the body in portions.

        Raises:
            OSError: the request failed or, as TimeoutError, took too long.
        """
        ...


class HttpTransport:
    """Sends requests over as many connections as are needed; no request waits for a free one.

    Args:
        base_url: with or without ``/v1``; https is checked against the system's certificates.
        timeout: seconds for one request from its start to its end.

    Raises:
        ValueError: ``base_url`` is not one.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = 3600.0) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"a server's URL is like http://127.0.0.1:8000, not {base_url!r}")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/").removesuffix("/v1")
        authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"host: {url.netloc.rpartition('@')[2]}\r\n{authorization}"
        self._timeout = timeout
        self._idle: list[tuple[_Connection, float]] = []

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        async with self._request(f"POST {self._prefix}{path}", head, body) as connection:
            yield connection.status, connection.portions()

    async def get(self, path: str) -> Any:
        """Return the JSON at a path.

        Raises:
            OSError: there is no server, or the status is not 200.
            msgspec.DecodeError: the answer is not JSON.
        """
        async with self._request(f"GET {self._prefix}{path}", "", b"") as connection:
            content = b"".join([portion async for portion in connection.portions()])
            if connection.status != 200:
                raise ConnectionError(f"GET {path} gave status {connection.status}")
        return msgspec.json.decode(content)

    async def close(self) -> None:
        for connection, _ in self._idle:
            connection.close()
        self._idle.clear()

    @asynccontextmanager
    async def _request(self, line: str, headers: str, body: bytes) -> AsyncIterator[_Connection]:
        message = f"{line} HTTP/1.1\r\n{self._headers}{headers}\r\n".encode() + body
        async with asyncio.timeout(self._timeout):
            connection = await self._asked(message)
            try:
                yield connection
            finally:
                self._keep(connection)

    async def _asked(self, message: bytes) -> _Connection:
        """A connection on which ``message`` was sent and a status has come.

        A server may close a kept connection at any moment, some do after every answer. So a request
        that gets not one byte of an answer on a kept connection is sent again, once, on a fresh
        one. No other request is sent twice: its failure is what is measured.
        """
        kept = self._kept()
        if kept is not None:
            try:
                await kept.ask(message)
            except ConnectionError:
                kept.close()
                if kept.answering:
                    raise
            except BaseException:
                kept.close()
                raise
            else:
                return kept
        connection = await self._connect()
        try:
            await connection.ask(message)
        except BaseException:
            connection.close()
            raise
        return connection

    def _keep(self, connection: _Connection) -> None:
        if connection.reusable:
            self._idle.append((connection, asyncio.get_running_loop().time()))
        else:
            connection.close()

    def _kept(self) -> _Connection | None:
        """A connection that has been idle only briefly, or None."""
        oldest = asyncio.get_running_loop().time() - IDLE_SECONDS
        while self._idle:
            connection, since = self._idle.pop()
            if connection.reusable and since >= oldest:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        return connection


class _Connection(asyncio.Protocol):
    """A connection with one request at a time. The parser calls the methods named ``on_``."""

    def __init__(self) -> None:
        self.status = 0
        self.answering = False
        """Whether a byte of the answer has come."""
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._news = asyncio.Event()
        self._body: list[bytes] = []
        self._framed = False
        self._begun = False
        self._complete = False
        self._keep = False
        self._error: str | None = None

    async def ask(self, message: bytes) -> None:
        """Send a request and return when the status has come.

        Raises:
            ConnectionError: the connection was lost, or the answer is not HTTP.
        """
        self._parser = httptools.HttpResponseParser(self)
        self._begun = self._complete = self._framed = self._keep = False
        self.answering = False
        self._body.clear()
        if self._transport is None or self._error is not None:
            raise ConnectionResetError(self._error or "not connected")
        self._transport.write(message)
        while not self._begun:
            await self._more()

    async def portions(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; bytes that arrived together are one portion.

        Raises:
            ConnectionError: the connection was lost before the end.
        """
        while True:
            if self._body:
                portion = b"".join(self._body)
                self._body.clear()
                yield portion
            elif self._complete:
                return
            else:
                await self._more()

    @property
    def reusable(self) -> bool:
        return self._complete and self._keep and self._error is None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        if self._error is not None:
            raise ConnectionResetError(self._error)
        self._news.clear()
        await self._news.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.answering = True
        try:
            if self._parser is not None:
                self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._error = f"the answer is not HTTP: {error}"
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._begun and not self._framed:
            self._complete = True  # a body without a length ends with its connection
        self._error = self._error or str(exc or "the server closed the connection")
        self._news.set()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._begun = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._begun:
            self._complete = True
            self._keep = self._parser.should_keep_alive()
