"""Stage 8: an engine, put together around the executor of rank 0."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from uuid import uuid4

import torch

from pla_serve.engine.build.rank import BuiltRank, build_rank
from pla_serve.engine.build.recalibration import Recalibration
from pla_serve.engine.build.sampling import Sampling, build_sampling
from pla_serve.engine.build.scheduling import Scheduling, build_scheduling
from pla_serve.engine.build.settings import build_settings, device_of_rank, use_threads
from pla_serve.engine.build.warm_up import warm_up
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.kv.sizing import KVPlan
from pla_serve.engine.loading import (
    ModelSource,
    NoLoadingProgress,
    eos_token_ids,
    load_config,
    resolve,
)
from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.parallel.leading import LeadingExecutor
from pla_serve.engine.parallel.ranks import ALONE
from pla_serve.engine.parallel.share import check_divides
from pla_serve.engine.parallel.team import Team
from pla_serve.engine.requests.admission import Intake, RequestLimits
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.run.executor import Executor
from pla_serve.engine.transfer.credentials import Credentials, fleet_secret
from pla_serve.engine.transfer.exchange import assemble
from pla_serve.engine.transfer.layout import KVLayout
from pla_serve.engine.transfer.nixl import NixlTransport
from pla_serve.wire.engine import EngineReady, Inbound, Outbound

log = logging.getLogger(__name__)


class EngineCore:
    """One engine in the calling thread.

    The constructor loads the model, warms it up and emits `EngineReady`. Call `step` again and
    again after that::

        core = EngineCore(config, inbox=channel.inbox, emit=channel.emit)
        while serving:
            channel.wait(core.step())

    Args:
        inbox: returns the messages that have arrived since its last call. Never blocks.
        emit: takes messages as they are made, also in the middle of a batch.
        clock: monotonic seconds, the clock of `AddRequest.arrival`.

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
        source = resolve(
            config.model, config.load_format, keep=config.keep, progress=NoLoadingProgress()
        )
        device = device_of_rank(config, 0)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current device
        self._team = team = _start_team(config, source)
        if team is None:
            rank = build_rank(build_settings(config, source, device, clock, ALONE))
            parts, ready = build_engine(rank, rank.execution.executor)
        else:
            with team.blamed():
                rank = build_rank(build_settings(config, source, device, clock, team.meet(device)))
                leading = LeadingExecutor(rank.execution.executor, team.send)
                parts, ready = build_engine(rank, leading)
            team.serve()
            weakref.finalize(self, team.close)
        weakref.finalize(self, parts.sampler.close)
        self._loop = EngineLoop(parts, inbox=inbox, emit=emit, clock=clock)
        emit(ready)

    def step(self) -> float | None:
        """Run at most one batch. See `EngineLoop.step`.

        Raises:
            RankLost: another rank has ended.
        """
        if self._team is None:
            return self._loop.step()
        with self._team.blamed():
            return self._team.at_most(self._loop.step())


def build_engine(rank: BuiltRank, executor: Executor) -> tuple[EngineParts, EngineReady]:
    """Warm up rank 0, and build the parts of the engine's loop around ``executor``.

    Args:
        executor: the rank's own, or one that makes other ranks run the same batches.

    Returns:
        The parts, and the message that tells the server what the engine can do.
    """
    settings, plan, cost = rank.settings, rank.memory.plan, rank.device.cost
    config = settings.config
    if not rank.device.stored:
        _warm_up(rank, executor)
    limits = RequestLimits(
        max_model_len=plan.max_model_len,
        vocab_size=rank.model.vocab_size,
        eos_token_ids=frozenset(eos_token_ids(settings.source)),
        default_seed=config.seed,
    )
    layers, kv_tokens = rank.model.kv_shape.layers, plan.blocks * config.block_tokens
    sampling = build_sampling(settings.source, limits, settings.device, settings.clock)
    scheduling = build_scheduling(config, cost, layers=layers, kv_tokens=kv_tokens)
    parts = build_parts(config, plan, executor, sampling, scheduling)
    if rank.device.stored:
        parts = replace(parts, recalibration=_recalibration(rank, executor, parts.kv))
    transfer = transfer_agent = None
    if config.kv_transfer:
        layout = KVLayout.of(rank.execution.cache, config.block_tokens, rank.model.weights)
        credentials = Credentials(fleet_secret(), uuid4())
        transfer, transfer_agent = credentials.kind(layout), credentials.reader
        exchange, _ = assemble(
            layout,
            parts.kv,
            parts.gate,
            parts.intake,
            credentials=credentials,
            transport=NixlTransport,
        )
        parts = replace(parts, exchange=exchange)
    return parts, EngineReady(
        max_model_len=plan.max_model_len,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=rank.kv_bytes_per_token,
        layers=layers,
        vocab_size=limits.vocab_size,
        device=str(settings.device),
        dtype=str(settings.dtype).removeprefix("torch."),
        policy=config.policy,
        quantised=rank.model.quantised,
        cpu_kernels=rank.model.kernels.level if settings.device.type == "cpu" else "",
        cost_profile="stored" if rank.device.stored else "measured",
        capabilities=parts.policy.capabilities,
        transfer=transfer,
        transfer_agent=transfer_agent,
    )


def _warm_up(rank: BuiltRank, executor: Executor) -> None:
    """Teach the cost model what batches take, and give back the memory that they took."""
    settings, plan = rank.settings, rank.memory.plan
    warm_up(
        lambda requests: executor.forward(requests, lambda: None),
        rank.device.cost,
        chunk=settings.config.policy_config.max_chunk_tokens,
        longest=plan.max_model_len,
        blocks=plan.blocks,
        block_tokens=settings.config.block_tokens,
        device=settings.device,
        clock=settings.clock,
    )
    executor.end_warm_up()
    if rank.device.store is not None:
        rank.device.store.write(rank.device.cost)


def _recalibration(rank: BuiltRank, executor: Executor, kv: KVManager) -> Recalibration:
    """Return the warm-up that goes on while the engine is idle, because a profile was stored."""
    assert rank.device.store is not None
    log.info("the cost profile of an earlier start is used; the warm-up goes on while idle")
    return Recalibration(
        executor,
        kv,
        rank.device.cost,
        rank.device.store,
        chunk=rank.settings.config.policy_config.max_chunk_tokens,
        longest=rank.memory.plan.max_model_len,
        layers=rank.model.kv_shape.layers,
        clock=rank.settings.clock,
    )


def build_parts(
    config: EngineConfig,
    plan: KVPlan,
    executor: Executor,
    sampling: Sampling,
    scheduling: Scheduling,
) -> EngineParts:
    """Make the collaborators of a loop, without KV transfer, around an executor and a policy.

    Of ``config`` it uses the block size and whether to cache prefixes and to schedule ahead, so
    that stand-ins for a model can be served as an engine is.
    """
    kv = KVManager(plan.blocks, config.block_tokens, prefix_cache=config.prefix_cache)
    gate = MemoryGate(kv, plan.short_reserve)
    return EngineParts(
        executor=executor,
        kv=kv,
        gate=gate,
        sampler=sampling.sampler,
        intake=Intake(
            sampling.limits,
            scheduling.admission,
            kv,
            sampling.sampler,
            scheduling.policy,
            scheduling.cost,
            gate,
        ),
        policy=scheduling.policy,
        cost=scheduling.cost,
        async_scheduling=config.async_scheduling,
    )


def _start_team(config: EngineConfig, source: ModelSource) -> Team | None:
    """Start the other ranks, which load while this one does. Returns None if there are none."""
    if config.tensor_parallel_size == 1:
        return None
    check_divides(load_config(source), config.tensor_parallel_size)
    return Team(replace(config, model=source.path, load_format=source.load_format))
