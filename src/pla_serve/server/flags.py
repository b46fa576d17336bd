"""The flags of ``pla-serve serve``: types, names, help. Their defaults are those of the configs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pla_serve.engine.config import NO_SHAPES, EngineConfig
from pla_serve.engine.config import AttentionBackendName as AttentionBackends
from pla_serve.engine.config import DType as DTypes
from pla_serve.engine.config import LoadFormat as LoadFormats
from pla_serve.logs import LogFormat as LogFormats
from pla_serve.wire.link import Role as Roles

MODEL = "Model"
CACHE = "KV cache"
SCHEDULE = "Scheduling"
ADMISSION = "Admission"
DEVICE = "Device"
HTTP = "HTTP server"
LogLevels = Literal["debug", "info", "warning", "error"]


def _known_policy(text: str) -> str:
    from pla_serve.policy.registry import parse_policy  # with numpy, which --help can do without

    try:
        parse_policy(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _known_shapes(text: str | None) -> str | None:
    if text is None or text == NO_SHAPES:
        return text
    from pla_serve.engine.run.graphs.choice import parse_shapes  # as above

    try:
        parse_shapes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="A folder of safetensors, a GGUF file, or a Hugging Face id. "
        f"Default: {EngineConfig().model}."
    ),
]
ModelFlag = Annotated[
    str | None,
    typer.Option("--model", help="The same as the argument.", rich_help_panel=MODEL),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        help="What clients call the model; may be repeated. Default: the model as given.",
        rich_help_panel=MODEL,
    ),
]
LoadFormat = Annotated[
    LoadFormats,
    typer.Option(
        help="dummy makes random weights from the config.",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    DTypes,
    typer.Option(help="auto is float32 on a CPU, bfloat16 elsewhere.", rich_help_panel=MODEL),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        min=1,
        help="Devices that share the model: GPUs from --device on, or processes on the CPU.",
        rich_help_panel=MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads, of all ranks. Default: all cores.", rich_help_panel=MODEL
    ),
]
Seed = Annotated[int, typer.Option(help="For requests that give none.", rich_help_panel=MODEL)]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of prompt and output. Default: the model's, as far as KV goes.",
        rich_help_panel=MODEL,
    ),
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        help="A Jinja file that takes the place of the model's template.", rich_help_panel=MODEL
    ),
]
KvCacheGib = Annotated[
    float | None,
    typer.Option(help="Memory for KV. Default: a share of what is free.", rich_help_panel=CACHE),
]
BlockSize = Annotated[int, typer.Option(help="Tokens in one KV block.", rich_help_panel=CACHE)]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Reuse the KV of prompts that begin alike.",
        rich_help_panel=CACHE,
    ),
]
ShortKvReserve = Annotated[
    float,
    typer.Option(help="Share of the KV that long prefills may not take.", rich_help_panel=CACHE),
]
KvTransfer = Annotated[
    bool,
    typer.Option(
        "--kv-transfer/--no-kv-transfer",
        help="Exchange KV with other instances of this model, for hand-overs from prefill to "
        "decode; needs NIXL.",
        rich_help_panel=CACHE,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        callback=_known_policy,
        metavar="NAME[:KNOB=VALUE]...",
        help="What runs next: length-aware, or a baseline: fcfs, hrrn, srpt, laps, bucketserve, "
        "fastserve, flowprefill. Knobs are the flags below that it uses, and its own: "
        "laps:window_seconds=0.01.",
        rich_help_panel=SCHEDULE,
    ),
]
MaxBatchTokens = Annotated[
    int,
    typer.Option(
        "--max-batch-tokens",
        "--max-num-batched-tokens",
        help="Most tokens in one batch.",
        rich_help_panel=SCHEDULE,
    ),
]
MaxBatchRequests = Annotated[
    int,
    typer.Option(
        "--max-batch-requests",
        "--max-num-seqs",
        help="Most requests in one batch.",
        rich_help_panel=SCHEDULE,
    ),
]
LongChunkTokens = Annotated[
    int | None,
    typer.Option(
        "--long-chunk-tokens",
        "--long-prefill-token-threshold",
        help="Most tokens of one long prefill in one batch. Default: length-aware chooses, others "
        "have no cap but --max-batch-tokens.",
        min=1,
        rich_help_panel=SCHEDULE,
    ),
]
BoundaryTokens = Annotated[
    int | None,
    typer.Option(
        help="At most this many new tokens are short. Default: fitted while serving.",
        rich_help_panel=SCHEDULE,
    ),
]
LongShare = Annotated[
    float,
    typer.Option(
        help="Share of time that waiting long prefills are guaranteed.",
        rich_help_panel=SCHEDULE,
    ),
]
ExpressBurstSeconds = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="How far short prefills may run ahead of that share. Default: by the machine.",
        rich_help_panel=SCHEDULE,
    ),
]
DecodeShare = Annotated[
    float,
    typer.Option(
        help="Most of the time for decode steps during a long prefill.",
        rich_help_panel=SCHEDULE,
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        help="How long a long prefill may be passed by shorter ones, in geometric means of its own "
        "time and that of a full batch; 0 is first come, first served.",
        rich_help_panel=SCHEDULE,
    ),
]
ExpressWaitSeconds = Annotated[
    float,
    typer.Option(
        help="Most time that shorts wait for each other, where it pays, while longs run.",
        rich_help_panel=SCHEDULE,
    ),
]
AttentionBackend = Annotated[
    AttentionBackends,
    typer.Option(
        help="auto takes the first that works; the others need a GPU, but sdpa.",
        rich_help_panel=DEVICE,
    ),
]
Graphs = Annotated[
    bool,
    typer.Option(
        "--graphs/--no-graphs",
        help="Run short batches as captured CUDA graphs.",
        rich_help_panel=DEVICE,
    ),
]
CaptureShapes = Annotated[
    str | None,
    typer.Option(
        metavar="auto|paper|none|TOKENSxREQUESTS,...",
        callback=_known_shapes,
        help="Shapes to capture. On a CPU batches are padded to them, for tests.",
        rich_help_panel=DEVICE,
    ),
]
CaptureTokens = Annotated[
    int,
    typer.Option(min=1, help="Most tokens of a shape by auto and paper.", rich_help_panel=DEVICE),
]
CapturePaddingCap = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Most padding in a captured batch, as a share.", rich_help_panel=DEVICE
    ),
]
RunAheadLayers = Annotated[
    int,
    typer.Option(
        min=1,
        help="On a GPU: most layers enqueued and not done while others may go first.",
        rich_help_panel=DEVICE,
    ),
]
CompileLayers = Annotated[
    bool,
    typer.Option(
        "--compile-layers/--no-compile-layers",
        help="Run stock decoder layers through torch.compile, in place of the fused ones; compiles "
        "at start.",
        rich_help_panel=DEVICE,
    ),
]
AsyncScheduling = Annotated[
    bool,
    typer.Option(
        help="On a GPU: enqueue the next batch before the tokens of the running one are known.",
        rich_help_panel=DEVICE,
    ),
]
MaxQueuedTokens = Annotated[
    int | None,
    typer.Option(
        help="Refuse (429) when more new tokens wait. Default: 4 times the KV.",
        rich_help_panel=ADMISSION,
    ),
]
MaxPredictedWait = Annotated[
    float,
    typer.Option(
        help="Refuse (429) what would wait longer, in seconds; 0: never.",
        rich_help_panel=ADMISSION,
    ),
]
Host = Annotated[
    str,
    typer.Option(help="0.0.0.0 opens it to the network.", rich_help_panel=HTTP),
]
Port = Annotated[int, typer.Option(help="0 picks a free one.", rich_help_panel=HTTP)]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="PLA_SERVE_API_KEY",
        help="Clients must send one of these; may be repeated.",
        rich_help_panel=HTTP,
        show_envvar=True,
    ),
]
MaxBodyMib = Annotated[float, typer.Option(help="Largest request body.", rich_help_panel=HTTP)]
KeepAliveSeconds = Annotated[
    float,
    typer.Option(help="A silent stream gets a comment this often.", rich_help_panel=HTTP),
]
StallSeconds = Annotated[
    float,
    typer.Option(
        help="A stream whose client reads nothing so long is ended.", rich_help_panel=HTTP
    ),
]
MaxUnreadTokens = Annotated[
    int,
    typer.Option(
        help="A stream whose client leaves more tokens unread is ended.", rich_help_panel=HTTP
    ),
]
RestartWait = Annotated[
    float,
    typer.Option(
        help="How long requests wait for a starting engine before a 503.", rich_help_panel=HTTP
    ),
]
DrainSeconds = Annotated[
    float,
    typer.Option(help="How long SIGTERM lets requests finish.", rich_help_panel=HTTP),
]
Role = Annotated[
    Roles,
    typer.Option(
        help="What routers are to use this instance for; it takes whatever comes all the same.",
        rich_help_panel=HTTP,
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        help="Send traces there, as http://127.0.0.1:4318. The usual OTEL_ variables work too.",
        rich_help_panel=HTTP,
    ),
]
LogLevel = Annotated[LogLevels, typer.Option(rich_help_panel=HTTP)]
LogFormat = Annotated[
    LogFormats,
    typer.Option(help="json is one object a line, for machines.", rich_help_panel=HTTP),
]
