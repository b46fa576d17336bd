"""One request as Envoy shows it: from its head to the end of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec

from pla_serve.fleet.picker import messages
from pla_serve.fleet.picker.addresses import InstanceAddresses
from pla_serve.fleet.picker.messages import KIND, ProcessingResponse
from pla_serve.fleet.picker.metrics import PickerMetrics
from pla_serve.fleet.picker.picks import NoPick, Pick, Picks
from pla_serve.fleet.picker.prompts import PickedPrompt, PromptReader
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.server.api.body import Upload, too_slow
from pla_serve.server.errors import ApiError, over_capacity, unavailable

log = logging.getLogger(__name__)

DESTINATION = "x-gateway-destination-endpoint"
"""Header, and key of the dynamic metadata, that names the instance."""
DESTINATION_SPACE = "envoy.lb"
"""Namespace of that metadata."""
SUBSET = "x-gateway-destination-endpoint-subset"
"""Key of the addresses of which one must be picked; all instances if it is not there."""
SUBSET_SPACE = "envoy.lb.subset_hint"
MOST_PIECE = 62 * 2**10
"""Most bytes of a body in one answer, for full duplex: Envoy takes at most 64 KiB."""
WHOLE = (messages.BUFFERED, messages.FULL_DUPLEX)
"""Body modes in which the request waits until its body is here."""


class EnvoyRequest:
    """Answers the messages of one request, and takes it off its account at the end.

    Args:
        instances: those of the fleet, as they are now.
    """

    def __init__(
        self,
        picks: Picks,
        reader: PromptReader,
        addresses: InstanceAddresses,
        instances: Sequence[FleetInstance],
        metrics: PickerMetrics,
    ) -> None:
        self._picks = picks
        self._reader = reader
        self._addresses = addresses
        self._instances = instances
        self._metrics = metrics
        self._headers: dict[str, str] = {}
        self._mode = messages.SKIPPED
        self._answer_mode = messages.SKIPPED
        self._body = bytearray()
        self._upload: Upload | None = None
        """The account of the body, once the head is here."""
        self._due: float | None = None
        self._allowed: list[str] | None = None
        """Addresses of the subset that Envoy asks for; None: all."""
        self._picked: Pick | None = None
        self._decided = False

    @property
    def due(self) -> float | None:
        """Time of the event loop by which the body must be here; None if it is not waited for."""
        return None if self._decided else self._due

    async def answers(self, message: Any) -> AsyncIterator[Any]:
        """Yield the answers to one message of Envoy; none if it has to wait for the next one."""
        kind = message.WhichOneof(KIND)
        if message.HasField("metadata_context"):
            self._note_subset(message.metadata_context)
        if kind == "request_headers":
            async for answer in self._head(message):
                yield answer
        elif kind == "request_body":
            async for answer in self._request_body(message.request_body):
                yield answer
        elif kind == "request_trailers":
            waits = self._mode == messages.FULL_DUPLEX and not self._decided
            if waits and self._upload is not None:
                async for answer in self._whole(self._upload, ends=False):
                    yield answer
            yield _empty("request_trailers")
        elif kind == "response_headers":
            self._note_status(message.response_headers.headers)
            yield _empty("response_headers")
        elif kind == "response_body":
            yield self._passed_on("response_body", message.response_body, self._answer_mode)
        elif kind == "response_trailers":
            yield _empty("response_trailers")

    def close(self) -> None:
        """End the request: it was answered, or its client or Envoy is gone."""
        self._end_pick()
        self._forget_body()

    def too_slow(self) -> Any:
        """Return the refusal of a request whose body is not here by `due`."""
        return self._turned_away(too_slow(self._reader.body_seconds))

    def _end_pick(self) -> None:
        if self._picked is not None:
            self._picks.end(self._picked)
            self._picked = None

    def _forget_body(self) -> None:
        self._body.clear()
        if self._upload is not None:
            self._upload.release()

    def _turned_away(self, error: ApiError) -> Any:
        """Return the refusal of a request whose body is not taken."""
        self._decided = True
        self._forget_body()
        self._metrics.ended("too large" if error.status == 413 else "refused")
        return _refusal(error)

    # The request

    async def _head(self, message: Any) -> AsyncIterator[Any]:
        self._headers = _read_headers(message.request_headers.headers)
        config = message.protocol_config
        self._mode, self._answer_mode = config.request_body_mode, config.response_body_mode
        self._forget_body()
        self._upload = self._reader.upload(self._headers)
        buffered = self._mode == messages.BUFFERED
        waits = not message.request_headers.end_of_stream and self._mode in WHOLE
        if not waits or (buffered and not self._reader.reads(self._headers)):
            yield await self._decide("request_headers", None)
            return
        self._due = asyncio.get_running_loop().time() + self._reader.body_seconds
        if buffered:
            yield _empty("request_headers")

    async def _request_body(self, body: Any) -> AsyncIterator[Any]:
        if self._decided or self._upload is None or self._mode not in WHOLE:
            yield self._passed_on("request_body", body, self._mode)
            return
        try:
            self._upload.carry(len(body.body))
        except ApiError as error:
            yield self._turned_away(error)
            return
        self._body += body.body
        if self._mode == messages.BUFFERED:
            decision = await self._decide("request_body", await self._read(self._upload))
            self._forget_body()
            yield decision
        elif body.end_of_stream:
            async for answer in self._whole(self._upload, ends=True):
                yield answer

    async def _whole(self, upload: Upload, *, ends: bool) -> AsyncIterator[Any]:
        """Decide for a request whose body is here in full duplex, and pass the body on.

        Args:
            ends: whether the last piece ends the request; otherwise trailers follow.
        """
        decision = await self._decide("request_headers", await self._read(upload))
        yield decision
        if decision.WhichOneof(KIND) != "immediate_response":
            for answer in _pieces(bytes(self._body), ends=ends):
                yield answer
        self._forget_body()

    async def _read(self, upload: Upload) -> PickedPrompt | ApiError | None:
        """Return the prompt of the body, None if there is none, or why it is not read now."""
        try:
            return await self._reader.read(self._headers, upload, bytes(self._body))
        except ApiError as error:
            return error
        except Exception:
            log.exception("a body could not be read; its request goes to some instance")
            return None

    async def _decide(self, kind: str, prompt: PickedPrompt | ApiError | None) -> Any:
        """Return the answer that names the instance, or the refusal."""
        self._decided = True
        self._end_pick()  # of a head that came twice, the last one counts
        if isinstance(prompt, ApiError):
            self._metrics.ended("refused")
            return _refusal(prompt)
        try:
            allowed = None if self._allowed is None else await self._names(self._allowed)
            picked = self._picked = self._picks.pick(prompt, allowed)
        except NoPick as none:
            self._metrics.ended("refused")
            make = over_capacity if none.status == 429 else unavailable
            return _refusal(make(none.reason, none.retry_after))
        address = await self._addresses.of(picked.instance)
        if address is None:
            self._end_pick()
            self._metrics.ended("refused")
            return _refusal(unavailable("the instance's name cannot be looked up"))
        self._metrics.ended("picked" if prompt is not None else "without a prompt")
        return _destination(kind, address)

    async def _names(self, addresses: Sequence[str]) -> list[str]:
        """Return the names of the instances that have these addresses."""
        wanted = set(addresses)
        connected = [each for each in self._instances if each.connected]
        return [each.name for each in connected if await self._addresses.of(each) in wanted]

    def _note_subset(self, metadata: Any) -> None:
        for entry in metadata.filter_metadata:
            if entry.key != SUBSET_SPACE or SUBSET not in entry.value.fields:
                continue
            value = entry.value.fields[SUBSET]
            if value.HasField("list_value"):
                texts = [each.string_value for each in value.list_value.values]
            else:
                texts = value.string_value.split(",")
            self._allowed = [text.strip() for text in texts if text.strip()]

    # The answer

    def _note_status(self, headers: Any) -> None:
        status = _read_headers(headers).get(":status", "")
        if self._picked is not None and status.isdecimal():
            self._picks.answered(self._picked, int(status[:3]))

    def _passed_on(self, kind: str, body: Any, mode: int) -> Any:
        """Return the answer that leaves a piece of a body as it is."""
        answer = _empty(kind)
        if mode == messages.FULL_DUPLEX:
            piece = getattr(answer, kind).response.body_mutation.streamed_response
            piece.body, piece.end_of_stream = body.body, body.end_of_stream
        return answer


def _empty(kind: str) -> Any:
    """Return an answer that changes nothing."""
    answer = ProcessingResponse()
    getattr(answer, kind).SetInParent()
    return answer


def _destination(kind: str, address: str) -> Any:
    """Return the answer that sends a request to ``address``, by header and by metadata."""
    answer = ProcessingResponse()
    common = getattr(answer, kind).response
    _set_header(common.header_mutation, DESTINATION, address)
    common.clear_route_cache = True
    answer.dynamic_metadata.update({DESTINATION_SPACE: {DESTINATION: address}})
    return answer


def _refusal(error: ApiError) -> Any:
    """Return the answer with which Envoy refuses a request by itself."""
    answer = ProcessingResponse()
    immediate = answer.immediate_response
    immediate.status.code = error.status
    immediate.body = msgspec.json.encode(error.body())
    immediate.details = "pla_serve_picker"
    _set_header(immediate.headers, "content-type", "application/json")
    for name, value in error.headers().items():
        _set_header(immediate.headers, name.lower(), value)
    return answer


def _set_header(mutation: Any, name: str, value: str) -> None:
    option = mutation.set_headers.add(append_action=messages.OVERWRITE)
    option.header.key, option.header.raw_value = name, value.encode("latin-1")


def _pieces(body: bytes, *, ends: bool) -> Iterator[Any]:
    for start in range(0, max(len(body), 1), MOST_PIECE):
        answer = ProcessingResponse()
        piece = answer.request_body.response.body_mutation.streamed_response
        piece.body = body[start : start + MOST_PIECE]
        piece.end_of_stream = ends and start + MOST_PIECE >= len(body)
        yield answer


def _read_headers(headers: Any) -> dict[str, str]:
    """Return headers by name; of several of one name the last one counts."""
    return {
        header.key: header.raw_value.decode("latin-1") if header.raw_value else header.value
        for header in headers.headers
    }
