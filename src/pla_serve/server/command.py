"""``pla-serve serve``: from flags to a running server.

What is slow to import (torch, transformers, FastAPI) is imported when the command runs, so that
``--help`` is quick.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from pla_serve.engine.config import DType, EngineConfig, LoadFormat
from pla_serve.policy.config import PolicyConfig
from pla_serve.server.settings import ServerSettings

if TYPE_CHECKING:
    from pla_serve.engine.loading import ModelSource
    from pla_serve.engine.messages import EngineReady, Grammar
    from pla_serve.server.endpoints import GrammarCheck

_ENGINE, _POLICY, _SERVER = EngineConfig(), PolicyConfig(), ServerSettings(("model",), "")
MODEL, CACHE, SCHEDULE, ADMISSION, HTTP = (
    "Model",
    "KV cache",
    "Scheduling",
    "Admission",
    "HTTP server",
)
Policy = Literal["length-aware", "fcfs", "hrrn", "srpt"]
LogLevel = Literal["debug", "info", "warning", "error"]


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder of safetensors, a GGUF file, or a Hugging Face id. "
            f"Default: {_ENGINE.model}."
        ),
    ] = None,
    model_flag: Annotated[
        str | None,
        typer.Option("--model", help="The same as the argument.", rich_help_panel=MODEL),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients call the model; may be repeated. Default: the model as given.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    load_format: Annotated[
        LoadFormat,
        typer.Option(
            help="dummy makes random weights from the config.",
            rich_help_panel=MODEL,
        ),
    ] = _ENGINE.load_format,
    dtype: Annotated[
        DType, typer.Option(help="auto follows the model.", rich_help_panel=MODEL)
    ] = _ENGINE.dtype,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)
    ] = _ENGINE.device,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. Default: all cores.", rich_help_panel=MODEL),
    ] = _ENGINE.threads,
    seed: Annotated[
        int, typer.Option(help="For requests that give none.", rich_help_panel=MODEL)
    ] = _ENGINE.seed,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of prompt and output. Default: the model's, as far as KV goes.",
            rich_help_panel=MODEL,
        ),
    ] = _ENGINE.max_model_len,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="A Jinja file that takes the place of the model's template.", rich_help_panel=MODEL
        ),
    ] = None,
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            help="Memory for KV. Default: a share of what is free.", rich_help_panel=CACHE
        ),
    ] = _ENGINE.kv_cache_gib,
    block_size: Annotated[
        int, typer.Option(help="Tokens in one KV block.", rich_help_panel=CACHE)
    ] = _ENGINE.block_tokens,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Reuse the KV of prompts that begin alike.",
            rich_help_panel=CACHE,
        ),
    ] = _ENGINE.prefix_cache,
    short_kv_reserve: Annotated[
        float,
        typer.Option(
            help="Share of the KV that long prefills may not take.", rich_help_panel=CACHE
        ),
    ] = _ENGINE.short_kv_reserve,
    policy: Annotated[
        Policy,
        typer.Option(help="What runs next.", rich_help_panel=SCHEDULE),
    ] = "length-aware",
    max_batch_tokens: Annotated[
        int,
        typer.Option(
            "--max-batch-tokens",
            "--max-num-batched-tokens",
            help="Most tokens in one batch.",
            rich_help_panel=SCHEDULE,
        ),
    ] = _POLICY.max_batch_tokens,
    max_batch_requests: Annotated[
        int,
        typer.Option(
            "--max-batch-requests",
            "--max-num-seqs",
            help="Most requests in one batch.",
            rich_help_panel=SCHEDULE,
        ),
    ] = _POLICY.max_batch_requests,
    long_chunk_tokens: Annotated[
        int,
        typer.Option(
            "--long-chunk-tokens",
            "--long-prefill-token-threshold",
            help="Most tokens of one long prefill in one batch.",
            rich_help_panel=SCHEDULE,
        ),
    ] = _POLICY.long_chunk_tokens,
    boundary_tokens: Annotated[
        int | None,
        typer.Option(
            help="At most this many new tokens are short. Default: fitted while serving.",
            rich_help_panel=SCHEDULE,
        ),
    ] = _POLICY.boundary_tokens,
    long_share: Annotated[
        float,
        typer.Option(
            help="Share of time that waiting long prefills are guaranteed.",
            rich_help_panel=SCHEDULE,
        ),
    ] = _POLICY.long_share,
    express_burst_seconds: Annotated[
        float,
        typer.Option(
            help="How far short prefills may run ahead of that share.", rich_help_panel=SCHEDULE
        ),
    ] = _POLICY.express_burst_seconds,
    decode_share: Annotated[
        float,
        typer.Option(
            help="Most of the time for decode steps during a long prefill.",
            rich_help_panel=SCHEDULE,
        ),
    ] = _POLICY.decode_share,
    aging: Annotated[
        float,
        typer.Option(
            help="Seconds of work that a second of waiting outweighs, among longs.",
            rich_help_panel=SCHEDULE,
        ),
    ] = _POLICY.aging,
    max_queued_tokens: Annotated[
        int | None,
        typer.Option(
            help="Refuse (429) when more new tokens wait. Default: 4 times the KV.",
            rich_help_panel=ADMISSION,
        ),
    ] = _ENGINE.max_queued_tokens,
    max_predicted_wait: Annotated[
        float,
        typer.Option(
            help="Refuse (429) what would wait longer, in seconds; 0: never.",
            rich_help_panel=ADMISSION,
        ),
    ] = _ENGINE.max_predicted_wait or 0.0,
    host: Annotated[
        str,
        typer.Option(help="0.0.0.0 opens it to the network.", rich_help_panel=HTTP),
    ] = _SERVER.host,
    port: Annotated[
        int, typer.Option(help="0 picks a free one.", rich_help_panel=HTTP)
    ] = _SERVER.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="PLA_SERVE_API_KEY",
            help="Clients must send one of these; may be repeated.",
            rich_help_panel=HTTP,
            show_envvar=True,
        ),
    ] = None,
    max_body_mib: Annotated[
        float, typer.Option(help="Largest request body.", rich_help_panel=HTTP)
    ] = _SERVER.max_body_bytes / 2**20,
    keep_alive_seconds: Annotated[
        float,
        typer.Option(help="A silent stream gets a comment this often.", rich_help_panel=HTTP),
    ] = _SERVER.keep_alive_seconds,
    stall_seconds: Annotated[
        float,
        typer.Option(
            help="A stream whose client reads nothing so long is ended.", rich_help_panel=HTTP
        ),
    ] = _SERVER.stall_seconds,
    max_unread_tokens: Annotated[
        int,
        typer.Option(
            help="A stream whose client leaves more tokens unread is ended.", rich_help_panel=HTTP
        ),
    ] = _SERVER.max_unread_tokens,
    restart_wait: Annotated[
        float,
        typer.Option(
            help="How long requests wait for a starting engine before a 503.", rich_help_panel=HTTP
        ),
    ] = _SERVER.restart_wait,
    drain_seconds: Annotated[
        float,
        typer.Option(help="How long SIGTERM lets requests finish.", rich_help_panel=HTTP),
    ] = _SERVER.drain_seconds,
    log_level: Annotated[LogLevel, typer.Option(rich_help_panel=HTTP)] = "info",
) -> None:
    """Serve a model to OpenAI clients."""
    if model and model_flag and model != model_flag:
        _fail(ValueError(f"two models were named, {model} and {model_flag}; name one"))
    name = model or model_flag or _ENGINE.model
    try:
        engine = EngineConfig(
            model=name,
            load_format=load_format,
            dtype=dtype,
            device=device,
            seed=seed,
            max_model_len=max_model_len,
            block_tokens=block_size,
            kv_cache_gib=kv_cache_gib,
            prefix_cache=prefix_cache,
            short_kv_reserve=short_kv_reserve,
            threads=threads,
            policy=policy,
            policy_config=PolicyConfig(
                max_batch_tokens=max_batch_tokens,
                max_batch_requests=max_batch_requests,
                long_chunk_tokens=long_chunk_tokens,
                boundary_tokens=boundary_tokens,
                long_share=long_share,
                express_burst_seconds=express_burst_seconds,
                decode_share=decode_share,
                aging=aging,
            ),
            max_queued_tokens=max_queued_tokens,
            max_predicted_wait=max_predicted_wait or None,
        )
        settings = ServerSettings(
            model_names=tuple(served_model_name or [name]),
            model_root=name,
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            max_body_bytes=int(max_body_mib * 2**20),
            keep_alive_seconds=keep_alive_seconds,
            stall_seconds=stall_seconds,
            max_unread_tokens=max_unread_tokens,
            restart_wait=restart_wait,
            drain_seconds=drain_seconds,
        )
        template = chat_template.read_text(encoding="utf-8") if chat_template else None
    except (ValueError, OSError) as error:
        _fail(error)
    raise typer.Exit(start(engine, settings, template, log_level))


def start(
    config: EngineConfig, settings: ServerSettings, chat_template: str | None, log_level: str
) -> int:
    """Load, serve, drain; returns the exit status. What the user can mend exits with one line."""
    from pla_serve.engine.loading import ConsoleProgress, LoadingError, resolve
    from pla_serve.server.engine_client import EngineStartError
    from pla_serve.server.engine_process import EngineSpec
    from pla_serve.server.run import Instance, listen, run

    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s server: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        listener = listen(settings.host, settings.port)
        source = resolve(config.model, config.load_format, progress=ConsoleProgress())
        tokenizer = _tokenizer(source)
    except (LoadingError, OSError, ValueError) as error:
        _fail(error)
    host, port = listener.getsockname()[:2]

    def instance() -> Instance:
        return Instance(
            settings,
            EngineSpec(config, log_level=log_level),
            tokenizer,
            chat_template=chat_template,
            check_grammar=_grammar_check(tokenizer, source),
            on_ready=lambda engine: _announce(settings, host, port, engine.info),
        )

    try:
        return run(instance, listener)
    except EngineStartError as error:
        _fail(error)


def _tokenizer(source: ModelSource) -> Any:
    from pla_serve.engine.loading import load_config, load_tokenizer
    from pla_serve.server.numbers import numbers_tokenizer

    found = load_tokenizer(source)
    return found if found is not None else numbers_tokenizer(load_config(source).vocab_size)


def _grammar_check(tokenizer: Any, source: ModelSource) -> GrammarCheck:
    """Its import takes seconds, so it begins in a thread while the engine loads its weights."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def build() -> Any:
        from pla_serve.engine.loading import eos_token_ids
        from pla_serve.engine.sampling.grammar import GrammarCompiler

        return GrammarCompiler(tokenizer, len(tokenizer), eos_token_ids=eos_token_ids(source))

    compiler = thread.submit(build)
    thread.shutdown(wait=False)

    def check(grammar: Grammar) -> None:
        compiler.result().check_grammar(grammar)

    return check


def _announce(settings: ServerSettings, host: str, port: int, info: EngineReady | None) -> None:
    assert info is not None
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_keys else ""
    print(
        f"Ready: {settings.model_names[0]} ({info.dtype} on {info.device}, {info.max_model_len} "
        f"tokens of context, policy {info.policy}). Try:\n"
        f"curl http://{address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        '-d \'{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32}\'',
        flush=True,
    )


def _fail(error: Exception) -> NoReturn:
    print(f"pla-serve: {error}", file=sys.stderr)
    raise typer.Exit(1)
