"""What is sent and when: sessions of turns, drawn from a seed before anything is sent.

A session's first turn is open loop: it is due at its time whatever the server does. A later turn is
due when the answer before it is complete and the user has thought, as with a real chat client.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pla_serve.bench.text import FillerPart
from pla_serve.traces.arrivals import poisson
from pla_serve.traces.lengths import ChatLengths, Lmsys, Uniform

Mix = Literal["chat+documents", "chat", "documents"]


@dataclass(frozen=True, slots=True)
class BenchTurn:
    """One request."""

    id: str
    kind: str
    """Where it comes from: ``chat``, ``document`` or ``trace``. Classes go by new tokens, not by
    this."""
    pieces: tuple[FillerPart, ...]
    """The user's message, or the whole prompt of a trace."""
    new_tokens: int
    """New tokens as planned; the server's usage, where it tells them, is what counts."""
    max_tokens: int
    offset: float = 0.0
    """Seconds after the session's start before which it is not sent."""
    think: float = 0.0
    """Seconds between the answer before it and this turn."""


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that are sent one after another."""

    start: float
    """Seconds after the start of the run."""
    turns: tuple[BenchTurn, ...]
    remembers: bool = True
    """Whether a prompt holds the turns and real answers before it. A trace's prompts are whole."""


@dataclass(frozen=True, slots=True)
class BenchWorkload:
    """Sessions in the order of their starts."""

    name: str
    sessions: tuple[Session, ...]
    parameters: dict[str, object] = field(default_factory=dict)
    """How it was made, for the record."""

    @property
    def turns(self) -> Iterator[BenchTurn]:
        return (turn for session in self.sessions for turn in session.turns)

    @property
    def requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def multi_turn(self) -> bool:
        """Whether some prompt needs the answer before it."""
        return any(session.remembers and len(session.turns) > 1 for session in self.sessions)


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """The built-in workload.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    mix: Mix = "chat+documents"
    requests: int = 200
    rate: float = 1.0
    """Requests a second, over all turns. Sessions start at this over the mean turns of one."""
    burst: int = 1
    """Sessions that start at the same moment; the moments are a Poisson process."""
    seed: int = 0
    document_share: float = 0.1
    """Share of requests that are documents, in ``chat+documents``; met exactly, at random places.
    """
    document_tokens: tuple[int, int] = (2048, 4096)
    """Range of a document's size; uniform."""
    message: Lmsys = field(default_factory=Lmsys)
    mean_turns: float = 2.0
    """Of a chat session; geometric. LMSYS-Chat-1M has 2.0."""
    max_turns: int = 8
    think_seconds: float = 5.0
    """Mean, exponential."""
    output_tokens: tuple[int, int] = (16, 48)
    """Range of answers; uniform."""

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ValueError(f"requests must be at least 1, not {self.requests}")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate must be positive, not {self.rate}")
        if self.burst < 1:
            raise ValueError(f"burst must be at least 1, not {self.burst}")
        if not 0 <= self.document_share <= 1:
            raise ValueError(f"document_share must lie in [0, 1], not {self.document_share}")
        if not 1 <= self.mean_turns <= self.max_turns:
            raise ValueError("mean_turns must lie between 1 and max_turns")
        if self.think_seconds < 0:
            raise ValueError(f"think_seconds must not be negative, not {self.think_seconds}")
        for name in ("document_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be a range of at least 1, not {low}-{high}")


def generate(config: WorkloadConfig) -> BenchWorkload:
    """Draws the workload; equal configs give equal workloads.

    Sizes and order are drawn apart from times, so changing the rate changes nothing but times.
    """
    shapes = _sessions(config)
    turns = sum(len(turns) for turns in shapes)
    session_rate = config.rate * len(shapes) / turns
    starts = poisson(len(shapes), session_rate, config.burst, random.Random(f"{config.seed}/times"))
    sessions = tuple(Session(start, turns) for start, turns in zip(starts, shapes, strict=True))
    return BenchWorkload(config.mix, sessions, _parameters(config))


def _sessions(config: WorkloadConfig) -> list[tuple[BenchTurn, ...]]:
    rng = random.Random(f"{config.seed}/sizes")
    share = {"chat": 0.0, "documents": 1.0}.get(config.mix, config.document_share)
    documents = round(share * config.requests)
    sessions = [_document(config, f"d{i}", rng) for i in range(documents)]
    left = config.requests - documents
    while left:
        session = _chat(config, f"c{len(sessions) - documents}", left, rng)
        sessions.append(session)
        left -= len(session)
    rng.shuffle(sessions)
    return sessions


def _document(config: WorkloadConfig, name: str, rng: random.Random) -> tuple[BenchTurn, ...]:
    tokens = rng.randint(*config.document_tokens)
    answer = rng.randint(*config.output_tokens)
    return (BenchTurn(f"{name}.0", "document", (FillerPart(name, tokens),), tokens, answer),)


def _chat(
    config: WorkloadConfig, name: str, most: int, rng: random.Random
) -> tuple[BenchTurn, ...]:
    lengths = ChatLengths(
        message=config.message,
        answer=Uniform(*config.output_tokens),
        mean_turns=config.mean_turns,
        max_turns=min(most, config.max_turns),
        think_seconds=config.think_seconds,
    )
    return tuple(
        BenchTurn(
            f"{name}.{i}", "chat", (FillerPart(f"{name}.{i}", new),), new, answer, think=think
        )
        for i, (new, answer, think) in enumerate(lengths.session(rng))
    )


def _parameters(config: WorkloadConfig) -> dict[str, object]:
    return {
        "workload": config.mix,
        "requests": config.requests,
        "rate": config.rate,
        "burst": config.burst,
        "seed": config.seed,
        "document_share": config.document_share,
        "document_tokens": list(config.document_tokens),
        "mean_turns": config.mean_turns,
        "think_seconds": config.think_seconds,
        "output_tokens": list(config.output_tokens),
        "longest_message": config.message.high,
    }
