"""Runs the same workload against each entry in turn."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pla_serve.bench.calibrate import (
    Costs,
    Probe,
    idle_ttft,
    measure_costs,
    sized_by_server,
    warm_up,
)
from pla_serve.bench.client import RequestTarget
from pla_serve.bench.load import LoadGenerator, LoadObserver, RunResult
from pla_serve.bench.report import Objectives, Percentiles, Report, summarise
from pla_serve.bench.servers import Open, ServerEntry, ServerError
from pla_serve.bench.text import WordFiller
from pla_serve.bench.transport import HttpTransport
from pla_serve.bench.workload import BenchWorkload

MakeWorkload = Callable[[float, int], BenchWorkload]
"""Makes a workload from requests a second and the number of the repetition. Sizes and order do not
depend on the rate."""
IDLE_REQUESTS = 30


@dataclass(frozen=True, slots=True)
class ExperimentPlan:
    """Settings of an experiment.

    With ``load``, ``rate`` is not used: the first entry's server is measured before its first run,
    and the rate of all entries is ``load`` times its capacity.
    """

    entries: tuple[ServerEntry, ...]
    open_server: Open
    target: RequestTarget
    """Target of all requests; an empty model name stands for the first that the server lists."""
    make_workload: MakeWorkload
    objectives: Objectives
    rate: float = 1.0
    load: float | None = None
    repeat: int = 1
    idle: bool = False
    warm: bool = True
    size_words: bool = True
    """Whether the tokens of a word are measured on the first server."""
    ids: bool = False
    api_key: str | None = None
    max_seconds: float | None = None
    """Longest run; None: three times the span of the arrivals, and two minutes."""


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One run of one entry."""

    entry: str
    repetition: int
    report: Report
    idle: Percentiles | None
    result: RunResult


@dataclass(slots=True)
class ExperimentResult:
    """All complete runs; ``interrupted`` says whether others were called off."""

    rate: float
    costs: Costs | None = None
    runs: list[BenchRun] = field(default_factory=list)
    workloads: list[BenchWorkload] = field(default_factory=list)
    interrupted: bool = False

    def of(self, entry: str) -> list[BenchRun]:
        """Return the runs of one entry."""
        return [run for run in self.runs if run.entry == entry]


class Experiment:
    """Runs a plan. ``observe`` makes the observer of a run from its title and workload."""

    def __init__(
        self,
        plan: ExperimentPlan,
        filler: WordFiller,
        observe: Callable[[str, BenchWorkload], LoadObserver],
        tell: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._filler = filler
        self._observe = observe
        self._tell = tell
        self._sized = False
        self.outcome = ExperimentResult(plan.rate)

    def run(self) -> ExperimentResult:
        """Run all entries, repetition by repetition (A B C, A B C), and return the complete runs.

        In this order a slow change of the machine affects all entries alike. After Ctrl-C or
        SIGTERM no server is left behind.
        """
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for repetition in range(self._plan.repeat):
                for entry in self._plan.entries:
                    self._tell(f"{entry.label}: starting")
                    with self._plan.open_server(entry) as url:
                        asyncio.run(self._measure(entry, repetition, url))
                    if self.outcome.interrupted:
                        return self.outcome
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        finally:
            signal.signal(signal.SIGTERM, before)
        return self.outcome

    async def _measure(self, entry: ServerEntry, repetition: int, url: str) -> None:
        plan = self._plan
        transport = HttpTransport(url, plan.api_key)
        try:
            probe = await self._connect(transport, repetition)
            shape = plan.make_workload(1.0, repetition)
            longest = max(turn.new_tokens for turn in shape.turns)
            if plan.warm:
                self._tell(f"{entry.label}: warming up")
                await warm_up(probe, longest)
            if plan.load is not None and self.outcome.costs is None:
                self._tell(f"{entry.label}: measuring its capacity")
                self.outcome.costs = await measure_costs(probe, longest)
                self.outcome.rate = plan.load * self.outcome.costs.capacity(shape)
            idle = await self._idle(probe, entry, shape) if plan.idle else None
            workload = plan.make_workload(self.outcome.rate, repetition)
            result = await self._load(probe, entry, repetition, workload)
        finally:
            await transport.close()
        report = summarise(result, plan.objectives)
        self.outcome.runs.append(BenchRun(entry.label, repetition, report, idle, result))
        if len(self.outcome.workloads) <= repetition:
            self.outcome.workloads.append(workload)

    async def _connect(self, transport: HttpTransport, repetition: int) -> Probe:
        """Ask the server for what the plan leaves open: the model's name and the tokens of a word.

        All entries use the tokens of a word that the first server gave.
        """
        target = self._plan.target
        if not target.model:
            target = replace(target, model=await _first_model(transport))
        if self._plan.size_words and not self._sized and not self._plan.ids:
            probe = Probe(transport, target, self._filler, "probe")
            self._filler = await sized_by_server(probe, self._filler)
            self._sized = True
        filler = replace(self._filler, salt=f"{self._filler.salt}/{repetition}")
        return Probe(transport, target, filler, "probe", self._plan.ids)

    async def _idle(
        self, probe: Probe, entry: ServerEntry, shape: BenchWorkload
    ) -> Percentiles | None:
        self._tell(f"{entry.label}: short requests on an idle server")
        limit = self._plan.objectives.short_tokens
        sizes = [turn.new_tokens for turn in shape.turns if turn.new_tokens <= limit]
        return await idle_ttft(replace(probe, name=f"{probe.name}/idle"), sizes[:IDLE_REQUESTS])

    async def _load(
        self, probe: Probe, entry: ServerEntry, repetition: int, workload: BenchWorkload
    ) -> RunResult:
        plan = self._plan
        title = entry.label if plan.repeat == 1 else f"{entry.label} ({repetition + 1})"
        generator = LoadGenerator(
            probe.transport,
            probe.target,
            probe.filler,
            clock=asyncio.get_running_loop().time,
            ids=plan.ids,
        )
        span = workload.sessions[-1].start
        with self._stopped_by_ctrl_c(generator):
            observer = self._observe(title, workload)
            return await generator.run(workload, plan.max_seconds or 3 * span + 120, observer)

    @contextmanager
    def _stopped_by_ctrl_c(self, generator: LoadGenerator) -> Iterator[None]:
        """Let the first Ctrl-C end the run with a report; a second one raises KeyboardInterrupt."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.outcome.interrupted = True
            generator.stop()
            loop.remove_signal_handler(signal.SIGINT)

        loop.add_signal_handler(signal.SIGINT, stop)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


async def _first_model(transport: HttpTransport) -> str:
    try:
        return str((await transport.get("/v1/models"))["data"][0]["id"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ServerError(
            f"the server does not list its models ({error}); is its URL right, does it need "
            "--api-key? Name a model with --model if it has no list"
        ) from None
