"""A batch between the moment its work is enqueued and the moment its tokens are booked."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.engine.device import Mark
from pla_serve.engine.sampling import Choice
from pla_serve.engine.sequence import Sequence
from pla_serve.policy.protocol import Batch


@dataclass(frozen=True, slots=True)
class Member:
    """One sequence's part of a batch that is computed."""

    sequence: Sequence
    tokens: int
    decodes: bool
    """Decoded before this batch already."""
    yields: bool
    """Its last token's logits are sampled."""


@dataclass(slots=True)
class Frame:
    """One batch on the stack."""

    started: float
    inside: float = 0.0
    """Seconds that batches inside it have taken."""


@dataclass(slots=True, kw_only=True)
class Flight:
    """A batch whose work is enqueued, and whose tokens are on their way."""

    batch: Batch
    members: list[Member]
    choice: Choice | None
    """None if it was abandoned."""
    frame: Frame
    outer: Frame
    nested: bool
    whole: bool
    """It had no layer boundaries, so that all of it may still be before the device."""
    began: Mark
    ended: Mark
    dispatched: bool = False
    """Policy and sequences go on from its end already."""
