"""``pla-serve serve``: from flags to a running server.

Modules that are slow to import (torch, transformers, Starlette) are imported when the command runs,
so that ``--help`` is quick.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pla_serve.command_line import CliCommand, Given, fail
from pla_serve.engine.config import DEVICE, NO_SHAPES, SCHEDULE, EngineConfig
from pla_serve.flags import Flag, FlagsOf
from pla_serve.logs import LogFormat, configure
from pla_serve.policy.config import PolicyConfig
from pla_serve.server.limits import Limits
from pla_serve.server.model import ServedModel
from pla_serve.server.offline_options import OfflineOptions
from pla_serve.server.records import tracing
from pla_serve.server.settings import LogSettings, ModelFlags, ServerSettings, server_settings
from pla_serve.server.tier_options import TierOptions

if TYPE_CHECKING:
    from pla_serve.engine.loading import ModelSource
    from pla_serve.server.api.service import GrammarCheck
    from pla_serve.wire.engine import EngineReady

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphFlags:
    """The flag that turns CUDA graphs off, whatever shapes are captured by default."""

    graphs: Annotated[bool, Flag("Run short batches as captured CUDA graphs.", panel=DEVICE)] = True


def serve(given: Given) -> int:
    """Run a server until SIGTERM."""
    try:
        engine, settings, template = read(given)
        logs = given.make(LogSettings)
    except (ValueError, OSError) as error:
        fail(error)
    return start(engine, settings, template, logs.level, logs.form)


SERVE = CliCommand(
    "serve",
    serve,
    (
        FlagsOf(ModelFlags),
        FlagsOf(EngineConfig),
        FlagsOf(GraphFlags),
        FlagsOf(
            PolicyConfig,
            without=("interruptible", "layers"),  # known to the engine
            panel=SCHEDULE,
            also={
                "max_batch_tokens": ("--max-num-batched-tokens",),
                "max_batch_requests": ("--max-num-seqs",),
                "long_chunk_tokens": ("--long-prefill-token-threshold",),
            },
        ),
        FlagsOf(ServerSettings),
        FlagsOf(Limits),
        FlagsOf(OfflineOptions),
        FlagsOf(TierOptions),
        FlagsOf(LogSettings),
    ),
)
"""Flags of other names are those of vLLM."""


def read(given: Given) -> tuple[EngineConfig, ServerSettings, str | None]:
    """Return the settings of the engine and of its server, and the text of a chat template.

    Raises:
        ValueError: a flag is out of range, is not for this policy, or excludes another one.
        OSError: the chat template cannot be read.
    """
    model = given.make(ModelFlags)
    engine = given.make(EngineConfig, model=model.source)
    engine = replace(
        engine,
        policy_config=_schedule(engine.policy, given),
        capture_shapes=_shapes(given.make(GraphFlags).graphs, engine.capture_shapes),
    )
    settings = server_settings(given, model)
    tracing.check(settings.otlp_endpoint)
    return engine, settings, model.read_template()


def _shapes(graphs: bool, shapes: str | None) -> str | None:
    if not graphs and shapes not in (None, NO_SHAPES):
        raise ValueError(f"--no-graphs and --capture-shapes {shapes} exclude each other; drop one")
    return shapes if graphs else NO_SHAPES


def _schedule(policy: str, given: Given) -> PolicyConfig:
    """Settings of a policy, from flags and from the knobs in its text.

    Raises:
        ValueError: a flag was given that this policy does not use, or that is a knob there too.
    """
    from pla_serve.policy.registry import parse_policy

    spec = parse_policy(policy)
    for name in given.fields(PolicyConfig):
        flag = "--" + name.replace("_", "-")
        if name not in spec.kind.settings:
            raise ValueError(f"policy {spec.name} does not use {flag}; leave it out")
        if name in dict(spec.knobs):
            raise ValueError(f"{flag} is given as a flag and as a knob of --policy; drop one")
    return spec.configure(given.make(PolicyConfig))


def start(
    config: EngineConfig,
    settings: ServerSettings,
    chat_template: str | None,
    log_level: str,
    log_format: LogFormat,
    engine: str | None = None,
) -> int:
    """Load the model, serve, and drain.

    Args:
        engine: factory of an engine (`EngineSpec`) that takes the place of the project's own.

    Returns:
        The exit status.

    Raises:
        SystemExit: the server cannot start; one line on standard error says why.
    """
    from pla_serve.engine.host.process import CORE
    from pla_serve.server.engine.backend import EngineStartError
    from pla_serve.server.engine.process import EngineSpec, spawn
    from pla_serve.server.run import InstanceServer, listen, run

    configure(log_level, log_format, "server")
    try:
        listener = listen(settings.host, settings.port, settings.listen_fd)
    except OSError as error:
        fail(error)
    host, port = listener.getsockname()[:2]
    spec = EngineSpec(config, engine or CORE, log_level=log_level, log_format=log_format)
    log.info("loading %s for port %d", config.model, port)
    with listener, spawn(spec) as child:  # it imports torch while this process does
        try:
            source, model = load_for_api(config, chat_template, settings)
            found = replace(spec, config=located(config, source))

            def instance() -> InstanceServer:
                return InstanceServer(
                    settings,
                    found,
                    model,
                    on_ready=lambda engine: _announce(settings, host, port, engine.info),
                    child=child,
                )

            return run(instance, listener)
        except EngineStartError as error:
            fail(error)
        finally:
            child.kill()  # does nothing to one that has ended


def located(config: EngineConfig, source: ModelSource) -> EngineConfig:
    """Return the settings with the model's place on disk, so that nobody looks for it again."""
    return replace(config, model=source.path, load_format=source.load_format)


def load_for_api(
    config: EngineConfig, chat_template: str | None, settings: ServerSettings
) -> tuple[ModelSource, ServedModel]:
    """Find the model, fetch it if it is not here yet, and load what the API needs of it.

    Raises:
        SystemExit: it cannot be had; the message on standard error says why.
    """
    from pla_serve.engine.loading import (
        ConsoleProgress,
        LoadingError,
        load_config,
        load_tokenizer,
        resolve,
        vocab_size,
    )
    from pla_serve.server.embedding_model import read_embedding_model
    from pla_serve.server.generation.defaults import read_defaults
    from pla_serve.server.generation.numbers_tokenizer import numbers_tokenizer

    try:
        source = resolve(
            config.model, config.load_format, keep=config.keep, progress=ConsoleProgress()
        )
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            tokenizer = numbers_tokenizer(load_config(source).vocab_size)
        defaults = read_defaults(
            settings.generation_config, settings.override_generation_config, source.folder
        )
        embeddings = read_embedding_model(source.folder)
    except (LoadingError, OSError, ValueError) as error:
        fail(error)
    log.info("sampling parameters of requests that give none: %s beside the API's", defaults)
    check = _grammar_check(tokenizer, source)
    tokens = vocab_size(source)
    model = ServedModel(tokenizer, check, chat_template, tokens, defaults, embeddings)
    return source, model


def _grammar_check(tokenizer: Any, source: ModelSource) -> GrammarCheck:
    """Return the check of grammars. Its process starts now, while the engine loads its weights."""
    from pla_serve.engine.loading import eos_token_ids
    from pla_serve.grammar.tokenizer import vocabulary_of
    from pla_serve.server.generation.grammar_checks import GrammarChecks, refuse_grammars

    try:
        return GrammarChecks(vocabulary_of(tokenizer, len(tokenizer), eos_token_ids(source)))
    except ValueError as error:
        return refuse_grammars(str(error))


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
