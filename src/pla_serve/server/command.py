"""``pla-serve serve``: from flags to a running server.

What is slow to import (torch, transformers, FastAPI) is imported when the command runs, so that
``--help`` is quick.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from pla_serve.engine.config import NO_SHAPES, EngineConfig
from pla_serve.logs import LogFormat, configure
from pla_serve.policy.config import PolicyConfig
from pla_serve.server import flags
from pla_serve.server.records import tracing
from pla_serve.server.settings import ServerSettings

if TYPE_CHECKING:
    from pla_serve.engine.loading import ModelSource
    from pla_serve.server.api.endpoints import GrammarCheck
    from pla_serve.wire.engine import EngineReady, Grammar

log = logging.getLogger(__name__)

_ENGINE, _POLICY, _SERVER = EngineConfig(), PolicyConfig(), ServerSettings(("model",), "")


def serve(
    context: typer.Context,
    model: flags.ModelArgument = None,
    model_flag: flags.ModelFlag = None,
    served_model_name: flags.ServedModelName = None,
    load_format: flags.LoadFormat = _ENGINE.load_format,
    dtype: flags.Dtype = _ENGINE.dtype,
    device: flags.Device = _ENGINE.device,
    tensor_parallel_size: flags.TensorParallelSize = _ENGINE.tensor_parallel_size,
    threads: flags.Threads = _ENGINE.threads,
    seed: flags.Seed = _ENGINE.seed,
    max_model_len: flags.MaxModelLen = _ENGINE.max_model_len,
    chat_template: flags.ChatTemplate = None,
    kv_cache_gib: flags.KvCacheGib = _ENGINE.kv_cache_gib,
    block_size: flags.BlockSize = _ENGINE.block_tokens,
    prefix_cache: flags.PrefixCache = _ENGINE.prefix_cache,
    short_kv_reserve: flags.ShortKvReserve = _ENGINE.short_kv_reserve,
    kv_transfer: flags.KvTransfer = _ENGINE.kv_transfer,
    policy: flags.Policy = "length-aware",
    max_batch_tokens: flags.MaxBatchTokens = _POLICY.max_batch_tokens,
    max_batch_requests: flags.MaxBatchRequests = _POLICY.max_batch_requests,
    long_chunk_tokens: flags.LongChunkTokens = _POLICY.long_chunk_tokens,
    boundary_tokens: flags.BoundaryTokens = _POLICY.boundary_tokens,
    long_share: flags.LongShare = _POLICY.long_share,
    express_burst_seconds: flags.ExpressBurstSeconds = _POLICY.express_burst_seconds,
    decode_share: flags.DecodeShare = _POLICY.decode_share,
    express_wait_seconds: flags.ExpressWaitSeconds = _POLICY.express_wait_seconds,
    patience: flags.Patience = _POLICY.patience,
    attention_backend: flags.AttentionBackend = _ENGINE.attention_backend,
    graphs: flags.Graphs = True,
    capture_shapes: flags.CaptureShapes = _ENGINE.capture_shapes,
    capture_tokens: flags.CaptureTokens = _ENGINE.capture_tokens,
    capture_padding_cap: flags.CapturePaddingCap = _ENGINE.capture_padding_cap,
    run_ahead_layers: flags.RunAheadLayers = _ENGINE.run_ahead_layers,
    compile_layers: flags.CompileLayers = _ENGINE.compile_layers,
    async_scheduling: flags.AsyncScheduling = _ENGINE.async_scheduling,
    max_queued_tokens: flags.MaxQueuedTokens = _ENGINE.max_queued_tokens,
    max_predicted_wait: flags.MaxPredictedWait = _ENGINE.max_predicted_wait or 0.0,
    host: flags.Host = _SERVER.host,
    port: flags.Port = _SERVER.port,
    api_key: flags.ApiKey = None,
    max_body_mib: flags.MaxBodyMib = _SERVER.max_body_bytes / 2**20,
    keep_alive_seconds: flags.KeepAliveSeconds = _SERVER.keep_alive_seconds,
    stall_seconds: flags.StallSeconds = _SERVER.stall_seconds,
    max_unread_tokens: flags.MaxUnreadTokens = _SERVER.max_unread_tokens,
    restart_wait: flags.RestartWait = _SERVER.restart_wait,
    drain_seconds: flags.DrainSeconds = _SERVER.drain_seconds,
    role: flags.Role = _SERVER.role,
    otlp_endpoint: flags.OtlpEndpoint = None,
    log_level: flags.LogLevel = "info",
    log_format: flags.LogFormat = "text",
) -> None:
    """Serve a model to OpenAI clients."""
    if model and model_flag and model != model_flag:
        _fail(ValueError(f"two models were named, {model} and {model_flag}; name one"))
    name = model or model_flag or _ENGINE.model
    try:
        schedule = _schedule(
            context,
            policy,
            PolicyConfig(
                max_batch_tokens=max_batch_tokens,
                max_batch_requests=max_batch_requests,
                long_chunk_tokens=long_chunk_tokens,
                boundary_tokens=boundary_tokens,
                long_share=long_share,
                express_burst_seconds=express_burst_seconds,
                decode_share=decode_share,
                express_wait_seconds=express_wait_seconds,
                patience=patience,
            ),
        )
        engine = EngineConfig(
            model=name,
            load_format=load_format,
            dtype=dtype,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            seed=seed,
            max_model_len=max_model_len,
            block_tokens=block_size,
            kv_cache_gib=kv_cache_gib,
            prefix_cache=prefix_cache,
            short_kv_reserve=short_kv_reserve,
            kv_transfer=kv_transfer,
            threads=threads,
            policy=policy,
            policy_config=schedule,
            attention_backend=attention_backend,
            capture_shapes=_shapes(graphs, capture_shapes),
            capture_tokens=capture_tokens,
            capture_padding_cap=capture_padding_cap,
            run_ahead_layers=run_ahead_layers,
            compile_layers=compile_layers,
            async_scheduling=async_scheduling,
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
            role=role,
            otlp_endpoint=otlp_endpoint,
        )
        tracing.check(otlp_endpoint)
        template = chat_template.read_text(encoding="utf-8") if chat_template else None
    except (ValueError, OSError) as error:
        _fail(error)
    raise typer.Exit(start(engine, settings, template, log_level, log_format))


def _shapes(graphs: bool, shapes: str | None) -> str | None:
    if not graphs and shapes not in (None, NO_SHAPES):
        raise ValueError(f"--no-graphs and --capture-shapes {shapes} exclude each other; drop one")
    return shapes if graphs else NO_SHAPES


def _schedule(context: typer.Context, policy: str, flags: PolicyConfig) -> PolicyConfig:
    """The settings by ``flags`` and by the knobs in ``policy``.

    Raises:
        ValueError: a flag was given that this policy does not use, or that is a knob there too.
    """
    from pla_serve.policy.registry import parse_policy

    spec = parse_policy(policy)
    for name in (field.name for field in fields(flags)):
        source = context.get_parameter_source(name)
        if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
            continue
        flag = "--" + name.replace("_", "-")
        if name not in spec.kind.settings:
            raise ValueError(f"policy {spec.name} does not use {flag}; leave it out")
        if name in dict(spec.knobs):
            raise ValueError(f"{flag} is given as a flag and as a knob of --policy; drop one")
    return spec.configure(flags)


def start(
    config: EngineConfig,
    settings: ServerSettings,
    chat_template: str | None,
    log_level: str,
    log_format: LogFormat,
    engine: str | None = None,
) -> int:
    """Load, serve, drain; returns the exit status. What the user can mend exits with one line.

    ``engine`` is a factory as of `EngineSpec`, in the place of the engine's own.
    """
    from pla_serve.engine.host.process import CORE
    from pla_serve.server.engine.backend import EngineStartError
    from pla_serve.server.engine.process import EngineSpec, spawn
    from pla_serve.server.run import InstanceServer, listen, run

    configure(log_level, log_format, "server")
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        _fail(error)
    host, port = listener.getsockname()[:2]
    spec = EngineSpec(config, engine or CORE, log_level=log_level, log_format=log_format)
    log.info("loading %s for port %d", config.model, port)
    with listener, spawn(spec) as child:  # it imports torch while this process does
        try:
            source, tokenizer, check_grammar = load_for_api(config)
            found = replace(spec, config=_located(config, source))

            def instance() -> InstanceServer:
                return InstanceServer(
                    settings,
                    found,
                    tokenizer,
                    chat_template=chat_template,
                    check_grammar=check_grammar,
                    on_ready=lambda engine: _announce(settings, host, port, engine.info),
                    child=child,
                )

            return run(instance, listener)
        except EngineStartError as error:
            _fail(error)
        finally:
            child.kill()  # does nothing to one that has ended


def _located(config: EngineConfig, source: ModelSource) -> EngineConfig:
    """The same settings with the model where it was found, so that nobody looks for it again."""
    return replace(config, model=source.path, load_format=source.load_format)


def load_for_api(config: EngineConfig) -> tuple[ModelSource, Any, GrammarCheck]:
    """Source, tokenizer, and a check of grammars. Fetches the model if it is not here yet."""
    from pla_serve.engine.loading import (
        ConsoleProgress,
        LoadingError,
        load_config,
        load_tokenizer,
        resolve,
    )
    from pla_serve.server.generation.numbers_tokenizer import numbers_tokenizer

    try:
        source = resolve(config.model, config.load_format, progress=ConsoleProgress())
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            tokenizer = numbers_tokenizer(load_config(source).vocab_size)
    except (LoadingError, OSError, ValueError) as error:
        _fail(error)
    return source, tokenizer, _grammar_check(tokenizer, source)


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
