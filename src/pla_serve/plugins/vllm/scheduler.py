"""vLLM's scheduler with the order and the size of prefills decided by `policy`.

vLLM keeps building batches: decode steps first, KV memory, preemption, structured output,
speculative decoding, connectors. Four seams of its `schedule` carry the decisions:

- `queue.HeldQueue` offers its admission loop only what the plan names, in the plan's order.
- ``Request.next_decode_eligible_step`` makes its loop over running requests pass over a prefill
  under way without giving up its place or its memory.
- `_reserve_prefill_lookahead` is asked for every request, right before its memory is reserved, how
  many tokens it may have: there the plan's chunks are cut.
- `_preempt_request` and `_free_request` see every request that loses its memory or ends.

With `preemption`, a step of long work can be left between layers. Decode steps do not ride in it
then. Inside it, `schedule_nested` makes steps of shorts and of decodes that are due, from which
`preemption.outer` keeps the requests and the blocks of the outer step away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from pla_serve.plugins.vllm.options import read_options
from pla_serve.plugins.vllm.preemption.outer import OuterStep
from pla_serve.plugins.vllm.queue import HeldQueue
from pla_serve.plugins.vllm.support import refuse_unsupported
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, Chunk, PrefillRequest
from pla_serve.policy.step_length import SPARE_SHARE
from pla_serve.policy.steps import StepPlan, StepPlanner

logger = init_logger("vllm.pla_serve")

REREAD = 2
"""Waiting requests a step whose cached tokens are looked up again."""
DECODE_SAMPLES = 4
"""One in so many steps of nothing but decodes is a sample for the cost model."""
NOTHING = StepPlan(BatchClass.DECODE)
STATS_PREFIX = "pla_serve:"
"""Prefix of the numbers that travel to the API server in `SchedulerStats`; `plugins.vllm_metrics`
    reads them."""


class Step(NamedTuple):
    """A step that vLLM has scheduled and that has not ended."""

    output: SchedulerOutput
    plan: StepPlan
    batch: Batch | None
    """Batch for the cost model. None for a step of decodes only that is not sampled."""
    started: float
    timed: bool
    """Whether the time of the step can be explained by its tokens."""


class LengthAwareScheduler(AsyncScheduler):
    """For ``--scheduler-cls``; its options are `options.Options`.

    Short and long prefills never share a step, unless memory leaves no choice: while a planned
    request cannot be admitted (KV memory, places), prefills under way go on, because only their
    end makes room.

    Raises:
        ValueError: an option is unknown, or vLLM is asked for something that is not supported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(self.vllm_config, self.has_mamba_layers)
        options = read_options(
            self.vllm_config.additional_config, foreign_keys=current_platform.is_out_of_tree()
        )
        self._options = options
        self._preemptible = False
        self._outer: OuterStep | None = None
        """The step under way, while it can be left between layers."""
        self._nested_seconds = 0.0
        """Time that nested steps have taken inside of it."""
        self._nested_steps = 0
        self._no_room = False
        """The last nested step could not admit what was planned for it."""
        self._last_decode = 0.0
        self.planner = self._make_planner()
        self.clock: Callable[[], float] = time.monotonic
        self.waiting: HeldQueue = HeldQueue()
        self._by_priority = self.policy == SchedulingPolicy.PRIORITY
        self._compiling: dict[str, Request] = {}
        """Requests whose grammar is not ready."""
        self._came: dict[str, float] = {}
        self._rereads: deque[Request] = deque()
        self._decode_tokens = 1 + self.num_spec_tokens
        self._plan = NOTHING
        self._count = 0
        self._caps: dict[str, int] = {}
        self._blocked = False
        """The last step could not admit what was planned for it."""
        self._steps: deque[Step] = deque()
        self._last_finish = 0.0
        logger.info("Prefills are scheduled by length (PLA-Serve): %s", options)

    def leave_between_layers(self) -> None:
        """Plan for an executor that leaves steps of long work; to be called before any request."""
        self._preemptible = True
        self.planner = self._make_planner()
        options = self._options
        if options.step_seconds is not None or options.spare_share != SPARE_SHARE:
            logger.warning(
                "step_seconds and spare_share have no effect: steps are left between layers"
            )

    def may_leave(self, output: SchedulerOutput) -> bool:
        """Whether the step scheduled last, ``output``, is long work that can be left."""
        if not self._preemptible or not self._steps or self._steps[-1].output is not output:
            return False
        step = self._steps[-1]
        return step.plan.kind is BatchClass.LONG and bool(step.batch and step.batch.prefills)

    def enter(self, output: SchedulerOutput) -> None:
        """Note that the step ``output`` runs now and may be left, until it is updated from."""
        self._outer, self._no_room = OuterStep(self, output), False
        self._nested_seconds = 0.0

    def schedule_nested(self) -> SchedulerOutput | None:
        """Schedule express work at a layer boundary of the step entered; None if none is due."""
        outer, now = self._outer, self.clock()
        if outer is None or self._pause_state != PauseState.UNPAUSED:
            return None
        running = self._steps[-1].batch
        assert running is not None
        under_way = [
            request
            for request in self.running
            if request.is_prefill_chunk and request.request_id not in outer.request_ids
        ]
        self._take_arrivals(under_way, now)
        plan = self._plan_nested(running, now)
        if plan is None and not self._decodes_due(outer, now):
            return None
        with outer.hidden():
            return self._carry_out(plan or NOTHING, under_way, now)

    def _plan_nested(self, running: Batch, now: float) -> StepPlan | None:
        """Plan a nested step; None unless some prefill of it can start or go on."""
        if self._no_room or self.waiting.urgent:
            return None  # who lost its memory is first to get some, after the outer step
        plan = self.planner.nested(now, running)
        if plan is None:
            return None
        waiting = [self.waiting.get(chunk.request_id) for chunk in plan.chunks]
        if all(request is not None and not self._admissible(request) for request in waiting):
            self.planner.settle(plan, {}, now)
            return None
        return plan

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        now = self.clock()
        if self._pause_state == PauseState.PAUSED_ALL:
            return super().schedule(*args, **kwargs)
        under_way = [request for request in self.running if request.is_prefill_chunk]
        self._take_arrivals(under_way, now)
        self._reread_cached(now)
        return self._carry_out(self._make_plan(under_way, now), under_way, now, *args, **kwargs)

    def _carry_out(
        self, plan: StepPlan, under_way: list[Request], now: float, *args: Any, **kwargs: Any
    ) -> SchedulerOutput:
        """Let vLLM schedule what is planned."""
        self._open(plan, under_way)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.waiting.withdraw()
            self._caps = {}
        self._close(plan, output, now)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        self._learn(scheduler_output, self.clock())
        return super().update_from_output(scheduler_output, model_runner_output)

    def _learn(self, output: SchedulerOutput, finish: float) -> None:
        """Report to the planner that a step has ended, and its time."""
        if self._outer is not None and output is not self._outer.output:
            step = self._steps.pop()
            seconds = finish - step.started
            self._nested_seconds += seconds
            self._nested_steps += 1
        elif self._steps and self._steps[0].output is output:
            step = self._steps.popleft()
            seconds = finish - max(step.started, self._last_finish) - self._nested_seconds
            self._last_finish, self._nested_seconds, self._outer = finish, 0.0, None
        else:
            self._last_finish = finish
            return
        self.planner.ended(step.plan, finish)
        if step.timed:
            self.planner.finished(step.plan, step.batch, seconds, finish)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Adds what waits by class, in a field that vLLM's own metrics read by other keys."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.num_kv_fetch_reqs_by_stage.update(
                {
                    STATS_PREFIX + "short": self.planner.shorts,
                    STATS_PREFIX + "long": self.planner.longs,
                    STATS_PREFIX + "boundary": self.planner.boundary(),
                    STATS_PREFIX + "nested": self._nested_steps,
                }
            )
        return stats

    def _take_arrivals(self, under_way: list[Request], now: float) -> None:
        """Tell the planner of prefills that it does not know: new, resumed, or loaded in part."""
        for request in under_way:
            if request.request_id not in self.planner.known:
                self._tell(request, request.num_computed_tokens, now)
        for request in [*self.waiting.take_arrivals(), *self._compiled()]:
            if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR and not (
                request.structured_output_request and request.structured_output_request.grammar
            ):
                self._compiling[request.request_id] = request
            elif request.request_id not in self.planner.known:
                self._tell(request, self._cached(request), now)
                if self.cache_config.enable_prefix_caching:
                    self._rereads.append(request)

    def _compiled(self) -> list[Request]:
        """Requests whose grammar has come, or turned out wrong, which vLLM finds by admitting."""
        ready = [
            request
            for request in self._compiling.values()
            if request.structured_output_request and request.structured_output_request.grammar
        ]
        for request in ready:
            del self._compiling[request.request_id]
        return ready

    def _tell(self, request: Request, history: int, now: float) -> None:
        new_tokens = max(1, request.num_tokens - history)
        arrival = self._came.setdefault(request.request_id, now)
        priority = request.priority if self._by_priority else 0
        self.planner.add(
            PrefillRequest(request.request_id, arrival, new_tokens, history, priority=priority), now
        )

    def _cached(self, request: Request) -> int:
        """Tokens that need no prefill here; what a connector will bring counts as cached."""
        if request.kv_transfer_params and request.kv_transfer_params.get("do_remote_prefill"):
            return request.num_tokens - 1
        if self.enable_kv_cache_events and getattr(request, "kv_cache_report_mode", "") == "full":
            return 0  # to look is to report: vLLM sends an event for each block that it finds
        return int(self.kv_cache_manager.get_computed_blocks(request)[1])

    def _reread_cached(self, now: float) -> None:
        """Cached tokens of a few waiting requests, in turn: eviction changes them."""
        for _ in range(min(REREAD, len(self._rereads))):
            request = self._rereads.popleft()
            if self.waiting.holds(request):
                cached = self._cached(request)
                new_tokens = max(1, request.num_tokens - cached)
                self.planner.update(request.request_id, new_tokens, cached, now)
                self._rereads.append(request)

    def _make_planner(self) -> StepPlanner:
        options = self._options
        requests = min(self.max_num_running_reqs, self.max_num_active_reqs)
        return StepPlanner(
            options.policy(self.max_num_scheduled_tokens, requests),
            CostModel(),
            most_seconds=options.step_seconds,
            spare_share=options.spare_share,
            interruptible=self._preemptible,
            layers=self.vllm_config.model_config.get_num_layers(self.vllm_config.parallel_config)
            if self._preemptible
            else None,
        )

    def _decodes_due(self, outer: OuterStep, now: float) -> bool:
        """Whether streams have waited for a token for long enough to leave the outer step."""
        passed = now - self._last_decode
        if passed < self.planner.token_seconds(1, 1):
            return False
        contexts = [
            request.num_computed_tokens
            for request in self.running
            if not request.is_prefill_chunk and request.request_id not in outer.request_ids
        ]
        return bool(contexts) and passed >= self.planner.token_seconds(len(contexts), sum(contexts))

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        """Take no block for cached that the outer step has yet to fill."""
        hit = super()._get_local_prefix_cache_hit(request)
        if self._outer is not None and self._outer.fills(hit[0]):
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return hit

    def _make_plan(self, under_way: list[Request], now: float) -> StepPlan:
        """Plan the step; nothing is planned while no prefill could be admitted or go on."""
        places = self.max_num_active_reqs - self.num_waiting_for_streaming_input
        if not under_way and len(self.running) >= places:
            return NOTHING
        decodes = len(self.running) - len(under_way)
        budget = self.max_num_scheduled_tokens - decodes * self._decode_tokens
        return self.planner.plan(now, max(1, budget))

    def _open(self, plan: StepPlan, under_way: list[Request]) -> None:
        """Pass the plan to the parts of vLLM's `schedule` that ask for it."""
        self._plan = plan
        self._caps = caps = {chunk.request_id: chunk.tokens for chunk in plan.chunks}
        nested = self._outer is not None
        standing: list[Request] = []
        if nested or not self._blocked:
            standing = [request for request in under_way if request.request_id not in caps]
            if self._preemptible and plan.kind is BatchClass.LONG:
                standing += [request for request in self.running if not request.is_prefill_chunk]
        skipped = self.current_step + 2  # `schedule` counts the step before it compares
        for request in standing:
            request.next_decode_eligible_step = skipped
        waiting = map(self.waiting.get, caps)
        planned = [request for request in waiting if request is not None]
        offers = [*self.waiting.urgent, *planned]
        if nested:
            offers = list(filter(self._admissible, planned))
        if self._by_priority:
            offers.sort(key=lambda request: request.priority)
        self.waiting.offer(offers)

    def _admissible(self, request: Request) -> bool:
        """Whether nothing of the prefix that a waiting request would reuse is yet to be filled."""
        blocks = self.kv_cache_manager.get_computed_blocks(request)[0]
        return self._outer is None or not self._outer.fills(blocks)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        if num_new_tokens > self._decode_tokens and not request.has_encoder_inputs:
            most = self._caps.get(request.request_id, self._plan.others_tokens)
            if most is not None and most < num_new_tokens:
                num_new_tokens = most
        if not self.num_prefill_lookahead:
            return num_new_tokens
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _close(self, plan: StepPlan, output: SchedulerOutput, now: float) -> None:
        """Compare the step that vLLM has scheduled with its plan, and settle it."""
        scheduled = output.num_scheduled_tokens
        self._count += 1
        if plan.kind is not BatchClass.LONG or not self._preemptible:
            self._last_decode = now
        if not plan.chunks and output.total_num_scheduled_tokens == len(scheduled):
            # Decode steps resemble each other: a few of them are samples enough.
            batch = self._lay_out(plan, output, {}) if self._count % DECODE_SAMPLES == 0 else None
        else:
            left: dict[str, tuple[int, int]] = {}
            batch = self._lay_out(plan, output, left)
            self._settle(plan, left, now)
        timed = bool(scheduled) and not (
            output.has_sync_kv_loads or output.scheduled_encoder_inputs
        )
        self._steps.append(Step(output, plan, batch, self.clock(), timed))

    def _lay_out(
        self, plan: StepPlan, output: SchedulerOutput, left: dict[str, tuple[int, int]]
    ) -> Batch:
        """Return the step as a batch, and fill in what is ``left`` of its prefills."""
        prefills: list[Chunk] = []
        decodes: list[Chunk] = []
        known, requests, decode_tokens = self.planner.known, self.requests, self._decode_tokens
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            computed, more = request.num_computed_tokens, request.is_prefill_chunk
            chunk = Chunk(request_id, tokens, computed - tokens, not more)
            if more or request_id in known:
                left[request_id] = (request.num_tokens - computed if more else 0, computed)
                prefills.append(chunk)
            elif tokens > decode_tokens:
                prefills.append(chunk)
            else:
                decodes.append(chunk)
        kind = plan.kind if prefills else BatchClass.DECODE
        return Batch(kind, tuple(prefills), tuple(decodes))

    def _settle(self, plan: StepPlan, left: dict[str, tuple[int, int]], now: float) -> None:
        """Report to the planner which planned prefills are in the step."""
        planned = [chunk.request_id for chunk in plan.chunks]
        left_out = any(self.waiting.get(request_id) for request_id in planned)
        if self._outer is None:
            self._blocked = left_out
        else:
            self._no_room = left_out
        self.planner.settle(plan, left, now)
        for request_id in planned if self.connector is not None else ():
            # Its KV is on the way from elsewhere: then it is vLLM's to resume.
            request = self.requests.get(request_id)
            if request is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self.planner.remove(request_id)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.planner.remove(request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._no_room = False
        self.planner.remove(request.request_id)
        self._compiling.pop(request.request_id, None)
        self._came.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)
