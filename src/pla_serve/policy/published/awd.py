"""AWD, adaptive wait-depth batching of short prefills, as published (arXiv 2601.11589).

State: the window W, between W_min and W_max, and the target depth D, first the deepest captured
shape within the memory budget M. A round goes like this:

1. Accumulate shorts, grouped by length and within M, until W expires or D of them are there.
2. Break at once if the slack ``DDL_i - (t + S)`` of any pending request is down to sigma, or if the
   head has waited T_max.
3. Take the nearest captured shape, pad, dispatch.
4. With d the depth reached and tau the seconds that the batch took: if ``d >= D`` then
   ``W <- clip(tau, W_min, W_max)``, else ``D <- d``.

Deadline mode sets ``W = clip(min(W_SLA, W_GR))`` when a round opens, with
``W_SLA = min_i(DDL_i - t - S - delta)`` and W_GR the expected time until depth D is reached at the
estimated arrival rate. Token-max mode, for offline work, ignores deadlines and admits requests
while the batch has fewer tokens than a target.

Two consequences of these rules are kept as they are: D never grows again, and a window applies
also when no other request is about to come. `waiting.GainWindow` is the project's own rule and has
neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, islice
from math import inf
from typing import Annotated, Literal

from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pending import Pending
from pla_serve.policy.published.levels import LengthLevels
from pla_serve.policy.shapes.ladder import Fit, Ladder
from pla_serve.policy.waiting import ArrivalRate


class Cause(StrEnum):
    """Reason why a round ended."""

    DEPTH = "depth"
    """Depth D is reached."""
    TOKENS = "tokens"
    """The token target is reached."""
    FULL = "full"
    """No shape, and no memory, takes more requests of this length."""
    WINDOW = "window"
    """The window has expired."""
    SLACK = "slack"
    """A deadline comes close."""
    HEAD = "head"
    """The head has waited T_max."""


@dataclass(frozen=True, slots=True)
class AwdOptions:
    """Symbols of the publication.

    Raises:
        ValueError: a field is out of range; the message names the field and the range.
    """

    mode: Annotated[
        Literal["deadline", "token_max"],
        Knob(
            "deadline: the window follows deadlines and the arrival rate, and depth D ends a "
            "round. token_max: for offline work; deadlines are ignored, and token_target ends it."
        ),
    ] = "deadline"
    window: Annotated[
        float,
        Knob(
            "W of the first round, and of a round that neither deadlines nor a rate decide.",
            unit="seconds",
            least=0,
        ),
    ] = 0.007
    window_min: Annotated[float, Knob("W_min.", unit="seconds", least=0)] = 0.0
    window_max: Annotated[float, Knob("W_max.", unit="seconds", least=0)] = 0.02
    sigma: Annotated[
        float, Knob("Slack at which a pending deadline ends the round.", unit="seconds", least=0)
    ] = 0.005
    delta: Annotated[float, Knob("Safety margin in W_SLA.", unit="seconds", least=0)] = 0.005
    head_wait: Annotated[
        float, Knob("T_max: longest time that the head waits.", unit="seconds", least=0)
    ] = 0.05
    memory_tokens: Annotated[
        int,
        Knob("M: most token slots of a batch, real or padding.", unit="tokens", least=1),
    ] = 64 * 256
    max_requests: Annotated[
        int, Knob("Most requests of a batch that fits no shape.", unit="requests", least=1)
    ] = 64
    token_target: Annotated[
        int,
        Knob("Tokens that end a round in token_max mode, which alone uses this.", least=1),
    ] = 4096

    def __post_init__(self) -> None:
        check_knobs(self)
        if not self.window_min <= self.window <= self.window_max:
            raise ValueError(
                "window must lie between window_min and window_max, not "
                f"{self.window_min} <= {self.window} <= {self.window_max}"
            )


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Run these requests now, in ``fit.shape`` or on ordinary kernels for ``fit.reason``."""

    members: tuple[Pending, ...]
    fit: Fit
    cause: Cause

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the members."""
        return tuple(short.id for short in self.members)


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Run nothing yet: decide again at ``time``, or when a short arrives or leaves."""

    time: float


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests that would run together, where, and whether their batch takes no more."""

    members: list[Pending]
    fit: Fit
    full: bool


class AdaptiveWaitDepth:
    """State W and D, and the round that is open.

    Report every short that arrives (`arrived`), ask `decide` when the device is free, and report
    what was dispatched (`observe`).

    Args:
        options: the symbols.
        ladder: captured shapes, padded per request; those beyond ``memory_tokens`` are not used. It
            should know the cost of ordinary kernels, or the service time S of a batch that runs
            there counts as 0.
        rate: estimator of the short arrival rate.
    """

    def __init__(
        self, options: AwdOptions, ladder: Ladder, rate: ArrivalRate | None = None
    ) -> None:
        self._options = options
        self.reprice(ladder)
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
        """D, requests."""
        return self._depth

    def reprice(self, ladder: Ladder) -> None:
        """Go by the same shapes at other predicted seconds."""
        self._ladder = ladder.within(self._options.memory_tokens)

    def arrived(self, now: float) -> None:
        """A short arrived."""
        self._rate.arrived(now)

    def window_left(self, now: float) -> float:
        """Seconds that a newcomer waits for others at most, if D is not reached before."""
        opened = now if self._opened is None else self._opened
        return max(0.0, min(opened + self._window - now, self._options.head_wait))

    def decide(self, queue: LengthLevels, now: float) -> Dispatch | WaitUntil | None:
        """Decide about the pending shorts; None if there are none.

        A `Dispatch` ends the round, so it has to be carried out. The head, or the request that
        ended the round early, is always in it.
        """
        head = queue.head()
        if head is None:
            self._opened = None
            return None
        group = self._group(head, queue)
        seconds = group.fit.seconds
        if self._opened is None:
            self._opened = now
            self._set_window(queue, len(group.members), seconds, now)
        window_ends = self._opened + self._window
        head_ends = head.arrival + self._options.head_wait
        urgent, slack_ends = self._most_urgent(queue, seconds)
        if urgent is not None and now >= slack_ends:
            if urgent not in group.members:
                group = self._group(urgent, queue)
            return self._dispatch(group, Cause.SLACK)
        if now >= head_ends:
            return self._dispatch(group, Cause.HEAD)
        reached = self._reached(group)
        if reached is not None:
            return self._dispatch(group, reached)
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

    def _dispatch(self, group: _Group, cause: Cause) -> Dispatch:
        self._opened = None
        return Dispatch(tuple(group.members), group.fit, cause)

    def _set_window(self, queue: LengthLevels, depth: int, service: float, now: float) -> None:
        """W = clip(min(W_SLA, W_GR)), where one of the two is known."""
        if self._options.mode != "deadline":
            return
        urgent = queue.most_urgent()
        deadline = inf if urgent is None or urgent.deadline is None else urgent.deadline
        by_deadline = deadline - now - service - self._options.delta
        rate = self._rate.rate(now)
        by_rate = max(0, self._depth - depth) / rate if rate > 0 else inf
        window = min(by_deadline, by_rate)
        if window < inf:
            self._window = self._clip(window)

    def _most_urgent(self, queue: LengthLevels, service: float) -> tuple[Pending | None, float]:
        """Return the request with the earliest deadline, and when its slack is down to sigma."""
        urgent = queue.most_urgent() if self._options.mode == "deadline" else None
        if urgent is None or urgent.deadline is None:
            return None, inf
        return urgent, urgent.deadline - service - self._options.sigma

    def _reached(self, group: _Group) -> Cause | None:
        if self._options.mode == "token_max":
            if sum(short.new_tokens for short in group.members) >= self._options.token_target:
                return Cause.TOKENS
        elif len(group.members) >= self._depth:
            return Cause.DEPTH
        return Cause.FULL if group.full else None

    def _group(self, anchor: Pending, queue: LengthLevels) -> _Group:
        """The anchor and those that run with it: of its length level, by arrival.

        Rows that the nearest shape would then have empty are filled with shorter requests: these
        cost nothing.
        """
        level = queue.level(anchor.new_tokens)
        capacity = self._ladder.capacity(anchor.new_tokens)
        if capacity == 0:
            return self._without_shape(anchor, queue)
        members = self._admit(anchor, queue.of_level(level), capacity)
        fit = self._fit(members)
        if fit.shape is not None and fit.shape.batch > len(members):
            shorter = queue.shorter(level, fit.shape.batch - len(members))
            if shorter:
                members += shorter
                fit = self._fit(members)
        return _Group(members, fit, len(members) >= capacity)

    def _admit(self, anchor: Pending, level: Iterable[Pending], capacity: int) -> list[Pending]:
        """At most ``capacity`` of a level; in token-max mode only while below the token target."""
        others = (short for short in islice(level, capacity) if short is not anchor)
        members = [anchor, *islice(others, capacity - 1)]
        if self._options.mode == "token_max":
            totals = accumulate(short.new_tokens for short in members)
            below = sum(total < self._options.token_target for total in totals)
            del members[below + 1 :]
        return members

    def _without_shape(self, anchor: Pending, queue: LengthLevels) -> _Group:
        """A batch for the ordinary kernels: by arrival, whatever the lengths are."""
        options = self._options
        members, tokens, full = [anchor], anchor.new_tokens, False
        for short in queue.oldest(options.max_requests):
            if short is anchor:
                continue
            full = len(members) >= options.max_requests
            full = full or tokens + short.new_tokens > options.memory_tokens
            if full:
                break
            members.append(short)
            tokens += short.new_tokens
        full = full or len(members) >= options.max_requests or tokens >= options.memory_tokens
        return _Group(members, self._fit(members), full)

    def _fit(self, members: list[Pending]) -> Fit:
        return self._ladder.fit([short.new_tokens for short in members])

    def _clip(self, seconds: float) -> float:
        return min(max(seconds, self._options.window_min), self._options.window_max)
