"""Generates traces from a seed, for tests and for users who have none."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pla_serve.traces.arrivals import Bursts, poisson
from pla_serve.traces.lengths import ChatLengths, Lengths, Lmsys, Lognormal
from pla_serve.traces.rows import Row

GeneratedKind = Literal[
    "chat", "documents", "chat+documents", "burst-short", "burst-long", "all-short", "all-long"
]
KINDS: tuple[GeneratedKind, ...] = get_args(GeneratedKind)
SHORT_TOKENS = 256
LONG_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class GeneratorOptions:
    """Sizes and times of generated requests.

    Chats have messages as in LMSYS-Chat-1M (`lengths.Lmsys`), a geometric number of turns, and
    exponential think times; the history of a turn is all earlier turns and their answers. A
    document is one request of lognormal size. Answers have lognormal sizes. The sizes of documents
    and answers are assumptions and no fits.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    requests: int = 10_000
    rate: float = 1.0
    """Requests a second in the long run."""
    share: float = 0.1
    """Share of requests that are documents, where there are both."""
    turns: float = 2.0
    """Mean number of turns of a chat, which has 20 at most."""
    think: float = 5.0
    """Mean seconds between an answer and the next message."""
    longest_message: int = 2048
    document: int = 4096
    """Median tokens of a document; with ``document_sigma`` 0.8 one in ten has 2.8 times as many."""
    document_sigma: float = 0.8
    longest_document: int = 131_072
    answer: int = 128
    """Median tokens of an answer."""
    answer_sigma: float = 0.9
    longest_answer: int = 2048
    factor: float = 10.0
    """Rate of the bursting class in a burst, over its rate between bursts."""
    quiet: float = 300.0
    """Mean seconds between bursts."""
    burst: float = 30.0
    """Mean seconds of a burst."""

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ValueError(f"requests must be at least 1, not {self.requests}")
        for name in ("rate", "factor", "quiet", "burst"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("document", "answer", "longest_message", "longest_document", "longest_answer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in 0..1, not {self.share}")
        if not 1 <= self.turns <= 20:
            raise ValueError(f"turns must lie in 1..20, not {self.turns}")
        for name in ("think", "document_sigma", "answer_sigma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


def generate_rows(kind: GeneratedKind, options: GeneratorOptions, seed: int) -> list[Row]:
    """Generate rows in the order of their arrivals.

    - ``chat``, ``documents``, ``chat+documents``: Poisson arrivals of sessions.
    - ``burst-short``, ``burst-long``: both classes, of which chats or documents come in bursts
      (`arrivals.Bursts`), stretched so that both classes end together.
    - ``all-short``: single messages of at most 256 tokens. ``all-long``: documents of more than
      2,048.

    Sizes and times are drawn from generators of their own, so the rate changes times only.
    """
    alone = {"chat": 0.0, "all-short": 0.0, "documents": 1.0, "all-long": 1.0}
    documents = round(alone.get(kind, options.share) * options.requests)
    sizes = random.Random(f"{seed}/{kind}/sizes")
    chats = _chats(kind, options, options.requests - documents, sizes)
    papers = _documents(kind, options, documents, sizes)
    rows = [
        *_timed(chats, options, kind == "burst-short", random.Random(f"{seed}/{kind}/chats")),
        *_timed(papers, options, kind == "burst-long", random.Random(f"{seed}/{kind}/documents")),
    ]
    rows.sort(key=lambda row: row.arrival or 0.0)
    first = rows[0].arrival or 0.0
    return [replace(row, index=i, arrival=(row.arrival or 0) - first) for i, row in enumerate(rows)]


def _answers(options: GeneratorOptions) -> Lengths:
    return Lognormal(options.answer, options.answer_sigma, high=options.longest_answer)


def _chats(
    kind: GeneratedKind, options: GeneratorOptions, requests: int, rng: random.Random
) -> list[list[Row]]:
    alone = kind == "all-short"
    longest = min(options.longest_message, SHORT_TOKENS) if alone else options.longest_message
    lengths = ChatLengths(
        message=Lmsys(low=min(2, longest), high=longest),
        answer=_answers(options),
        mean_turns=1.0 if alone else options.turns,
        max_turns=1 if alone else 20,
        think_seconds=options.think,
    )
    sessions: list[list[Row]] = []
    while requests > 0:
        history, rows = 0, []
        for turn, (new, answer, think) in enumerate(lengths.session(rng)[:requests], 1):
            name = f"chat{len(sessions)}"
            thought = think if turn > 1 else None
            rows.append(Row(0, None, history + new, answer, name, history, thought, turn=turn))
            history += new + answer
        sessions.append(rows)
        requests -= len(rows)
    return sessions


def _documents(
    kind: GeneratedKind, options: GeneratorOptions, requests: int, rng: random.Random
) -> list[list[Row]]:
    low = LONG_TOKENS + 1 if kind == "all-long" else 1
    lengths = Lognormal(
        options.document, options.document_sigma, low, max(low, options.longest_document)
    )
    answers = _answers(options)
    return [
        [Row(0, None, lengths.sample(rng), answers.sample(rng), cached_tokens=0)]
        for _ in range(requests)
    ]


def _timed(
    sessions: list[list[Row]], options: GeneratorOptions, bursty: bool, rng: random.Random
) -> list[Row]:
    requests = sum(map(len, sessions))
    if not requests:
        return []
    rate = options.rate * len(sessions) / options.requests
    if bursty:
        process = Bursts(options.factor, options.quiet, options.burst)
        times = process.times(len(sessions), rate, rng)
        stretch = len(sessions) / rate / times[-1]
        times = [time * stretch for time in times]
    else:
        times = poisson(len(sessions), rate, 1, rng)
    rows = []
    for now, session in zip(times, sessions, strict=True):
        due = now
        for row in session:
            due += row.think or 0.0
            rows.append(replace(row, arrival=due))
    return rows
