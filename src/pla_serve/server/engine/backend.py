"""Contract of a backend, which makes tokens for the API: one engine, or a fleet of instances."""

from __future__ import annotations

from typing import Protocol

from pla_serve.server.engine.session import EngineSession
from pla_serve.wire.engine import EngineReady


class EngineStartError(Exception):
    """The engine cannot start. The message is the engine's own and names the cure."""


class EngineUnavailableError(Exception):
    """No engine became ready within the time that a request may wait."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Backend(Protocol):
    """Makes tokens for the API.

    All methods belong to one event loop, and `run` must be running. Requests go through sessions.
    """

    @property
    def info(self) -> EngineReady | None:
        """Limits of requests, as last known; None before the backend was first ready."""

    @property
    def is_ready(self) -> bool:
        """Whether a request would be accepted now."""

    @property
    def status(self) -> str:
        """State as one word for people: starting, ready, restarting or stopped."""

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            EngineStartError: the engine cannot be started.
        """

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End `run`; requests in flight fail with `EngineDiedError`."""

    async def ready(self) -> EngineReady:
        """Wait, without a limit, until the backend is ready, and return its limits."""

    async def wait_ready(self, seconds: float) -> EngineReady:
        """Wait until the backend is ready, and return its limits.

        Raises:
            EngineUnavailableError: not within ``seconds``, or too many requests wait already.
        """

    def session(self, max_unread_tokens: int, tenant: str = "") -> EngineSession:
        """Return a new session for one HTTP request.

        Args:
            tenant: who asks: the same text for the same API key, and never the key itself. Empty
                where the server has no keys.
        """
