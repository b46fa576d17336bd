"""Figures of a simulated run, and the file that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.tiers import Tier
from pla_serve.simulator.machine import KnownCost
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.run import SHORT_TOKENS, RequestsDone, SimulationResult, simulate
from pla_serve.simulator.setting import Objective, RunSpec
from pla_serve.simulator.tiers import kept_promise

CLASSES = ("short", "long", "all")
SecondsArray = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Times(msgspec.Struct, frozen=True):
    """Times of one class in seconds; None where the class has no request.

    Percentiles are interpolated linearly.
    """

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None
    count: int


class ByClass(msgspec.Struct, frozen=True):
    """Times of each class."""

    short: Times
    long: Times
    all: Times


class ClassShares(msgspec.Struct, frozen=True):
    """Share of each class; None where the class has no request."""

    short: float | None
    long: float | None
    all: float | None


class TierReport(msgspec.Struct, frozen=True):
    """Says what became of the requests of one tier."""

    tier: str
    requests: int
    refused: int
    attainment: float | None
    """It is the share of the others all of whose tokens came by their deadlines; None without
    targets."""
    ttft_s: Times
    itl_s: Times | None
    """They are the seconds between two tokens, where answers decode."""
    pause_s: Times | None
    """They are the longest seconds between two tokens of each answer."""


class RunReport(msgspec.Struct, frozen=True):
    """Figures of one run. All seconds are virtual time."""

    trace: str
    policy: str
    load: float | None
    """Load that was asked for; None in a closed loop."""
    instances: int
    machine: str
    seed: int
    requests: int
    makespan_s: float
    """Time from the first arrival to the last token."""
    throughput_tokens_per_s: float
    """Computed prompt tokens, without cached ones, for each second of the makespan."""
    ttft_s: ByClass
    slo_violation: ClassShares
    wait_longest_s: float
    """Largest difference between the TTFT of a request and its time alone."""
    utilisation: float
    """Share of the makespan in which an instance that prefills computed, on average."""
    idle_ttft_s: ByClass
    """Time of each request alone on an idle machine, in one pass."""
    mode: str
    clients: int | None
    offered_load: float | None
    """Work over capacity between the first and the last arrival; less than ``load`` where sessions
    go on after the last one has started."""
    arrivals: str
    prompt_tokens: int
    cached_tokens: int
    batches: int
    express_batches: int
    """Batches that ran at a layer boundary of another batch."""
    attainment: ClassShares = ClassShares(None, None, None)
    """Share of requests all of whose tokens came by their deadlines; see `Objective`."""
    tpot_s: Times | None = None
    """Seconds for each token of an answer after the first, where answers decode."""
    itl_s: ByClass | None = None
    """Seconds between two tokens, of all answers of a class together, where answers decode."""
    pause_s: ByClass | None = None
    """Longest time between two tokens of each answer."""
    idle_itl_s: ByClass | None = None
    """Time of a decode step alone on an idle machine, by request."""
    decode_utilisation: float | None = None
    restarts: int = 0
    """Requests that were sent to another instance after a failure."""
    pool_moves: int = 0
    fetched_tokens: int = 0
    refused: int = 0
    """Requests that no instance took. All figures but ``requests`` are of the others."""
    tiers: tuple[TierReport, ...] = ()


def run_and_report(spec: RunSpec, progress: RequestsDone) -> RunReport:
    """Simulate a run and make its report, as a worker process does."""
    return report(spec, simulate(spec, progress))


def report(spec: RunSpec, outcome: SimulationResult) -> RunReport:
    """Return the report of a run."""
    setting, workload = spec.setting, spec.workload
    jobs = [job for job in outcome.jobs if not job.refused]
    if not jobs:
        raise ValueError(f"{spec.policy} refused all requests of {workload.name}; widen the tiers")
    cost = KnownCost(setting.machine.profile)
    ttft = np.array([job.ttft for job in jobs])
    alone = time_alone(jobs, cost)
    short = np.array([job.new_tokens <= SHORT_TOKENS for job in jobs])
    steps = steps_alone(jobs, cost)
    decodes = setting.mode != "prefill"
    late = ttft > slo_seconds(alone, setting.objective)
    start = min(job.arrival for job in outcome.jobs)
    makespan = outcome.end - start
    fleet = setting.fleet
    cached = sum(job.history for job in jobs)
    span = workload.span * fleet.instances
    return RunReport(
        trace=workload.name,
        policy=spec.policy,
        load=spec.load,
        instances=fleet.instances,
        machine=setting.machine.name,
        seed=setting.seed,
        requests=len(outcome.jobs),
        makespan_s=makespan,
        throughput_tokens_per_s=outcome.prefill.computed_tokens / makespan,
        ttft_s=_by_class(ttft, short),
        slo_violation=_shares(late, short),
        wait_longest_s=max(0.0, float((ttft - alone).max())),
        utilisation=outcome.prefill.busy_seconds / makespan / fleet.instances,
        idle_ttft_s=_by_class(alone, short),
        mode=setting.mode,
        clients=setting.clients,
        offered_load=workload.offered_seconds / span if setting.clients is None else None,
        arrivals=workload.clock,
        prompt_tokens=sum(job.prompt_tokens for job in jobs),
        cached_tokens=cached,
        batches=outcome.prefill.batches + outcome.decode.batches,
        express_batches=outcome.prefill.express_batches,
        attainment=_shares(_kept(jobs, alone, steps, setting.objective), short),
        tpot_s=_times(_tpot(jobs)) if decodes else None,
        itl_s=_gaps(jobs, short) if decodes else None,
        pause_s=_pauses(jobs, short) if decodes else None,
        idle_itl_s=_by_class(steps, short) if decodes else None,
        decode_utilisation=(
            outcome.decode.busy_seconds / makespan / fleet.decode_instances
            if fleet.decode_instances
            else None
        ),
        restarts=outcome.restarts,
        pool_moves=outcome.moves,
        fetched_tokens=outcome.fetched_tokens,
        refused=len(outcome.jobs) - len(jobs),
        tiers=_by_tier(spec, outcome.jobs),
    )


def _by_tier(spec: RunSpec, jobs: Sequence[SimulatedRequest]) -> tuple[TierReport, ...]:
    decodes = spec.setting.mode != "prefill"
    tiers = [each.tier for each in spec.setting.tier_shares]
    return tuple(
        _tier_report(tier, [job for job in jobs if job.tier == tier], decodes=decodes)
        for tier in tiers
    )


def _tier_report(tier: Tier, jobs: Sequence[SimulatedRequest], *, decodes: bool) -> TierReport:
    served = [job for job in jobs if not job.refused]
    attainment = None
    if tier.service is ServiceLevel.PROMISED:
        attainment = _share(np.array([kept_promise(job, tier) for job in served]))
    every = np.zeros(len(served), dtype=np.bool_)
    return TierReport(
        tier=str(tier),
        requests=len(jobs),
        refused=len(jobs) - len(served),
        attainment=attainment,
        ttft_s=_times(np.array([job.ttft for job in served])),
        itl_s=_gaps(served, every).all if decodes and served else None,
        pause_s=_pauses(served, every).all if decodes and served else None,
    )


def time_alone(jobs: Sequence[SimulatedRequest], cost: CostModel) -> SecondsArray:
    """Return the seconds of each prompt alone, in one pass, with the cache of its instance."""
    return np.array([cost.prefill_seconds(job.new_tokens, job.history) for job in jobs])


def steps_alone(jobs: Sequence[SimulatedRequest], cost: CostModel) -> SecondsArray:
    """Return the seconds of a decode step of each request alone, in the middle of its answer."""
    contexts = (job.prompt_tokens + job.output_tokens / 2 for job in jobs)
    return np.array([cost.work_seconds(1, context, context + 1, 1, 1) for context in contexts])


def slo_seconds(alone: SecondsArray, objective: Objective) -> SecondsArray:
    """Return the seconds after its arrival at which the first token of each request is due."""
    due: SecondsArray = np.maximum(objective.seconds, objective.stretch * alone)
    return due


def save(
    path: Path, runs: Sequence[RunReport], about: dict[str, object], *, interrupted: bool
) -> None:
    """Write the JSON file, and make its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"runs": runs, "interrupted": interrupted, **about}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def load_report(path: Path) -> list[RunReport]:
    """Read the runs of a file that `save` has written.

    Raises:
        ValueError: the file cannot be read.
    """

    class File(msgspec.Struct):
        runs: list[RunReport]

    try:
        return msgspec.json.decode(path.read_bytes(), type=File).runs
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} does not hold simulated runs: {error}") from None


def _masks(short: Mask) -> tuple[Mask, Mask, Mask]:
    return short, ~short, np.ones_like(short)


def _by_class(seconds: SecondsArray, short: Mask) -> ByClass:
    return ByClass(*(_times(seconds[mask]) for mask in _masks(short)))


def _times(seconds: SecondsArray) -> Times:
    if not len(seconds):
        return Times(None, None, None, None, None, 0)
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Times(float(seconds.mean()), p50, p90, p99, float(seconds.max()), len(seconds))


def _share(flags: Mask) -> float | None:
    return float(flags.mean()) if len(flags) else None


def _shares(flags: Mask, short: Mask) -> ClassShares:
    return ClassShares(*(_share(flags[mask]) for mask in _masks(short)))


def _kept(
    jobs: Sequence[SimulatedRequest],
    alone: SecondsArray,
    steps: SecondsArray,
    objective: Objective,
) -> Mask:
    """Return which requests got every token by its deadline."""
    first_due = slo_seconds(alone, objective)
    each = np.maximum(objective.token_seconds, objective.stretch * steps)
    return np.array([job.in_time(*due) for job, *due in zip(jobs, first_due, each, strict=True)])


def _gaps(jobs: Sequence[SimulatedRequest], short: Mask) -> ByClass:
    """Return the times between tokens, by the class of the request."""
    every = [np.asarray(job.gaps, dtype=np.float64) for job in jobs]
    counts = [len(gaps) for gaps in every]
    return _by_class(np.concatenate(every), np.repeat(short, counts))


def _pauses(jobs: Sequence[SimulatedRequest], short: Mask) -> ByClass:
    """Return the longest time between two tokens of each answer that has two."""
    longest = np.array([max(job.gaps, default=nan) for job in jobs])
    known = ~np.isnan(longest)
    return _by_class(longest[known], short[known])


def _tpot(jobs: Sequence[SimulatedRequest]) -> SecondsArray:
    found = [
        (job.finished - job.first_token) / (job.output_tokens - 1) if job.output_tokens > 1 else nan
        for job in jobs
    ]
    values = np.array(found)
    kept: SecondsArray = values[~np.isnan(values)]
    return kept
