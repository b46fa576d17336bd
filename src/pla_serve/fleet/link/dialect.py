"""Protocols of kinds of servers that stream over HTTP, and checks of what they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

import httpx
import msgspec

from pla_serve.fleet.link.protocol import InstanceFacts
from pla_serve.wire.codec import MessageDecoder, encode
from pla_serve.wire.engine import AddRequest, EngineLoad, Output, Rejected

LONG_EVENT_BYTES = 1 << 16
"""A longer event holds the event loop for too long."""
NONSENSE = (LookupError, TypeError, ValueError, ArithmeticError, RecursionError)
"""Raised where a dialect reads what is not of its kind of server."""
_message = MessageDecoder[Output | Rejected](Output | Rejected)
_facts = MessageDecoder[InstanceFacts](InstanceFacts)
_load = MessageDecoder[EngineLoad](EngineLoad)


class Broken(Exception):
    """The server did not keep to its protocol, or the connection failed in the middle."""


class Answer(Protocol):
    """Reads the stream of one request."""

    def read(self, event: bytes) -> Output | Rejected | None:
        """Return the answer in one event, or None. `Rejected` may only be the first answer.

        Raises:
            Broken: it is not an event of such a server.
        """


class Dialect(Protocol):
    """Protocol of one kind of server: requests, answers, facts and load."""

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> str:
        """Path that requests are posted to."""

    def body(self, request: AddRequest, model: str) -> dict[str, Any]:
        """Return the JSON body of a request in the protocol of the server.

        Raises:
            Unmappable: the request asks for something that the server lacks.
        """

    def answer(self, request: AddRequest) -> Answer: ...

    async def facts(
        self, client: httpx.AsyncClient, model: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> InstanceFacts:
        """Return the facts of the server. The link fills in ``boot`` later.

        Args:
            model: the model's entry in ``/v1/models``.
            metrics: as `samples` returns them.

        Raises:
            httpx.HTTPError: the server did not answer.
        """

    def load(self, metrics: Mapping[str, float]) -> EngineLoad:
        """Load of the server, as far as its metrics say."""


async def read_facts(
    dialect: Dialect,
    client: httpx.AsyncClient,
    model: Mapping[str, Any],
    metrics: Mapping[str, float],
    boot: str,
) -> InstanceFacts:
    """Return the facts of a server, with fields in the ranges of the wire.

    Raises:
        Broken: it says nothing that such a server would say.
        httpx.HTTPError: it did not answer.
    """
    try:
        facts = await dialect.facts(client, model, metrics)
        return _facts(encode(msgspec.structs.replace(facts, boot=boot)))
    except NONSENSE as error:
        raise Broken(f"its facts are not those of a {dialect.kind} server: {error}") from None


def read_load(dialect: Dialect, metrics: Mapping[str, float]) -> EngineLoad:
    """Return the load of a server, with fields in the ranges of the wire; empty for nonsense."""
    try:
        return _load(encode(dialect.load(metrics)))
    except NONSENSE:
        return EngineLoad()


async def read_event(answer: Answer, event: bytes) -> Output | Rejected | None:
    """Return the answer in an event, with fields in the ranges of the wire. A long one is read in a
    thread.

    Raises:
        Broken: it is not an event of such a server.
    """
    if len(event) > LONG_EVENT_BYTES:
        return await asyncio.to_thread(_read_at_once, answer, event)
    return _read_at_once(answer, event)


def _read_at_once(answer: Answer, event: bytes) -> Output | Rejected | None:
    try:
        message = answer.read(event)
        return None if message is None else _message(encode(message))
    except NONSENSE as error:
        raise Broken(f"an event out of range: {error}") from None
