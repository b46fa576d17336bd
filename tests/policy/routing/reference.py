"""Slow and obvious accounts of a fleet, to hold the arrays against."""

from __future__ import annotations

from dataclasses import dataclass, field

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.request import RouteRequest


@dataclass
class SlowInstance:
    pool: Pool
    ready: float
    express_ready: float
    waiting: dict[str, tuple[int, float, bool, float]] = field(default_factory=dict)
    """New tokens, seconds, short, time."""
    unfinished: set[str] = field(default_factory=set)

    def done(self, request_id: str, now: float) -> None:
        if request_id not in self.waiting:
            return
        _, _, short, _ = self.waiting.pop(request_id)
        left = sum(seconds for _, seconds, _, _ in self.waiting.values())
        self.ready = min(max(self.ready, now), now + left)
        if short:
            express = sum(seconds for _, seconds, s, _ in self.waiting.values() if s)
            self.express_ready = min(max(self.express_ready, now), now + express)

    def wait(self, express: bool, now: float, grace: float) -> float:
        """Until such a request begins: what is late is given as much time again, shorts that are
        later than ``grace``."""
        ready = self.express_ready if express else self.ready
        held = any(short or not express for _, _, short, _ in self.waiting.values())
        late = now - ready > (grace if express else 0.0)
        return now - ready if held and late else max(0.0, ready - now)

    @property
    def short_waiting(self) -> int:
        return sum(short for _, _, short, _ in self.waiting.values())

    @property
    def tokens(self) -> int:
        return sum(tokens for tokens, _, _, _ in self.waiting.values())


@dataclass
class SlowFleet:
    """A millisecond a token, and no transfer."""

    boundary: int
    express: bool
    instances: dict[str, SlowInstance] = field(default_factory=dict)

    def uncached(self, request: RouteRequest, instance_id: str) -> int:
        return request.prompt_tokens - min(
            request.cached.get(instance_id, 0), request.prompt_tokens - 1
        )

    def ttft(self, request: RouteRequest, instance_id: str, now: float) -> float:
        instance = self.instances[instance_id]
        new = self.uncached(request, instance_id)
        express = self.express and new <= self.boundary
        return instance.wait(express, now, self.boundary * 1e-3) + new * 1e-3

    def dispatched(self, request: RouteRequest, instance_id: str, now: float) -> None:
        instance = self.instances[instance_id]
        new = self.uncached(request, instance_id)
        short = new <= self.boundary
        instance.waiting[request.id] = (new, new * 1e-3, short, now)
        instance.unfinished.add(request.id)
        instance.ready = max(instance.ready, now) + new * 1e-3
        if short:
            instance.express_ready = max(instance.express_ready, now) + new * 1e-3

    def report(self, instance_id: str, seconds: float, express: float, at: float) -> None:
        instance = self.instances[instance_id]
        later = [w for w in instance.waiting.values() if w[3] > at]
        instance.ready = at + seconds + sum(w[1] for w in later)
        instance.express_ready = at + express + sum(w[1] for w in later if w[2])
