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
    long_chunk_tokens: int | None = None
    """Most tokens of one request in one batch. None: as many as ``max_batch_tokens`` for baselines;
    `length-aware` chooses by its cost model (`chunking`)."""
    boundary_tokens: int | None = None
    """L_m, at most this many new tokens are short; None takes it from the fitted cost model."""
    long_share: float = 0.5
    """Share of the device's time that waiting long prefills are guaranteed, 0 to 1."""
    express_burst_seconds: float | None = None
    """How far express work may run ahead of that guarantee before longs get their turn; None is
    twice the time of a prefill of 256 tokens, so that the classes take turns quickly."""
    express_wait_seconds: float = 0.005
    """How long a short prefill may be held back, while longs wait, for others to share its launch.
    It is held only where that is predicted to pay (`waiting`); at light load never."""
    decode_share: float = 0.02
    """Most of the device's time that decode steps of their own (in no prefill's batch) take while a
    long prefill is under way. More of it gives steadier streams and slower long prefills."""
    patience: float = 400.0
    """How long a long prefill may be passed by others with less left: those that arrive within
    ``patience * sqrt(seconds left * seconds of a full batch)`` after it. At 0 longs run in the
    order of their arrival. More of it gives a lower mean and a longer wait of the longest ones."""
    interruptible: bool = True
    """Whether the executor asks at layer boundaries. If it does not, `length-aware` keeps chunks as
    short as the machine's spare time allows."""
    layers: int | None = None
    """Decoder layers of the model, equal parts of a pass between which the executor asks; whoever
    makes the policy says it. `length-aware` bounds the time of one by it; None sets no bound."""

    @property
    def max_chunk_tokens(self) -> int:
        """Most tokens of one request in one batch, by both limits."""
        return min(self.long_chunk_tokens or self.max_batch_tokens, self.max_batch_tokens)

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_batch_requests", "long_chunk_tokens", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.boundary_tokens is not None and self.boundary_tokens < 0:
            raise ValueError(f"boundary_tokens must be at least 0, not {self.boundary_tokens}")
        for name in ("long_share", "decode_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("express_burst_seconds", "express_wait_seconds", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < inf:
                raise ValueError(f"{name} must be finite and at least 0, not {value}")
