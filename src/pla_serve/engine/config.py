"""Everything the engine is told at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pla_serve.policy.config import PolicyConfig

AttentionBackendName = Literal["auto", "sdpa", "varlen", "triton", "flashinfer"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
NO_SHAPES = "none"
DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine core.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A folder of safetensors, a GGUF file, or a Hugging Face id."""
    load_format: LoadFormat = "auto"
    dtype: DType = "auto"
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    tensor_parallel_size: int = 1
    """Ranks that share the model, each a process: on CUDA one a device, from ``device`` on."""
    seed: int = 0
    """For requests that give none, and for dummy weights."""
    max_model_len: int | None = None
    """Most tokens of prompt and output; None takes the model's own limit, bounded by the KV."""
    block_tokens: int = 16
    """Tokens in one KV block."""
    kv_cache_gib: float | None = None
    """Memory for KV, of all ranks together; None takes a share of what is free after the weights
    are loaded."""
    prefix_cache: bool = True
    short_kv_reserve: float = 0.05
    """Share of the KV blocks that long prefills may not take, so that short ones always start."""
    threads: int | None = None
    """CPU threads of all ranks together; None takes all cores."""
    policy: str = "length-aware"
    policy_config: PolicyConfig = field(default_factory=PolicyConfig)
    attention_backend: AttentionBackendName = "auto"
    """auto: the first that gives what the reference gives, tried at start."""
    capture_shapes: str | None = None
    """Shapes that short batches run on as a whole: auto, paper, none, or tokens x requests such as
    64x4,256x16. None is auto on CUDA and none elsewhere, where named ones are padded to without
    being captured."""
    capture_tokens: int = 512
    """Most tokens of a batch that auto and paper capture."""
    capture_padding_cap: float = 0.9
    """A batch that would be more padding than this runs on the ordinary kernels."""
    run_ahead_layers: int = 2
    """On CUDA: most layers that the host enqueues before the first of them is done. Express work
    waits for one less; with 1 the device waits for the host."""
    compile_layers: bool = False
    """Run stock decoder layers through torch.compile, in place of the project's own fused ones."""
    async_scheduling: bool = True
    """On CUDA: enqueue the next batch before the tokens of the one that runs are known."""
    max_queued_tokens: int | None = None
    """Admission: most new tokens waiting; None: four times the KV capacity."""
    max_predicted_wait: float | None = 120.0
    """Admission: refuse what is predicted to wait longer, in seconds; None: never."""
    kv_transfer: bool = False
    """Exchange KV with other engines that serve the same model; needs NIXL."""

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, not {self.block_tokens}")
        if not 0 <= self.short_kv_reserve < 1:
            raise ValueError(f"short_kv_reserve must lie in [0, 1), not {self.short_kv_reserve}")
        if self.kv_cache_gib is not None and self.kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib must be positive, not {self.kv_cache_gib}")
        if self.max_queued_tokens is not None and self.max_queued_tokens < 1:
            raise ValueError(f"max_queued_tokens must be at least 1, not {self.max_queued_tokens}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len must be at least 2, not {self.max_model_len}")
        if not 0 <= self.capture_padding_cap <= 1:
            raise ValueError(
                f"capture_padding_cap must lie in 0..1, not {self.capture_padding_cap}"
            )
        if self.kv_transfer and self.tensor_parallel_size > 1:
            raise ValueError(
                "--kv-transfer is not possible with --tensor-parallel-size: each rank holds a part "
                "of every token's KV, and other instances expect the whole; drop one of the two"
            )
        for name in ("capture_tokens", "run_ahead_layers", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
