"""A fleet on virtual time: routing, pools, prefill and decode apart, failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf, isfinite
from typing import Any

from pla_serve.policy.pools.protocol import Pool, PoolController
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.routing.least_loaded import LeastLoaded
from pla_serve.policy.routing.registry import parse_routing
from pla_serve.policy.routing.request import FleetModel, RouteRequest
from pla_serve.policy.routing.router import Router
from pla_serve.simulator.caches import Holders, SimulatedPrefixCache
from pla_serve.simulator.cluster_options import ClusterOptions, ClusterResult
from pla_serve.simulator.control import PoolControl
from pla_serve.simulator.faults import Fault
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import KnownCost, Machine
from pla_serve.simulator.node import Node
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.turns import SimulatedTurn, TurnSource

NOTHING: Mapping[str, int] = {}


class Cluster:
    """One run. Events are handled in order of time, those of one moment as they were caused.

    The first token of an answer leaves from the prefill instance; with ``decode="apart"`` the
    others follow once the KV has been sent. Transfers do not compete for the network. A failure
    loses what the instance held: requests go elsewhere, those with tokens prefill prompt and tokens
    again.

    Args:
        make_policy: a fresh policy for an instance.
        turns: all requests, by place.
        controller: moves instances between the pools, or None.
        deadline: seconds after arrival by new tokens, as the workload counts them; None for none.
    """

    def __init__(
        self,
        options: ClusterOptions,
        machine: Machine,
        make_policy: Callable[[], PrefillPolicy],
        turns: Sequence[SimulatedTurn],
        source: TurnSource,
        *,
        controller: PoolController | None = None,
        faults: Sequence[Fault] = (),
        deadline: Callable[[SimulatedTurn], float | None] | None = None,
    ) -> None:
        if controller is not None and not options.short_instances:
            raise ValueError("a pool controller needs short_instances of at least 1 to begin with")
        self._options = options
        self._machine = machine
        self._cost = KnownCost(machine.profile)
        self._true_cost = machine.cost
        self._make_policy = make_policy
        self._turns = turns
        self._source = source
        self._deadline = deadline
        self._heap: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._serial = count()
        self._holders = Holders()
        self._router = self._new_router(parse_routing(options.routing))
        self._decode_router = self._new_router(LeastLoaded("tokens"))
        self._nodes: dict[str, Node] = {}
        self._stranded: list[SimulatedRequest] = []
        """Requests for which there is no prefill instance."""
        self._kv_stranded: list[tuple[SimulatedRequest, Node, int]] = []
        """Prefilled, but there is no decode instance."""
        self._jobs: list[SimulatedRequest | None] = [None] * len(turns)
        self._left = len(turns)
        self._heard_at = 0.0
        """When instances last gave an account of their queues."""
        self._more_arrivals = True
        self._result = ClusterResult([], 0.0, {})
        self._build()
        self._control: PoolControl | None = None
        if controller is not None:
            self._control = PoolControl(
                controller,
                options.control_seconds,
                interruptible=options.interruptible,
                recalls=options.recalls,
            )
            self._push(options.control_seconds, self._tick, self._control)
        names = list(self._nodes)
        for fault in faults:
            if fault.instance >= len(names):
                raise ValueError(f"{fault} is for none of the {len(names)} instances")
            self._push(fault.time, self._fail, (self._nodes[names[fault.instance]], fault))

    def run(self, progress: Callable[[int], None] | None = None) -> ClusterResult:
        """To the end of the last answer.

        Args:
            progress: told now and then how many answers are complete.

        Raises:
            RuntimeError: requests are left that no instance will ever take.
        """
        arrivals = list(self._source.start())
        heap, place, now, told = self._heap, 0, 0.0, self._left
        while self._left:
            if place < len(arrivals) and (not heap or arrivals[place][0] <= heap[0][0]):
                now, turn = arrivals[place]
                place += 1
                self._more_arrivals = place < len(arrivals)
                self._arrive(turn, now)
            elif heap:
                now, _, handle, argument = heappop(heap)
                handle(argument, now)
            else:
                raise RuntimeError(
                    f"{self._left} requests are left and no instance will take them: all have "
                    "failed for good; let them start again, or give a longer workload less"
                )
            if progress is not None and told - self._left >= 1000:
                told = self._left
                progress(len(self._turns) - told)
        return self._finish(now)

    # Building

    def _new_router(self, policy: Any) -> Router:
        options = self._options
        return Router(
            policy,
            FleetModel(
                self._cost.prefill_seconds,
                options.boundary_tokens,
                express=options.express,
                transfer_seconds=self._machine.transfer if options.fetch_kv else None,
                launch_seconds=self._cost.profile.per_launch,
            ),
        )

    def _build(self) -> None:
        options = self._options
        for number in range(options.instances):
            if not options.short_instances:
                pool = Pool.MIXED
            else:
                pool = Pool.SHORT if number < options.short_instances else Pool.LONG
            self._add_node(f"p{number}", pool)
        for number in range(options.decode_instances):
            self._add_node(f"d{number}", Pool.DECODE)

    def _add_node(self, name: str, pool: Pool) -> None:
        capacity = 0 if pool is Pool.DECODE else self._options.cache_tokens
        node = Node(name, pool, None, SimulatedPrefixCache(capacity))  # type: ignore[arg-type]
        node.instance = self._new_instance(node)
        self._nodes[name] = node
        self._router_of(node).added(name, pool, 0.0)

    def _new_instance(self, node: Node) -> SimulatedInstance:
        options = self._options
        return SimulatedInstance(
            self._make_policy(),
            self._true_cost,
            self._machine.layers if options.interruptible else 1,
            partial(self._prefilled, node),
            partial(self._finished, node),
            decodes=options.decode == "same" or node.pool is Pool.DECODE,
        )

    def _router_of(self, node: Node) -> Router:
        return self._decode_router if node.pool is Pool.DECODE else self._router

    # Events

    def _push(self, time: float, handle: Callable[[Any, float], None], argument: Any) -> None:
        heappush(self._heap, (time, next(self._serial), handle, argument))

    def _schedule(self, node: Node) -> None:
        wake = node.instance.wake_at
        if wake < node.scheduled:
            node.scheduled = wake
            self._push(wake, self._wake, node)

    def _wake(self, node: Node, now: float) -> None:
        if now != node.scheduled:
            return  # an earlier event took its place
        node.scheduled = inf
        if node.instance.wake_at <= now:
            node.instance.advance(now)
        self._schedule(node)

    def _arrive(self, turn: SimulatedTurn, now: float) -> None:
        due = self._deadline(turn) if self._deadline is not None else None
        job = SimulatedRequest(
            str(turn.index),
            now,
            turn.prompt_tokens,
            0,
            turn.output_tokens,
            None if due is None else now + due,
            row=turn.index,
        )
        self._jobs[turn.index] = job
        self._place(job, now)

    def _place(self, job: SimulatedRequest, now: float) -> None:
        """Send a request to a prefill instance: all of its prompt, and its tokens so far."""
        turn = self._turns[job.row]
        cached = self._holders.cached(turn.prompt) if turn.history is None else NOTHING
        tokens = turn.prompt_tokens + job.produced
        request = RouteRequest(job.id, tokens, cached, turn.history or 0)
        router = self._router
        if not router.view.entries:
            self._stranded.append(job)
            return
        self._hear(now)
        name = router.choose(request, now)
        place = router.dispatched(request, name, now)
        job.new_tokens, job.history = place.new_tokens, place.history
        self._result.cached_tokens += place.history
        if self._control is not None:
            charge = router.charged(job.id)
            pool = Pool.SHORT if charge.short else Pool.LONG
            self._control.controller.arrived(pool, charge.seconds, now)
        node = self._nodes[name]
        if place.fetch_from is None:
            node.instance.submit(job, now)
            self._schedule(node)
        else:
            self._result.fetched_tokens += place.fetch_tokens
            seconds = self._machine.transfer(place.fetch_tokens)
            self._send(job, node, now + seconds, self._deliver)

    def _hear(self, now: float) -> None:
        """What instances say of their queues, if it is time."""
        period = self._options.report_seconds
        if not period or now < self._heard_at + period:
            return
        self._heard_at = now
        for node in self._nodes.values():
            # One that waits for KV is charged for work that its policy does not know of yet.
            if node.alive and node.pool is not Pool.DECODE and not node.transfers:
                queue = node.instance.policy.state(now)
                self._router.reported(node.id, queue.seconds, queue.short_seconds, now)

    def _send(
        self, job: SimulatedRequest, node: Node, until: float, then: Callable[[Any, float], None]
    ) -> None:
        """KV goes to or from ``node``; if that fails meanwhile, its next life knows nothing."""
        node.transfers[job.id] = job
        self._push(until, then, (job, node, node.life))

    def _deliver(self, sent: tuple[SimulatedRequest, Node, int], now: float) -> None:
        """A fetched prefix has arrived."""
        job, node, life = sent
        if node.life != life:
            return
        del node.transfers[job.id]
        node.instance.submit(job, now)
        self._schedule(node)

    def _prefilled(self, node: Node, job: SimulatedRequest, now: float) -> None:
        self._router.prefilled(job.id, now)
        turn = self._turns[job.row]
        if turn.prompt:
            self._holders.insert(node.id, node.cache, turn.prompt)
        if job.deadline is not None:
            node.lateness += now - job.deadline
            node.first_tokens += 1

    def _finished(self, node: Node, job: SimulatedRequest, now: float) -> None:
        self._router_of(node).finished(job.id, now)
        options = self._options
        if options.decode == "apart" and job.produced < job.output_tokens:
            seconds = self._machine.transfer(job.prompt_tokens)
            self._send(job, node, now + seconds, self._hand_over)
            return
        self._left -= 1
        turn = self._turns[job.row]
        if turn.answer and node.pool is not Pool.DECODE:
            self._holders.insert(node.id, node.cache, (*turn.prompt, *turn.answer))
        answered = now
        if options.decode == "none":
            answered += options.token_seconds * (job.output_tokens - 1)
        for time, later in self._source.answered(turn, answered):
            self._push(time, self._arrive, later)

    def _hand_over(self, sent: tuple[SimulatedRequest, Node, int], now: float) -> None:
        """A prompt's KV has been sent to a decode instance, which is chosen only now."""
        job, node, life = sent
        if node.life != life:
            return
        router = self._decode_router
        if not router.view.entries:
            self._kv_stranded.append(sent)  # its sender keeps the KV
            return
        del node.transfers[job.id]
        request = RouteRequest(job.id, job.prompt_tokens)
        target = self._nodes[router.choose(request, now)]
        router.dispatched(request, target.id, now)
        target.instance.adopt(job, now)
        self._schedule(target)

    # Failures

    def _fail(self, what: tuple[Node, Fault], now: float) -> None:
        node, fault = what
        if not node.alive:
            return
        node.alive = False
        node.life += 1
        node.scheduled = inf
        self._router_of(node).removed(node.id)
        node.cache.clear()
        node.totals.failures += 1
        node.totals.add(node.instance)
        lost = [*node.instance.withdraw(), *node.transfers.values()]
        node.transfers.clear()
        if isfinite(fault.down_seconds):
            ready = now + fault.down_seconds + self._options.start_seconds
            self._push(ready, self._start, node)
        for job in lost:
            self._restart(job, now)

    def _restart(self, job: SimulatedRequest, now: float) -> None:
        self._result.restarts += 1
        self._place(job, now)

    def _start(self, node: Node, now: float) -> None:
        node.alive = True
        node.busy_before = 0.0
        node.instance = self._new_instance(node)
        self._router_of(node).added(node.id, node.pool, now)
        if node.pool is Pool.DECODE:
            waiting, self._kv_stranded = self._kv_stranded, []
            for sent in waiting:
                self._hand_over(sent, now)
        else:
            stranded, self._stranded = self._stranded, []
            for job in stranded:
                self._place(job, now)
            self._recall((), {node.pool}, now)

    def _tick(self, control: PoolControl, now: float) -> None:
        prefills = [node for node in self._nodes.values() if node.pool is not Pool.DECODE]
        moves = control.decide(prefills, self._router, now)
        if moves:
            moved = [self._nodes[move.instance_id] for move in moves]
            self._recall(moved, {move.target for move in moves}, now)
        if self._heap or self._more_arrivals:
            self._push(now + control.period, self._tick, control)

    def _recall(self, moved: Sequence[Node], joined: set[Pool], now: float) -> None:
        """Send again what waits on moved instances, and in the pools that they joined."""
        if not self._options.recalls:
            return
        jobs: list[SimulatedRequest] = []
        for node in self._nodes.values():
            if node.alive and (node.pool in joined or node in moved):
                jobs += node.instance.recall(now)
                self._schedule(node)
        for job in sorted(jobs, key=lambda job: (job.arrival, job.row)):
            self._router.finished(job.id, now)
            self._place(job, now)

    def _finish(self, now: float) -> ClusterResult:
        result = self._result
        result.end = now
        result.jobs = [job for job in self._jobs if job is not None]
        for node in self._nodes.values():
            if node.alive:
                node.totals.add(node.instance)
            result.nodes[node.id] = node.totals
        if self._control is not None:
            result.moves = self._control.moves
        return result
