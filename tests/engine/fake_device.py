"""A device whose work finishes when the test says so."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pla_serve.engine.device.marks import DeviceMark


@dataclass
class HostClock:
    """Time of a host that only waits: it passes when somebody sleeps."""

    now: float = 0.0
    least: float = 0.0
    """Shortest time that passes: layers of a `FakeDevice` take a second each."""

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, self.least)


class WouldWait(Exception):
    """The host waited for work that the test has not let finish."""


@dataclass
class FakeMark:
    device: FakeDevice
    position: int

    def done(self) -> bool:
        return self.position <= self.device.finished

    def wait(self) -> None:
        self.device.waited_for.append(self.position)
        if self.device.patient:
            self.device.finish(self.position)
        elif not self.done():
            raise WouldWait

    def seconds_since(self, earlier: DeviceMark) -> float | None:
        assert isinstance(earlier, FakeMark)
        return float(self.position - earlier.position)


@dataclass
class FakeDevice:
    """Work is enqueued with ``enqueue``; ``finished`` counts what is done.

    ``patient``: waiting finishes what is waited for, and nothing else ever finishes: the slowest
    device that there can be.
    """

    patient: bool = True
    asynchronous: bool = True
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    enqueued: list[str] = field(default_factory=list)
    finished: int = 0
    waited_for: list[int] = field(default_factory=list)

    def enqueue(self, name: str) -> None:
        self.enqueued.append(name)

    def finish(self, position: int) -> None:
        """Everything up to there is done."""
        self.finished = max(self.finished, position)

    def record(self) -> FakeMark:
        return FakeMark(self, len(self.enqueued))

    @property
    def unfinished(self) -> list[str]:
        return self.enqueued[self.finished :]
