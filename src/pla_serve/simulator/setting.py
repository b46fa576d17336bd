"""What is to be simulated, as numbers and names; nothing of it changes during a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.routing.registry import parse_routing
from pla_serve.simulator.machine import Machine
from pla_serve.simulator.workload import TraceWorkload

DecodeMode = Literal["prefill", "mix", "pd-temporal", "pd-spatial"]
"""Where answers decode: elsewhere; in the batches of prefills; on the same instance in turns with
them; on decode instances to which the KV is sent."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A first token is in time within ``seconds``, or within ``stretch`` times what the request
    takes alone on an idle machine, whichever is more.

    Raises:
        ValueError: a field is negative or not finite.
    """

    seconds: float = 0.4
    stretch: float = 5.0

    def __post_init__(self) -> None:
        for name in ("seconds", "stretch"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"SLO {name} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class FleetSetting:
    """What only matters among several instances.

    Raises:
        ValueError: a field is out of range, or two do not go together.
    """

    instances: int = 1
    """That prefill."""
    decode_instances: int = 0
    routing: str | None = None
    short_instances: int = 0
    """So many are a pool for short requests, the rest one for long ones; 0: no pools."""
    controller: Literal["pressure", "balance"] | None = None
    """Moves instances between the pools."""
    control_seconds: float = 1.0
    fail_every: float | None = None
    """Mean seconds between two failures of an instance."""
    down_seconds: float = 30.0
    """From a failure until the instance takes requests again."""
    fetch_kv: bool = False
    """A prefix that another instance has cached may be fetched from it."""

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise ValueError(f"there must be at least 1 instance, not {self.instances}")
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
    """What all runs of a comparison have in common.

    Raises:
        ValueError: two fields do not go together, or one is out of range.
    """

    machine: Machine
    fleet: FleetSetting = field(default_factory=FleetSetting)
    mode: DecodeMode = "prefill"
    seed: int = 0
    preemption: bool = True
    """The machine can leave a prefill at a layer boundary."""
    kv_tokens: int | None = None
    """KV of earlier prompts that an instance keeps. None: the trace says what was cached, as in a
    cache without bounds that all instances share."""
    clients: int | None = None
    """A closed loop of so many; None: arrivals by the clock."""
    wait_for_answers: bool = False
    """A later turn of a session also waits for the answer before it, and then its thought."""
    token_seconds: float | None = None
    """Mode prefill: after the first token, each other token of an answer comes so much later, as
    far as the next turn waits for it. None: a decode step of the machine alone."""
    max_pause: float = 600.0
    """Pauses of sessions that have clocks of their own are cut to it."""
    objective: Objective = Objective()

    def __post_init__(self) -> None:
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
    def linked(self) -> bool:
        """Some arrivals wait for answers."""
        return self.clients is not None or self.wait_for_answers

    @property
    def policy_config(self) -> PolicyConfig:
        """What a policy is made with; its knobs go before."""
        return PolicyConfig(
            max_batch_tokens=self.machine.max_batch_tokens,
            interruptible=self.preemption,
            layers=self.machine.layers,
        )

    @property
    def decode_batch(self) -> int:
        """Answers that decode together in ideal execution; 0: not on the prefill instances."""
        return self.policy_config.max_batch_requests if self.mode in ("mix", "pd-temporal") else 0


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run."""

    workload: TraceWorkload
    policy: str
    """As `policy.registry.parse_policy` reads it."""
    load: float | None
    """None in a closed loop."""
    setting: Setting
