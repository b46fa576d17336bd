"""Contract of a backend, which makes tokens for the API: one engine, or a fleet of instances."""

from __future__ import annotations

from typing import Protocol

from pla_serve.server.engine.session import EngineSession
from pla_serve.wire.engine import EngineReady


class EngineStartError(Exception):
    """There will never be an engine. The message is the engine's own and names the cure."""


class EngineUnavailableError(Exception):
    """No engine within the time that a request may wait for one."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Backend(Protocol):
    """All methods belong to one event loop. `run` must be running; sessions carry requests."""

    @property
    def info(self) -> EngineReady | None:
        """What may be asked of it, as last known; None until it was ready once."""

    @property
    def is_ready(self) -> bool:
        """A request would be taken now."""

    @property
    def status(self) -> str:
        """One word for people: starting, ready, restarting, stopped."""

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            EngineStartError: it cannot.
        """

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End `run`; requests in flight fail with `EngineDiedError`."""

    async def ready(self) -> EngineReady:
        """Waits for as long as it takes."""

    async def wait_ready(self, seconds: float) -> EngineReady:
        """Its facts, once it takes requests.

        Raises:
            EngineUnavailableError: not within ``seconds``, or too many requests wait already.
        """

    def session(self, max_unread_tokens: int, tenant: str = "") -> EngineSession:
        """For one HTTP request.

        Args:
            tenant: who asks: the same text for the same API key, and never the key itself. Empty
                where the server has no keys.
        """
