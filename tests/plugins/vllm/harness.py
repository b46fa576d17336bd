"""vLLM's scheduler without a model: its configuration, its KV blocks, and a made-up runner."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK = 16
TOKEN = 7
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


def model_folder(folder: Path) -> Path:
    """A folder that is enough for vLLM's configuration."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def make_config(
    folder: Path,
    *,
    budget: int = 2048,
    seqs: int = 64,
    policy: str = "fcfs",
    caching: bool = True,
    additional: dict[str, Any] | None = None,
    chunked: bool = True,
) -> VllmConfig:
    model = ModelConfig(
        model=str(model_folder(folder)), skip_tokenizer_init=True, dtype="float32", seed=0
    )
    config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=caching),
        device_config=DeviceConfig("cpu"),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=budget,
            max_num_seqs=seqs,
            max_model_len=65536,
            is_encoder_decoder=False,
            policy=policy,
        ),
        additional_config=additional or {},
    )
    config.scheduler_config.enable_chunked_prefill = chunked
    return config


def make_scheduler(
    kind: type[AsyncScheduler], folder: Path, *, blocks: int = 10_000, **settings: Any
) -> Any:
    config = make_config(folder, **settings)
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


def make_request(
    name: str,
    tokens: int | list[int],
    *,
    answer: int = 4,
    priority: int = 0,
    arrival: float = 0.0,
    grammar: bool = False,
) -> Request:
    """``tokens`` tokens that no other request has, or these very tokens."""
    ids = tokens if isinstance(tokens, list) else Random(name).choices(range(1000), k=tokens)
    sampling = SamplingParams(
        max_tokens=answer,
        ignore_eos=True,
        structured_outputs=StructuredOutputsParams(json_object=True) if grammar else None,
    )
    init_none_hash(sha256)
    return Request(
        request_id=name,
        prompt_token_ids=ids,
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=arrival,
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


@dataclass
class FakeClock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Engine:
    """Steps a scheduler as vLLM's core does, on a clock of its own.

    A step takes ``launch`` seconds and ``per_token`` for each token.
    """

    scheduler: Any
    launch: float = 0.04
    per_token: float = 0.001
    depth: int = 1
    """Batches in flight; 2 as with asynchronous scheduling."""
    clock: FakeClock = field(default_factory=FakeClock)
    steps: list[dict[str, int]] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    """When each request got its first token."""
    tokens: dict[str, int] = field(default_factory=dict)
    _flying: list[SchedulerOutput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler.clock = self.clock

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def step(self) -> dict[str, int]:
        """One turn of the core; returns what it scheduled."""
        output = self.scheduler.schedule()
        scheduled = dict(output.num_scheduled_tokens)
        self.steps.append(scheduled)
        self._flying.append(output)
        if len(self._flying) >= self.depth or not scheduled:
            self._finish(self._flying.pop(0))
        return scheduled

    def drain(self, most: int = 10_000) -> None:
        """Until nothing is left."""
        for _ in range(most):
            if not self.scheduler.has_unfinished_requests() and not self._flying:
                return
            if self.scheduler.has_unfinished_requests():
                self.step()
            else:
                self._finish(self._flying.pop(0))
        raise AssertionError(f"not done after {most} steps: {list(self.scheduler.requests)}")

    def seconds(self, output: SchedulerOutput) -> float:
        """What a step takes."""
        return self.launch + self.per_token * output.total_num_scheduled_tokens

    def _finish(self, output: SchedulerOutput) -> None:
        scheduled = output.num_scheduled_tokens
        self.clock.now += self.seconds(output) if scheduled else 0.001
        names = list(scheduled)
        sampled = [[TOKEN] if self._samples(output, name) else [] for name in names]
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.first.setdefault(one.request_id, self.clock.now)
                count = self.tokens.get(one.request_id, 0)
                self.tokens[one.request_id] = count + len(one.new_token_ids)

    def _samples(self, output: SchedulerOutput, name: str) -> bool:
        """Whether the step reached the end of what is known of this request."""
        for new in output.scheduled_new_reqs:
            if new.req_id == name:
                start = new.num_computed_tokens
                break
        else:
            cached = output.scheduled_cached_reqs
            start = cached.num_computed_tokens[cached.req_ids.index(name)]
        request = self.scheduler.requests.get(name)
        if request is None:
            return False
        return start + output.num_scheduled_tokens[name] >= request.num_tokens
