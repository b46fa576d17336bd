"""The knobs of every policy, with units; one object, so that a comparison changes one field."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Settings shared by all policies; one that does not use a field says so in its docstring.

    Raises:
        ValueError: a field is out of range; the message names the field and the range.
    """

    max_batch_tokens: int = 2048
    """Most tokens in one batch, prefill and decode together."""
    max_batch_requests: int = 64
    """Most requests in one batch."""
    long_chunk_tokens: int = 512
    """Most tokens of one long prefill in one batch; for baselines the cap per request. Streams that
    decode meanwhile get a token a chunk; large chunks read history and weights less often."""
    boundary_tokens: int | None = None
    """L_m, at most this many new tokens are short; None takes it from the fitted cost model."""
    long_share: float = 0.5
    """Share of the device's time that waiting long prefills are guaranteed, 0 to 1."""
    express_burst_seconds: float = 2.0
    """How far express work may run ahead of that guarantee before longs get their turn."""
    decode_share: float = 0.1
    """Most of the device's time that decode steps of their own (in no prefill's batch) take while a
    long prefill is under way. More of it gives steadier streams and slower long prefills."""
    aging: float = 1.0
    """Seconds of remaining work that one second of waiting outweighs, among longs. At 0 a long
    prefill may be passed by shorter ones for ever."""

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_batch_requests", "long_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.boundary_tokens is not None and self.boundary_tokens < 0:
            raise ValueError(f"boundary_tokens must be at least 0, not {self.boundary_tokens}")
        for name in ("long_share", "decode_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("express_burst_seconds", "aging"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be finite and at least 0, not {getattr(self, name)}")
