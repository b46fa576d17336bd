"""From a spec to running processes."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import psutil

from pla_serve.engine.transfer.installed import CURE, installed_module
from pla_serve.environment import usable_cores
from pla_serve.fleet.supervisor.commands import (
    LOOPBACK,
    instance_command,
    router_command,
    threads_each,
)
from pla_serve.fleet.supervisor.log_lines import write_line
from pla_serve.fleet.supervisor.member import FleetMember, FleetStartError, Recipe
from pla_serve.fleet.supervisor.ports import ReservedPort
from pla_serve.fleet.supervisor.spec import FleetSpec, Option
from pla_serve.fleet.supervisor.supervisor import Supervisor
from pla_serve.logs import LogFormat, configure
from pla_serve.server.run import listen
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE

log = logging.getLogger(__name__)

KEY_VARIABLE = "PLA_SERVE_INSTANCE_KEY"
"""The router's key for its instances, which nobody else on this machine knows."""
MEMORY_SHARE = 0.4
"""Of free memory, for the KV of all instances together, as one instance on a CPU takes it."""
MOST_GIB = 4.0
"""KV of one instance, unless a flag says otherwise; the same as without a fleet."""


class LaunchPlan:
    """All command lines of a fleet, and `run`.

    Args:
        serve_words, route_words: further flags from the command line.

    Raises:
        OSError: the fleet's port is taken, or none are free for instances.
    """

    def __init__(
        self,
        spec: FleetSpec,
        serve_words: Sequence[str],
        route_words: Sequence[str],
        log_level: str,
        log_format: LogFormat,
    ) -> None:
        self._spec = spec
        self._log_level = log_level
        self._log_format = log_format
        with ExitStack() as stack:
            # Held here, so that connections wait while the router is restarted.
            self._listener = stack.enter_context(listen(spec.host, spec.port))
            self._ports = [stack.enter_context(ReservedPort(LOOPBACK)).number for _ in spec.names]
            self._stack = stack.pop_all()
        threads = spec.threads or threads_each(usable_cores(), len(spec.names))
        serve_words = [*_transfer_words(spec, serve_words), *serve_words]
        memory = _memory_words(spec, serve_words)
        self._instances: list[tuple[str, int, list[str]]] = []
        for number, (name, role) in enumerate(spec.names):
            port = self._ports[number]
            words = instance_command(spec, number, role, port, threads)
            self._instances.append((name, port, [*words, *memory, *serve_words]))
        urls = [f"http://{LOOPBACK}:{port}" for _, port, _ in self._instances]
        control = _control_words(spec, route_words)
        inherited = ["--listen-fd", str(self._listener.fileno())]
        self._router = [*router_command(spec, urls), *inherited, *control, *route_words]

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """``serve`` or ``route``, and the words behind it, of each process."""
        for _, _, words in self._instances:
            yield "serve", words[words.index("serve") + 1 :]
        yield "route", self._router[self._router.index("route") + 1 :]

    def close(self) -> None:
        """Give the ports back, of a plan that is not run."""
        self._stack.close()

    def run(self) -> int:
        """Until SIGTERM or Ctrl-C; returns the exit status."""
        configure(self._log_level, self._log_format, "fleet")
        with self._stack:
            try:
                asyncio.run(self._run())
            except (FleetStartError, OSError) as error:
                print(f"pla-serve: {error}", file=sys.stderr)
                return 1
        return 0

    async def _run(self) -> None:
        spec, on_line = self._spec, write_line(self._log_format)
        key = secrets.token_hex(16)
        environment = instance_environment(key)
        instances = [
            FleetMember(
                Recipe(
                    name,
                    words,
                    f"http://{LOOPBACK}:{port}",
                    has_engine=True,
                    env=environment,
                ),
                spec.health,
                on_line,
            )
            for name, port, words in self._instances
        ]
        front = f"http://{_reachable(spec.host)}:{spec.port}"
        fds = (self._listener.fileno(),)
        recipe = Recipe("router", self._router, front, env={KEY_VARIABLE: key}, fds=fds)
        router = FleetMember(recipe, spec.health, on_line)
        supervisor = Supervisor(instances, router, drain_seconds=spec.drain_seconds)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.stop)
        loop.add_signal_handler(signal.SIGHUP, supervisor.renew)
        await supervisor.run(lambda: print(f"Ready: {len(instances)} instances, {front}/v1"))


def _memory_words(spec: FleetSpec, serve_words: Sequence[str]) -> list[str]:
    """Each instance takes its share of the free memory of a CPU, not all of them the whole."""
    said = _said("kv-cache-gib", spec.serve, serve_words)
    if said or spec.devices or os.path.exists("/dev/nvidia0"):
        return []
    free = psutil.virtual_memory().available / 2**30
    each = min(MOST_GIB, free * MEMORY_SHARE / len(spec.names))
    return ["--kv-cache-gib", f"{each:.3f}"]


def _transfer_words(spec: FleetSpec, serve_words: Sequence[str]) -> list[str]:
    """With decode instances KV is exchanged, where the library for it is installed."""
    if not spec.instances.decode or _said("kv-transfer", spec.serve, serve_words):
        return []
    if installed_module() is None:
        log.warning(
            "NIXL is not installed, so decode instances will compute prompts again; %s", CURE
        )
        return []
    return ["--kv-transfer"]


def instance_environment(key: str) -> dict[str, str]:
    """Return the variables that every instance gets, in which secrets travel (never in argv).

    Args:
        key: the router's key for its instances.
    """
    return {
        "PLA_SERVE_API_KEY": key,
        FLEET_SECRET_VARIABLE: os.environ.get(FLEET_SECRET_VARIABLE) or secrets.token_hex(32),
        **_ucx_env(),
    }


def _ucx_env() -> dict[str, str]:
    """UCX has no passwords: the instances of one machine meet where no other one can reach."""
    return {} if "UCX_NET_DEVICES" in os.environ else {"UCX_NET_DEVICES": "lo"}


def _control_words(spec: FleetSpec, route_words: Sequence[str]) -> list[str]:
    """Pools are kept in balance unless a flag says otherwise."""
    pools = spec.instances
    if not (pools.short and pools.long) or _said("controller", spec.route, route_words):
        return []
    return ["--controller", "balance"]


def _said(flag: str, options: Mapping[str, Option], words: Sequence[str]) -> bool:
    """Whether a flag, or its opposite, was given in the file or on the command line."""
    names = {name.replace("_", "-") for name in options}
    given = {word.partition("=")[0] for word in words}
    return flag in names or f"--{flag}" in given or f"--no-{flag}" in given


def _reachable(host: str) -> str:
    """An address of this machine under which a server on ``host`` answers."""
    if host in ("", "0.0.0.0", "::"):
        return LOOPBACK if host != "::" else "[::1]"
    return f"[{host}]" if ":" in host else host
