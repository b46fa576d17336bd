"""Settings of an engine, which are flags of ``pla-serve serve``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pla_serve.flags import Flag
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.knobs import check_knobs

AttentionBackendName = Literal["auto", "sdpa", "varlen", "triton", "flashinfer"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DType = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["auto", "keep", "none", "int8", "int4"]
Keep = Literal["auto", "keep", "none"]
CpuKernelsName = Literal["auto", "amx", "avx512-bf16", "avx512", "avx2", "torch"]
NO_SHAPES = "none"

MODEL, CACHE, SCHEDULE = "Model", "KV cache", "Scheduling"
DEVICE, ADMISSION = "Device", "Admission"


def known_policy(text: str) -> str:
    """``text``, if it names a policy and knobs that it has.

    Raises:
        ValueError: it does not; the message names what there is.
    """
    from pla_serve.policy.registry import parse_policy  # takes time: numpy

    parse_policy(text)
    return text


def list_policies() -> str:
    """Names of all policies with a few words about each, for the help."""
    from pla_serve.policy.registry import POLICIES

    return POLICIES.help() + "."


def known_shapes(text: str) -> str:
    """``text``, if it names shapes to capture.

    Raises:
        ValueError: it does not; the message says what such a name looks like.
    """
    if text != NO_SHAPES:
        from pla_serve.policy.shapes.choice import parse_shapes  # as above

        parse_shapes(text)
    return text


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    Example: ``EngineConfig("Qwen/Qwen2.5-0.5B-Instruct", kv_cache_gib=2.0)``.

    Raises:
        ValueError: a field is out of range, or two exclude each other; the message names them.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Folder of safetensors, GGUF file, or Hugging Face id."""
    load_format: Annotated[
        LoadFormat,
        Flag("Form of the weights. dummy makes random ones from the model's config.", panel=MODEL),
    ] = "auto"
    dtype: Annotated[
        DType,
        Flag("Type of the weights. auto is float32 on a CPU, bfloat16 elsewhere.", panel=MODEL),
    ] = "auto"
    quantization: Annotated[
        Quantization,
        Flag(
            "Weights that stay quantised in memory, on a CPU. auto keeps those of a GGUF file as "
            "they are, if kernels can multiply all of them; keep refuses a file otherwise. none "
            "makes floats of them. int8 and int4 quantise safetensors while they are loaded, in "
            "groups of 32.",
            panel=MODEL,
        ),
    ] = "auto"
    device: Annotated[
        str, Flag("auto, cpu, cuda or cuda:N. auto is cuda if there is one, else cpu.", panel=MODEL)
    ] = "auto"
    tensor_parallel_size: Annotated[
        int,
        Flag(
            "Ranks that share the model, each a process: GPUs from --device on, or processes on "
            "the CPU.",
            unit="ranks",
            least=1,
            panel=MODEL,
            also=("-tp",),
        ),
    ] = 1
    threads: Annotated[
        int | None,
        Flag(
            "CPU threads of all ranks together. None: all cores.",
            unit="threads",
            least=1,
            panel=MODEL,
        ),
    ] = None
    seed: Annotated[
        int, Flag("Seed of requests that give none, and of dummy weights.", panel=MODEL)
    ] = 0
    max_model_len: Annotated[
        int | None,
        Flag(
            "Most tokens of prompt and output together. None: the model's own limit, as far as "
            "the memory for KV goes.",
            unit="tokens",
            least=2,
            panel=MODEL,
        ),
    ] = None
    kv_cache_gib: Annotated[
        float | None,
        Flag(
            "Memory for KV, of all ranks together. None: a share of what is free once the weights "
            "are loaded.",
            unit="GiB",
            above=0,
            panel=CACHE,
        ),
    ] = None
    block_tokens: Annotated[
        int,
        Flag("Tokens in one KV block.", unit="tokens", least=1, panel=CACHE, name="--block-size"),
    ] = 16
    prefix_cache: Annotated[
        bool, Flag("Reuse the KV of prompts that begin alike.", panel=CACHE)
    ] = True
    short_kv_reserve: Annotated[
        float,
        Flag(
            "Share of the KV blocks that long prefills may not take, so that short ones always "
            "find room.",
            least=0,
            below=1,
            panel=CACHE,
        ),
    ] = 0.05
    kv_transfer: Annotated[
        bool,
        Flag(
            "Exchange KV with other instances of this model, for hand-overs from prefill to "
            "decode; needs NIXL.",
            panel=CACHE,
        ),
    ] = False
    policy: Annotated[
        str,
        Flag(
            "What runs next. Knobs are the flags below that the policy uses, and its own: "
            "laps:window_seconds=0.01. Policies:",
            panel=SCHEDULE,
            metavar="NAME[:KNOB=VALUE]...",
            read=known_policy,
            more=list_policies,
        ),
    ] = "length-aware"
    policy_config: PolicyConfig = field(default_factory=PolicyConfig)
    attention_backend: Annotated[
        AttentionBackendName,
        Flag(
            "Kernels of attention. auto takes the first that gives what the reference gives, tried "
            "at start; all but sdpa need a GPU.",
            panel=DEVICE,
        ),
    ] = "auto"
    cpu_kernels: Annotated[
        CpuKernelsName,
        Flag(
            "Instructions that kernels on the CPU use. auto takes the highest level of this "
            "processor that gives what torch gives, tried at start; torch uses no kernels of this "
            "project.",
            panel=DEVICE,
        ),
    ] = "auto"
    capture_shapes: Annotated[
        str | None,
        Flag(
            "Shapes, of tokens and requests, on which short batches run as captured CUDA graphs. "
            "On a CPU batches are padded to them without capture, for tests. None: auto on CUDA, "
            "none elsewhere.",
            panel=DEVICE,
            metavar="auto|paper|none|TOKENSxREQUESTS,...",
            read=known_shapes,
        ),
    ] = None
    capture_tokens: Annotated[
        int,
        Flag(
            "Most tokens of a shape that auto and paper choose.",
            unit="tokens",
            least=1,
            panel=DEVICE,
        ),
    ] = 512
    capture_padding_cap: Annotated[
        float,
        Flag(
            "Largest share of padding in a captured batch; one with more runs on the ordinary "
            "kernels.",
            least=0,
            most=1,
            panel=DEVICE,
        ),
    ] = 0.9
    run_ahead_layers: Annotated[
        int,
        Flag(
            "On a GPU: most layers that are enqueued before the first of them is done. Express "
            "work waits for one less; with 1 the GPU waits for the host.",
            unit="layers",
            least=1,
            panel=DEVICE,
        ),
    ] = 2
    stored_profile: Annotated[
        bool,
        Flag(
            "On a CPU: start with the cost profile that an earlier start has stored for this "
            "machine and model, and warm up while idle. Otherwise the warm-up comes first, takes "
            "up to 10 s, and nothing is stored.",
            panel=DEVICE,
        ),
    ] = True
    compile_layers: Annotated[
        bool,
        Flag(
            "Run stock decoder layers through torch.compile in place of the project's fused ones; "
            "compiles at start.",
            panel=DEVICE,
        ),
    ] = False
    async_scheduling: Annotated[
        bool,
        Flag(
            "On a GPU: enqueue the next batch before the tokens of the running one are known.",
            panel=DEVICE,
        ),
    ] = True
    max_queued_tokens: Annotated[
        int | None,
        Flag(
            "Refuse a request (429) when more new tokens than this wait. None: four times the "
            "tokens that the KV memory holds.",
            unit="tokens",
            least=1,
            panel=ADMISSION,
        ),
    ] = None
    max_predicted_wait: Annotated[
        float | None,
        Flag(
            "Refuse a request (429) that is predicted to wait longer than this; 0: never.",
            unit="seconds",
            panel=ADMISSION,
            none=0,
        ),
    ] = 120.0

    @property
    def keep(self) -> Keep:
        """Say whether quantised weights of a GGUF file have to stay so, may, or do not (`Keep`)."""
        if self.quantization == "keep":
            return "keep"
        apart = self.tensor_parallel_size > 1 or self.compile_layers
        possible = self.device in ("auto", "cpu") and self.cpu_kernels != "torch" and not apart
        return "auto" if self.quantization == "auto" and possible else "none"

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.quantization not in ("auto", "none"):
            self._check_quantization()
        if self.kv_transfer and self.tensor_parallel_size > 1:
            raise ValueError(
                "--kv-transfer is not possible with --tensor-parallel-size: each rank holds a part "
                "of every token's KV, and other instances expect the whole; drop one of the two"
            )

    def _check_quantization(self) -> None:
        """Refuse settings under which no weights can stay quantised."""
        reasons = {
            "--tensor-parallel-size": self.tensor_parallel_size > 1,
            "--compile-layers": self.compile_layers,
            "--cpu-kernels torch": self.cpu_kernels == "torch",
            f"--device {self.device}": self.device not in ("auto", "cpu"),
        }
        if against := [flag for flag, given in reasons.items() if given]:
            raise ValueError(
                f"--quantization {self.quantization} is for one rank on a CPU with kernels of this "
                f"project; drop it, or {' and '.join(against)}"
            )
