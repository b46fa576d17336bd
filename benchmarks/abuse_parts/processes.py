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
    """Most that a process grew beyond its start, in MiB, by role and pid."""

    def __post_init__(self) -> None:
        self._start = {process.pid: _memory(process) for process in self._all()}
        self._roles = {process.pid: role(process) for process in self._all()}

    def ended(self) -> list[str]:
        """Processes of the start that are gone or were replaced."""
        alive = {process.pid for process in self._all()}
        return [f"{self._roles[pid]} {pid}" for pid in self._start if pid not in alive]

    def look(self) -> None:
        for process in self._all():
            if process.pid in self._start:
                name = f"{self._roles[process.pid]} {process.pid}"
                grown = (_memory(process) - self._start[process.pid]) / 2**20
                self.growth[name] = max(self.growth.get(name, 0.0), grown)

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
