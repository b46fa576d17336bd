"""One device that executes a policy on virtual time, as `engine.loop` does on a real one.

Nothing happens but at three kinds of moments: a request arrives, a layer boundary at which the
policy has something to decide, and the end of a batch. Between them no time is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, inf

from pla_serve.policy.admission import Admission, Refuse
from pla_serve.policy.calibration import Forecast
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import (
    Batch,
    Chunk,
    Idle,
    PrefillPolicy,
    PrefillRequest,
    Run,
)
from pla_serve.simulator.request import SimulatedRequest

RequestCallback = Callable[[SimulatedRequest, float], None]
"""Called with a job and the time."""
SLACK = 1e-3
"""Share of a layer: a moment so shortly after a boundary counts as at it, because of rounding."""


@dataclass(slots=True)
class SimulatedPass:
    """A batch that is computed."""

    batch: Batch
    seconds: float
    layer: float
    """Seconds of one layer."""
    resumed: float
    """Time at which the batch began, or last went on after a nested batch."""
    done: int = 0
    """Layers computed before ``resumed``."""

    def boundary(self, now: float) -> int:
        """Return the next layer to begin at ``now`` or later."""
        layers = ceil((now - self.resumed) / self.layer - SLACK)
        return self.done + layers if layers > 0 else self.done

    def begins(self, layer: int) -> float:
        """Return the time at which a layer begins, if nothing runs in between."""
        return self.resumed + (layer - self.done) * self.layer


class SimulatedInstance:
    """Owns a policy and the jobs that were given to it.

    Args:
        cost: the true time of a batch (the policy may believe in another).
        layers: boundaries of a pass; 1 is a device that cannot be interrupted.
        prefilled, finished: called when a job reaches these. A prefill ends with the first token.
        decodes: whether jobs go on decoding here after their first token.
        started: called when the first new token of a job begins to be computed.
        decoded: called with every further token but the last.

    ``wake_at`` is when `advance` must be called next; infinite if only an arrival can change
    anything. The callbacks must not call the instance.
    """

    def __init__(
        self,
        policy: PrefillPolicy,
        cost: CostModel,
        layers: int,
        prefilled: RequestCallback,
        finished: RequestCallback,
        *,
        decodes: bool = False,
        started: RequestCallback | None = None,
        decoded: RequestCallback | None = None,
    ) -> None:
        self.policy = policy
        self.jobs: dict[str, SimulatedRequest] = {}
        self.wake_at = inf
        self.busy_seconds = 0.0
        """Spent computing so far; a pass counts when it ends."""
        self.computed_tokens = 0
        """Prefill tokens computed so far."""
        self.batches = 0
        self.express_batches = 0
        """Batches that ran at a layer boundary of another."""
        self._cost = cost
        self._layers = layers
        self._interruptible = layers > 1 and policy.capabilities.leaves_at_layer_boundary
        self._prefilled = prefilled
        self._finished = finished
        self._decodes = decodes
        self._started = started
        self._decoded = decoded
        self.admission: Admission | None = None
        """It refuses requests; None takes them all."""
        self._forecasts: dict[str, Forecast] = {}
        """They say when the first tokens of jobs that have none yet were predicted to come."""
        self._passes: list[SimulatedPass] = []
        """Running batches, each inside the one before it; only the last one is being computed."""
        self._ready = 0
        """Jobs that no running batch computes: while it is 0 the policy has nothing to decide."""

    def submit(self, job: SimulatedRequest, now: float) -> Refuse | None:
        """Add a job whose ``history`` is that of this instance's cache, or refuse it."""
        request = PrefillRequest(
            job.id,
            job.arrival,
            job.new_tokens,
            job.history,
            job.deadline,
            job.priority,
            service=job.service,
            tpot=job.tpot,
        )
        if self.admission is not None:
            own = self._cost.prefill_seconds(job.new_tokens, job.history)
            verdict = self.admission.decide(request, self.policy, own, now)
            if isinstance(verdict, Refuse):
                return verdict
            if not job.service.unhurried:
                self._forecasts[job.id] = verdict.forecast
        self.jobs[job.id] = job
        job.computed = job.history
        self._ready += 1
        self.policy.add(request, now)
        self._plan(now)
        return None

    def adopt(self, job: SimulatedRequest, now: float) -> None:
        """Take a job whose prompt was prefilled elsewhere and whose KV has arrived: it decodes."""
        self.jobs[job.id] = job
        job.computed = job.prompt_tokens
        self._ready += 1
        self._decode(job, now)
        self._plan(now)

    def _decode(self, job: SimulatedRequest, now: float) -> None:
        self.policy.start_decode(job.id, job.computed, job.arrival, now, tpot=job.tpot)

    def not_begun(self) -> list[SimulatedRequest]:
        """Jobs of which nothing was computed here, in order of submission."""
        begun = self._computed_now()
        return [
            job for job in self.jobs.values() if job.computed == job.history and job.id not in begun
        ]

    def abort(self, id: str, now: float) -> None:
        """Forget a job; a batch that computes it goes on to its end. Unknown ids are ignored."""
        job = self.jobs.pop(id, None)
        if job is None:
            return
        self.policy.remove(id)
        self._forecasts.pop(id, None)
        if id not in self._computed_now():
            self._ready -= 1
            self._plan(now)
            return
        for at in self._passes:
            at.batch = _without(at.batch, id)
        if self._leave_aborted(now):
            self.wake_at = now

    def _leave_aborted(self, now: float) -> bool:
        """Leave the passes, from the innermost on, of which all requests were aborted."""
        left = False
        while self._passes:
            top = self._passes[-1]
            if top.batch.prefills or top.batch.decodes:
                break
            self._passes.pop()
            seconds = top.done * top.layer + max(0.0, now - top.resumed)
            self.busy_seconds += seconds
            self.policy.observe(top.batch, seconds, now)
            if self._passes:
                self._passes[-1].resumed = now
            left = True
        return left

    def _computed_now(self) -> set[str]:
        """Ids of the jobs in batches that have begun."""
        return {c.request_id for p in self._passes for c in (*p.batch.prefills, *p.batch.decodes)}

    def withdraw(self) -> list[SimulatedRequest]:
        """Remove and return all jobs, because the instance has failed."""
        jobs = list(self.jobs.values())
        for job in jobs:
            self.policy.remove(job.id)
        self.jobs.clear()
        self._forecasts.clear()
        self._passes.clear()
        self._ready = 0
        self.wake_at = inf
        return jobs

    def advance(self, now: float) -> None:
        """Do what is due at ``now``, which is `wake_at`."""
        if not self._passes:
            self._ask(now)
            return
        top = self._passes[-1]
        layer = top.boundary(now)
        if layer < self._layers:
            self._at_boundary(top, layer, now)
            return
        self._passes.pop()
        self._complete(top, now)
        if self._passes:
            self._passes[-1].resumed = now
            self._leave_aborted(now)
        if self._passes:
            outer = self._passes[-1]
            self._at_boundary(outer, outer.boundary(now), now)
        else:
            self._ask(now)

    def _plan(self, now: float) -> None:
        """Set `wake_at`, after the jobs have changed, to when the policy can decide next."""
        if not self._passes:
            self.wake_at = now
        elif self._interruptible:
            top = self._passes[-1]
            self.wake_at = max(now, top.begins(top.boundary(now)))

    def _ask(self, now: float) -> None:
        """Ask the policy for the next batch, because the device is free."""
        decision = self.policy.next(now)
        if isinstance(decision, Run):
            self._start(decision.batch, now)
        elif isinstance(decision, Idle):
            assert self._ready == 0, f"idle although {self._ready} wait"
            self.wake_at = inf
        else:
            assert decision.until > now, "a wait that is over already would never end"
            self.wake_at = decision.until

    def _at_boundary(self, top: SimulatedPass, layer: int, now: float) -> None:
        batch = None
        asks = self._ready and self._interruptible
        if asks and layer < self._layers:
            batch = self.policy.at_layer_boundary(now, top.batch)
        if batch is None:
            until = layer + 1 if asks else self._layers
            self.wake_at = top.resumed + (until - top.done) * top.layer
            return
        top.done, top.resumed = layer, now
        self.express_batches += 1
        self._start(batch, now)

    def _go_on(self, top: SimulatedPass, layer: int) -> None:
        """Wake at ``layer`` if the policy may have something to decide there, else at the end."""
        asks = self._ready and self._interruptible
        self.wake_at = top.begins(layer if asks else self._layers)

    def _start(self, batch: Batch, now: float) -> None:
        self._ready -= len(batch.prefills) + len(batch.decodes)
        if self._started is not None:
            for chunk in batch.prefills:
                job = self.jobs[chunk.request_id]
                if chunk.history == job.history:
                    self._started(job, now)
        seconds = self._cost.seconds(batch)
        self._passes.append(SimulatedPass(batch, seconds, seconds / self._layers, now))
        self._go_on(self._passes[-1], 0)

    def _complete(self, done: SimulatedPass, now: float) -> None:
        batch = done.batch
        self.busy_seconds += done.seconds
        self.batches += 1
        self.policy.observe(batch, done.seconds, now)
        for chunk in batch.prefills:
            self.computed_tokens += chunk.tokens
            self._settle(chunk, now)
        for chunk in batch.decodes:
            self._settle(chunk, now, decoded=True)

    def _settle(self, chunk: Chunk, now: float, decoded: bool = False) -> None:
        job = self.jobs.get(chunk.request_id)
        if job is None:
            return
        job.computed += chunk.tokens
        if not chunk.completes:
            self._ready += 1
            return
        job.produced += 1
        job.token(now)
        forecast = self._forecasts.pop(job.id, None)
        if forecast is not None and self.admission is not None:
            self.admission.calibration.observe(forecast, now)
        if not decoded:
            self._prefilled(job, now)
        if not self._decodes or job.produced >= job.output_tokens:
            self.policy.remove(job.id)
            del self.jobs[job.id]
            job.finished = now
            self._finished(job, now)
            return
        self._ready += 1
        if not decoded:
            self._decode(job, now)
        elif self._decoded is not None:
            self._decoded(job, now)


def _without(batch: Batch, id: str) -> Batch:
    """Return the batch without one request."""
    return replace(
        batch,
        prefills=tuple(chunk for chunk in batch.prefills if chunk.request_id != id),
        decodes=tuple(chunk for chunk in batch.decodes if chunk.request_id != id),
    )
