"""The processes of a server: whether they live, and how much memory they take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOOK_SECONDS = 0.1
ROLES = {
    "pla_serve fleet": "supervisor",
    "pla_serve route": "router",
    "pla_serve serve": "server",
    "pla_serve.engine.host.process": "engine",
}


@dataclass
class ProcessWatch:
    """Watches a server's main processes. Workers that are killed by design do not count.

    Args:
        pid: of the first process; the others descend from it.
    """

    pid: int
    growth: dict[str, float] = field(default_factory=dict)
    """Most that a process grew beyond its start, in MiB, by role and pid.

    KV does not count: it grows with its use, up to a bound that the operator sets.
    """

    def __post_init__(self) -> None:
        self._start = {process.pid: _memory(process) for process in self._all()}
        self._kv = {pid: kv_memory(pid) for pid in self._start}
        self._kv_start = dict(self._kv)
        self._roles = {process.pid: role(process) for process in self._all()}

    def ended(self) -> list[str]:
        """Processes of the start that are gone or were replaced."""
        alive = {process.pid for process in self._all()}
        return [f"{self._roles[pid]} {pid}" for pid in self._start if pid not in alive]

    def look(self) -> None:
        for process in self._all():
            pid = process.pid
            if pid in self._start:
                name = f"{self._roles[pid]} {pid}"
                memory, most = _memory(process), self.growth.get(name, 0.0)
                if self._grown(pid, memory) > most:
                    self._kv[pid] = kv_memory(pid)  # milliseconds: only where it may decide
                self.growth[name] = max(most, self._grown(pid, memory))

    def _grown(self, pid: int, memory: int) -> float:
        kv = self._kv[pid] - self._kv_start[pid]
        return (memory - self._start[pid] - kv) / 2**20

    async def run(self) -> None:
        """`look` until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def _all(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self.pid)
            found = [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        return [process for process in found if role(process)]


def role(process: psutil.Process) -> str:
    """What a process is for; "" for workers and processes that have gone."""
    try:
        words = process.cmdline()
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
    except psutil.Error:
        return ""
    line = " ".join(Path(word).name if "/" in word else word for word in words)
    return next((name for words, name in ROLES.items() if words in line), "")


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def kv_memory(pid: int) -> int:
    """Bytes of KV that a process holds; 0 if it holds none or has gone.

    They are mappings that ask for large pages (``hg`` in ``VmFlags`` of proc(5)), as nothing else
    in an engine does.
    """
    held = total = 0
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "Rss":
            held = int(rest.split()[0])
        elif name == "VmFlags" and "hg" in rest.split():
            total += held
    return total * 1024
