"""One run: a workload, a policy and a setting in, every request with its times out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pla_serve.policy.admission import Admission
from pla_serve.policy.cost import CostModel
from pla_serve.policy.pools.protocol import PoolController
from pla_serve.policy.pools.registry import parse_controller
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import parse_policy
from pla_serve.policy.temporal import PrefillFirst
from pla_serve.simulator.cluster import Cluster
from pla_serve.simulator.cluster_options import ClusterOptions, SimulatedTraffic
from pla_serve.simulator.faults import Fault, draw_faults
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import KnownCost
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.setting import RunSpec, Setting
from pla_serve.simulator.solo import serve
from pla_serve.simulator.tiers import draw_tiers
from pla_serve.simulator.totals import Totals
from pla_serve.simulator.turns import ClosedLoop, OpenLoop, SimulatedTurn, TurnSource, turns_of
from pla_serve.simulator.workload import TraceWorkload, uncached

RequestsDone = Callable[[int], None]
"""Called now and then with the number of requests that are complete."""
SHORT_TOKENS = 256
"""Most uncached tokens of a short request, in reports and for routers."""


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Result of one run."""

    jobs: list[SimulatedRequest]
    """Requests in order of the workload, each with its times."""
    end: float
    """Seconds of virtual time at which the last answer was complete."""
    prefill: Totals
    """Sums over all instances that prefill."""
    decode: Totals
    """Sums over the decode instances."""
    moves: int = 0
    restarts: int = 0
    fetched_tokens: int = 0


def simulate(spec: RunSpec, progress: RequestsDone | None = None) -> SimulationResult:
    """Serve all requests to their end.

    Raises:
        ValueError: the policy's spec does not fit.
    """
    setting, workload = spec.setting, spec.workload
    cost = KnownCost(setting.machine.profile)
    make = policy_maker(spec.policy, setting, cost)
    alone = setting.fleet.instances == 1 and setting.fleet.fail_every is None
    if alone and setting.kv_tokens is None and not setting.linked and setting.mode != "pd-spatial":
        return _solo(make(), setting, workload, progress)
    return _cluster(make, setting, workload, cost, progress)


def policy_maker(text: str, setting: Setting, cost: CostModel) -> Callable[[], PrefillPolicy]:
    """Makes fresh policies for the instances of a setting.

    Raises:
        ValueError: there is no such policy or knob, or a value does not fit.
    """
    spec = parse_policy(text)
    config = spec.configure(setting.policy_config)

    def make() -> PrefillPolicy:
        policy = spec.create(config, cost)
        return PrefillFirst(policy, config, cost) if setting.mode == "pd-temporal" else policy

    return make


def _solo(
    policy: PrefillPolicy,
    setting: Setting,
    workload: TraceWorkload,
    progress: RequestsDone | None,
) -> SimulationResult:
    """One instance, and no arrival waits for an answer: without the bookkeeping of a fleet."""
    instance = SimulatedInstance(
        policy,
        setting.machine.cost,
        setting.machine.layers if setting.preemption else 1,
        _ignore,
        _ignore,
        decodes=setting.mode != "prefill",
    )
    instance.admission = Admission() if setting.tiers else None
    jobs = workload.jobs(draw_tiers(workload.rows, setting.tier_shares, setting.seed))
    end = serve(instance, jobs, progress)
    totals = Totals()
    totals.count(instance)
    return SimulationResult(jobs, end, totals, Totals())


def _ignore(job: SimulatedRequest, now: float) -> None:
    """Do nothing with a callback that nobody waits for."""


def _cluster(
    make: Callable[[], PrefillPolicy],
    setting: Setting,
    workload: TraceWorkload,
    cost: CostModel,
    progress: RequestsDone | None,
) -> SimulationResult:
    fleet = setting.fleet
    turns = _turns(setting, workload)
    options = ClusterOptions(
        instances=fleet.instances,
        short_instances=fleet.short_instances,
        decode={"prefill": "none", "pd-spatial": "apart"}.get(setting.mode, "same"),  # type: ignore[arg-type]
        decode_instances=fleet.decode_instances,
        routing=fleet.route,
        express=setting.preemption and make().capabilities.leaves_at_layer_boundary,
        boundary_tokens=SHORT_TOKENS,
        interruptible=setting.preemption,
        fetch_kv=fleet.fetch_kv,
        cache_tokens=setting.kv_tokens or 0,
        control_seconds=fleet.control_seconds,
        token_seconds=_token_seconds(setting, cost),
    )
    tiers = draw_tiers(workload.rows, setting.tier_shares, setting.seed)
    cluster = Cluster(
        options,
        setting.machine,
        make,
        SimulatedTraffic(turns, _source(setting, turns), tiers=tiers),
        controller=_controller(setting),
        faults=_faults(setting, workload),
    )
    result = cluster.run(progress)
    prefill, decode = Totals(), Totals()
    for name, totals in result.nodes.items():
        (decode if name.startswith("d") else prefill).add(totals)
    return SimulationResult(
        result.jobs,
        result.end,
        prefill,
        decode,
        len(result.moves),
        result.restarts,
        result.fetched_tokens,
    )


def _turns(setting: Setting, workload: TraceWorkload) -> list[SimulatedTurn]:
    turns = turns_of(workload.rows, workload.stretch)
    if setting.kv_tokens is None:
        for turn, row in zip(turns, workload.rows, strict=True):
            turn.history = uncached(row)[1]
            turn.prompt = ()
    return turns


def _source(setting: Setting, turns: list[SimulatedTurn]) -> TurnSource:
    if setting.clients is not None:
        return ClosedLoop(turns, setting.clients)
    return OpenLoop(turns, wait=setting.wait_for_answers)


def _token_seconds(setting: Setting, cost: CostModel) -> float:
    if setting.mode != "prefill":
        return 0.0
    if setting.token_seconds is not None:
        return setting.token_seconds
    return cost.work_seconds(1, 0, 0, 1, 1)


def _controller(setting: Setting) -> PoolController | None:
    if setting.fleet.controller is None:
        return None
    return parse_controller(setting.fleet.controller)


def _faults(setting: Setting, workload: TraceWorkload) -> list[Fault]:
    """Until twice the time in which the workload should be over."""
    fleet = setting.fleet
    if fleet.fail_every is None:
        return []
    until = 2 * max(workload.span, workload.offered_seconds / fleet.instances)
    count = fleet.instances + fleet.decode_instances
    return draw_faults(count, fleet.fail_every, fleet.down_seconds, until, setting.seed)
