"""Built-in workload: sessions of turns, drawn from a seed before anything is sent.

The first turn of a session is open loop: it is due at its time, however busy the server is. A later
turn is due when the answer before it is complete and the user has thought, as with a real chat
client.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pla_serve.bench.text import FillerPart
from pla_serve.flags import Flag
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.traces.arrivals import poisson
from pla_serve.traces.lengths import ChatLengths, Lmsys, Uniform

WORK, TIME = "Built-in workload", "Load"
"""Panels of flags."""
Mix = Literal["chat+documents", "chat", "documents"]


@dataclass(frozen=True, slots=True)
class BenchTurn:
    """One request."""

    id: str
    kind: str
    """Origin of the request: ``chat``, ``document`` or ``trace``. Its class, short or long, depends
    on its new tokens and not on this."""
    pieces: tuple[FillerPart, ...]
    """Parts of the user's message, or of the whole prompt of a trace."""
    new_tokens: int
    """New tokens as planned. Reports use the server's usage where it has one."""
    max_tokens: int
    offset: float = 0.0
    """Earliest sending, in seconds after the start of the session."""
    think: float = 0.0
    """Seconds between the previous answer and this turn."""


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that are sent one after another."""

    start: float
    """Seconds after the start of the run."""
    turns: tuple[BenchTurn, ...]
    remembers: bool = True
    """Whether each prompt begins with the turns and real answers before it. Prompts of a trace are
    whole already."""


@dataclass(frozen=True, slots=True)
class BenchWorkload:
    """Sessions in the order of their starts."""

    name: str
    sessions: tuple[Session, ...]
    parameters: dict[str, object] = field(default_factory=dict)
    """Settings that it was made with, for the record."""

    @property
    def turns(self) -> Iterator[BenchTurn]:
        """All turns, session by session."""
        return (turn for session in self.sessions for turn in session.turns)

    @property
    def requests(self) -> int:
        """Number of turns of all sessions."""
        return sum(len(session.turns) for session in self.sessions)

    @property
    def multi_turn(self) -> bool:
        """Whether some prompt holds an earlier answer."""
        return any(session.remembers and len(session.turns) > 1 for session in self.sessions)


def read_range(text: str) -> tuple[int, int]:
    """Read a range such as ``2048-4096``, or one number for both ends.

    Raises:
        ValueError: the text is neither.
    """
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(f"it takes a range such as 2048-4096, not {text!r}") from None


def show_range(ends: tuple[int, int]) -> str:
    """Write a range as `read_range` reads it."""
    return f"{ends[0]}-{ends[1]}"


def read_longest(text: str) -> Lmsys:
    """Make the distribution of chat messages that have at most so many tokens.

    Raises:
        ValueError: the text is no whole number.
    """
    return Lmsys(high=int(text))


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """Settings of the built-in workload.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    mix: Annotated[
        Mix,
        Flag(
            "Multi-turn chat sessions with turns of LMSYS size, long documents, or both.",
            panel=WORK,
            name="--workload",
        ),
    ] = "chat+documents"
    requests: Annotated[int, Knob("Number of requests.", least=1)] = 200
    rate: Annotated[
        float,
        Knob(
            "Requests a second, over all turns. Sessions start at this over the mean turns of one.",
            above=0,
        ),
    ] = 1.0
    burst: Annotated[
        int,
        Flag(
            "Sessions that start at the same moment; the moments are a Poisson process.",
            least=1,
            panel=TIME,
        ),
    ] = 1
    seed: Annotated[
        int, Flag("Seed of sizes and times; repetitions count on from it.", panel=TIME)
    ] = 0
    document_share: Annotated[
        float,
        Flag(
            "Share of requests that are documents, in chat+documents; met exactly, at random "
            "places.",
            least=0,
            most=1,
            panel=WORK,
        ),
    ] = 0.1
    document_tokens: Annotated[
        tuple[int, int],
        Flag(
            "Range of a document's size; uniform.",
            unit="tokens",
            panel=WORK,
            read=read_range,
            show=show_range,
        ),
    ] = (2048, 4096)
    message: Annotated[
        Lmsys,
        Flag(
            "Longest chat message; longer ones are clipped.",
            unit="tokens",
            panel=WORK,
            name="--longest-message",
            read=read_longest,
            show=lambda message: str(message.high),
        ),
    ] = field(default_factory=Lmsys)
    mean_turns: Annotated[
        float,
        Flag(
            "Mean turns of a chat session; geometric. LMSYS-Chat-1M has 2.0.",
            unit="turns",
            panel=WORK,
        ),
    ] = 2.0
    max_turns: int = 8
    think_seconds: Annotated[
        float,
        Flag(
            "Mean time between an answer and the next turn; exponential.",
            unit="seconds",
            least=0,
            panel=WORK,
        ),
    ] = 5.0
    output_tokens: Annotated[
        tuple[int, int],
        Flag(
            "Range of an answer's length; uniform.",
            unit="tokens",
            panel=WORK,
            read=read_range,
            show=show_range,
        ),
    ] = (16, 48)

    def __post_init__(self) -> None:
        check_knobs(self)
        if not 1 <= self.mean_turns <= self.max_turns:
            raise ValueError("mean_turns must lie between 1 and max_turns")
        for name in ("document_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be a range of at least 1, not {low}-{high}")


def generate(config: WorkloadConfig) -> BenchWorkload:
    """Draw the workload; equal configs give equal workloads.

    Sizes and order are drawn apart from times, so that another rate changes nothing but times.
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
