"""One request inside the engine, from admission to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field

from pla_serve.engine.kv.manager import BlockTable
from pla_serve.engine.sampling import SequenceSampling
from pla_serve.policy.calibration import Forecast
from pla_serve.policy.protocol import PrefillRequest
from pla_serve.wire.engine import AddRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, KV blocks and sampling state of one request."""

    request: AddRequest
    sampling: SequenceSampling
    short: bool
    """Its class on arrival, for metrics."""
    tokens: list[int]
    """Prompt and output so far."""
    computed: int = 0
    """Leading tokens whose KV is in ``table``."""
    table: BlockTable = field(default_factory=BlockTable)
    ahead: int = 0
    """Tokens behind these whose KV is written by batches that were dispatched and not booked."""
    coming: int | None = None
    """The token behind ``tokens`` is chosen, and this is its row among the choices of the batch
    that was dispatched last."""
    in_flight: int = 0
    """Batches under way, and transfers, that write to its blocks."""
    over: bool = False
    """Ended or aborted. What still runs for it is for nobody."""
    seen_version: int = -1
    """State of the prefix cache when its prefix was last looked up."""
    seen_cached: int = 0
    """Cached tokens found then, which is what the policy goes by."""
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache when its prefill began."""
    started: float | None = None
    """When its first chunk began."""
    forecast: Forecast | None = None
    """What admission foresaw of its first token; None once it is known what came of it."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def enqueued(self) -> int:
        """Leading tokens whose KV is there once the device has done all that it was given."""
        return self.computed + self.ahead

    @property
    def rank(self) -> tuple[int, float]:
        """Who goes first when memory is short: smaller is more entitled."""
        return (self.request.priority, self.request.arrival)

    @property
    def made(self) -> int:
        """Output tokens that were made here."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def queued_seconds(self) -> float | None:
        """From arrival until its prefill began; None before that."""
        return None if self.started is None else self.started - self.request.arrival

    @property
    def generated(self) -> int:
        """Output tokens so far, with those that another engine made."""
        return self.made + self.request.generated

    def prefill(self, cached: int) -> PrefillRequest:
        """Its numbers, if the KV of ``cached`` leading tokens is there."""
        return PrefillRequest(
            id=self.id,
            arrival=self.request.arrival,
            new_tokens=len(self.tokens) - cached,
            history=cached,
            deadline=self.request.deadline if self.generated == 0 else None,
            priority=self.request.priority,
        )
