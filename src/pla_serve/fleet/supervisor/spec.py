"""A fleet on this machine as data, from a YAML file or from flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec

from pla_serve.flags import Flag
from pla_serve.wire.link import Role

BOOL = "tag:yaml.org,2002:bool"
INSTANCES = "Instances"
ROLES: tuple[Role, ...] = get_args(Role)

Option = bool | int | float | str | list[str]
"""Value of a flag in YAML: true and false are ``--flag`` and ``--no-flag``, lists repeat it."""


def split_devices(text: str) -> list[str]:
    """Devices from ``cuda:0,cuda:1``."""
    return [device.strip() for device in text.split(",")]


class Pools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Number of instances by the role that they begin in."""

    mixed: Annotated[int, Flag("Instances for all requests.", panel=INSTANCES)] = 0
    short: Annotated[int, Flag("Instances for short prompts.", panel=INSTANCES)] = 0
    long: Annotated[int, Flag("Instances for long prompts.", panel=INSTANCES)] = 0
    decode: Annotated[
        int, Flag("Instances that take requests over after the first token.", panel=INSTANCES)
    ] = 0


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rules by which a process counts as hung, and is started again. All times are seconds."""

    check_seconds: float = 1.0
    """Time between two questions to a process whether it is ready."""
    hang_seconds: float = 20.0
    """A process that answered once, and then says nothing for this long, is killed."""
    start_seconds: float = 600.0
    """A process that never answered is killed after this long; the first start may fetch a model.
    """
    steady_seconds: float = 60.0
    """If a process lived this long, its end counts as the first failure again."""
    base_seconds: float = 0.5
    """Wait before the start after the second failure in a row; it doubles with each further one.
    After the first failure there is none."""
    most_seconds: float = 30.0
    """Longest such wait."""


class FleetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A fleet on one machine. `check` says what is wrong with one.

    Example: ``FleetSpec(model="./my-model", instances=Pools(short=2, long=1))``.
    """

    model: Annotated[str | None, Flag("As `pla-serve serve` takes it.", argument=True)] = None
    host: Annotated[str, Flag("Address that clients connect to.")] = "127.0.0.1"
    port: Annotated[int, Flag("Port that clients connect to.")] = 8000
    instances: Pools = Pools()
    threads: Annotated[
        int | None,
        Flag(
            "CPU threads of each instance. None: its share of the cores.",
            unit="threads",
            panel=INSTANCES,
        ),
    ] = None
    devices: Annotated[
        list[str],
        Flag(
            "Devices, given out to instances in turn, for example cuda:0,cuda:1. Without any, "
            "each instance chooses.",
            panel=INSTANCES,
            metavar="DEVICE,...",
            read=split_devices,
            show=",".join,
        ),
    ] = []
    serve: dict[str, Option] = {}
    """Flags of ``pla-serve serve``, for every instance."""
    route: dict[str, Option] = {}
    """Flags of ``pla-serve route``."""
    health: Health = Health()
    drain_seconds: Annotated[
        float, Flag("How long running requests may go on after SIGTERM.", unit="seconds")
    ] = 30.0

    @property
    def names(self) -> tuple[tuple[str, Role], ...]:
        """Instances by name, with the roles they begin in."""
        return tuple(
            (f"{role}-{number}", role)
            for role in ROLES
            for number in range(getattr(self.instances, role))
        )


OWN_FLAGS = {
    "serve": ("model", "host", "port", "role", "threads", "device", "drain-seconds", "listen-fd"),
    "route": ("host", "port", "instance", "instance-key", "drain-seconds", "listen-fd"),
}
"""Flags that the supervisor sets; the file has fields of its own for them."""


def read_spec(path: Path) -> FleetSpec:
    """Read a fleet from a YAML file.

    Raises:
        ValueError: the file is not YAML, or has an unknown field; the message names the place.
        OSError: the file cannot be read.
    """
    import yaml

    try:
        content = yaml.load(path.read_bytes(), _loader())
        return msgspec.convert(content or {}, FleetSpec)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {error}") from None


def _loader() -> Any:
    """Return a safe loader that reads ``off`` as a word, as YAML 1.2 does: ``controller: off``."""
    import yaml

    others = {
        first: [pair for pair in pairs if pair[0] != BOOL]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    kind: Any = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": others})
    kind.add_implicit_resolver(BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
    return kind


def check(spec: FleetSpec) -> FleetSpec:
    """Return the fleet if it can serve.

    Raises:
        ValueError: it cannot, or a field is out of range; the message says what to change.
    """
    pools = spec.instances
    for role in ROLES:
        if getattr(pools, role) < 0:
            raise ValueError(f"the number of {role} instances must not be negative")
    if not pools.mixed + pools.short + pools.long:
        raise ValueError(
            "a fleet needs instances that prefill: --mixed N, or --short N and --long N"
        )
    if not pools.mixed and not (pools.short and pools.long):
        missing = "long" if pools.short else "short"
        raise ValueError(
            f"who serves {missing} prompts? Add --{missing} N, or use --mixed N for instances "
            "that take both"
        )
    if not 0 < spec.port <= 65535:
        raise ValueError(f"port must lie between 1 and 65535, not {spec.port}")
    if spec.threads is not None and spec.threads < 1:
        raise ValueError(f"threads must be at least 1, not {spec.threads}")
    if not spec.drain_seconds >= 0:
        raise ValueError(f"drain_seconds must not be negative, not {spec.drain_seconds}")
    for name in Health.__struct_fields__:
        if not getattr(spec.health, name) > 0:
            raise ValueError(f"health.{name} must be positive, not {getattr(spec.health, name)}")
    for command, own in OWN_FLAGS.items():
        for flag in getattr(spec, command):
            if flag.replace("_", "-") in own:
                raise ValueError(
                    f"the fleet sets --{flag} of {command} itself; use its own field or flag"
                )
    return spec
