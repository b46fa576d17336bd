"""Distributions of the sizes of messages, documents, answers and chats."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Lengths(Protocol):
    """A distribution of token counts."""

    def sample(self, rng: random.Random) -> int:
        """Draw a number of tokens, at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class Lmsys:
    """A mixture of two lognormals, rounded up to whole tokens and clipped.

    The default fits the lengths of user messages in LMSYS-Chat-1M (Zheng et al. 2023,
    arXiv 2309.11998): 10th, 50th, 90th and 99th percentile of 10,000 messages are 6, 17, 120 and
    1.2K tokens, 95% are at most 256. The fit (maximum likelihood): two in three are a line or two
    around 14 tokens, one in three has pasted text, around 56 tokens with a long tail.
    """

    weight: float = 0.659
    """Probability of the first lognormal."""
    mu: tuple[float, float] = (2.604, 4.021)
    sigma: tuple[float, float] = (0.685, 1.515)
    low: int = 2
    high: int = 2048

    def sample(self, rng: random.Random) -> int:
        part = 0 if rng.random() < self.weight else 1
        tokens = math.ceil(rng.lognormvariate(self.mu[part], self.sigma[part]))
        return min(max(tokens, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """A lognormal, rounded up to whole tokens and clipped to ``low``..``high``.

    Raises:
        ValueError: the parameters are out of range.
    """

    median: float
    sigma: float
    """Standard deviation of the logarithm: the 90th percentile is ``exp(1.28 sigma)`` medians."""
    low: int = 1
    high: int = 131072

    def __post_init__(self) -> None:
        if not (self.median > 0 and self.sigma >= 0):
            raise ValueError(f"a lognormal needs median > 0 and sigma >= 0, not {self}")
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths lie between 1 <= low <= high, not {self.low}-{self.high}")

    def sample(self, rng: random.Random) -> int:
        tokens = math.ceil(rng.lognormvariate(math.log(self.median), self.sigma))
        return min(max(tokens, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Whole numbers from ``low`` to ``high``."""

    low: int
    high: int

    def sample(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


class TurnLengths(NamedTuple):
    """Sizes of one turn of a chat."""

    new_tokens: int
    answer_tokens: int
    think: float
    """Seconds since the previous answer; 0 for the first turn."""


@dataclass(frozen=True, slots=True)
class ChatLengths:
    """Distribution of chats.

    A chat has a geometric number of turns, at most ``max_turns``, and an exponential think time
    between an answer and the next message.

    Raises:
        ValueError: a field is out of range.
    """

    message: Lengths = Lmsys()
    answer: Lengths = Uniform(16, 48)
    mean_turns: float = 2.0
    """LMSYS-Chat-1M has 2.0."""
    max_turns: int = 8
    think_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not (self.mean_turns >= 1 and self.max_turns >= 1):
            raise ValueError("a conversation has at least one turn: mean_turns, max_turns >= 1")
        if self.think_seconds < 0:
            raise ValueError(f"think_seconds must not be negative, not {self.think_seconds}")

    def session(self, rng: random.Random) -> list[TurnLengths]:
        """Draw one chat."""
        messages: list[TurnLengths] = []
        goes_on = True
        while goes_on and len(messages) < self.max_turns:
            new = self.message.sample(rng)
            think = rng.expovariate(1.0) * self.think_seconds if messages else 0.0
            messages.append(TurnLengths(new, self.answer.sample(rng), think))
            goes_on = rng.random() >= 1 / self.mean_turns
        return messages
