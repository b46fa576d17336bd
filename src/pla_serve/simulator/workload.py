"""Recorded or generated requests, stretched in time until they offer a given load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from pla_serve.policy.cost import CostModel
from pla_serve.policy.tiers import Tier
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.traces.load import Trace
from pla_serve.traces.rows import Row


@dataclass(frozen=True, slots=True)
class TraceWorkload:
    """Requests in order of arrival, on one clock, in seconds of virtual time."""

    name: str
    rows: tuple[Row, ...]
    """Rows sorted by arrival, which all rows have."""
    stretch: float
    """Factor on the arrivals of the rows."""
    offered_seconds: float
    """Sum of the times of all requests alone, which is the work at load 1."""
    clock: str = ""
    """Description of how the arrivals were made."""

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last."""
        return ((self.rows[-1].arrival or 0.0) - (self.rows[0].arrival or 0.0)) * self.stretch

    def jobs(self, tiers: Sequence[Tier] = ()) -> list[SimulatedRequest]:
        """Make fresh requests, each with the history that the trace says was cached.

        Args:
            tiers: that of each row; empty for none.
        """
        jobs = []
        for number, row in enumerate(self.rows):
            new, history = uncached(row)
            job = SimulatedRequest(
                id=str(number),
                arrival=(row.arrival or 0.0) * self.stretch,
                new_tokens=new,
                history=history,
                output_tokens=row.output_tokens,
                row=number,
            )
            if tiers:
                job.promise(tiers[number])
            jobs.append(job)
        return jobs


def uncached(row: Row) -> tuple[int, int]:
    """Return new tokens and history of a row; the last prompt token is always new."""
    history = min(row.cached_tokens or 0, row.input_tokens - 1)
    return row.input_tokens - history, history


def work_seconds(rows: Sequence[Row], cost: CostModel, *, decode_batch: int = 0) -> float:
    """Return the seconds of ideal execution of all rows: each prompt alone, in one pass.

    Args:
        decode_batch: number of answers that always decode together on the same machine, so that
            each token after the first takes its share of such a step; 0: they decode elsewhere.
    """
    seconds = sum(cost.prefill_seconds(*uncached(row)) for row in rows)
    if decode_batch:
        seconds += sum(_decode_seconds(row, cost, 1 / decode_batch) for row in rows)
    return seconds


def _decode_seconds(row: Row, cost: CostModel, share: float) -> float:
    """Return the seconds of all tokens after the first, each with a share of a launch."""
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
    """Stretch all gaps between arrivals alike until the trace offers ``load``.

    Load is the work of the trace (`work_seconds`) over what ``instances`` could do in the same
    time.

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
    """Spread the starts of sessions until a trace whose sessions have own clocks offers ``load``.

    The starts are spread over `work_seconds` divided by load and instances. Pauses within a session
    are not stretched, only cut to ``max_pause`` seconds: they are those of people and tools.
    Requests after the last start take further time, which makes the load a little lower.

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
