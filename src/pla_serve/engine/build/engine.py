"""Builds an engine from its settings: the model, its KV memory, the policy, and the loop."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from uuid import uuid4

import torch

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.run.executor import Executor
from pla_serve.engine.requests.admission import Intake, Limits
from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.kv.sizing import KVPlan
from pla_serve.engine.build.model import device_of_rank, load, use_threads
from pla_serve.engine.loading import (
    ModelSource,
    NoLoadingProgress,
    eos_token_ids,
    load_config,
    load_tokenizer,
    resolve,
)
from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.wire.engine import EngineReady, Inbound, Outbound
from pla_serve.engine.parallel.leading import LeadingExecutor
from pla_serve.engine.parallel.ranks import ALONE
from pla_serve.engine.parallel.share import check_divides
from pla_serve.engine.parallel.team import Team
from pla_serve.engine.build.parts import EngineParts
from pla_serve.engine.sampling import GrammarCompiler, Sampler
from pla_serve.engine.transfer.exchange import assemble
from pla_serve.engine.transfer.layout import KVLayout
from pla_serve.engine.transfer.nixl import NixlTransport
from pla_serve.engine.build.warm_up import warm_up
from pla_serve.policy.admission import Admission
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import create_policy

log = logging.getLogger(__name__)


class EngineCore:
    """One engine in this thread. Loads, warms up and emits `EngineReady` when it is made.

    Args:
        inbox: messages that have arrived since it was called last; never blocks.
        emit: takes messages as they are made, also in the middle of a batch.
        clock: seconds, monotonic, the clock of `AddRequest.arrival`.

    Raises:
        LoadingError: the model cannot be had, or is not supported.
        ValueError: the settings do not fit the model or the machine.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        inbox: Callable[[], Iterable[Inbound]],
        emit: Callable[[Outbound], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        use_threads(config)
        source = resolve(config.model, config.load_format, progress=NoLoadingProgress())
        device = device_of_rank(config, 0)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current device
        self._team = team = _team(config, source)
        if team is None:
            parts, ready = build_parts(config, source, device, clock)
        else:
            with team.blamed():
                parts, ready = build_parts(config, source, device, clock, team)
            team.serve()
            weakref.finalize(self, team.close)
        self._loop = EngineLoop(parts, inbox=inbox, emit=emit, clock=clock)
        emit(ready)

    def step(self) -> float | None:
        """See `EngineLoop.step`. Raises RankLost if another rank has ended."""
        if self._team is None:
            return self._loop.step()
        with self._team.blamed():
            return self._team.at_most(self._loop.step())


def _team(config: EngineConfig, source: ModelSource) -> Team | None:
    """The other ranks, which load while this one does; None if there are none."""
    if config.tensor_parallel_size == 1:
        return None
    check_divides(load_config(source), config.tensor_parallel_size)
    return Team(replace(config, model=source.path, load_format=source.load_format))


def build_parts(
    config: EngineConfig,
    source: ModelSource,
    device: torch.device,
    clock: Callable[[], float],
    team: Team | None = None,
) -> tuple[EngineParts, EngineReady]:
    """Everything that the loop drives, warmed up; ``team`` are the ranks that share the model."""
    loaded = load(config, source, device, clock, ALONE if team is None else team.meet(device))
    execution, kv_plan, cost = loaded.execution, loaded.kv_plan, loaded.cost
    if team is not None:
        leading = LeadingExecutor(execution.executor, team.send)
        execution = replace(execution, executor=leading)
    warm_up(
        execution.run,
        cost,
        chunk=config.policy_config.max_chunk_tokens,
        longest=kv_plan.max_model_len,
        blocks=kv_plan.blocks,
        block_tokens=config.block_tokens,
        device=device,
        clock=clock,
    )
    limits = Limits(
        max_model_len=kv_plan.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=frozenset(eos_token_ids(source)),
        default_seed=config.seed,
    )
    knobs = config.policy_config
    knobs = replace(knobs, layers=knobs.layers or loaded.layers)
    policy = create_policy(config.policy, knobs, cost)
    parts = assemble_parts(
        config, source, device, execution.executor, cost, kv_plan, limits, policy
    )
    layout = None
    if config.kv_transfer:
        layout = KVLayout.of(execution.cache, config.block_tokens, loaded.weights)
        exchange, _ = assemble(
            layout, parts.kv, parts.gate, parts.intake, life=uuid4(), transport=NixlTransport
        )
        parts = replace(parts, exchange=exchange)
    ready = EngineReady(
        max_model_len=kv_plan.max_model_len,
        kv_tokens=kv_plan.blocks * config.block_tokens,
        kv_bytes_per_token=loaded.kv_bytes_per_token,
        layers=loaded.layers,
        vocab_size=limits.vocab_size,
        device=str(device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        policy=config.policy,
        capabilities=policy.capabilities,
        transfer=None if layout is None else layout.kind,
    )
    return parts, ready


def assemble_parts(
    config: EngineConfig,
    source: ModelSource,
    device: torch.device,
    executor: Executor,
    cost: CostModel,
    kv_plan: KVPlan,
    limits: Limits,
    policy: PrefillPolicy,
) -> EngineParts:
    """What a loop drives, around an executor and a policy that are made already."""
    kv = KVManager(kv_plan.blocks, config.block_tokens, prefix_cache=config.prefix_cache)
    gate = MemoryGate(kv, kv_plan.short_reserve)
    sampler = Sampler(limits.vocab_size, device, _grammars(source, limits))
    queued = config.max_queued_tokens or 4 * kv.capacity_tokens
    admission = Admission(queued, config.max_predicted_wait)
    return EngineParts(
        executor=executor,
        kv=kv,
        gate=gate,
        sampler=sampler,
        intake=Intake(limits, admission, kv, sampler, policy, cost, gate),
        policy=policy,
        cost=cost,
        async_scheduling=config.async_scheduling,
    )


def _grammars(source: ModelSource, limits: Limits) -> GrammarCompiler | None:
    """None, with the reason in the log, for a tokenizer that grammars cannot be built on."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        return None
    try:
        return GrammarCompiler(tokenizer, limits.vocab_size, eos_token_ids=limits.eos_token_ids)
    except ValueError as error:
        log.warning("structured output is off, this tokenizer does not allow it: %s", error)
        return None
