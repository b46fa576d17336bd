"""The command lines of a fleet's processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from pla_serve.fleet.supervisor.spec import FleetSpec, Option
from pla_serve.wire.link import Role

LOOPBACK = "127.0.0.1"
"""Instances are for the router on this machine only."""


def instance_command(
    spec: FleetSpec, number: int, role: Role, port: int, threads: int
) -> list[str]:
    """``pla-serve serve`` for one instance; ``number`` counts all of them from 0."""
    words = [sys.executable, "-m", "pla_serve", "serve"]
    if spec.model is not None:
        words.append(spec.model)
    words += ["--host", LOOPBACK, "--port", str(port), "--role", role]
    words += ["--threads", str(threads), "--drain-seconds", str(spec.drain_seconds)]
    if spec.devices:
        words += ["--device", spec.devices[number % len(spec.devices)]]
    return words + as_words(spec.serve)


def router_command(spec: FleetSpec, urls: Sequence[str]) -> list[str]:
    """``pla-serve route`` in front of instances at ``urls``."""
    words = [sys.executable, "-m", "pla_serve", "route"]
    if spec.model is not None:
        words.append(spec.model)
    words += ["--host", spec.host, "--port", str(spec.port)]
    words += ["--drain-seconds", str(spec.drain_seconds)]
    for url in urls:
        words += ["--instance", url]
    return words + as_words(spec.route)


def as_words(options: Mapping[str, Option]) -> list[str]:
    """Flags as they are typed."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            for item in value:
                words += [flag, item]
        else:
            words += [flag, str(value)]
    return words


def threads_each(cores: int, instances: int) -> int:
    """Threads of one instance when cores are shared out; the router gets by with what is idle."""
    return max(1, cores // max(1, instances))
