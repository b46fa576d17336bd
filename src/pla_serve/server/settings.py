"""Settings of an API server, which are flags of ``serve`` and ``route``.

The engine has its own: `engine.config.EngineConfig`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pla_serve.command_line import Given
from pla_serve.engine.config import MODEL, EngineConfig
from pla_serve.flags import Flag
from pla_serve.logs import LogFormat
from pla_serve.policy.knobs import check_knobs
from pla_serve.server.cors_origins import check_origins
from pla_serve.server.limits import Limits
from pla_serve.server.link_key import find_link_key
from pla_serve.server.offline_options import OfflineOptions
from pla_serve.server.reasoning.formats import BY_NAME as REASONING_BY_NAME
from pla_serve.server.reasoning.formats import choose_reasoning
from pla_serve.server.tier_options import TierOptions
from pla_serve.server.tools.choice import BY_NAME, choose_format
from pla_serve.wire.link import Role

HTTP = "HTTP server"
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of the HTTP server in front of an engine or a fleet.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    model_names: tuple[str, ...]
    """Names by which clients may ask for the model. Answers to requests that name none have the
    first."""
    model_root: str
    """Folder, file or Hugging Face id that the model came from."""
    host: Annotated[
        str, Flag("Address to listen on; 0.0.0.0 opens the server to the network.", panel=HTTP)
    ] = "127.0.0.1"
    port: Annotated[
        int, Flag("Port to listen on; 0 picks a free one.", least=0, most=65535, panel=HTTP)
    ] = 8000
    api_keys: Annotated[
        tuple[str, ...],
        Flag(
            "Key that clients must send, as a bearer token; repeat it for several keys. Without "
            "any, everybody may use /v1.",
            panel=HTTP,
            name="--api-key",
            variable="PLA_SERVE_API_KEY",
        ),
    ] = ()
    share_prefix_cache: Annotated[
        bool,
        Flag(
            "Let clients with different API keys share the prefix cache. Each can then find out "
            "whether another one has sent a prompt that it guesses.",
            panel=HTTP,
        ),
    ] = False
    enable_priority: Annotated[
        bool,
        Flag(
            "Let clients set the priority of a request; without it a priority is refused.",
            panel=HTTP,
        ),
    ] = False
    link_key_file: Annotated[
        Path | None,
        Flag(
            "File with the key that routers and their instances share; PLA_SERVE_LINK_KEY holds "
            "the key itself. Without one, only routers on this machine may open links, and none "
            "may if there are API keys.",
            panel=HTTP,
        ),
    ] = None
    max_body_mib: Annotated[
        float, Flag("Largest body of a request.", unit="MiB", above=0, panel=HTTP)
    ] = 8.0
    keep_alive_seconds: Annotated[
        float,
        Flag(
            "A stream without tokens gets a comment this often.",
            unit="seconds",
            above=0,
            panel=HTTP,
        ),
    ] = 15.0
    stall_seconds: Annotated[
        float,
        Flag(
            "A stream whose client reads nothing for this long is ended.",
            unit="seconds",
            above=0,
            panel=HTTP,
        ),
    ] = 60.0
    max_unread_tokens: Annotated[
        int,
        Flag(
            "A stream whose client leaves more tokens of one choice unread is ended.",
            unit="tokens",
            least=1,
            panel=HTTP,
        ),
    ] = 1024
    restart_wait: Annotated[
        float,
        Flag(
            "How long a request waits for an engine that starts or restarts before it gets a 503.",
            unit="seconds",
            least=0,
            panel=HTTP,
        ),
    ] = 60.0
    drain_seconds: Annotated[
        float,
        Flag(
            "How long running requests may go on after SIGTERM.",
            unit="seconds",
            least=0,
            panel=HTTP,
        ),
    ] = 30.0
    cors_origins: Annotated[
        tuple[str, ...],
        Flag(
            "Origin of web pages whose scripts may use the API, such as https://chat.example.com; "
            "repeat it for several. * is every page that a user of this machine opens, and is not "
            "safe: without API keys each of them has the model, with keys each can try them.",
            panel=HTTP,
            name="--cors-origin",
        ),
    ] = ()
    metrics_key: Annotated[
        str | None,
        Flag(
            "Key that reads /metrics and nothing else, for scrapers; API keys read it as well. "
            "Where neither is set, /metrics is open.",
            panel=HTTP,
            variable="PLA_SERVE_METRICS_KEY",
        ),
    ] = None
    listen_fd: Annotated[
        int | None,
        Flag(
            "File descriptor of a listening socket that outlives this process. None: it makes its "
            "own.",
            hidden=True,
        ),
    ] = None
    limits: Limits = field(default_factory=Limits)
    offline: OfflineOptions = field(default_factory=OfflineOptions)
    tiers: TierOptions = field(default_factory=TierOptions)
    role: Annotated[
        Role,
        Flag(
            "Requests that routers send here first. It changes nothing in the instance, which "
            "serves whatever comes.",
            panel=HTTP,
        ),
    ] = "mixed"
    tool_parser: Annotated[
        str,
        Flag(
            "Format in which the model writes tool calls: " + ", ".join(BY_NAME) + ". auto: the "
            "one that the chat template shows.",
            panel=MODEL,
            also=("--tool-call-parser",),
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Flag(
            "Format in which the model reasons before it answers: "
            + ", ".join(REASONING_BY_NAME)
            + ". auto: the one that the chat template shows.",
            panel=MODEL,
        ),
    ] = "auto"
    generation_config: Annotated[
        str,
        Flag(
            "Sampling parameters of requests that give none: those of generation_config.json in "
            "the model's folder (auto), none (vllm), or those of the file in this folder.",
            panel=MODEL,
        ),
    ] = "auto"
    override_generation_config: Annotated[
        str | None,
        Flag(
            "JSON object whose fields go before those of the generation config, for example "
            '{"temperature": 0.6}.',
            panel=MODEL,
        ),
    ] = None
    otlp_endpoint: Annotated[
        str | None,
        Flag(
            "Base URL of an OTLP collector for traces, for example http://127.0.0.1:4318. The "
            "usual OTEL_ variables work too.",
            panel=HTTP,
        ),
    ] = None

    link_key: str | None = None
    """Key of links, from the file or the environment (`find_link_key`)."""

    @property
    def max_body_bytes(self) -> int:
        """Largest body of a request."""
        return int(self.max_body_mib * 2**20)

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ValueError("the model needs at least one name, and no empty one")
        if not all(self.api_keys):
            raise ValueError("an API key must not be empty")
        if self.metrics_key == "":
            raise ValueError("the key for /metrics must not be empty")
        self.tiers.of_keys(self.api_keys)
        check_origins(self.cors_origins)
        choose_format("", self.tool_parser)
        choose_reasoning("", self.reasoning_parser)
        check_knobs(self)


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """Flags of ``serve`` and ``route`` that name a model.

    Raises:
        ValueError: argument and flag name two models.
    """

    model: Annotated[
        str | None,
        Flag(
            "Folder of safetensors, GGUF file, or Hugging Face id. None: " + EngineConfig().model,
            argument=True,
        ),
    ] = None
    model_flag: Annotated[
        str | None, Flag("The same as the argument.", panel=MODEL, name="--model")
    ] = None
    served_model_name: Annotated[
        tuple[str, ...],
        Flag(
            "Name by which clients ask for the model; repeat it for several names. Default: the "
            "model as given.",
            panel=MODEL,
        ),
    ] = ()
    chat_template: Annotated[
        Path | None,
        Flag("Jinja file that takes the place of the model's chat template.", panel=MODEL),
    ] = None

    def __post_init__(self) -> None:
        if self.model and self.model_flag and self.model != self.model_flag:
            raise ValueError(f"two models were named, {self.model} and {self.model_flag}; name one")

    @property
    def source(self) -> str:
        """Folder, file or Hugging Face id of the model."""
        return self.model or self.model_flag or EngineConfig().model

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which clients ask for it."""
        return self.served_model_name or (self.source,)

    def read_template(self) -> str | None:
        """Text of the chat template, or None for the model's own.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not UTF-8.
        """
        return None if self.chat_template is None else self.chat_template.read_text("utf-8")


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Logs of a process."""

    level: Annotated[
        LogLevel, Flag("Least serious entries that are logged.", panel=HTTP, name="--log-level")
    ] = "info"
    form: Annotated[
        LogFormat,
        Flag("Form of the logs; json is one object a line.", panel=HTTP, name="--log-format"),
    ] = "text"


def server_settings(given: Given, model: ModelFlags) -> ServerSettings:
    """Settings of the HTTP server from the flags of ``serve`` or ``route``.

    Raises:
        ValueError: a flag is out of range.
        OSError: the file with the link key cannot be read.
    """
    settings = given.make(
        ServerSettings,
        model_names=model.names,
        model_root=model.source,
        limits=given.make(Limits),
        offline=given.make(OfflineOptions),
        tiers=given.make(TierOptions),
    )
    return replace(settings, link_key=find_link_key(settings.link_key_file, os.environ))
