"""A live router in the test process, before instances with fake engines."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import httpx
import openai
from prometheus_client import CollectorRegistry

from pla_serve.fleet.picker.options import PickerOptions
from pla_serve.fleet.route_command import RouteSettings, build
from pla_serve.fleet.router.contract import FleetOptions
from pla_serve.server.model import ServedModel
from pla_serve.server.run import listen
from pla_serve.server.settings import ServerSettings
from tests.server.server_harness import (
    CHAT_TEMPLATE,
    DEADLINE,
    MODEL,
    Live,
    check_grammar,
    make_tokenizer,
    until,
)

KEY = "between us"


class Routed:
    """A live router in a thread of the test process."""

    def __init__(self, instances: list[Live], **options: Any) -> None:
        settings = ServerSettings(
            model_names=(MODEL,), model_root="", restart_wait=5.0, **options.pop("server", {})
        )
        picker = options.pop("picker", PickerOptions())
        self._tokenizer = make_tokenizer(options.pop("chat_template", CHAT_TEMPLATE))
        router = RouteSettings(
            instances=tuple(instance.url for instance in instances),
            instance_key=KEY,
            liveness_seconds=2.0,
            routing="auto",
            fleet=FleetOptions(patience_seconds=5.0, **options),
            controller="off",
            control_seconds=1.0,
            picker=picker,
        )
        self._listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ended: Future[int] = Future()
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, args=(settings, router))
        self._thread.start()
        until(lambda: self.metric("instance_up") == len(instances), "all links")

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"pla_serve_router:{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    @property
    def picker_port(self) -> int:
        """The port of its endpoint picker."""
        picker = self._server.picker
        assert picker is not None
        return picker.port

    @property
    def registry(self) -> CollectorRegistry:
        """Metrics of the router and its picker."""
        return self._server.metrics.registry

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=DEADLINE
        )

    def close(self) -> None:
        loop = self._loop.result(DEADLINE)
        loop.call_soon_threadsafe(self._server.stop)
        assert self._ended.result(DEADLINE) == 0
        self._thread.join(DEADLINE)

    def _run(self, settings: ServerSettings, router: RouteSettings) -> None:
        async def main() -> int:
            self._server = build(
                settings, router, ServedModel(self._tokenizer, check_grammar), "here"
            )
            self._loop.set_result(asyncio.get_running_loop())
            return await self._server.run(self._listener)

        self._ended.set_result(asyncio.run(main()))
