"""The process of a router: the API in front of a fleet, and the picker that Envoys ask."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from pla_serve.fleet.picker.metrics import PickerMetrics
from pla_serve.fleet.picker.options import PickerOptions
from pla_serve.fleet.picker.picks import Picks
from pla_serve.fleet.picker.prompts import PromptReader
from pla_serve.fleet.router.client import FleetClient
from pla_serve.fleet.router.metrics import FleetMetrics
from pla_serve.server.api.body import BodyReader
from pla_serve.server.engine.backend import EngineStartError
from pla_serve.server.model import ServedModel
from pla_serve.server.run import ApiServer
from pla_serve.server.settings import ServerSettings

if TYPE_CHECKING:
    from pla_serve.fleet.picker.server import PickerServer


class RouterServer(ApiServer):
    """As `ApiServer`, for a fleet. API and picker share the fleet's accounts of instances."""

    def __init__(
        self,
        settings: ServerSettings,
        client: FleetClient,
        metrics: FleetMetrics,
        model: ServedModel,
        picker: PickerOptions,
        **more: Any,
    ) -> None:
        """``more``: arguments of `ApiServer`."""
        super().__init__(settings, client, metrics, model, **more)
        self._picker_options = picker
        self._client = client
        self.picker: PickerServer | None = None
        """The picker, while it listens."""

    async def run(self, listener: socket.socket) -> int:
        """As `ApiServer.run`, with the picker if it has a port.

        Raises:
            EngineStartError: the picker's port cannot be had, or all instances refuse the router.
        """
        if self._picker_options.picker_port is None:
            return await super().run(listener)
        async with AsyncExitStack() as stack:
            try:
                self.picker = await stack.enter_async_context(self._make_picker().serving())
            except OSError as error:
                raise EngineStartError(str(error)) from None
            return await super().run(listener)

    def _make_picker(self) -> PickerServer:
        from pla_serve.fleet.picker.server import PickerServer

        settings, fleet = self.service.settings, self._client.fleet
        picks = Picks(fleet, asyncio.get_running_loop().call_later)
        reader = PromptReader(self.service, BodyReader(settings.max_body_bytes, settings.limits))
        metrics = PickerMetrics(self.metrics.registry, settings.model_names[0])
        return PickerServer(self._picker_options, fleet, picks, reader, metrics)
