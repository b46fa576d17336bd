"""A fleet on virtual time: the real router before simulated instances."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from math import isfinite

import numpy as np

from pla_serve.fleet.control.control import ControlOptions, FleetControl
from pla_serve.fleet.link.protocol import InstanceReport, Link, Role
from pla_serve.fleet.router.contract import FleetOptions, RoutingObserver
from pla_serve.fleet.router.fleet import Fleet
from pla_serve.fleet.router.observers import WithControl
from pla_serve.fleet.router.prefixes import Chain
from pla_serve.fleet.router.routed_request import Attempt
from pla_serve.policy.admission import Admission
from pla_serve.policy.pools.protocol import Pool, PoolController
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.routing.registry import parse_routing
from pla_serve.simulator.caches import TurnCache, row_of
from pla_serve.simulator.cluster_options import (
    ClusterOptions,
    ClusterResult,
    SimulatedTraffic,
    Stopwatch,
)
from pla_serve.simulator.faults import Fault
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import Machine
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.server import SimulatedServer
from pla_serve.simulator.server_options import ServedEvents, ServerOptions
from pla_serve.simulator.timeline import Timeline
from pla_serve.simulator.turns import SimulatedTurn
from pla_serve.wire.engine import AddRequest, Output, Rejected, RequestAnswer, SamplingParams

PATIENT = FleetOptions(patience_seconds=1e9, most_failures=10**9, most_lost_engines=10**9)
"""No request of a simulation is given up: its clients wait for as long as it takes."""


class Cluster:
    """One run. Events are handled in order of time, those of one moment as they were caused.

    The router, its hand-overs and its control are those of real fleets (`fleet.router`,
    `fleet.control`), and so are their policies; links take no time, and no transfer of KV competes
    with another one for the network. A failure loses everything that the instance held, and the
    router learns of it at once.

    Args:
        make_policy: a fresh policy for an instance.
        traffic: all requests, when they arrive, and when their first tokens are due.
        controller: moves instances between the pools, or None.
        stopwatch: measures routing decisions, or None.
    """

    def __init__(
        self,
        options: ClusterOptions,
        machine: Machine,
        make_policy: Callable[[], PrefillPolicy],
        traffic: SimulatedTraffic,
        *,
        controller: PoolController | None = None,
        faults: Sequence[Fault] = (),
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if controller is not None and not options.short_instances:
            raise ValueError("a pool controller needs short_instances of at least 1 to begin with")
        self._options = options
        self._turns = turns = traffic.turns
        self._source = traffic.source
        self._deadline = traffic.deadline
        self._tiers = traffic.tiers
        self._timeline = Timeline()
        self._jobs: list[SimulatedRequest | None] = [None] * len(turns)
        self._left = len(turns)
        self._arrivals: Iterator[tuple[float, SimulatedTurn]] = iter(())
        self._progress: Callable[[int], None] | None = None
        self._starting = 0
        """Instances that failed and will start again."""
        self._result = ClusterResult([], 0.0, {})
        self._watch = _Watch(self._result, stopwatch)
        self._control = self._new_control(controller)
        observer: RoutingObserver = self._watch
        if self._control is not None:
            observer = WithControl(observer, self._control)
        self._fleet = Fleet(
            self._timeline.clock,
            self._timeline.later,
            observer,
            options=PATIENT,
            routing=parse_routing(options.routing),
            timer=None if stopwatch is None else stopwatch.clock,
            logger=logging.Logger(__name__, logging.CRITICAL),  # failures are simulated, not news
        )
        self._servers: dict[str, SimulatedServer] = {}
        make = partial(_make_instance, options, machine, make_policy, admits=bool(traffic.tiers))
        self._build(_server_options(options, machine, make, self._tokens, self._token_made))
        servers = list(self._servers.values())
        for fault in faults:
            if fault.instance >= len(servers):
                raise ValueError(f"{fault} is for none of the {len(servers)} instances")
            self._timeline.at(fault.time, self._fail, (servers[fault.instance], fault))

    def run(self, progress: Callable[[int], None] | None = None) -> ClusterResult:
        """Serve all requests to the end of the last answer.

        Args:
            progress: called now and then with the number of complete answers.

        Raises:
            RuntimeError: requests are left that no instance will ever take.
        """
        self._arrivals = iter(list(self._source.start()))
        self._progress = progress
        self._next_arrival()
        if self._left:
            with _rare_collections():
                self._timeline.run()
        return self._finish()

    # Building

    def _new_control(self, controller: PoolController | None) -> FleetControl | None:
        if controller is None:
            return None
        period = self._options.control_seconds
        if not period > 0:
            raise ValueError(f"a control period must be positive, not {period}")
        self._timeline.at(period, self._tick)
        return FleetControl(
            lambda: [server.link for server in self._servers.values()],
            controller,
            ControlOptions(period_seconds=period),
        )

    def _build(self, server_options: ServerOptions) -> None:
        options = self._options
        for number in range(options.instances):
            role: Role = "mixed"
            if options.short_instances:
                role = "short" if number < options.short_instances else "long"
            self._add_server(f"p{number}", role, options.cache_tokens, server_options)
        for number in range(options.decode_instances):
            self._add_server(f"d{number}", "decode", 0, server_options)
        phase = options.report_seconds / len(self._servers)
        for number, server in enumerate(self._servers.values()):
            server.start()
            self._timeline.at(number * phase, server.report_regularly)

    def _add_server(self, name: str, role: Role, cache_tokens: int, options: ServerOptions) -> None:
        server = SimulatedServer(
            name,
            role,
            options,
            TurnCache(self._turns, cache_tokens),
            self._timeline,
            self._fleet,
            self._servers,
            self._admitted,
        )
        self._servers[name] = server
        self._fleet.attach(server.link)

    # Requests

    def _next_arrival(self) -> None:
        """Schedule the next request that waits for no answer, ahead of other events of its time."""
        arrival = next(self._arrivals, None)
        if arrival is not None:
            time, turn = arrival
            self._timeline.first(time, self._arrive_in_turn, turn)

    def _arrive_in_turn(self, turn: SimulatedTurn) -> None:
        self._next_arrival()
        self._arrive(turn)

    def _arrive(self, turn: SimulatedTurn) -> None:
        now = self._timeline.now
        due = self._deadline(turn) if self._deadline is not None else None
        deadline = None if due is None else now + due
        job = self._jobs[turn.index] = SimulatedRequest(
            str(turn.index),
            now,
            turn.prompt_tokens,
            0,
            turn.output_tokens,
            deadline,
            row=turn.index,
        )
        if self._tiers:
            job.promise(self._tiers[turn.index])
        prompt, known = self._prompt(turn)
        whole = self._options.decode != "none" or turn.answer
        request = AddRequest(
            id=job.id,
            prompt=prompt,
            sampling=SamplingParams(max_tokens=turn.output_tokens if whole else 1, temperature=0.0),
            arrival=now,
            deadline=job.deadline,
            tpot=job.tpot,
            service=job.service,
        )
        self._fleet.submit(request, _Client(self, turn, job), "", known)

    def _prompt(self, turn: SimulatedTurn) -> tuple[list[int], Chain]:
        """The prompt's tokens, of which only the number counts, and the chain of its true ones."""
        tokens = [0] * turn.prompt_tokens
        if not self._options.cache_tokens or not turn.prompt:
            return tokens, _KnownHistory(turn.history or 0)
        known = Chain(())
        for run in turn.prompt:
            known.extend_bytes(np.arange(run.start, run.stop, dtype=np.int64).tobytes())
        return tokens, known

    def _tokens(self, id: str, so_far: Sequence[int], generated: int) -> Iterator[int]:
        """Tokens of an answer: those that the next turn begins with, where they are known."""
        answer = self._turns[row_of(id)].answer
        if not answer:
            return repeat(0)
        if len(answer) == 1:
            return chain(answer[0][generated:], repeat(0))
        return chain(islice(chain.from_iterable(answer), generated, None), repeat(0))

    def _token_made(self, id: str, now: float) -> None:
        job = self._jobs[row_of(id)]
        assert job is not None
        job.token(now)

    def _admitted(self, id: str, new_tokens: int, history: int, fetched: int) -> None:
        job = self._jobs[row_of(id)]
        assert job is not None
        job.new_tokens, job.history = new_tokens, history
        self._result.cached_tokens += history
        self._result.fetched_tokens += fetched

    def answered(self, turn: SimulatedTurn, job: SimulatedRequest) -> None:
        """An answer is complete: the next turn of its session, or of its client, may come."""
        now = self._timeline.now
        job.finished = now
        self._left -= 1
        if not self._left:
            self._timeline.stop()
        if self._progress is not None and not self._left % 1000:
            self._progress(len(self._turns) - self._left)
        options = self._options
        if options.decode == "none":
            now += options.token_seconds * (job.output_tokens - 1)
        for time, later in self._source.answered(turn, now):
            self._timeline.at(time, self._arrive, later)

    @property
    def one_token(self) -> bool:
        """Answers count as complete with their first token."""
        return self._options.decode == "none"

    @property
    def now(self) -> float:
        """Seconds of virtual time."""
        return self._timeline.now

    # Failures

    def _fail(self, what: tuple[SimulatedServer, Fault]) -> None:
        server, fault = what
        if not server.alive:
            return
        if isfinite(fault.down_seconds):
            self._starting += 1
            ready = self.now + fault.down_seconds + self._options.start_seconds
            self._timeline.at(ready, self._start, server)
        server.fail("it failed")
        for other in self._servers.values():
            other.peer_failed(server.name)
        if not self._starting and not any(other.alive for other in self._servers.values()):
            raise RuntimeError(
                f"{self._left} requests are left and no instance will take them: all have "
                "failed for good; let them start again, or give a longer workload less"
            )

    def _start(self, server: SimulatedServer) -> None:
        self._starting -= 1
        server.start()
        self._recall((), {Pool(server.role)})

    # Control

    def _tick(self, _: object) -> None:
        control, now = self._control, self.now
        assert control is not None
        moves = control.tick(now, self._fleet.held_seconds)
        self._result.moves += [(now, move) for move in moves]
        if moves:
            self._recall([move.instance_id for move in moves], {move.target for move in moves})
        self._timeline.at(now + control.options.period_seconds, self._tick)

    def _recall(self, moved: Sequence[str], joined: set[Pool]) -> None:
        """Place again the requests that wait on moved instances and in the pools they joined."""
        if not self._options.recalls:
            return
        rows = [
            row_of(id)
            for server in self._servers.values()
            if server.alive and (Pool(server.role) in joined or server.name in moved)
            for id in server.not_begun()
        ]
        for row in sorted(rows, key=self._arrival):
            self._fleet.place_again(str(row))

    def _arrival(self, row: int) -> tuple[float, int]:
        job = self._jobs[row]
        assert job is not None
        return job.arrival, row

    def _finish(self) -> ClusterResult:
        result = self._result
        result.end = self.now
        result.jobs = [job for job in self._jobs if job is not None]
        for name, server in self._servers.items():
            server.totals.count(server.engine)
            result.nodes[name] = server.totals
        return result


def _server_options(
    options: ClusterOptions,
    machine: Machine,
    make_instance: Callable[[ServedEvents], SimulatedInstance],
    make_tokens: Callable[[str, Sequence[int], int], Iterator[int]],
    token_made: Callable[[str, float], None],
) -> ServerOptions:
    """Return the options that all instances of a cluster have in common."""
    return ServerOptions(
        make_instance,
        make_tokens,
        machine.profile,
        options.boundary_tokens,
        options.express,
        kv_tokens=options.cache_tokens,
        kv_memory_tokens=machine.kv_tokens,
        kv_bytes_per_token=round(machine.kv_bytes_per_token),
        transfer=machine.name if options.fetch_kv or options.decode == "apart" else None,
        transfer_seconds=machine.transfer,
        token_made=token_made,
        report_seconds=options.report_seconds,
        whole_answers=options.decode == "none",
    )


def _make_instance(
    options: ClusterOptions,
    machine: Machine,
    make_policy: Callable[[], PrefillPolicy],
    events: ServedEvents,
    *,
    admits: bool,
) -> SimulatedInstance:
    """Return a fresh instance; with ``admits`` it refuses what it cannot keep."""
    instance = SimulatedInstance(
        make_policy(),
        machine.cost,
        machine.layers if options.interruptible else 1,
        events.prefilled,
        events.finished,
        decodes=True,
        started=events.started if options.decode == "apart" else None,
        decoded=events.decoded,
    )
    instance.admission = Admission() if admits else None
    return instance


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for cycles rarely: a run keeps millions of objects, and makes few cycles."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _KnownHistory(Chain):
    """Chain of a prompt of which every instance has the same tokens cached, and no more."""

    def __init__(self, common: int) -> None:
        super().__init__((), common=common)

    def extend(self, tokens: Sequence[int]) -> None:
        """Do nothing: output is cached by nobody."""


@dataclass(slots=True, eq=False)
class _Client:
    """Receives one answer."""

    cluster: Cluster
    turn: SimulatedTurn
    job: SimulatedRequest

    def take(self, message: RequestAnswer) -> None:
        job = self.job
        if isinstance(message, Rejected):
            job.refused = True
            self.cluster.answered(self.turn, job)
        if not isinstance(message, Output):
            return
        job.produced += 1 if self.cluster.one_token else len(message.tokens)
        if message.finish_reason is not None:
            assert message.finish_reason == "length", message.error
            self.cluster.answered(self.turn, job)

    def fail(self, failure: Exception) -> None:
        raise RuntimeError(f"request {self.job.id} was given up: {failure}")


def _ignore(seconds: float) -> None: ...


class _Watch:
    """A `RoutingObserver` that counts what results are made of."""

    def __init__(self, result: ClusterResult, stopwatch: Stopwatch | None) -> None:
        self._result = result
        self.decided = _ignore if stopwatch is None else stopwatch.report

    def dispatched(self, instance: str, short: bool, seconds: float, now: float) -> None: ...

    def began(
        self, attempt: Attempt, cached_tokens: int | None, lateness: float | None, now: float
    ) -> None: ...

    def reported(self, link: Link, report: InstanceReport) -> None: ...

    def gone(self, link: Link) -> None: ...

    def moved(self, instance: str, reason: str, resumed: bool) -> None:
        self._result.restarts += reason == "lost"

    def refused(self, reason: str) -> None: ...

    def handed_over(self, outcome: str) -> None: ...
