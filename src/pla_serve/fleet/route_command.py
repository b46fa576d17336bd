"""``pla-serve route``: the whole API in front of instances that run elsewhere."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from pla_serve.engine.config import EngineConfig
from pla_serve.fleet import route_flags
from pla_serve.fleet.router.circuit import CircuitOptions
from pla_serve.fleet.router.contract import FleetOptions
from pla_serve.logs import LogFormat, configure
from pla_serve.server import flags
from pla_serve.server.records import tracing
from pla_serve.server.settings import ServerSettings

if TYPE_CHECKING:
    from pla_serve.fleet.control.control import FleetControl
    from pla_serve.fleet.router.client import MakeLink

log = logging.getLogger(__name__)

_ENGINE, _SERVER, _FLEET = EngineConfig(), ServerSettings(("model",), ""), FleetOptions()


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """What the router is told beside the settings of its API."""

    instances: tuple[str, ...]
    instance_key: str | None
    liveness_seconds: float | None
    """None: by the kind of server."""
    routing: str
    fleet: FleetOptions
    controller: str
    """As `parse_controller` takes it, or off."""
    control_seconds: float
    listen_fd: int | None = None
    """A listening socket that outlives this process; None: it makes its own."""


def route(
    instance: route_flags.Instances,
    model: flags.ModelArgument = None,
    model_flag: flags.ModelFlag = None,
    served_model_name: flags.ServedModelName = None,
    load_format: flags.LoadFormat = _ENGINE.load_format,
    chat_template: flags.ChatTemplate = None,
    instance_key: route_flags.InstanceKey = None,
    routing: route_flags.Routing = "auto",
    max_predicted_wait: route_flags.MaxPredictedWait = 0.0,
    controller: route_flags.Controller = "off",
    control_seconds: route_flags.ControlSeconds = 1.0,
    liveness_seconds: route_flags.Liveness = None,
    circuit_failures: route_flags.CircuitFailures = _FLEET.circuit.failures,
    circuit_seconds: route_flags.CircuitSeconds = _FLEET.circuit.open_seconds,
    max_failures: route_flags.MaxFailures = _FLEET.most_failures,
    lease_seconds: route_flags.LeaseSeconds = _FLEET.lease_seconds,
    host: flags.Host = _SERVER.host,
    port: flags.Port = _SERVER.port,
    listen_fd: route_flags.ListenFd = None,
    api_key: flags.ApiKey = None,
    max_body_mib: flags.MaxBodyMib = _SERVER.max_body_bytes / 2**20,
    keep_alive_seconds: flags.KeepAliveSeconds = _SERVER.keep_alive_seconds,
    stall_seconds: flags.StallSeconds = _SERVER.stall_seconds,
    max_unread_tokens: flags.MaxUnreadTokens = _SERVER.max_unread_tokens,
    restart_wait: flags.RestartWait = _SERVER.restart_wait,
    drain_seconds: flags.DrainSeconds = _SERVER.drain_seconds,
    otlp_endpoint: flags.OtlpEndpoint = None,
    log_level: flags.LogLevel = "info",
    log_format: flags.LogFormat = "text",
) -> None:
    """Route the requests of OpenAI clients to instances of one model."""
    if model and model_flag and model != model_flag:
        _fail(ValueError(f"two models were named, {model} and {model_flag}; name one"))
    name = model or model_flag or _ENGINE.model
    try:
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
            otlp_endpoint=otlp_endpoint,
        )
        fleet = FleetOptions(
            circuit=CircuitOptions(circuit_failures, circuit_seconds),
            max_predicted_wait=max_predicted_wait or None,
            most_failures=max_failures,
            patience_seconds=restart_wait,
            lease_seconds=lease_seconds,
        )
        if liveness_seconds is not None and not liveness_seconds > 0:
            raise ValueError(f"--liveness-seconds must be positive, not {liveness_seconds}")
        check_urls(instance)
        tracing.check(otlp_endpoint)
        if not control_seconds > 0:
            raise ValueError(f"--control-seconds must be positive, not {control_seconds}")
        template = chat_template.read_text(encoding="utf-8") if chat_template else None
    except (ValueError, OSError) as error:
        _fail(error)
    engine = EngineConfig(model=name, load_format=load_format)
    router = RouteSettings(
        instances=tuple(instance),
        instance_key=instance_key,
        liveness_seconds=liveness_seconds,
        routing=routing,
        fleet=fleet,
        controller=controller,
        control_seconds=control_seconds,
        listen_fd=listen_fd,
    )
    raise typer.Exit(start(engine, settings, router, template, log_level, log_format))


def start(
    config: EngineConfig,
    settings: ServerSettings,
    router: RouteSettings,
    chat_template: str | None,
    log_level: str,
    log_format: LogFormat,
) -> int:
    """Load the tokenizer, connect, route, drain; returns the exit status."""
    from pla_serve.server.command import load_for_api
    from pla_serve.server.engine.backend import EngineStartError
    from pla_serve.server.run import listen, run

    configure(log_level, log_format, "router")
    try:
        if router.listen_fd is None:
            listener = listen(settings.host, settings.port)
        else:
            listener = socket.socket(fileno=router.listen_fd)
    except OSError as error:
        _fail(error)
    host, port = listener.getsockname()[:2]
    with listener:
        _, tokenizer, check_grammar = load_for_api(config)

        def server() -> Any:
            return build(
                settings, router, tokenizer, check_grammar, chat_template, f"{host}:{port}"
            )

        try:
            return run(server, listener)
        except EngineStartError as error:
            _fail(error)


def build(
    settings: ServerSettings,
    router: RouteSettings,
    tokenizer: Any,
    check_grammar: Any,
    chat_template: str | None,
    address: str,
) -> Any:
    """The API server whose backend is the fleet. Belongs to a running event loop."""
    from pla_serve.fleet.router.client import FleetClient
    from pla_serve.fleet.router.metrics import FleetMetrics
    from pla_serve.fleet.router.observers import WithControl
    from pla_serve.fleet.status import ControlMetrics, FleetStatus
    from pla_serve.policy.routing.registry import parse_routing
    from pla_serve.server.api.guard import Keys
    from pla_serve.server.run import ApiServer

    client: FleetClient
    metrics = FleetMetrics(settings.model_names[0])
    signal = ControlMetrics(metrics.registry, settings.model_names[0])
    control = _control(router, lambda: [i.link for i in client.instances], signal.look)
    client = FleetClient(
        make_links(router),
        WithControl(metrics, control),
        options=router.fleet,
        routing=None if router.routing == "auto" else parse_routing(router.routing),
        control=control,
    )
    metrics.watch(client.fleet)
    status = FleetStatus(client, control, Keys(settings.api_keys), time.monotonic)

    def announce() -> None:
        there = sum(instance.connected for instance in client.instances)
        print(
            f"Ready: routing {settings.model_names[0]} on http://{address}/v1, "
            f"{there} of {len(client.instances)} instances connected.",
            flush=True,
        )

    return ApiServer(
        settings,
        client,
        metrics,
        tokenizer,
        chat_template=chat_template,
        check_grammar=check_grammar,
        on_ready=announce,
        extend=status.add_routes,
        shared_listener=router.listen_fd is not None,
    )


def check_urls(urls: Sequence[str]) -> None:
    """Raises:
    ValueError: a URL is none of an instance, or is there twice; says what one looks like.
    """
    for url in urls:
        kind, address = split_url(url)
        if kind not in ("pla", "vllm", "sglang") or not address.startswith(("http://", "https://")):
            raise ValueError(
                f"an instance is http://HOST:PORT, vllm+http://HOST:PORT or "
                f"sglang+http://HOST:PORT, not {url!r}"
            )
    addresses = [split_url(url)[1] for url in urls]
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError(f"the instance {address} was named twice; name it once")


def split_url(url: str) -> tuple[str, str]:
    """Kind of server and its address, of ``kind+http://host:port`` or ``http://host:port``."""
    scheme, separator, rest = url.rstrip("/").partition("://")
    kind, plus, scheme_behind = scheme.partition("+")
    return (kind, f"{scheme_behind}://{rest}") if plus else ("pla", f"{scheme}{separator}{rest}")


def make_links(router: RouteSettings) -> list[MakeLink]:
    """One for each instance, by its kind."""
    return [_link(router, *split_url(url)) for url in router.instances]


def _link(router: RouteSettings, kind: str, url: str) -> MakeLink:
    from pla_serve.fleet.link import http, protocol
    from pla_serve.fleet.link.http import Dialect, HttpLink
    from pla_serve.fleet.link.own import InstanceLink
    from pla_serve.fleet.link.sglang import SglangDialect
    from pla_serve.fleet.link.vllm import VllmDialect

    key, told = router.instance_key, router.liveness_seconds
    if kind == "pla":
        heartbeat = protocol.LIVENESS_SECONDS if told is None else told
        return lambda events: InstanceLink(url, events, api_key=key, liveness_seconds=heartbeat)
    dialect: Dialect = VllmDialect() if kind == "vllm" else SglangDialect()
    answer = http.LIVENESS_SECONDS if told is None else told
    return lambda events: HttpLink(url, events, dialect, api_key=key, liveness_seconds=answer)


def _control(
    router: RouteSettings, links: Any, on_decision: Callable[[FleetControl], None]
) -> FleetControl:
    """Without a controller it moves nothing and keeps the signal for autoscalers."""
    from pla_serve.fleet.control.control import ControlOptions, FleetControl
    from pla_serve.policy.pools.registry import parse_controller

    return FleetControl(
        links,
        None if router.controller == "off" else parse_controller(router.controller),
        ControlOptions(period_seconds=router.control_seconds),
        name=router.controller,
        on_decision=on_decision,
    )


def _fail(error: Exception) -> NoReturn:
    print(f"pla-serve: {error}", file=sys.stderr)
    raise typer.Exit(1)
