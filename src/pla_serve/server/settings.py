"""What the API server is told at start; the engine has its own `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from pla_serve.server.limits import Limits
from pla_serve.wire.link import Role


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Raises:
    ValueError: a field is out of range; the message names it.
    """

    model_names: tuple[str, ...]
    """What clients may call the model; the first is used in answers to requests that name none."""
    model_root: str
    """Where the model came from."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free one."""
    api_keys: tuple[str, ...] = ()
    """Without any, everybody may use /v1."""
    max_body_bytes: int = 8 * 2**20
    keep_alive_seconds: float = 15.0
    """A stream without news gets a comment this often."""
    max_unread_tokens: int = 1024
    """A stream whose client leaves more tokens of one choice unread is ended."""
    stall_seconds: float = 60.0
    """A stream whose client reads nothing for so long is ended."""
    restart_wait: float = 60.0
    """How long a request waits for an engine that starts or restarts before it gets a 503."""
    otlp_endpoint: str | None = None
    """Base URL of an OTLP collector for traces; None: as the environment has it, or no traces."""
    drain_seconds: float = 30.0
    """How long requests in flight may go on after SIGTERM."""
    limits: Limits = field(default_factory=Limits)
    role: Role = "mixed"
    """What routers are told that this instance is for; it changes nothing in the instance."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ValueError("the model needs at least one name, and no empty one")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must lie between 0 and 65535, not {self.port}")
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, not {self.role}")
        if not all(self.api_keys):
            raise ValueError("an API key must not be empty")
        for name in ("max_body_bytes", "max_unread_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("keep_alive_seconds", "stall_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("restart_wait", "drain_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
