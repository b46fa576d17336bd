"""The contract between a pool controller and the fleet, real or simulated, that it controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Pool(StrEnum):
    """Requests that an instance is kept for."""

    SHORT = "short"
    LONG = "long"
    DECODE = "decode"
    MIXED = "mixed"
    """Any request; no controller moves it."""


def other_class(pool: Pool) -> Pool:
    """The other one of SHORT and LONG.

    Raises:
        ValueError: ``pool`` is neither.
    """
    if pool is Pool.SHORT:
        return Pool.LONG
    if pool is Pool.LONG:
        return Pool.SHORT
    raise ValueError(f"only short and long instances change their pool, not {pool.value} ones")


@dataclass(frozen=True, slots=True)
class PoolReport:
    """One instance at one moment. All times are seconds."""

    id: str
    pool: Pool
    """The pool whose requests it is given now; one that was moved is in its new pool at once."""
    queued_short: float = 0.0
    """Predicted seconds of short prefills that it holds, in progress or waiting."""
    queued_long: float = 0.0
    """Predicted seconds of long prefills that it holds. An instance may hold both classes: it was
    moved, or took an overflow."""
    deadline_error: float = 0.0
    """Seconds by which its requests miss their deadlines on average; negative if they are early."""
    utilisation: float = 0.0
    """Share of the last control period in which it computed, 0 to 1."""
    drain_seconds: float = 0.0
    """Until it could begin with requests of the other class; 0 if it can interrupt a prefill."""
    draining: bool = False
    """True after a move until it has begun with requests of its new class."""
    kv_usage: float = 0.0
    """Share of its KV memory that requests hold, 0 to 1. Counts for decode instances."""

    @property
    def queued(self) -> float:
        """Predicted seconds of all that it holds."""
        return self.queued_short + self.queued_long


@dataclass(frozen=True, slots=True)
class Move:
    """Move of an instance: it is given requests of ``target`` from now on, not of ``source``."""

    instance_id: str
    source: Pool
    target: Pool


class PoolController(Protocol):
    """Decides which instances change between the short and the long pool.

    Asked once in a control period. Deterministic in its calls; reads no clock.
    """

    def arrived(self, pool: Pool, seconds: float, now: float) -> None:
        """Count a request of this class (SHORT or LONG), with ``seconds`` of predicted prefill."""
        ...

    def decide(self, now: float, instances: Sequence[PoolReport]) -> Sequence[Move]:
        """The moves to make now. Instances of other pools than SHORT and LONG are left alone."""
        ...
