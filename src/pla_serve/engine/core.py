"""Builds an engine from its settings: the model, its KV memory, the policy, and the loop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from uuid import uuid4

import torch

from pla_serve.engine import cpu, gpu
from pla_serve.engine.assembly import Execution, make_execution
from pla_serve.engine.attention.cache import KVShape
from pla_serve.engine.attention.interface import APART, IMPLEMENTATION
from pla_serve.engine.ceilings import ModelSize, measure, starting_profile
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.intake import Intake, Limits
from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.kv.sizing import KVPlan, plan_kv
from pla_serve.engine.loading import (
    ModelSource,
    Silent,
    check_supported,
    decoder_layers,
    eos_token_ids,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    resolve_device,
    resolve_dtype,
)
from pla_serve.engine.loop import EngineLoop
from pla_serve.engine.memory import MemoryGate
from pla_serve.engine.messages import EngineReady, Inbound, Outbound
from pla_serve.engine.parts import Parts
from pla_serve.engine.sampling import GrammarCompiler, Sampler
from pla_serve.engine.tiles import Tiles
from pla_serve.engine.transfer.exchange import assemble
from pla_serve.engine.transfer.layout import KVLayout, fingerprint
from pla_serve.engine.transfer.nixl import NixlTransport
from pla_serve.engine.warmup import warm_up
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
        torch.set_num_threads(config.threads or _usable_cores())
        source = resolve(config.model, config.load_format, progress=Silent())
        device = resolve_device(config.device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current device
        parts, ready = build_parts(config, source, device, clock)
        self._loop = EngineLoop(parts, inbox=inbox, emit=emit, clock=clock)
        emit(ready)

    def step(self) -> float | None:
        """See `EngineLoop.step`."""
        return self._loop.step()


def build_parts(
    config: EngineConfig, source: ModelSource, device: torch.device, clock: Callable[[], float]
) -> tuple[Parts, EngineReady]:
    """Everything that the loop drives, warmed up."""
    dtype = resolve_dtype(config.dtype, device)
    if config.kv_transfer and device.type != "cpu":
        # Layers are announced when they are enqueued, which on a GPU is before they are computed.
        raise ValueError(f"--kv-transfer is for CPU instances only, not for {device}; drop it")
    model_config = load_config(source)
    attention = check_supported(model_config)
    shape = KVShape(attention.layers, attention.kv_heads, attention.head_dim, dtype)
    implementation = APART if config.compile_layers else IMPLEMENTATION
    model = load_model(
        source, dtype, device, config.seed, attn_implementation=implementation, checked=True
    )
    layers = decoder_layers(model, attention.layers)
    size = ModelSize.of(
        model,
        layers,
        attention_width=attention.query_heads * attention.head_dim,
        kv_bytes_per_token=shape.bytes_per_token,
    )
    weights = fingerprint(model) if config.kv_transfer else ""
    tiles = Tiles.open() if device.type == "cpu" and dtype == torch.float32 else None
    if device.type == "cpu":
        cpu.optimise(model, tiles, keep=layers if config.compile_layers else None)
    elif not config.compile_layers:
        fused = gpu.optimise(model, gpu.best_operations())
        log.info("fused %d of %d decoder layers", fused, len(layers))
    kv_plan = plan_kv(config, shape, device, int(model_config.max_position_embeddings))
    kv_tokens = kv_plan.blocks * config.block_tokens
    cost = CostModel(starting_profile(size, measure(device, dtype, clock)))
    execution = make_execution(
        config, model, layers, shape, attention, kv_plan, cost, device, tiles
    )
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
        vocab_size=int(model_config.vocab_size),
        eos_token_ids=frozenset(eos_token_ids(source)),
        default_seed=config.seed,
    )
    knobs = config.policy_config
    knobs = replace(knobs, layers=knobs.layers or attention.layers)
    policy = create_policy(config.policy, knobs, cost)
    parts = _assemble(config, source, device, execution, cost, kv_plan, limits, policy)
    layout = None
    if config.kv_transfer:
        layout = KVLayout.of(execution.cache, config.block_tokens, weights)
        exchange, _ = assemble(
            layout, parts.kv, parts.gate, parts.intake, life=uuid4(), transport=NixlTransport
        )
        parts = replace(parts, exchange=exchange)
    ready = EngineReady(
        max_model_len=kv_plan.max_model_len,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=shape.bytes_per_token,
        layers=shape.layers,
        vocab_size=limits.vocab_size,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        policy=config.policy,
        transfer=None if layout is None else layout.kind,
    )
    return parts, ready


def _assemble(
    config: EngineConfig,
    source: ModelSource,
    device: torch.device,
    execution: Execution,
    cost: CostModel,
    kv_plan: KVPlan,
    limits: Limits,
    policy: PrefillPolicy,
) -> Parts:
    kv = KVManager(kv_plan.blocks, config.block_tokens, prefix_cache=config.prefix_cache)
    gate = MemoryGate(kv, kv_plan.short_reserve)
    sampler = Sampler(limits.vocab_size, device, _grammars(source, limits))
    queued = config.max_queued_tokens or 4 * kv.capacity_tokens
    admission = Admission(queued, config.max_predicted_wait)
    return Parts(
        runner=execution.runner,
        executor=execution.executor,
        kv=kv,
        gate=gate,
        sampler=sampler,
        intake=Intake(limits, admission, kv, sampler, policy, cost, gate),
        policy=policy,
        cost=cost,
        device=device,
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


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
