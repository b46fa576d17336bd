"""Recorded or drawn requests, laid out in time until they offer a given load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from pla_serve.policy.cost import CostModel
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.traces.load import Trace
from pla_serve.traces.rows import Row


@dataclass(frozen=True, slots=True)
class TraceWorkload:
    """Requests in order of arrival, on one clock, in seconds of virtual time."""

    name: str
    rows: tuple[Row, ...]
    """Sorted by arrival; all arrivals known."""
    stretch: float
    """Factor on the rows' own times."""
    offered_seconds: float
    """Time of all requests alone, one after another: the work at load 1."""
    clock: str = ""
    """How the arrivals were made, in words."""

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last."""
        return ((self.rows[-1].arrival or 0.0) - (self.rows[0].arrival or 0.0)) * self.stretch

    def jobs(self) -> list[SimulatedRequest]:
        """Fresh jobs; the history of each is what the trace says was cached."""
        jobs = []
        for number, row in enumerate(self.rows):
            new, history = uncached(row)
            jobs.append(
                SimulatedRequest(
                    id=str(number),
                    arrival=(row.arrival or 0.0) * self.stretch,
                    new_tokens=new,
                    history=history,
                    output_tokens=row.output_tokens,
                    row=number,
                )
            )
        return jobs


def uncached(row: Row) -> tuple[int, int]:
    """New tokens and history of a request by its trace; the last prompt token is always new."""
    history = min(row.cached_tokens or 0, row.input_tokens - 1)
    return row.input_tokens - history, history


def work_seconds(rows: Sequence[Row], cost: CostModel, *, decode_batch: int = 0) -> float:
    """What ideal execution needs for all of them: each prompt alone, in one pass.

    Args:
        decode_batch: answers decode here, always so many together, so that each token after the
            first takes its share of such a step; 0: they decode elsewhere.
    """
    seconds = sum(cost.prefill_seconds(*uncached(row)) for row in rows)
    if decode_batch:
        seconds += sum(_decode_seconds(row, cost, 1 / decode_batch) for row in rows)
    return seconds


def _decode_seconds(row: Row, cost: CostModel, share: float) -> float:
    """Of all tokens after the first; ``share`` of a launch each."""
    steps = row.output_tokens - 1
    context = row.input_tokens + (steps + 1) / 2
    return steps * cost.work_seconds(1, context, context, 1, share)


def at_load(
    name: str,
    rows: Sequence[Row],
    cost: CostModel,
    load: float,
    *,
    instances: int = 1,
    decode_batch: int = 0,
) -> TraceWorkload:
    """The trace at ``load``: offered work (`work_seconds`) over what ``instances`` could do in the
    same time. The gaps between arrivals are stretched alike.

    Raises:
        ValueError: ``load`` is not positive, or the trace has no length in time.
    """
    _check(load)
    ordered = tuple(sorted(rows, key=lambda row: row.arrival or 0.0))
    work = work_seconds(ordered, cost, decode_batch=decode_batch)
    first, last = (ordered[0].arrival or 0.0), (ordered[-1].arrival or 0.0)
    if last <= first:
        raise ValueError(f"{name}: all requests arrive at once, so that it has no load")
    stretch = work / (load * instances) / (last - first)
    return TraceWorkload(name, ordered, stretch, work)


def sessions_at_load(
    trace: Trace,
    cost: CostModel,
    load: float,
    *,
    seed: int,
    instances: int = 1,
    decode_batch: int = 0,
    max_pause: float = inf,
) -> TraceWorkload:
    """A trace whose sessions have clocks of their own: not its pauses are stretched, but the time
    over which sessions start, until it is `work_seconds` over load and instances.

    So pauses stay those of the people and tools that made them, cut to ``max_pause`` seconds. What
    follows the last start comes on top, and makes the load a little less.

    Raises:
        ValueError: ``load`` is not positive, or the trace is on one clock.
    """
    _check(load)
    for _ in range(2):  # what is cached, and so the work, depends a little on the order
        work = work_seconds(trace.rows, cost, decode_batch=decode_batch)
        trace = trace.restarted(work / (load * instances), seed, max_pause=max_pause)
    work = work_seconds(trace.rows, cost, decode_batch=decode_batch)
    return TraceWorkload(trace.name, trace.rows, 1.0, work, trace.clock)


def _check(load: float) -> None:
    if not 0 < load < inf:
        raise ValueError(f"load must be positive, not {load}")
