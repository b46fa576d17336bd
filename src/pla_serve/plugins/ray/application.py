"""The application on Ray Serve: replicas of the API before replicas with engines."""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from pla_serve.command_line import parse
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.host.process import CORE
from pla_serve.plugins.ray.backend import RayBackend
from pla_serve.plugins.ray.instance import Instance, InstanceOptions
from pla_serve.plugins.ray.replicas import DEFAULT_ROUTING
from pla_serve.plugins.ray.request_router import PredictedRequestRouter
from pla_serve.plugins.ray.scaling import DesiredReplicas
from pla_serve.plugins.ray.streams import ContinuationOptions
from pla_serve.policy.routing.registry import parse_routing
from pla_serve.server.command import SERVE, load_for_api, read
from pla_serve.server.engine.process import EngineSpec
from pla_serve.server.model import ServedModel
from pla_serve.server.records.metrics import Metrics
from pla_serve.server.run import ApiServer
from pla_serve.server.settings import ServerSettings

MOST_REQUESTS = 100_000
"""Requests that Ray lets a replica have at once: admission is the engine's, and the API's."""
STATS_SECONDS = 0.5
"""Time between two reports of a replica to routers."""
RAYS_ROUTING = "ray"
OF_THE_MACHINE = ("--host", "--port", "--listen-fd", "--role", "--link-key-file", "--batch-dir")
"""Flags of ``serve`` that have no meaning here."""


class AppArgs(BaseModel):
    """Arguments of ``serve run pla_serve.plugins.ray:app``, or ``args`` in a file of Ray's."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="As `pla-serve serve` takes it. Looked for on each node.")
    instances: int = Field(1, ge=1, description="Replicas with an engine; the least, with scaling.")
    max_instances: int | None = Field(
        None, ge=1, description="Most of them; with it their number follows the work."
    )
    short: int = Field(0, ge=0, description="So many of them are short instances.")
    long: int = Field(0, ge=0, description="So many of them are long instances.")
    cpus: float = Field(
        1.0, ge=0, description="Ray's CPUs of each; --threads says how many it uses."
    )
    gpus: float = Field(0.0, ge=0, description="GPUs of each.")
    apis: int = Field(1, ge=1, description="Replicas of the API.")
    api_cpus: float = Field(1.0, ge=0, description="Ray's CPUs of each of these.")
    resources: dict[str, float] = Field(
        {}, description="Further resources of Ray that each instance takes, to say where it runs."
    )
    api_resources: dict[str, float] = Field(
        {}, description="The same for replicas of the API: on nodes that stay."
    )
    routing: str = Field(
        DEFAULT_ROUTING,
        description="As `pla-serve route --routing`; ray: Ray's own, the better of two.",
    )
    serve: str = Field("", description="Flags of `pla-serve serve`, as one text.")


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """Settings of the replicas of the API, the same for all of them."""

    engine: EngineConfig
    """Names the model, whose tokenizer is loaded."""
    settings: ServerSettings
    chat_template: str | None


def app(args: AppArgs) -> serve.Application:
    """Return the application. Called by ``serve run`` and ``serve deploy``.

    Raises:
        ValueError: an argument or a flag cannot be read, or is out of range.
    """
    return build(args)


def build(args: AppArgs, engine: str = CORE, environment: dict[str, str] | None = None) -> Any:
    """As `app`, with another engine (`EngineSpec.factory`) and variables of its process."""
    config, settings, template = read(parse(SERVE, [args.model, *_words(args.serve)]))
    if args.short + args.long > args.instances:
        raise ValueError(
            f"{args.short} short and {args.long} long instances are more than the "
            f"{args.instances} instances there are; raise instances"
        )
    if args.short and args.short == args.instances:
        raise ValueError("short instances need others beside them: raise instances, or lower short")
    if args.max_instances is not None and args.max_instances < args.instances:
        raise ValueError(f"max_instances must be at least instances, {args.instances}")
    if args.routing not in (DEFAULT_ROUTING, RAYS_ROUTING):
        parse_routing(args.routing)
    instances = serve.deployment(Instance).options(
        **_size(args),
        ray_actor_options={
            "num_cpus": args.cpus,
            "num_gpus": args.gpus,
            "resources": args.resources,
        },
        logging_config=LoggingConfig(enable_access_log=False),  # the API logs requests
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=2.0,
        request_router_config=_routing(args.routing),
    )
    api = serve.deployment(RayApi).options(
        name="Api",
        num_replicas=args.apis,
        ray_actor_options={"num_cpus": args.api_cpus, "resources": args.api_resources},
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    spec = EngineSpec(config, engine, env=environment or {})
    silence = settings.limits.engine_silence_seconds
    options = InstanceOptions(spec, settings.model_names[0], silence, args.short, args.long)
    return api.bind(instances.bind(options), ApiOptions(config, settings, template))


def _words(flags: str) -> list[str]:
    words = shlex.split(flags)
    for word in words:
        if word.partition("=")[0] in OF_THE_MACHINE:
            raise ValueError(f"{word} has no meaning on Ray; leave it out")
    return words


def _routing(routing: str) -> RequestRouterConfig:
    if routing == RAYS_ROUTING:
        return RequestRouterConfig()
    return RequestRouterConfig(
        request_router_class=PredictedRequestRouter,
        request_router_kwargs={"routing": routing},
        request_routing_stats_period_s=STATS_SECONDS,
    )


def _size(args: AppArgs) -> dict[str, Any]:
    if args.max_instances is None:
        return {"num_replicas": args.instances}
    policy = AutoscalingPolicy(policy_function=DesiredReplicas)
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=args.instances, max_replicas=args.max_instances, policy=policy
        )
    }


@serve.ingress()
class RayApi:
    """A replica of the API: what ``pla-serve route`` is, before replicas in place of instances."""

    async def __init__(self, instances: DeploymentHandle[Any], options: ApiOptions) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load the tokenizer, and begin to look for replicas.

        Raises:
            RuntimeError: the tokenizer cannot be loaded.
        """
        settings, calls = options.settings, instances.options(stream=True)
        model = await asyncio.to_thread(_load, options)
        backend = RayBackend(
            instances.facts.remote,
            calls.generate.remote,
            vocab_size=model.token_ids,
            options=ContinuationOptions(patience_seconds=settings.restart_wait),
        )
        self._server = ApiServer(
            replace(settings, drain_seconds=0.0),
            backend,
            Metrics(settings.model_names[0]),
            model,
            view=_NoView(),
        )
        self._backend = backend
        self._running = asyncio.create_task(backend.run())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return what answers HTTP; asked for by Ray."""
        return _WithLifespan(self._server.app)

    async def __del__(self) -> None:
        """End what still runs. Ray awaits this once the requests of the replica have ended."""
        await self._backend.stop()
        await asyncio.gather(self._running, return_exceptions=True)


def _load(options: ApiOptions) -> ServedModel:
    try:
        return load_for_api(options.engine, options.chat_template, options.settings)[1]
    except SystemExit:
        reason = "the model's tokenizer cannot be loaded; the lines before this say why"
        raise RuntimeError(reason) from None


class _NoView:
    """Shows nothing of the replicas at ``/ui``: Ray's dashboard does."""

    boundary_tokens = 0

    def describe(self) -> dict[str, Any]:
        return {"kind": "instance", "engine": None, "load": None, "counters": None}


class _WithLifespan:
    """Answers the events of start and end that Ray sends, and passes requests on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
