"""The gRPC server that an Envoy asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from pla_serve.fleet.picker.addresses import InstanceAddresses
from pla_serve.fleet.picker.envoy_request import EnvoyRequest
from pla_serve.fleet.picker.messages import METHOD, ProcessingRequest, ProcessingResponse
from pla_serve.fleet.picker.metrics import PickerMetrics
from pla_serve.fleet.picker.options import PickerOptions
from pla_serve.fleet.picker.picks import Picks
from pla_serve.fleet.picker.prompts import PromptReader
from pla_serve.fleet.router.fleet import Fleet

log = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""Time for requests that are being decided when the server ends."""
MESSAGE_SLACK = 2**20
"""Bytes of a message beside the body."""
END, LATE = object(), object()
"""What `_next` returns in place of a message: there are no more, or none came in time."""


class PickerServer:
    """Answers Envoy's external processing. Belongs to the fleet's event loop.

    Args:
        fleet: whose instances are picked.
        metrics: counts what was said.
    """

    def __init__(
        self,
        options: PickerOptions,
        fleet: Fleet,
        picks: Picks,
        reader: PromptReader,
        metrics: PickerMetrics,
    ) -> None:
        self._options = options
        self._fleet = fleet
        self._picks = picks
        self._reader = reader
        self._metrics = metrics
        self._addresses = InstanceAddresses()
        self._open = 0
        self.port = 0
        """Port that is listened on, while the server is `serving`."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[PickerServer]:
        """Listen while the context lasts.

        Raises:
            OSError: the address cannot be had.
        """
        most = self._reader.most_bytes + MESSAGE_SLACK
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", most),
                ("grpc.so_reuseport", 0),
            ]
        )
        service, _, method = METHOD[1:].partition("/")
        handler = grpc.stream_stream_rpc_method_handler(
            self._process,
            request_deserializer=ProcessingRequest.FromString,
            response_serializer=ProcessingResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        host, port = self._options.picker_host, self._options.picker_port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {address}: {error}. Choose another with --picker-port."
            ) from None
        await server.start()
        log.info("an Envoy may ask on %s:%d where requests go", host, self.port)
        try:
            yield self
        finally:
            await server.stop(GRACE_SECONDS)

    async def _process(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answer about one request of a client; Envoy ends the stream with the request."""
        if self._open >= self._options.picker_requests:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests at once (--picker-requests)"
            )
        asked = EnvoyRequest(
            self._picks, self._reader, self._addresses, self._fleet.instances, self._metrics
        )
        self._open += 1
        self._metrics.opened(+1)
        try:
            while (message := await _next(requests, asked.due)) is not END:
                if message is LATE:
                    yield asked.too_slow()
                    break
                async for answer in asked.answers(message):
                    yield answer
        finally:  # also where the client or Envoy is gone, which cancels this
            asked.close()
            self._open -= 1
            self._metrics.opened(-1)


async def _next(requests: Any, due: float | None) -> Any:
    """Return the next message, `END`, or `LATE` if it is not there by this time of the loop."""
    try:
        async with asyncio.timeout_at(due):
            return await anext(requests, END)
    except TimeoutError:
        return LATE
