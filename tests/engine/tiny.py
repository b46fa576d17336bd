"""Tiny random models, and engines of all sizes around them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pla_serve.engine.attention.interface import IMPLEMENTATION, AttentionBackend
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.vector import attention_of
from pla_serve.engine.attention.window import WindowedAttention
from pla_serve.engine.batch.staging import DirectUploader
from pla_serve.engine.build.engine import build_parts
from pla_serve.engine.build.sampling import Sampling
from pla_serve.engine.build.scheduling import Scheduling
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.device.marks import HostDevice
from pla_serve.engine.kernels.open import TORCH_ALONE, CpuKernels
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.kv.sizing import KVPlan
from pla_serve.engine.layers import cpu
from pla_serve.engine.loading import check_supported, decoder_layers
from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.requests.admission import RequestLimits
from pla_serve.engine.run.executor import BatchExecutor, Executor
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.engine.sampling import Grammars, Sampler
from pla_serve.engine.transfer.protocol import KVExchange
from pla_serve.grammar.compiler import GrammarCompiler
from pla_serve.grammar.tokenizer import vocabulary_of
from pla_serve.policy.admission import Admission
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.wire.engine import (
    AbortRequest,
    AddRequest,
    Inbound,
    Outbound,
    Output,
    Rejected,
    SamplingParams,
)
from tests.engine.local_grammars import LocalGrammars

VOCABULARY = 96
EOS = 0
BLOCK = 4
MAX_BLOCKS = 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "arcee": lambda: ArceeConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=21),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
MIXTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "granitemoe": lambda: GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **SIZES,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
}
"""Families whose layers, or some of them, have experts."""
CONFIGS |= MIXTURES
SAMPLE = tuple(sorted(set(CONFIGS) - set(MIXTURES) | {"qwen2-moe"}))
"""All families, but of the mixtures one only."""
WINDOWED = ("gemma3", "mistral-window")
"""Families with layers whose tokens see the latest tokens only."""
FUSED = tuple(sorted(set(CONFIGS) - {"arcee", "gemma3", "granitemoe", "olmoe"}))
"""Families whose decoder layers are replaced as a whole on a CPU."""
FUSED_DENSE = tuple(sorted(set(FUSED) - set(MIXTURES)))
"""Those of them that are on a GPU as well."""


@cache
def reference_model(name: str) -> torch.nn.Module:
    """The stock model with eager attention."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    return model.eval()


@cache
def runner(name: str) -> ModelRunner:
    """The same weights under the engine's attention and optimised modules."""
    return new_runner(name)


@cache
def padded_runner(name: str) -> ModelRunner:
    """One that takes batches with padding; its KV has a block that belongs to nobody."""
    return new_runner(name, padded=True)


@cache
def runner_with(name: str, kernels: CpuKernels) -> ModelRunner:
    """One that computes with these kernels."""
    return new_runner(name, kernels=kernels)


def new_runner(name: str, padded: bool = False, kernels: CpuKernels = TORCH_ALONE) -> ModelRunner:
    """One with KV memory of its own."""
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION).eval()
    model.load_state_dict(reference_model(name).state_dict())
    model.requires_grad_(False)
    layers = decoder_layers(model, config.num_hidden_layers)
    cpu.optimise(model, kernels)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
    shape = KVShape(config.num_hidden_layers, 2, head_dim, torch.float32)
    cache = KVCache(shape, (MAX_BLOCKS + padded) * BLOCK, torch.device("cpu"))
    for memory in (*cache.keys, *cache.values):
        memory.fill_(torch.nan)  # whatever is read before it was written shows
    backend: AttentionBackend = attention_of(kernels)
    if windows := check_supported(config).windows:
        backend = WindowedAttention(windows, lambda: attention_of(kernels))
    return ModelRunner(model, layers, cache, PaddedAttention(backend) if padded else backend)


def plain_executor(runner: ModelRunner) -> BatchExecutor:
    """An executor that runs every batch layer by layer on the CPU."""
    return BatchExecutor(runner, None, DirectUploader(), HostDevice(), BLOCK)


@cache
def expected(name: str, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Greedy continuation by ``transformers.generate``, EOS included."""
    with torch.inference_mode():
        output = reference_model(name).generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=EOS
        )
    return tuple(output[0, len(prompt) :].tolist())


@dataclass
class Engine:
    """A loop with its messages; time moves by a millisecond whenever it is asked for."""

    loop: EngineLoop
    parts: EngineParts
    inbox: deque[Inbound]
    emitted: list[Outbound]
    clock: Callable[[], float]
    on_poll: list[Callable[[], None]] = field(default_factory=list)
    asked: list[AddRequest] = field(default_factory=list)
    """Every request that was sent."""

    def add(self, request_id: str, prompt: Sequence[int], **sampling: object) -> None:
        """Send a request; greedy unless told otherwise."""
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
        self.inbox.append(
            AddRequest(id=request_id, prompt=list(prompt), sampling=params, arrival=self.clock())
        )

    def abort(self, request_id: str) -> None:
        self.inbox.append(AbortRequest(request_id))

    def run(self, most_steps: int = 20_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(most_steps):
            if self.loop.step() is None and not self.inbox:
                return
        raise AssertionError("the engine does not come to rest")

    def outputs(self, request_id: str) -> list[Output]:
        return [o for o in self.emitted if isinstance(o, Output) and o.id == request_id]

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs(request_id) for token in output.tokens)

    def rejected(self, request_id: str) -> Rejected | None:
        found = [o for o in self.emitted if isinstance(o, Rejected) and o.id == request_id]
        return found[0] if found else None


def make_engine(
    name: str,
    policy: PrefillPolicy,
    *,
    cost: CostModel | None = None,
    blocks: int = MAX_BLOCKS,
    short_reserve: int = 0,
    prefix_cache: bool = True,
    admission: Admission | None = None,
    max_model_len: int = 512,
    grammars: Grammars | None = None,
    runner_of: ModelRunner | None = None,
    exchange: Callable[[EngineParts], KVExchange] | None = None,
    clock: Callable[[], float] | None = None,
    vocabulary: int = VOCABULARY,
    eos: int = EOS,
    executor: Executor | None = None,
    sampler: Sampler | None = None,
    async_scheduling: bool = True,
) -> Engine:
    """An engine around the shared runner of this model, with KV memory of its own size.

    ``runner_of`` is another model's runner, with the vocabulary and EOS that go with it; an
    ``exchange`` is made from the rest of the parts.
    """
    cost = cost or CostModel()
    longest = min(max_model_len, (blocks - short_reserve) * BLOCK)
    limits = RequestLimits(longest, vocabulary, frozenset({eos}), 0)
    parts = build_parts(
        EngineConfig(
            block_tokens=BLOCK, prefix_cache=prefix_cache, async_scheduling=async_scheduling
        ),
        KVPlan(blocks, short_reserve, longest),
        executor or plain_executor(runner_of or runner(name)),
        Sampling(limits, sampler or Sampler(vocabulary, torch.device("cpu"), grammars)),
        Scheduling(policy, cost, admission or Admission()),
    )
    if exchange is not None:
        parts = replace(parts, exchange=exchange(parts))
    inbox: deque[Inbound] = deque()
    emitted: list[Outbound] = []
    ticks = count(1)

    def tick() -> float:
        return next(ticks) / 1000

    clock = clock or tick

    engine: Engine

    def poll() -> list[Inbound]:
        for hook in engine.on_poll:
            hook()
        messages = list(inbox)
        engine.asked += [message for message in messages if isinstance(message, AddRequest)]
        inbox.clear()
        return messages

    loop = EngineLoop(parts, inbox=poll, emit=emitted.append, clock=clock)
    engine = Engine(loop, parts, inbox, emitted, clock)
    return engine


@cache
def grammar_compiler() -> LocalGrammars:
    """For a vocabulary in which each token but EOS is one ASCII character."""
    characters = [chr(code) for code in range(0x21, 0x7F)]
    vocabulary = {"<eos>": EOS, **{c: i for i, c in enumerate(characters, 1)}, "Ġ": 95}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    return LocalGrammars(GrammarCompiler(vocabulary_of(tokenizer, VOCABULARY)))


def write_tokenizer(folder: Path) -> None:
    """Tokenizer files for a vocabulary of VOCABULARY words, w0 to w95; w0 is EOS."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w0").save_pretrained(folder)
