"""vLLM's engine in this process, with a small random model and messages at given moments."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequestType, FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.executor.abstract import Executor
from vllm.v1.request import Request

LAYERS = 5
VOCABULARY = 300
BLOCK = 32
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
}


def tiny_model(folder: Path) -> Path:
    """Write a Llama of random weights, large enough that every token depends on those before."""
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
    more = {"head_dim": 32, "torch_dtype": "float32", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings | _SIZES | more))
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.25

    weights = {
        "model.embed_tokens.weight": random(VOCABULARY, 64) * 4,
        "lm_head.weight": random(VOCABULARY, 64),
        "model.norm.weight": torch.ones(64),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}{norm}.weight"] = torch.ones(64)
        shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
        for part, shape in shapes.items():
            weights[f"{name}self_attn.{part}.weight"] = random(*shape)
        for part, shape in {
            "gate_proj": (96, 64),
            "up_proj": (96, 64),
            "down_proj": (64, 96),
        }.items():
            weights[f"{name}mlp.{part}.weight"] = random(*shape)
    save_file(weights, folder / "model.safetensors")
    return folder


class LocalEngine(EngineCoreProc):
    """The engine of a vLLM process, without the process and its sockets."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.input_queue = queue.Queue()
        self.output_queue = queue.Queue()
        self.engines_running = False
        self.shutdown_state = EngineShutdownState.RUNNING
        self.process_input_queue_block = False
        self.publish_dp_lb_stats = False
        config = EngineArgs(
            **{
                "model": str(folder),
                "skip_tokenizer_init": True,
                "dtype": "float32",
                "enforce_eager": True,
                "block_size": BLOCK,
                "max_model_len": 1024,
                "max_num_batched_tokens": 256,
                "max_num_seqs": 16,
                "kv_cache_memory_bytes": 64 << 20,
                "distributed_executor_backend": "pla_serve.plugins.vllm.PreemptibleExecutor",
            }
            | settings
        ).create_engine_config()
        EngineCore.__init__(self, config, Executor.get_class(config), log_stats=True)

    def request(self, name: str, ids: list[int], answer: int, **sampling: Any) -> Request:
        return Request(
            request_id=name,
            prompt_token_ids=ids,
            sampling_params=SamplingParams(
                **{"temperature": 0, "max_tokens": answer, "ignore_eos": True} | sampling
            ),
            pooling_params=None,
            arrival_time=0.0,
            block_hasher=self.request_block_hasher,
        )

    def send(self, request: Request) -> None:
        self.input_queue.put((EngineCoreRequestType.ADD, (request, 0)))

    def abort(self, name: str) -> None:
        """As vLLM's socket thread does it: to both queues."""
        self.aborts_queue.put([name])
        self.input_queue.put((EngineCoreRequestType.ABORT, [name]))


@dataclass
class Run:
    """Steps an engine, and does ``moments[n]`` at the n-th moment.

    Moments are the beginnings of steps and, where steps are left, their layer boundaries.
    """

    engine: LocalEngine
    moments: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, FinishReason] = field(default_factory=dict)
    _count: int = 0

    def moment(self) -> None:
        """The next moment has come."""
        for act in self.moments.pop(self._count, []):
            act()
        self._count += 1

    def drain(self, most: int = 5000) -> None:
        """Until nothing is left."""
        engine = self.engine
        for _ in range(most):
            self.moment()
            engine._process_input_queue()
            if engine.has_work():
                engine._process_engine_step()
            self._collect()
            if not self.moments and not engine.has_work() and engine.input_queue.empty():
                return
        raise AssertionError(f"not done: {list(engine.scheduler.requests)}")

    def _collect(self) -> None:
        while not self.engine.output_queue.empty():
            for output in self.engine.output_queue.get()[1].outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    assert output.request_id not in self.finished
                    self.finished[output.request_id] = output.finish_reason
