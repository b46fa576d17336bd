"""A batch between the moment its work is enqueued and the moment its tokens are booked."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.run.device import DeviceMark
from pla_serve.engine.sampling import TokenChoice
from pla_serve.policy.protocol import Batch


@dataclass(frozen=True, slots=True)
class BatchMember:
    """One sequence's part of a batch that is computed."""

    sequence: Sequence
    tokens: int
    decodes: bool
    """Decoded before this batch already."""
    yields: bool
    """Its last token's logits are sampled."""


@dataclass(slots=True)
class BatchTimes:
    """One batch on the stack."""

    started: float
    inside: float = 0.0
    """Seconds that batches inside it have taken."""


@dataclass(slots=True, kw_only=True)
class EnqueuedBatch:
    """A batch whose work is enqueued, and whose tokens are on their way."""

    batch: Batch
    members: list[BatchMember]
    choice: TokenChoice | None
    """None if it was abandoned."""
    frame: BatchTimes
    outer: BatchTimes
    nested: bool
    whole: bool
    """It had no layer boundaries, so that all of it may still be before the device."""
    began: DeviceMark
    ended: DeviceMark
    dispatched: bool = False
    """Policy and sequences go on from its end already."""
