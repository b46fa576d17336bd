"""Starts the processes of a fleet from its description."""

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
    API_KEY_VARIABLE,
    KEY_TIER_VARIABLE,
    LOOPBACK,
    instance_command,
    router_command,
    take_secrets,
    threads_each,
)
from pla_serve.fleet.supervisor.log_lines import write_line
from pla_serve.fleet.supervisor.member import FleetMember, FleetStartError, Recipe
from pla_serve.fleet.supervisor.spec import FleetSpec, Option
from pla_serve.fleet.supervisor.supervisor import Supervisor
from pla_serve.logs import LogFormat, configure
from pla_serve.server.link_key import LINK_KEY_VARIABLE
from pla_serve.server.run import listen
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE

log = logging.getLogger(__name__)

KEY_VARIABLE = "PLA_SERVE_INSTANCE_KEY"
"""Environment variable of the router's key for its instances. Nobody else knows the key."""
MEMORY_SHARE = 0.4
"""Share of free memory for the KV of all instances together, as one instance on a CPU takes it."""
MOST_GIB = 4.0
"""Most memory for KV of one instance, unless a flag says otherwise; the same as without a fleet."""


class LaunchPlan:
    """Command lines of all processes of a fleet, which `run` starts.

    Args:
        serve_words, route_words: further flags of the instances and of the router.

    Raises:
        OSError: the fleet's port is taken, or no ports are free for instances.
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
            # Listened on here for as long as the fleet lives. Connections wait while a process is
            # restarted, and no other process can take a port meanwhile.
            self._front = stack.enter_context(listen(spec.host, spec.port))
            self._listeners = [stack.enter_context(listen(LOOPBACK, 0)) for _ in spec.names]
            self._plan(serve_words, route_words)
            self._stack = stack.pop_all()

    def _plan(self, serve_words: Sequence[str], route_words: Sequence[str]) -> None:
        """Make the command lines."""
        spec = self._spec
        threads = spec.threads or threads_each(usable_cores(), len(spec.names))
        serve_words = [*_transfer_words(spec, serve_words), *serve_words]
        memory = _memory_words(spec, serve_words)
        self._instances: list[list[str]] = []
        for number, (_, role) in enumerate(spec.names):
            listener = self._listeners[number]
            words = instance_command(spec, number, role, listener, threads)
            words, self._instance_secrets = take_secrets([*words, *memory, *serve_words])
            self._instances.append(words)
        self._urls = [
            f"http://{LOOPBACK}:{listener.getsockname()[1]}" for listener in self._listeners
        ]
        control = _control_words(spec, route_words)
        words = router_command(spec, self._front, self._urls)
        self._router, self._router_secrets = take_secrets([*words, *control, *route_words])

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the command of each process, ``serve`` or ``route``, and its words."""
        for words in self._instances:
            yield "serve", words[words.index("serve") + 1 :]
        yield "route", self._router[self._router.index("route") + 1 :]

    def close(self) -> None:
        """Free the ports of a plan that is not run."""
        self._stack.close()

    def run(self) -> int:
        """Run the fleet until SIGTERM or Ctrl-C.

        Returns:
            The exit status.
        """
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
        link_key = os.environ.get(LINK_KEY_VARIABLE) or secrets.token_hex(32)
        links = {LINK_KEY_VARIABLE: link_key}
        environment = instance_environment(key, {**self._instance_secrets, **links})
        instances = [
            FleetMember(
                Recipe(name, words, url, True, environment, (listener.fileno(),)),
                spec.health,
                on_line,
            )
            for (name, _), words, url, listener in zip(
                spec.names, self._instances, self._urls, self._listeners, strict=True
            )
        ]
        front = f"http://{_reachable(spec.host)}:{spec.port}"
        # It holds the instances' sockets as well, because it may outlive the supervisor: wherever
        # it connects, nobody else can be listening.
        fds = tuple(listener.fileno() for listener in (self._front, *self._listeners))
        keys = {KEY_VARIABLE: key, **links, **self._router_secrets}
        recipe = Recipe("router", self._router, front, env=keys, fds=fds)
        router = FleetMember(recipe, spec.health, on_line)
        supervisor = Supervisor(instances, router, drain_seconds=spec.drain_seconds)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.stop)
        loop.add_signal_handler(signal.SIGHUP, supervisor.renew)
        await supervisor.run(lambda: print(f"Ready: {len(instances)} instances, {front}/v1"))


def _memory_words(spec: FleetSpec, serve_words: Sequence[str]) -> list[str]:
    """Return the flag for KV memory on a CPU: each instance gets an equal part of the share."""
    said = _said("kv-cache-gib", spec.serve, serve_words)
    if said or spec.devices or os.path.exists("/dev/nvidia0"):
        return []
    free = psutil.virtual_memory().available / 2**30
    each = min(MOST_GIB, free * MEMORY_SHARE / len(spec.names))
    return ["--kv-cache-gib", f"{each:.3f}"]


def _transfer_words(spec: FleetSpec, serve_words: Sequence[str]) -> list[str]:
    """Return the flag for KV transfer, if there are decode instances and NIXL is installed."""
    if not spec.instances.decode or _said("kv-transfer", spec.serve, serve_words):
        return []
    if installed_module() is None:
        log.warning(
            "NIXL is not installed, so decode instances will compute prompts again; %s", CURE
        )
        return []
    return ["--kv-transfer"]


def instance_environment(key: str, given: Mapping[str, str] = {}) -> dict[str, str]:
    """Return the variables that every instance gets, in which secrets travel (never in argv).

    Args:
        key: the router's key for its instances.
        given: keys of the fleet's file or command line, as `take_secrets` has them.
    """
    return {
        **given,
        API_KEY_VARIABLE: f"{key} {given.get(API_KEY_VARIABLE, '')}".rstrip(),
        KEY_TIER_VARIABLE: "",  # tiers are the router's
        FLEET_SECRET_VARIABLE: os.environ.get(FLEET_SECRET_VARIABLE) or secrets.token_hex(32),
        **_ucx_env(),
    }


def _ucx_env() -> dict[str, str]:
    """Return variables that bind UCX, which has no passwords, to the loopback interface."""
    return {} if "UCX_NET_DEVICES" in os.environ else {"UCX_NET_DEVICES": "lo"}


def _control_words(spec: FleetSpec, route_words: Sequence[str]) -> list[str]:
    """Return the flag of the pool controller, if there are pools and no flag names another."""
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
    """Return an address at which a server that listens on ``host`` answers on this machine."""
    if host in ("", "0.0.0.0", "::"):
        return LOOPBACK if host != "::" else "[::1]"
    return f"[{host}]" if ":" in host else host
