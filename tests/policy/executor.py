"""Drives a policy as an engine would, on a virtual clock, and checks every step it takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Chunk,
    Idle,
    PrefillPolicy,
    PrefillRequest,
    Run,
    ServiceLevel,
    Wait,
)

Stage = Literal["ahead", "waiting", "flying", "parked", "decoding", "stepping", "done", "aborted"]


@dataclass
class Job:
    """A request, and what has become of it."""

    id: str
    arrival: float
    tokens: int
    cached: int = 0
    outputs: int = 1
    deadline: float | None = None
    priority: int = 0
    tenant: str = ""
    tpot: float | None = None
    service: ServiceLevel = ServiceLevel.USUAL
    abort_at: float | None = None

    stage: Stage = "ahead"
    computed: int = 0
    """Tokens whose KV is cached."""
    target: int = 0
    """Tokens that the prefill under way is to reach."""
    produced: int = 0
    short: bool = False
    first_token: float | None = None
    computed_in_all: int = 0
    """Prefill tokens computed, for any reason."""
    owed_in_all: int = 0
    """Prefill tokens that adds asked for, less what removals took back."""


@dataclass
class Trace:
    """What ran, in order of its end; times in seconds."""

    batches: list[tuple[float, float, Batch]] = field(default_factory=list)
    express_batch: float = 0.0
    """The longest one."""
    stretch: float = 0.0
    """The longest piece of long work that was not interruptible."""


class Executor:
    """Runs jobs to their end.

    Args:
        chaos: the chance of each disturbance at each occasion.
        separate: the classes never share a batch, and long prefills run one at a time.
        waits: the policy may let the device rest although prefills wait.

    One that interrupts may do so in any batch, or in long ones only if it is ``separate``.
    """

    def __init__(
        self,
        policy: PrefillPolicy,
        config: PolicyConfig,
        cost: CostModel,
        jobs: list[Job],
        *,
        layers: int = 4,
        chaos: float = 0.0,
        seed: int = 0,
        separate: bool = False,
        waits: bool = False,
    ) -> None:
        self.policy, self.config, self.cost = policy, config, cost
        self.jobs = {job.id: job for job in jobs}
        self.trace = Trace()
        self.now = 0.0
        self._ahead = sorted(jobs, key=lambda job: job.arrival)[::-1]
        self._layers = layers
        self._chaos = chaos
        self._random = random.Random(seed)
        self._separate = separate
        self._waits = waits
        self._interrupts = {BatchClass.LONG, BatchClass.OFFLINE} if separate else set(BatchClass)
        if not policy.capabilities.leaves_at_layer_boundary:
            self._interrupts.clear()

    def run(self, until: float = float("inf")) -> Trace:
        """Serve everything (or stop at ``until``); AssertionError if the policy breaks a rule."""
        while self.now < until:
            self._deliver()
            self._unpark()
            decision = self.policy.next(self.now)
            if isinstance(decision, Run):
                self._execute(decision.batch, nested=False)
                continue
            if isinstance(decision, Wait):
                self._rest(decision.until)
                continue
            assert isinstance(decision, Idle)
            ready = [job.id for job in self.jobs.values() if job.stage in ("waiting", "decoding")]
            assert not ready, f"idle although {ready} wait"
            if self._ahead:
                self.now = max(self.now, self._ahead[-1].arrival)
            elif not any(job.stage == "parked" for job in self.jobs.values()):
                break
        if until == float("inf"):
            self._check_end()
        return self.trace

    def _rest(self, until: float) -> None:
        """Nothing runs until then, unless something arrives."""
        assert self._waits, "nothing here is worth waiting for"
        assert self.now < until < float("inf")
        stages = [job.stage for job in self.jobs.values()]
        assert "waiting" in stages, "waits for nothing"
        assert "decoding" not in stages, "decode steps cost nothing while the device rests"
        self.now = min([until, *(job.arrival for job in self._ahead[-1:])])

    # What happens to the policy from outside.

    def _deliver(self) -> None:
        while self._ahead and self._ahead[-1].arrival <= self.now:
            job = self._ahead.pop()
            job.computed, job.target = job.cached, job.cached + job.tokens
            self._add(job)
        for job in self.jobs.values():
            if job.abort_at is not None and job.abort_at <= self.now:
                self._abort(job)

    def _abort(self, job: Job) -> None:
        if job.stage not in ("ahead", "done", "aborted"):
            job.stage = "aborted"
            self.policy.remove(job.id)

    def _add(self, job: Job) -> None:
        request = PrefillRequest(
            job.id,
            job.arrival,
            job.target - job.computed,
            job.computed,
            job.deadline,
            job.priority,
            job.tenant,
            job.service,
            job.tpot,
        )
        short = self.policy.waits_as_short(request.new_tokens, request.history)
        job.short = short and not job.service.unhurried
        job.owed_in_all += request.new_tokens
        job.stage = "waiting"
        self.policy.add(request, self.now)
        assert 0 <= self.policy.predicted_wait(50, 0, self.now) < 1e9
        assert 0 <= self.policy.predicted_wait(50, 0, self.now, self.now + 0.1) < 1e9
        assert 0 < self.policy.token_seconds(50, 0.05, self.now) < 1e9

    def _park(self, job: Job) -> None:
        self.policy.remove(job.id)
        job.owed_in_all -= job.target - job.computed
        job.stage = "parked"

    def _unpark(self) -> None:
        for job in self.jobs.values():
            if job.stage == "parked":
                job.computed = self._random.randrange(job.target)  # the cache has changed
                self._add(job)
            elif job.stage == "waiting" and self._strikes():  # re-matched while it waits
                job.owed_in_all -= job.target - job.computed
                job.computed = self._random.randrange(job.target)
                self._add(job)

    def _strikes(self) -> bool:
        return self._chaos > 0 and self._random.random() < self._chaos

    # One batch.

    def _execute(self, batch: Batch, nested: bool) -> None:
        self._check(batch, nested)
        batch = self._hand_back(batch)
        if not batch.prefills and not batch.decodes:
            return
        seconds = self.cost.seconds(batch)
        start = self.now
        interruptible = batch.kind in self._interrupts and self._layers > 1
        if batch.kind in (BatchClass.LONG, BatchClass.OFFLINE):
            layer = seconds / self._layers if interruptible else seconds
            self.trace.stretch = max(self.trace.stretch, layer)
        else:
            self.trace.express_batch = max(self.trace.express_batch, seconds)
            if batch.kind not in self._interrupts:
                assert nested or self.policy.at_layer_boundary(self.now, batch) is None
        if interruptible:
            self._layer_by_layer(batch, seconds / self._layers)
        else:
            self.now += seconds
            self._deliver()
        self.trace.batches.append((start, self.now, batch))
        self.policy.observe(batch, seconds, self.now)
        self._settle(batch)
        self._check_state()

    def _layer_by_layer(self, batch: Batch, layer: float) -> None:
        for _ in range(self._layers - 1):
            self.now += layer
            self._deliver()
            while (inner := self.policy.at_layer_boundary(self.now, batch)) is not None:
                assert inner.prefills or inner.decodes
                self._execute(inner, nested=batch.kind is not BatchClass.OFFLINE)
        self.now += layer
        self._deliver()

    def _hand_back(self, batch: Batch) -> Batch:
        """Leave out chunks for which there is no memory."""
        kept: dict[bool, list[Chunk]] = {True: [], False: []}
        for chunk in (*batch.prefills, *batch.decodes):
            job = self.jobs[chunk.request_id]
            if self._strikes():
                if job.stage == "stepping":
                    self._preempt(job)
                else:
                    self._park(job)
            else:
                kept[job.stage == "flying"].append(chunk)
        return Batch(batch.kind, tuple(kept[True]), tuple(kept[False]))

    def _preempt(self, job: Job) -> None:
        """Forget the KV of a decoding request; prompt and outputs are prefilled again."""
        self.policy.remove(job.id)
        job.target = job.computed + 1
        job.stage = "parked"

    def _settle(self, batch: Batch) -> None:
        for chunk in batch.prefills:
            job = self.jobs[chunk.request_id]
            if job.stage == "aborted":
                continue
            job.computed += chunk.tokens
            job.computed_in_all += chunk.tokens
            job.stage = "waiting"
            if chunk.completes:
                self._token(job)
        for chunk in batch.decodes:
            job = self.jobs[chunk.request_id]
            if job.stage == "aborted":
                continue
            job.computed += 1
            self._token(job)

    def _token(self, job: Job) -> None:
        was_decoding = job.stage == "stepping"
        job.produced += 1
        if job.first_token is None:
            job.first_token = self.now
        if job.produced == job.outputs:
            job.stage = "done"
            self.policy.remove(job.id)
            return
        job.stage = "decoding"
        if not was_decoding:
            self.policy.start_decode(
                job.id, job.computed, job.arrival, self.now, job.tenant, job.tpot
            )

    # The rules.

    def _check(self, batch: Batch, nested: bool) -> None:
        config = self.config
        assert batch.prefills or batch.decodes
        assert batch.tokens <= config.max_batch_tokens
        assert len(batch.prefills) + len(batch.decodes) <= config.max_batch_requests
        for chunk in batch.prefills:
            job = self.jobs[chunk.request_id]
            assert job.stage == "waiting", f"{job.id} is {job.stage}"
            assert chunk.history == job.computed
            assert 1 <= chunk.tokens <= min(job.target - job.computed, config.max_chunk_tokens)
            assert chunk.completes == (job.computed + chunk.tokens == job.target)
            job.stage = "flying"
        for chunk in batch.decodes:
            job = self.jobs[chunk.request_id]
            assert job.stage == "decoding", f"{job.id} is {job.stage}"
            assert chunk == Chunk(job.id, 1, job.computed)
            job.stage = "stepping"
        self._check_class(batch, nested)

    def _check_class(self, batch: Batch, nested: bool) -> None:
        classes = {self.jobs[chunk.request_id].short for chunk in batch.prefills}
        match batch.kind:
            case BatchClass.DECODE:
                assert not batch.prefills
            case BatchClass.SHORT:
                assert classes == {True}
            case BatchClass.LONG:
                assert classes == {False}
                assert (self._separate and not nested) or not batch.decodes, "riders have a seat"
            case BatchClass.MIXED:
                assert not self._separate
                assert False in classes
        if self._separate and batch.kind is BatchClass.LONG:
            assert all(chunk.completes for chunk in batch.prefills[1:])
        assert self._interrupts or not nested

    def _check_state(self) -> None:
        state = self.policy.state(self.now)
        jobs = [job for job in self.jobs.values() if job.service is not ServiceLevel.OFFLINE]
        waiting = [job for job in jobs if job.stage == "waiting"]
        for short, requests, tokens in (
            (True, state.short_requests, state.short_tokens),
            (False, state.long_requests, state.long_tokens),
        ):
            mine = [job for job in waiting if job.short is short]
            assert requests == len(mine)
            assert tokens == sum(job.target - job.computed for job in mine)
        stages = [job.stage for job in jobs]
        assert state.decoding_requests == stages.count("decoding") + stages.count("stepping")
        assert state.seconds >= 0

    def _check_end(self) -> None:
        for job in self.jobs.values():
            if job.abort_at is None:
                assert job.stage == "done", f"{job.id} was left {job.stage}"
            assert job.stage in ("done", "aborted", "ahead")
            if job.stage == "done":
                assert job.produced == job.outputs
                assert job.computed_in_all == job.owed_in_all
        state = self.policy.state(self.now)
        assert (state.short_requests, state.long_requests, state.decoding_requests) == (0, 0, 0)
        assert (state.short_tokens, state.long_tokens, state.seconds) == (0, 0, 0)
