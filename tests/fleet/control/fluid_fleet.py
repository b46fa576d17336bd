"""Links without instances, and work that flows through them: time is an argument everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from pla_serve.fleet.control.control import ControlOptions, FleetControl
from pla_serve.fleet.link.protocol import Inbound, InstanceFacts, InstanceReport, Role
from pla_serve.policy.pools.protocol import Move, Pool, PoolController
from pla_serve.policy.pools.stages import StageController
from pla_serve.wire.engine import EngineLoad

FACTS = InstanceFacts(
    boot="1",
    kind="pla",
    model="m",
    max_model_len=512,
    vocab_size=96,
    kv_tokens=1024,
    block_tokens=16,
    express=True,
)


@dataclass(eq=False)
class FakeLink:
    """The part of `Link` that control uses. A role that is set is reported at once."""

    url: str
    role: Role
    first_role: Role = "mixed"
    connected: bool = True
    facts: InstanceFacts | None = FACTS
    last_report: InstanceReport | None = None
    told: list[Role] = field(default_factory=list)
    deaf: bool = False
    """Does not obey."""

    def __post_init__(self) -> None:
        self.first_role = self.role
        self.say()

    def say(self, *, ready: bool = True, draining: bool = False, **numbers: float) -> None:
        self.last_report = InstanceReport(
            role=self.role,
            ready=ready,
            draining=draining,
            requests=int(any(numbers.values())),
            load=EngineLoad(**numbers),  # type: ignore[arg-type]
        )

    def set_role(self, role: Role) -> None:
        self.told.append(role)
        if not self.deaf:
            self.role = role
            self.say()

    def die(self) -> None:
        self.connected, self.last_report = False, None

    def restart(self) -> None:
        """It comes back as it was started."""
        self.connected, self.role = True, self.first_role
        self.say()

    def send(self, message: Inbound) -> None:
        raise AssertionError("control sends no requests")

    def drain(self, on: bool) -> None:
        raise AssertionError("control drains by role")

    async def run(self) -> None: ...

    async def close(self) -> None: ...


class FluidFleet:
    """Two classes of prefill and a decode stage, as fluids over instances.

    Work of a class is spread over the living instances of its pool, and over all that prefill when
    the pool has none; decodes fill the memory of the decode pool evenly.
    """

    def __init__(
        self,
        roles: list[Role],
        controller: PoolController | None,
        *,
        stages: StageController | None = None,
        period: float = 1.0,
    ) -> None:
        self.links = [FakeLink(f"http://i{number}", role) for number, role in enumerate(roles)]
        options = ControlOptions(period_seconds=period)
        self.control = FleetControl(lambda: self.links, controller, options, stages=stages)
        self.queued = {Pool.SHORT: 0.0, Pool.LONG: 0.0}
        self.now = 0.0

    def count(self, role: Role) -> int:
        return sum(link.connected and link.role == role for link in self.links)

    def run(
        self, periods: int, short: float, long: float, decode: float = 0.0, jobs: int = 8
    ) -> list[list[Move]]:
        """``short``, ``long``: work that arrives a second; ``decode``: instances' worth of KV."""
        made = []
        for _ in range(periods):
            length = self.control.options.period_seconds / jobs
            for _ in range(jobs):
                self._flow(length, short, long)
            self._report(decode)
            made.append(list(self.control.tick(self.now)))
        return made

    def burst(self, pool: Pool, seconds: float) -> None:
        self.control.dispatched(pool is Pool.SHORT, seconds, self.now)
        self.queued[pool] += seconds

    def _flow(self, length: float, short: float, long: float) -> None:
        for pool, rate in ((Pool.SHORT, short), (Pool.LONG, long)):
            if rate:
                self.control.dispatched(pool is Pool.SHORT, rate * length, self.now)
            size = self.count(pool.value)  # type: ignore[arg-type]
            self.queued[pool] = max(0.0, self.queued[pool] + (rate - size) * length)
        self.now += length

    def _report(self, decode: float) -> None:
        decoders = max(1, self.count("decode"))
        for link in self.links:
            if not link.connected:
                continue
            share = {
                pool: self.queued[pool] / max(1, self.count(pool.value))  # type: ignore[arg-type]
                if link.role == pool.value
                else 0.0
                for pool in self.queued
            }
            usage = min(1.0, decode / decoders) if link.role == "decode" else 0.0
            link.say(
                queued_short_seconds=share[Pool.SHORT],
                queued_long_seconds=share[Pool.LONG],
                kv_usage=usage,
            )
            assert link.last_report is not None
            self.control.report(link, link.last_report)  # type: ignore[arg-type]
