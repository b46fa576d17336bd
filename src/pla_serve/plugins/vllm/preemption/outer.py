"""The step that nested ones run inside of, as vLLM's scheduler sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request


class OuterStep:
    """A step under way, and what nested steps must leave alone.

    vLLM counts a step's tokens as computed, and its full KV blocks as cached, when it schedules
    the step. Both become true when the step ends. So its requests may be neither scheduled nor
    preempted before, and nobody may take its new blocks for cached ones.
    """

    def __init__(self, scheduler: Any, output: SchedulerOutput) -> None:
        self._scheduler = scheduler
        self.output = output
        self.request_ids = frozenset(output.num_scheduled_tokens)
        self._unwritten = frozenset(self._blocks_under_way())

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the step's requests from vLLM's `schedule`, which then neither runs nor preempts
        them; their places stay taken."""
        scheduler = self._scheduler
        before: list[Request] = scheduler.running
        scheduler.running = [r for r in before if r.request_id not in self.request_ids]
        taken = len(before) - len(scheduler.running)
        scheduler.max_num_active_reqs -= taken
        try:
            yield
        finally:
            scheduler.max_num_active_reqs += taken
            after: list[Request] = scheduler.running
            kept = {request.request_id for request in after} | self.request_ids
            known = {request.request_id for request in before}
            scheduler.running = [r for r in before if r.request_id in kept]
            scheduler.running += [r for r in after if r.request_id not in known]

    def fills(self, blocks: Any) -> bool:
        """Whether this step has yet to fill one of these blocks (vLLM's ``KVCacheBlocks``)."""
        return any(block.block_id in self._unwritten for group in blocks.blocks for block in group)

    def _blocks_under_way(self) -> Iterator[int]:
        scheduler = self._scheduler
        groups = scheduler.kv_cache_config.kv_cache_groups
        null = scheduler.kv_cache_manager.block_pool.null_block.block_id
        for request_id, tokens in self.output.num_scheduled_tokens.items():
            start = scheduler.requests[request_id].num_computed_tokens - tokens
            tables = scheduler.kv_cache_manager.get_block_ids(request_id)
            for group, table in zip(groups, tables, strict=True):
                size = group.kv_cache_spec.block_size
                yield from (block for block in table[start // size :] if block != null)
