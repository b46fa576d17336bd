"""``pla-serve route``: from flags to a running router."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pla_serve.command_line import CliCommand, Given, fail
from pla_serve.engine.config import EngineConfig
from pla_serve.flags import Flag, FlagsOf
from pla_serve.fleet.picker.options import PickerOptions
from pla_serve.fleet.router.circuit import FAULTS, CircuitOptions
from pla_serve.fleet.router.contract import ROUTING, FleetOptions
from pla_serve.logs import LogFormat, configure
from pla_serve.policy.knobs import check_knobs
from pla_serve.server.limits import Limits
from pla_serve.server.model import ServedModel
from pla_serve.server.records import tracing
from pla_serve.server.settings import LogSettings, ModelFlags, ServerSettings, server_settings
from pla_serve.server.tier_options import TierOptions

if TYPE_CHECKING:
    from pla_serve.fleet.control.control import FleetControl
    from pla_serve.fleet.router.client import MakeLink

log = logging.getLogger(__name__)

INSTANCES = "Instances"
AUTO, OFF = "auto", "off"


def known_routing(text: str) -> str:
    """``text``, if it names a routing policy and knobs that it has, or is auto.

    Raises:
        ValueError: it does not; the message names what there is.
    """
    from pla_serve.policy.routing.registry import parse_routing  # with numpy

    if text != AUTO:
        parse_routing(text)
    return text


def list_routings() -> str:
    """Routing policies for the help."""
    from pla_serve.policy.routing.registry import ROUTINGS

    return ROUTINGS.help() + "."


def known_controller(text: str) -> str:
    """``text``, if it names a pool controller and knobs that it has, or is off.

    Raises:
        ValueError: it does not; the message names what there is.
    """
    from pla_serve.policy.pools.registry import parse_controller

    if text != OFF:
        try:
            parse_controller(text)
        except ValueError as error:
            raise ValueError(f"{error}, or off") from None
    return text


def list_controllers() -> str:
    """Pool controllers for the help."""
    from pla_serve.policy.pools.registry import CONTROLLERS

    return CONTROLLERS.help() + "."


def list_urls() -> str:
    """Forms of an instance's URL for the help."""
    from pla_serve.fleet.link.kinds import url_forms

    return url_forms() + "."


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """Settings of a router beside those of its API.

    Raises:
        ValueError: a field is out of range, or an instance's URL is none.
    """

    instances: Annotated[
        tuple[str, ...],
        Flag(
            "An instance; repeat it for each one. Forms:",
            panel=INSTANCES,
            name="--instance",
            metavar="URL",
            more=list_urls,
        ),
    ]
    instance_key: Annotated[
        str | None,
        Flag(
            "Key that the instances ask for: the API key of vLLM or SGLang servers, and the "
            "link key of instances of ours unless PLA_SERVE_LINK_KEY or --link-key-file gives it.",
            panel=INSTANCES,
            variable="PLA_SERVE_INSTANCE_KEY",
        ),
    ] = None
    routing: Annotated[
        str,
        Flag(
            "Which instance a request goes to. auto is class-pools while there are short or long "
            "instances, and predicted otherwise. Routing policies:",
            panel=ROUTING,
            metavar="NAME[:KNOB=VALUE]...",
            read=known_routing,
            more=list_routings,
        ),
    ] = AUTO
    controller: Annotated[
        str,
        Flag(
            "Moves instances between the roles short, long and decode; at most one of several "
            "routers may. off moves none. Controllers:",
            panel=ROUTING,
            metavar="NAME[:KNOB=VALUE]...",
            read=known_controller,
            more=list_controllers,
        ),
    ] = OFF
    control_seconds: Annotated[
        float,
        Flag(
            "Time between two decisions of the controller.", unit="seconds", above=0, panel=ROUTING
        ),
    ] = 1.0
    liveness_seconds: Annotated[
        float | None,
        Flag(
            "An instance that is silent for this long is lost; more than its longest layer takes. "
            "None: 2, for the heartbeat of our instances; 5, for an answer to /health of others.",
            unit="seconds",
            above=0,
            panel=FAULTS,
        ),
    ] = None
    fleet: FleetOptions = field(default_factory=FleetOptions)
    picker: PickerOptions = field(default_factory=PickerOptions)

    def __post_init__(self) -> None:
        from pla_serve.fleet.link.kinds import check_own, check_urls

        check_knobs(self)
        check_urls(self.instances)
        if self.picker.picker_port is not None:
            check_own(self.instances)


def route(given: Given) -> int:
    """Run a router until SIGTERM."""
    try:
        engine, settings, router, template = read(given)
        logs = given.make(LogSettings)
    except (ValueError, OSError) as error:
        fail(error)
    return start(engine, settings, router, template, logs.level, logs.form)


ROUTE = CliCommand(
    "route",
    route,
    (
        FlagsOf(ModelFlags),
        FlagsOf(EngineConfig, only=("load_format",)),
        FlagsOf(RouteSettings),
        FlagsOf(FleetOptions),
        FlagsOf(CircuitOptions),
        FlagsOf(PickerOptions),
        FlagsOf(ServerSettings, without=("role",)),
        FlagsOf(Limits, without=("engine_silence_seconds",)),
        FlagsOf(TierOptions),
        FlagsOf(LogSettings),
    ),
)


def read(given: Given) -> tuple[EngineConfig, ServerSettings, RouteSettings, str | None]:
    """Return the source of the tokenizer, all settings, and the text of a chat template.

    Raises:
        ValueError: a flag is out of range.
        OSError: the chat template cannot be read.
    """
    model = given.make(ModelFlags)
    engine = given.make(EngineConfig, model=model.source)
    settings = server_settings(given, model)
    fleet = given.make(
        FleetOptions, circuit=given.make(CircuitOptions), patience_seconds=settings.restart_wait
    )
    router = given.make(RouteSettings, fleet=fleet, picker=given.make(PickerOptions))
    tracing.check(settings.otlp_endpoint)
    return engine, settings, router, model.read_template()


def start(
    config: EngineConfig,
    settings: ServerSettings,
    router: RouteSettings,
    chat_template: str | None,
    log_level: str,
    log_format: LogFormat,
) -> int:
    """Load the tokenizer, connect to the instances, route, and drain.

    Returns:
        The exit status.

    Raises:
        SystemExit: the router cannot start; one line on standard error says why.
    """
    from pla_serve.server.command import load_for_api
    from pla_serve.server.engine.backend import EngineStartError
    from pla_serve.server.run import listen, run

    configure(log_level, log_format, "router")
    try:
        listener = listen(settings.host, settings.port, settings.listen_fd)
    except OSError as error:
        fail(error)
    host, port = listener.getsockname()[:2]
    with listener:
        _, model = load_for_api(config, chat_template, settings)

        def server() -> Any:
            return build(settings, router, model, f"{host}:{port}")

        try:
            return run(server, listener)
        except EngineStartError as error:
            fail(error)


def build(
    settings: ServerSettings,
    router: RouteSettings,
    model: ServedModel,
    address: str,
) -> Any:
    """Make the API server whose backend is the fleet. To be called on the event loop."""
    from pla_serve.fleet.page_view import FleetPageView
    from pla_serve.fleet.router.client import FleetClient
    from pla_serve.fleet.router.metrics import FleetMetrics
    from pla_serve.fleet.router.observers import WithControl
    from pla_serve.fleet.router_server import RouterServer
    from pla_serve.fleet.status import ControlMetrics, FleetStatus
    from pla_serve.policy.routing.registry import parse_routing
    from pla_serve.server.api.guard import Keys

    client: FleetClient
    metrics = FleetMetrics(settings.model_names[0])
    signal = ControlMetrics(metrics.registry, settings.model_names[0])
    control = _control(router, lambda: [i.link for i in client.instances], signal.look)
    client = FleetClient(
        make_links(router, settings.link_key),
        WithControl(metrics, control),
        options=router.fleet,
        routing=None if router.routing == "auto" else parse_routing(router.routing),
        control=control,
        vocab_size=model.token_ids,
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

    return RouterServer(
        settings,
        client,
        metrics,
        model,
        router.picker,
        view=FleetPageView(client, status),
        on_ready=announce,
        more_routes=status.routes,
    )


def make_links(router: RouteSettings, link_key: str | None = None) -> list[MakeLink]:
    """Functions that make the links, one for each instance."""
    from pla_serve.fleet.link.kinds import link_maker

    return [
        link_maker(url, router.instance_key, router.liveness_seconds, link_key)
        for url in router.instances
    ]


def _control(
    router: RouteSettings, links: Any, on_decision: Callable[[FleetControl], None]
) -> FleetControl:
    """Make the control of pools. Without a controller it only makes the signal for autoscalers."""
    from pla_serve.fleet.control.control import ControlOptions, FleetControl
    from pla_serve.policy.pools.registry import parse_controller

    return FleetControl(
        links,
        None if router.controller == "off" else parse_controller(router.controller),
        ControlOptions(period_seconds=router.control_seconds),
        name=router.controller,
        on_decision=on_decision,
    )
