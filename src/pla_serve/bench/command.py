"""``pla-serve bench``: from flags to an experiment and its report."""

from __future__ import annotations

from dataclasses import replace

from pla_serve.bench.job import OUTPUT, SERVER, BenchJob, run
from pla_serve.bench.replay import TRACE, TraceOptions
from pla_serve.bench.report import GOALS, Objectives
from pla_serve.bench.workload import TIME, WORK, WorkloadConfig
from pla_serve.command_line import CliCommand, Given, fail
from pla_serve.flags import FlagsOf


def bench(given: Given) -> int:
    """Run an experiment and report it."""
    try:
        return run(read(given))
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


BENCH = CliCommand(
    "bench",
    bench,
    (FlagsOf(BenchJob), FlagsOf(WorkloadConfig), FlagsOf(TraceOptions), FlagsOf(Objectives)),
    panels=(SERVER, WORK, TRACE, TIME, GOALS, OUTPUT),
)


def read(given: Given) -> BenchJob:
    """The job that flags describe.

    Raises:
        ValueError: a flag is out of range, or two do not go together.
    """
    job, workload = given.make(BenchJob), given.make(WorkloadConfig)
    trace = given.make(TraceOptions, rate=job.rate, seed=workload.seed)
    requests = trace.max_requests or workload.requests
    if job.rate is not None and job.duration is not None:
        requests = max(1, round(job.rate * job.duration))
    goals = given.make(Objectives)
    return replace(
        job,
        workload=replace(workload, requests=requests),
        trace_options=trace,
        objectives=replace(goals, ttft_long=goals.ttft_long or goals.ttft_short),
    )
