"""AWD, adaptive wait-depth batching of shorts, as published (PLA-Serve, arXiv 2601.11589).

A round accumulates shorts until its window W expires or the depth D is reached, and then runs them
in the nearest captured shape. It breaks at once if a pending deadline comes close or the head has
waited too long. After a batch of depth d that took tau seconds: if d >= D then W <- clip(tau),
else D <- d. Two consequences of the published rules, kept here as they are: D never grows again,
and a window applies also when nobody else is about to come. `waiting.GainWindow` is the project's
own rule, which has neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf, isfinite
from typing import Protocol

from pla_serve.policy.shapes.ladder import Fit, Ladder, Layout, size_of
from pla_serve.policy.waiting import ArrivalRate


class Short(Protocol):
    """What AWD reads of a pending short; `PrefillRequest` has it."""

    @property
    def id(self) -> str: ...
    @property
    def arrival(self) -> float: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def deadline(self) -> float | None: ...


class WindowMode(StrEnum):
    """What ends a round besides its window."""

    DEADLINE = "deadline"
    """The depth D; the window follows deadlines and the arrival rate."""
    TOKEN_MAX = "token_max"
    """A number of tokens; deadlines are ignored. For offline work."""


class Cause(StrEnum):
    """Why a round ended."""

    DEPTH = "depth"
    TOKENS = "tokens"
    FULL = "full"
    """No shape, and no memory, takes more requests of this length."""
    WINDOW = "window"
    SLACK = "slack"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class AwdOptions:
    """The symbols of the publication; times in seconds.

    Raises:
        ValueError: a field is out of range; the message names the field and the range.
    """

    mode: WindowMode = WindowMode.DEADLINE
    window: float = 0.007
    """W of the first round, and of a round that neither deadlines nor a rate decide."""
    window_min: float = 0.0
    window_max: float = 0.02
    sigma: float = 0.005
    """Slack at which a pending deadline ends the round."""
    delta: float = 0.005
    """Safety margin in W_SLA."""
    head_wait: float = 0.05
    """T_max: the longest that the head waits."""
    memory_tokens: int = 64 * 256
    """M: most token slots of a batch, real or padding."""
    max_requests: int = 64
    """Most requests of a batch that fits no shape."""
    token_target: int = 4096
    """Tokens that end a round in token-max mode, which alone uses this."""

    def __post_init__(self) -> None:
        for name in ("window", "window_min", "window_max", "sigma", "delta", "head_wait"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, not {value}")
        for name in ("memory_tokens", "max_requests", "token_target"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.window_min <= self.window <= self.window_max:
            raise ValueError(
                "window must lie between window_min and window_max, not "
                f"{self.window_min} <= {self.window} <= {self.window_max}"
            )


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Run these now, in ``fit.shape`` or on ordinary kernels for ``fit.reason``."""

    ids: tuple[str, ...]
    fit: Fit
    cause: Cause


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Nothing yet: decide again at ``time``, or when a short arrives or leaves."""

    time: float


class AdaptiveWaitDepth:
    """State W and D, and the round that is open.

    Tell it every short that arrives (`arrived`), ask `decide` when the device is free, and report
    what was dispatched (`observe`).

    Args:
        options: the symbols.
        ladder: captured shapes; those beyond ``memory_tokens`` are not used. It should know the
            cost of ordinary kernels, else the service time S of what runs there counts as 0.
        rate: estimator of the short arrival rate.
    """

    def __init__(
        self, options: AwdOptions, ladder: Ladder, rate: ArrivalRate | None = None
    ) -> None:
        self._options = options
        self._ladder = ladder.within(options.memory_tokens)
        self._rate = rate or ArrivalRate()
        self._window = options.window
        self._depth = self._ladder.capacity() or options.max_requests
        self._opened: float | None = None

    @property
    def window(self) -> float:
        """W, seconds."""
        return self._window

    @property
    def depth(self) -> int:
        """D, requests; first the deepest captured shape that fits M."""
        return self._depth

    def arrived(self, now: float) -> None:
        """A short arrived."""
        self._rate.arrived(now)

    def decide(self, pending: Sequence[Short], now: float) -> Dispatch | WaitUntil | None:
        """What to do with the pending shorts; None if there are none.

        A `Dispatch` ends the round, so it has to be carried out. The head, or whatever ended the
        round early, is always in it.
        """
        if not pending:
            self._opened = None
            return None
        head = min(pending, key=lambda short: short.arrival)
        group = self._group(head, pending)
        fit = self._fit(group)
        if self._opened is None:
            self._opened = now
            self._set_window(pending, len(group), fit.seconds, now)
        window_ends = self._opened + self._window
        head_ends = head.arrival + self._options.head_wait
        urgent, slack_ends = self._most_urgent(pending, fit.seconds)
        if urgent is not None and now >= slack_ends:
            if all(short.id != urgent.id for short in group):
                group = self._group(urgent, pending)
            return self._dispatch(group, Cause.SLACK)
        if now >= head_ends:
            return self._dispatch(group, Cause.HEAD)
        full = self._reached(group)
        if full is not None:
            return self._dispatch(group, full)
        if now >= window_ends:
            return self._dispatch(group, Cause.WINDOW)
        return WaitUntil(min(window_ends, head_ends, slack_ends))

    def observe(self, depth: int, seconds: float) -> None:
        """A batch of ``depth`` requests was dispatched and took ``seconds``: the feedback rule.

        Raises:
            ValueError: ``depth`` is below 1.
        """
        if depth < 1:
            raise ValueError(f"a batch has at least one request, not {depth}")
        if depth >= self._depth:
            self._window = self._clip(seconds)
        else:
            self._depth = depth

    def _dispatch(self, group: list[Short], cause: Cause) -> Dispatch:
        self._opened = None
        return Dispatch(tuple(short.id for short in group), self._fit(group), cause)

    def _set_window(self, pending: Sequence[Short], depth: int, service: float, now: float) -> None:
        """W = clip(min(W_SLA, W_GR)), where one of the two is known."""
        if self._options.mode is not WindowMode.DEADLINE:
            return
        deadlines = [short.deadline for short in pending if short.deadline is not None]
        by_deadline = min(deadlines, default=inf) - now - service - self._options.delta
        rate = self._rate.rate(now)
        by_rate = max(0, self._depth - depth) / rate if rate > 0 else inf
        window = min(by_deadline, by_rate)
        if window < inf:
            self._window = self._clip(window)

    def _most_urgent(self, pending: Sequence[Short], service: float) -> tuple[Short | None, float]:
        """The earliest deadline, and when its slack is down to sigma."""
        if self._options.mode is not WindowMode.DEADLINE:
            return None, inf
        due = [(short.deadline, short) for short in pending if short.deadline is not None]
        if not due:
            return None, inf
        deadline, short = min(due, key=lambda pair: pair[0])
        return short, deadline - service - self._options.sigma

    def _reached(self, group: list[Short]) -> Cause | None:
        lengths = [short.new_tokens for short in group]
        if self._options.mode is WindowMode.TOKEN_MAX:
            if sum(lengths) >= self._options.token_target:
                return Cause.TOKENS
        elif len(group) >= self._depth:
            return Cause.DEPTH
        return None if self._takes([*lengths, min(lengths)]) else Cause.FULL

    def _group(self, anchor: Short, pending: Sequence[Short]) -> list[Short]:
        """The anchor and those that run with it: of its length level, by arrival.

        Rows that the shape would then have empty are filled with shorter ones: they cost nothing.
        """
        others = sorted(
            (short for short in pending if short.id != anchor.id),
            key=lambda short: short.arrival,
        )
        level = self._ladder.level(anchor.new_tokens)
        if level is None or self._ladder.layout is Layout.FLAT:
            return self._fill([anchor], others)
        levels = {short.id: self._ladder.level(short.new_tokens) for short in others}
        group = self._fill([anchor], (short for short in others if levels[short.id] == level))
        shape = self._fit(group).shape
        if shape is None or shape.batch <= len(group):
            return group
        shorter = [s for s in others if (levels[s.id] or inf) < level]
        return group + shorter[: shape.batch - len(group)]

    def _fill(self, group: list[Short], others: Iterable[Short]) -> list[Short]:
        """Add the others in order, as many as a batch takes; one that is too long is passed."""
        lengths = [short.new_tokens for short in group]
        for short in others:
            if self._takes([*lengths, short.new_tokens]):
                group.append(short)
                lengths.append(short.new_tokens)
            elif not self._takes([*lengths, 1]):
                break
        return group

    def _takes(self, lengths: list[int]) -> bool:
        """Whether a batch may have these lengths: a shape covers them, or none covers the first."""
        layout = self._ladder.layout
        if self._ladder.nearest(size_of(lengths[:1], layout)) is not None:
            return self._ladder.nearest(size_of(lengths, layout)) is not None
        options = self._options
        return len(lengths) <= options.max_requests and sum(lengths) <= options.memory_tokens

    def _fit(self, group: list[Short]) -> Fit:
        return self._ladder.fit([short.new_tokens for short in group])

    def _clip(self, seconds: float) -> float:
        return min(max(seconds, self._options.window_min), self._options.window_max)
