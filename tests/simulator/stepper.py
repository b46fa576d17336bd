"""A slow and obvious executor: every layer of every batch, one after another."""

from __future__ import annotations

from collections.abc import Sequence

from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, Chunk, Idle, PrefillPolicy, PrefillRequest, Run
from pla_serve.simulator.instance import SLACK
from pla_serve.simulator.request import SimulatedRequest


class Stepper:
    """Serves jobs on one device; `run` fills in what became of them."""

    def __init__(
        self, policy: PrefillPolicy, cost: CostModel, layers: int, *, decodes: bool = False
    ) -> None:
        self.now = 0.0
        self.busy = 0.0
        self._policy, self._cost, self._layers, self._decodes = policy, cost, layers, decodes
        self._ahead: list[SimulatedRequest] = []
        self._jobs: dict[str, SimulatedRequest] = {}

    def run(self, jobs: Sequence[SimulatedRequest]) -> None:
        self._ahead = sorted(jobs, key=lambda job: job.arrival)
        self._jobs = {job.id: job for job in jobs}
        while True:
            self._deliver(self.now)
            decision = self._policy.next(self.now)
            if isinstance(decision, Run):
                self._execute(decision.batch)
                continue
            if isinstance(decision, Idle) and not self._ahead:
                return
            times = [job.arrival for job in self._ahead[:1]]
            self.now = min(times if isinstance(decision, Idle) else [*times, decision.until])

    def _deliver(self, until: float) -> None:
        while self._ahead and self._ahead[0].arrival <= until:
            job = self._ahead.pop(0)
            job.computed = job.history
            request = PrefillRequest(job.id, job.arrival, job.new_tokens, job.history)
            self._policy.add(request, job.arrival)

    def _execute(self, batch: Batch) -> None:
        seconds = self._cost.seconds(batch)
        layer = seconds / self._layers
        for number in range(self._layers):
            if self._layers > 1 or number > 0:
                while (inner := self._policy.at_layer_boundary(self.now, batch)) is not None:
                    self._execute(inner)
            last = number == self._layers - 1
            self._deliver(self.now + layer * (1 if last else 1 + SLACK))
            self.now += layer
        self.busy += seconds
        self._policy.observe(batch, seconds, self.now)
        for chunk in batch.prefills:
            self._settle(chunk, decoded=False)
        for chunk in batch.decodes:
            self._settle(chunk, decoded=True)

    def _settle(self, chunk: Chunk, *, decoded: bool) -> None:
        job = self._jobs[chunk.request_id]
        assert chunk.history == job.computed
        job.computed += chunk.tokens
        if not chunk.completes:
            return
        job.produced += 1
        if job.produced == 1:
            job.first_token = self.now
        if not self._decodes or job.produced == job.output_tokens:
            job.finished = self.now
            self._policy.remove(job.id)
        elif not decoded:
            self._policy.start_decode(job.id, job.computed, job.arrival, self.now)
