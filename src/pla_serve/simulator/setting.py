"""Settings of simulations, which are flags of ``pla-serve simulate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Literal

from pla_serve.flags import Flag
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.knobs import check_knobs
from pla_serve.policy.pools.registry import CONTROLLERS, parse_controller
from pla_serve.policy.routing.registry import ROUTINGS, parse_routing
from pla_serve.policy.tiers import TierShare, parse_tier_share, tiers_by_name
from pla_serve.simulator.machine import Machine
from pla_serve.simulator.workload import TraceWorkload

RUNS, MACHINE, ARRIVALS = "What to run", "Machine", "Arrivals"
FLEET, OUTPUT = "Several instances", "Output"

DecodeMode = Literal["prefill", "mix", "pd-temporal", "pd-spatial"]


def known_routing(text: str) -> str:
    """``text``, if it names a routing policy and knobs that it has.

    Raises:
        ValueError: it does not; the message names what there is.
    """
    parse_routing(text)
    return text


def known_controller(text: str) -> str:
    """``text``, if it names a pool controller and knobs that it has.

    Raises:
        ValueError: it does not; the message names what there is.
    """
    parse_controller(text)
    return text


@dataclass(frozen=True, slots=True)
class Objective:
    """Latency objective: a first token is in time within ``seconds``, or within ``stretch`` times
    what the request takes alone on an idle machine, whichever is more. Each further token is due
    ``token_seconds`` later, or ``stretch`` times a decode step of the request alone, likewise.

    Raises:
        ValueError: a field is negative or not finite.
    """

    seconds: Annotated[
        float,
        Flag(
            "A first token is in time within this, or within --slo-stretch times the request's "
            "time alone.",
            unit="seconds",
            panel=OUTPUT,
            name="--slo-seconds",
        ),
    ] = 0.4
    stretch: Annotated[
        float,
        Flag("See --slo-seconds and --slo-token-seconds.", panel=OUTPUT, name="--slo-stretch"),
    ] = 5.0
    token_seconds: Annotated[
        float,
        Flag(
            "Each further token of an answer is due so long after the one before it was due, or "
            "after --slo-stretch times a decode step of the request alone.",
            unit="seconds",
            panel=OUTPUT,
            name="--slo-token-seconds",
        ),
    ] = 0.1

    def __post_init__(self) -> None:
        for name in ("seconds", "stretch", "token_seconds"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"SLO {name} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class FleetSetting:
    """Settings that matter among several instances.

    Raises:
        ValueError: a field is out of range, or two do not go together.
    """

    instances: Annotated[int, Flag("Instances that prefill.", unit="instances", panel=FLEET)] = 1
    decode_instances: Annotated[
        int,
        Flag("Instances that decode, for mode pd-spatial.", unit="instances", least=0, panel=FLEET),
    ] = 0
    routing: Annotated[
        str | None,
        Flag(
            "Which instance a request goes to. None: predicted, or class-pools where there are "
            "pools. Routing policies:",
            panel=FLEET,
            metavar="NAME[:KNOB=VALUE]...",
            read=known_routing,
            more=ROUTINGS.help,
        ),
    ] = None
    short_instances: Annotated[
        int,
        Flag(
            "Instances that are a pool for short requests; the others are one for long requests. "
            "0: no pools.",
            unit="instances",
            least=0,
            panel=FLEET,
        ),
    ] = 0
    controller: Annotated[
        str | None,
        Flag(
            "Moves instances between the pools. Controllers:",
            panel=FLEET,
            name="--pool-controller",
            metavar="NAME[:KNOB=VALUE]...",
            read=known_controller,
            more=CONTROLLERS.help,
        ),
    ] = None
    control_seconds: float = 1.0
    fetch_kv: Annotated[
        bool,
        Flag(
            "Prefixes may be fetched from the caches of other instances.", panel=FLEET, switch=True
        ),
    ] = False
    fail_every: Annotated[
        float | None,
        Flag(
            "Mean time from the start of an instance to its failure. None: they do not fail.",
            unit="seconds",
            panel=FLEET,
        ),
    ] = None
    down_seconds: Annotated[
        float,
        Flag(
            "Time from a failure until the instance takes requests again.",
            unit="seconds",
            panel=FLEET,
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise ValueError(f"there must be at least 1 instance, not {self.instances}")
        check_knobs(self)
        if self.routing is not None:
            parse_routing(self.routing)
            if self.instances == 1:
                raise ValueError("--routing needs --instances of at least 2 to choose from")
        if self.short_instances and not 0 < self.short_instances < self.instances:
            raise ValueError(
                f"--short-instances must leave a long pool: less than {self.instances}, not "
                f"{self.short_instances}"
            )
        if self.fail_every is not None and not self.fail_every > 0:
            raise ValueError(f"--fail-every must be positive, not {self.fail_every}")
        if not self.down_seconds >= 0:
            raise ValueError(f"--down-seconds must be at least 0, not {self.down_seconds}")
        if self.controller is not None and not self.short_instances:
            raise ValueError("--pool-controller needs --short-instances to begin with")

    @property
    def route(self) -> str:
        """The routing policy; with pools one that knows them."""
        return self.routing or ("class-pools" if self.short_instances else "predicted")


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings that all runs of a comparison have in common.

    Raises:
        ValueError: two fields do not go together, or one is out of range.
    """

    machine: Machine
    fleet: FleetSetting = field(default_factory=FleetSetting)
    mode: Annotated[
        DecodeMode,
        Flag(
            "Where answers decode. prefill: elsewhere, not simulated; mix: in the batches of "
            "prefills; pd-temporal: while no prefill waits; pd-spatial: on --decode-instances, to "
            "which the KV is sent.",
            panel=MACHINE,
        ),
    ] = "prefill"
    seed: Annotated[int, Flag("Seed of everything that is drawn.", panel=RUNS)] = 0
    preemption: Annotated[
        bool, Flag("Whether a prefill can be left at a layer boundary.", panel=MACHINE)
    ] = True
    kv_tokens: int | None = None
    """Tokens of earlier prompts whose KV an instance keeps. None: the trace says what was cached,
    as in a cache without bounds that all instances share."""
    clients: Annotated[
        int | None,
        Flag(
            "Clients of a closed loop, which takes the place of --load: each sends its next "
            "request when the last one is answered.",
            unit="clients",
            panel=ARRIVALS,
        ),
    ] = None
    wait_for_answers: Annotated[
        bool,
        Flag(
            "A session's next turn comes no earlier than the answer before it and the thought "
            "after that.",
            panel=ARRIVALS,
            switch=True,
        ),
    ] = False
    token_seconds: Annotated[
        float | None,
        Flag(
            "Mode prefill: time between two tokens of an answer that a next turn waits for. None: "
            "that of a decode step alone.",
            unit="seconds",
            panel=ARRIVALS,
        ),
    ] = None
    max_pause: Annotated[
        float,
        Flag(
            "Longest pause of sessions that have clocks of their own.",
            unit="seconds",
            panel=ARRIVALS,
        ),
    ] = 600.0
    tiers: Annotated[
        tuple[str, ...],
        Flag(
            "A tier with its targets and its share of the requests, drawn by session; repeat it "
            "for each tier. Requests whose targets are predicted not to be kept are refused, and "
            "do not come again.",
            panel=ARRIVALS,
            name="--tier",
            metavar="NAME[:ttft=300ms,tpot=40ms,share=0.3]",
        ),
    ] = ()
    objective: Objective = Objective()

    def __post_init__(self) -> None:
        tiers_by_name(str(each.tier) for each in self.tier_shares)
        if (self.mode == "pd-spatial") != (self.fleet.decode_instances > 0):
            raise ValueError("--mode pd-spatial and --decode-instances (at least 1) go together")
        if self.clients is not None and self.clients < 1:
            raise ValueError(f"--clients must be at least 1, not {self.clients}")
        if self.clients is not None and self.wait_for_answers:
            raise ValueError("--clients wait for answers already; leave out --wait-for-answers")
        if self.kv_tokens is not None and self.kv_tokens < 0:
            raise ValueError(f"--kv-tokens must be at least 0, not {self.kv_tokens}")
        if self.fleet.fetch_kv and (self.kv_tokens is None or self.fleet.instances == 1):
            raise ValueError("--fetch-kv needs --kv-tokens, and several instances")
        if self.token_seconds is not None and (self.mode != "prefill" or not self.linked):
            raise ValueError(
                "--token-seconds is for --mode prefill with --clients or --wait-for-answers"
            )

    @property
    def tier_shares(self) -> tuple[TierShare, ...]:
        """The tiers of requests, and how many are of each."""
        return tuple(map(parse_tier_share, self.tiers))

    @property
    def linked(self) -> bool:
        """Whether some arrivals wait for answers."""
        return self.clients is not None or self.wait_for_answers

    @property
    def policy_config(self) -> PolicyConfig:
        """Settings of a policy; its own knobs go before them."""
        return PolicyConfig(
            max_batch_tokens=self.machine.max_batch_tokens,
            interruptible=self.preemption,
            layers=self.machine.layers,
        )

    @property
    def decode_batch(self) -> int:
        """Number of answers that decode together in ideal execution; 0 if the prefill instances do
        not decode."""
        return self.policy_config.max_batch_requests if self.mode in ("mix", "pd-temporal") else 0


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run of a comparison."""

    workload: TraceWorkload
    policy: str
    """Policy with its knobs, as `policy.registry.parse_policy` reads it."""
    load: float | None
    """Offered work over capacity; None in a closed loop."""
    setting: Setting
