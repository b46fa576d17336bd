"""NIXL as the transport: its library UCX picks the fastest way between two processes or machines.

On one machine that is the kernel's copy between processes, which needs nothing of the other
process; between machines it is RDMA if the network has it, and TCP otherwise. ``UCX_TLS`` and the
other variables of UCX override its choice.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pla_serve.engine.transfer.installed import CURE, installed_module
from pla_serve.engine.transfer.layout import Copy
from pla_serve.engine.transfer.transport import TransportError


class _Peer:
    """Connection to the agent of another engine."""

    def __init__(self) -> None:
        self.operations = 0
        """Number of reads that are running."""
        self.broken = False


class _Operation:
    def __init__(self, agent: Any, handle: Any, peer: _Peer, state: str) -> None:
        self._agent = agent
        self._handle = handle
        self._peer = peer
        self._state = state
        self._settle()

    def done(self) -> bool:
        """See `Operation`."""
        if self._state == "PROC":
            try:
                self._state = self._agent.check_xfer_state(self._handle)
            except Exception as error:  # NIXL's errors have no base of their own
                self._state = f"{type(error).__name__}: {error}"
            self._settle()
        if self._state in ("PROC", "DONE"):
            return self._state == "DONE"
        raise TransportError(f"reading from the other engine failed ({self._state})")

    def _settle(self) -> None:
        """Forget the handle once nothing can come of it any more, not before."""
        if self._state == "PROC" or self._handle is None:
            return
        self._peer.operations -= 1
        self._peer.broken |= self._state != "DONE"
        handle, self._handle = self._handle, None
        try:
            self._agent.release_xfer_handle(handle)
        except Exception:
            self._peer.broken = True


class NixlTransport:
    """A `KVTransport` with one NIXL agent.

    Args:
        name: name of this engine; must differ in each life of the process.
        regions: address and size in bytes of all memory that is read or written.

    Raises:
        ValueError: NIXL is not installed, or does not work here; says what to do.
    """

    def __init__(self, name: str, regions: Sequence[tuple[int, int]]) -> None:
        api = _load()
        self._name = name
        self._peers: dict[str, _Peer] = {}
        try:
            # NIXL's own progress thread takes a whole core: `progress` does its work instead.
            config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._agent: Any = api.nixl_agent(name, config)
            listed = [(address, size, 0, "") for address, size in regions]
            self._registered = self._agent.register_memory(listed, "DRAM")
            self._metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:
            raise ValueError(
                f"KV transfer does not work here, NIXL says {type(error).__name__}: {error}"
            ) from error

    @property
    def name(self) -> str:
        """See `KVTransport`."""
        return self._name

    @property
    def metadata(self) -> bytes:
        """See `KVTransport`."""
        return self._metadata

    def read(self, agent: str, metadata: bytes, copies: Sequence[Copy]) -> _Operation:
        """See `KVTransport`."""
        try:
            peer = self._peer(agent, metadata)
            local = [(copy.local, copy.size, 0) for copy in copies]
            remote = [(copy.remote, copy.size, 0) for copy in copies]
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(local, "DRAM"),
                self._agent.get_xfer_descs(remote, "DRAM"),
                agent,
            )
            state = self._agent.transfer(handle)
        except TransportError:
            raise
        except Exception as error:
            if agent in self._peers:
                self._peers[agent].broken = True
            raise TransportError(f"{type(error).__name__}: {error}") from error
        peer.operations += 1
        return _Operation(self._agent, handle, peer, state)

    def progress(self) -> None:
        """See `KVTransport`."""
        self._agent.get_new_notifs()

    def _peer(self, agent: str, metadata: bytes) -> _Peer:
        """Return the connection to an agent; connect if there is none or it has broken."""
        peer = self._peers.get(agent)
        if peer is not None and peer.broken:
            if peer.operations:
                raise TransportError(f"the connection to {agent} is broken")
            del self._peers[agent]
            self._agent.remove_remote_agent(agent)
            peer = None
        if peer is None:
            self._agent.add_remote_agent(metadata)
            peer = self._peers[agent] = _Peer()
        return peer


def _load() -> ModuleType:
    # NIXL logs to standard output while it is imported, and programs parse what we print there.
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    name = installed_module()
    if name is None:
        raise ValueError(f"KV transfer needs NIXL, which is not installed; {CURE}")
    module = importlib.import_module(name)
    logging.getLogger("nixl").setLevel(logging.WARNING)
    return module
