"""The router's own metrics, beside those of its API."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from pla_serve.fleet.link.protocol import InstanceReport, Link
from pla_serve.fleet.router.circuit import CircuitState
from pla_serve.fleet.router.fleet import Fleet
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.routed_request import Attempt
from pla_serve.server.records.metrics import Metrics

DECISION_SECONDS = (
    *(0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05),
)
TOKENS_OFF = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2.0, 4.0, 10.0, 100.0)

INSTANCE_GAUGES = {
    "instance_up": "1 while it is connected.",
    "instance_open": "1 while it takes new requests.",
    "instance_circuit": "Its circuit: 0 closed, 1 half-open, 2 open.",
    "instance_requests": "Requests that this router has in flight there.",
    "instance_charged_seconds": "Predicted prefill of this router's requests that wait there.",
    "instance_queued_short_seconds": "Predicted prefill of all short requests that wait there.",
    "instance_queued_long_seconds": "Predicted prefill of all long requests that wait there.",
    "instance_running": "Requests that decode there.",
    "instance_parked": "Requests that wait there for KV memory.",
    "instance_kv_usage": "Share of its KV that requests hold, 0 to 1.",
}
POOL_GAUGES = {
    "pool_instances": "Instances by role that are connected.",
    "pool_queued_seconds": "Predicted prefill of all that waits there, by role.",
}
FLEET_GAUGES = {
    "requests_in_flight": "Requests without their last token.",
    "requests_parked": "Requests that no instance takes just now.",
    "prefix_blocks": "Blocks in the record of what instances cache.",
}
_CIRCUIT = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}


class FleetMetrics(Metrics):
    """Metrics of a router's API and, named ``pla_serve_router:*``, those of its fleet.

    Implements `RoutingObserver`.
    """

    def __init__(self, model_name: str) -> None:
        super().__init__(model_name)
        self._fleet: Fleet | None = None
        self._of_fleet = {name: self._own(Gauge, name, text) for name, text in FLEET_GAUGES.items()}
        self._of_instance = {
            name: self._own(Gauge, name, text, "instance") for name, text in INSTANCE_GAUGES.items()
        }
        self._of_pool = {
            name: self._own(Gauge, name, text, "pool") for name, text in POOL_GAUGES.items()
        }
        self._decisions = self._own(
            Histogram, "decision_seconds", "Time to choose an instance.", buckets=DECISION_SECONDS
        )
        self._sent = self._own(Counter, "dispatched", "Requests sent, by instance.", "instance")
        self._moves = self._own(
            Counter,
            "moved",
            "Requests that left an instance to go elsewhere: it was lost, ended them with an "
            "error, or refused them. resumed: the client had got tokens.",
            "instance",
            "reason",
            "resumed",
        )
        self._refusals = self._own(
            Counter,
            "refused",
            "Requests that no instance served: capacity, share (of an API key), failures.",
            "reason",
        )
        self._hand_overs = self._own(
            Counter, "hand_overs", "KV hand-overs between instances by outcome.", "outcome"
        )
        self._prefix_error = self._own(
            Histogram,
            "prefix_error_tokens",
            "Cached prompt tokens, believed at dispatch against found: the difference.",
            buckets=TOKENS_OFF,
        )
        self._ttft_ratio = self._own(
            Histogram,
            "first_token_ratio",
            "Time from dispatch to the first token as a multiple of what was predicted.",
            buckets=RATIOS,
        )

    def watch(self, fleet: Fleet) -> None:
        """Set the fleet whose state `render` shows."""
        self._fleet = fleet

    def render(self) -> bytes:
        if self._fleet is not None:
            self._look(self._fleet)
        return super().render()

    # Observer

    def decided(self, seconds: float) -> None:
        self._decisions.observe(seconds)

    def dispatched(self, instance: str, short: bool, seconds: float, now: float) -> None:
        self._sent.labels(self._model, instance).inc()

    def began(
        self, attempt: Attempt, cached_tokens: int | None, lateness: float | None, now: float
    ) -> None:
        if cached_tokens is not None:
            self._prefix_error.observe(abs(cached_tokens - attempt.believed))
        if attempt.expected > 0:
            self._ttft_ratio.observe((now - attempt.sent) / attempt.expected)

    def moved(self, instance: str, reason: str, resumed: bool) -> None:
        self._moves.labels(self._model, instance, reason, str(resumed).lower()).inc()

    def refused(self, reason: str) -> None:
        self._refusals.labels(self._model, reason).inc()

    def handed_over(self, outcome: str) -> None:
        self._hand_overs.labels(self._model, outcome).inc()

    def reported(self, link: Link, report: InstanceReport) -> None:
        """Do nothing: `render` reads the last report itself."""

    def gone(self, link: Link) -> None:
        """Do nothing: `render` reads the connections itself."""

    # State

    def _look(self, fleet: Fleet) -> None:
        instances = fleet.instances
        reports = [i.report for i in instances if i.report is not None]
        waiting = sum(r.load.waiting for r in reports)
        self.set("pla_serve:engine_up", float(fleet.serving))
        self.set("vllm:num_requests_running", sum(r.load.running for r in reports))
        self.set("vllm:num_requests_waiting", waiting)
        self.set("pla_serve:waiting_tokens", sum(r.load.waiting_tokens for r in reports))
        self.set("pla_serve:requests_parked", sum(r.load.parked for r in reports))
        self.set("pla_serve:kv_cached_tokens", sum(r.load.kv_cached_tokens for r in reports))
        self.set("pla_serve:kv_tokens", sum(i.facts.kv_tokens for i in instances if i.facts))
        self.set("pla_serve:boundary_tokens", fleet.dispatcher.cost.boundary_tokens)
        if reports:
            self.set(
                "vllm:kv_cache_usage_perc", sum(r.load.kv_usage for r in reports) / len(reports)
            )
        self._of_fleet["requests_in_flight"].set(fleet.in_flight)
        self._of_fleet["requests_parked"].set(fleet.parked)
        self._of_fleet["prefix_blocks"].set(len(fleet.dispatcher.prefixes))
        pools = dict.fromkeys(("mixed", "short", "long", "decode"), (0, 0.0))
        for instance in instances:
            self._show(fleet, instance)
            count, seconds = pools[instance.role]
            pools[instance.role] = (count + instance.connected, seconds + _queued(instance))
        for role, (count, seconds) in pools.items():
            self._of_pool["pool_instances"].labels(self._model, role).set(count)
            self._of_pool["pool_queued_seconds"].labels(self._model, role).set(seconds)

    def _show(self, fleet: Fleet, instance: FleetInstance) -> None:
        report = instance.report
        values = {
            "instance_up": float(instance.connected),
            "instance_open": float(instance.open),
            "instance_circuit": _CIRCUIT[instance.circuit.state(fleet.clock())],
            "instance_requests": len(instance.attempts),
            "instance_charged_seconds": fleet.dispatcher.outstanding(instance.name)[1],
            "instance_queued_short_seconds": report.load.queued_short_seconds if report else 0.0,
            "instance_queued_long_seconds": report.load.queued_long_seconds if report else 0.0,
            "instance_running": report.load.running if report else 0,
            "instance_parked": report.load.parked if report else 0,
            "instance_kv_usage": report.load.kv_usage if report else 0.0,
        }
        for name, value in values.items():
            self._of_instance[name].labels(self._model, instance.name).set(value)

    @property
    def _model(self) -> str:
        return self._label["model_name"]

    def _own(self, kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
        metric = kind(
            f"pla_serve_router:{name}",
            text,
            ["model_name", *labels],
            registry=self.registry,
            **options,
        )
        return metric if labels else metric.labels(self._model)


def _queued(instance: FleetInstance) -> float:
    report = instance.report
    return report.load.queued_seconds if report else 0.0
