"""Command lines of a fleet's processes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence

from pla_serve.fleet.supervisor.spec import FleetSpec, Option
from pla_serve.wire.link import Role

API_KEY_VARIABLE = "PLA_SERVE_API_KEY"
"""Keys that a process admits, separated by spaces."""
KEY_TIER_VARIABLE = "PLA_SERVE_KEY_TIER"
"""Keys with their tiers, separated by spaces."""
SECRET_FLAGS = {
    "--api-key": API_KEY_VARIABLE,
    "--key-tier": KEY_TIER_VARIABLE,
    "--metrics-key": "PLA_SERVE_METRICS_KEY",
}
"""Flags that hold keys, and the variables that hold them as well."""
LOOPBACK = "127.0.0.1"
"""Address of the instances, which only the router on this machine may reach."""


def instance_command(
    spec: FleetSpec, number: int, role: Role, listener: socket.socket, threads: int
) -> list[str]:
    """Return the words of ``serve`` for one instance on ``listener``; ``number`` counts from 0."""
    words = [sys.executable, "-m", "pla_serve", "serve"]
    if spec.model is not None:
        words.append(spec.model)
    port = listener.getsockname()[1]
    words += ["--host", LOOPBACK, "--port", str(port), "--role", role]
    words += ["--listen-fd", str(listener.fileno())]
    words += ["--threads", str(threads), "--drain-seconds", str(spec.drain_seconds)]
    if spec.devices:
        words += ["--device", spec.devices[number % len(spec.devices)]]
    return words + as_words(spec.serve)


def router_command(spec: FleetSpec, listener: socket.socket, urls: Sequence[str]) -> list[str]:
    """Return the words of ``route`` on ``listener``, in front of instances at ``urls``."""
    words = [sys.executable, "-m", "pla_serve", "route"]
    if spec.model is not None:
        words.append(spec.model)
    words += ["--host", spec.host, "--port", str(spec.port)]
    words += ["--listen-fd", str(listener.fileno())]
    words += ["--drain-seconds", str(spec.drain_seconds)]
    for url in urls:
        words += ["--instance", url]
    return words + as_words(spec.route)


def as_words(options: Mapping[str, Option]) -> list[str]:
    """Return flags as they are typed.

    >>> as_words({"seed": 3, "prefix_cache": False})
    ['--seed', '3', '--no-prefix-cache']
    """
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


def take_secrets(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words without keys, and the keys as environment variables.

    Other users of a machine can read command lines, and not the environment.

    >>> take_secrets(["serve", "--api-key", "a", "--port", "1", "--api-key=b"])
    (['serve', '--port', '1'], {'PLA_SERVE_API_KEY': 'a b'})

    Raises:
        ValueError: a key has spaces, which separate keys in an environment variable.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    left = iter(words)
    for word in left:
        flag, equals, key = word.partition("=")
        variable = SECRET_FLAGS.get(flag)
        if variable is None:
            rest.append(word)
            continue
        key = key if equals else next(left, "")
        if key.split() != [key]:
            raise ValueError(f"{flag} of a fleet must have no spaces, and must not be empty")
        found[variable] = f"{found[variable]} {key}" if variable in found else key
    return rest, found


def threads_each(cores: int, instances: int) -> int:
    """Return the threads of one instance, an equal share of the cores; the router gets none."""
    return max(1, cores // max(1, instances))
