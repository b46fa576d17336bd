"""Whether it pays to hold a short batch back for the next arrival. Beyond the published AWD.

A wait saves launches, for everybody whom a launch keeps from the device, and costs time, for
everybody who could be served meanwhile. Both are counted here as *request-seconds in the system*
under Poisson arrivals at rate r, and the rule that makes their long-run average least is computed
exactly. With n shorts pending and a batch of n taking S(n) seconds there are two actions:

- go: takes S(n). The batch is in the system for n S(n), arrivals meanwhile for r S(n)^2 / 2, and m
  ``others`` lose S(n) each. Then K ~ Poisson(r S(n)) shorts are pending.
- wait for one more: takes 1/r, and costs (n + ``idle``) / r: the pending ones wait, and so does
  who could have used the device. Then n + 1 are pending.

This is a semi-Markov decision process with at most `MOST_DEPTH` states; Howard's policy iteration
solves it, starting from never waiting. So what it returns is, for these numbers, never worse than
no window; and the window is zero when arrivals are rare, since then a wait is long and there is
hardly a launch to be shared. (Arrivals beyond the deepest batch are not counted, so there is no
plan for more arrivals than that batch can keep up with.) Compare Deb and Serfozo, "Optimal control
of batch service queues" (1973), who show that such rules are thresholds if S(n) is linear. S(n) may
be a staircase here, as captured shapes make it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, inf, isfinite, lgamma, log

import numpy as np

from pla_serve.policy.arrays import Array

MOST_DEPTH = 32
"""Deepest batch that a plan looks at; deeper ones are never held back."""
LEAST_GAIN = 0.02
"""Share of the cost that a plan must be predicted to save; below it there is no waiting. Rates are
estimates, and without a wait nothing can be lost."""
LIGHT_LOAD = 0.25
"""Arrivals a launch time, times who gains by one launch less: below it no plan ever waits."""
RATE_STEP = 0.25
"""Rates are rounded down to powers of 1 + RATE_STEP, so that plans are found again."""
ROUNDS = 50
MOST_PLANS = 512
"""Plans that a window keeps."""
Situation = tuple[tuple[float, ...], float, float, float]
"""Arguments of `plan_waits`."""


class ArrivalRate:
    """Arrivals a second, each counting less as it ages: by exp(-age / memory).

    Corrected for the time before the first arrival, so that it is unbiased from the start. It is 0
    until ``least`` arrivals were seen, because two that happen to come together are no rate.

    Raises:
        ValueError: ``memory`` is not positive.
    """

    def __init__(self, memory: float = 5.0, least: int = 8) -> None:
        if not 0 < memory < inf:
            raise ValueError(f"memory must be positive and finite, not {memory}")
        self._memory = memory
        self._least = least
        self._sum = 0.0
        self._seen = 0
        self._first = 0.0
        self._last = 0.0

    def arrived(self, now: float, amount: float = 1.0) -> None:
        """Count an arrival; times must not fall, and one that does counts as the last one.

        Args:
            amount: what it brings, if the rate is one of something else than arrivals.
        """
        self._seen += 1
        if self._seen == 1:
            self._first = self._last = now  # it starts the clock, and is no interval
            return
        now = max(now, self._last)
        self._sum = self._sum * exp((self._last - now) / self._memory) + amount
        self._last = now

    def rate(self, now: float) -> float:
        """The estimate; it falls while nothing arrives."""
        span = (max(now, self._last) - self._first) / self._memory
        if self._seen < self._least or span <= 0:
            return 0.0
        aged = self._sum * exp((self._last - max(now, self._last)) / self._memory)
        return aged / (self._memory * -expm1(-span))


@dataclass(frozen=True, slots=True)
class WaitPlan:
    """Rule that says, for each number of pending requests, whether to wait for another one."""

    waits: tuple[bool, ...]
    """waits[n - 1] with n pending; the last one is False."""
    gain: float
    """Predicted share of request-seconds saved over never waiting, 0 to 1."""

    def waits_at(self, pending: int) -> bool:
        """Whether to wait with so many pending; never beyond the plan."""
        return 0 < pending <= len(self.waits) and self.waits[pending - 1]

    def target(self, pending: int) -> int:
        """The depth at which the wait that begins with so many pending ends."""
        depth = pending
        while self.waits_at(depth):
            depth += 1
        return depth


NEVER = WaitPlan((), 0.0)


def plan_waits(
    curve: tuple[float, ...], rate: float, others: float = 0.0, idle: float = 0.0
) -> WaitPlan:
    """The best rule for arrivals at ``rate``; milliseconds, so keep what it returns.

    Args:
        curve: S(1), S(2), ...: seconds of a batch of so many. The first MOST_DEPTH count, and of
            these the ones before the first that takes longer than its requests one by one.
        rate: arrivals a second.
        others: requests that a launch keeps from the device, as longs that it interrupts.
        idle: requests that could use the device but may not while the shorts wait; 0 if longs run
            meanwhile, or if there are none.

    Raises:
        ValueError: a number is negative or not finite, or a batch takes no time.
    """
    curve = curve[:MOST_DEPTH]
    if not all(isfinite(s) and s > 0 for s in curve):
        raise ValueError(f"a batch takes a positive and finite time, not one of {curve}")
    if not all(isfinite(x) and x >= 0 for x in (rate, others, idle)):
        raise ValueError(
            f"rate, others and idle must be finite, at least 0, not {rate}, {others}, {idle}"
        )
    if len(curve) < 2 or rate * curve[0] * (1 + others) < LIGHT_LOAD:
        return NEVER
    curve = _worthwhile(curve)
    if rate * curve[-1] >= len(curve):  # a backlog forms by itself
        return NEVER
    return _solve(curve, rate, others, idle)


def _worthwhile(curve: tuple[float, ...]) -> tuple[float, ...]:
    """The depths before the first at which a batch takes longer than its requests one by one."""
    slower = (n for n, seconds in enumerate(curve) if seconds > (n + 1) * curve[0] * (1 + 1e-9))
    return curve[: next(slower, len(curve))]


def _solve(curve: tuple[float, ...], rate: float, others: float, idle: float) -> WaitPlan:
    """Howard's policy iteration over the states 0..depth pending.

    A depth beyond the curve is taken as its end. Waiting in state 0 is no action but a fact.
    """
    depth = len(curve)
    service = np.array(curve)
    counts = np.arange(depth + 1)
    log_factorials = np.array([lgamma(count + 1) for count in range(depth + 1)])
    after = np.zeros((depth + 1, depth + 1))
    mean = rate * service[:, None]
    after[1:] = np.exp(counts * np.log(mean) - mean - log_factorials)
    after[1:, -1] = np.maximum(0, 1 - after[1:, :-1].sum(axis=1))
    go_time = np.append(1.0, service)
    go_cost = np.append(inf, (counts[1:] + others) * service + rate * service**2 / 2)
    wait_time = 1 / rate
    wait_cost = (counts + idle * (counts > 0)) / rate
    more = np.eye(depth + 1, k=1)
    waits = counts == 0
    never = average = 0.0
    for rounds in range(ROUNDS):
        average, values = _evaluate(
            np.where(waits[:, None], more, after),
            np.where(waits, wait_cost, go_cost),
            np.where(waits, wait_time, go_time),
        )
        never = average if rounds == 0 else never  # the first rule never holds a batch back
        go = go_cost - average * go_time + after @ values
        wait = wait_cost - average * wait_time + more @ values
        slack = 1e-9 * (1 + np.abs(values))  # a tie changes nothing, or the rounds would not end
        better = np.where(waits, wait <= go + slack, wait < go - slack)
        better[0], better[-1] = True, False
        if (better == waits).all():
            break
        waits = better
    gain = 1 - average / never if never > 0 else 0.0
    return WaitPlan(tuple(waits[1:].tolist()), gain) if gain >= LEAST_GAIN else NEVER


def _evaluate(moves: Array, costs: Array, times: Array) -> tuple[float, Array]:
    """Average cost a second, and relative values with that of state 0 at 0."""
    size = len(costs)
    system = np.eye(size) - moves
    system[:, 0] = times  # the value of state 0 is 0, so its column holds the average instead
    solution = np.linalg.solve(system, costs)
    values = np.append(0.0, solution[1:])
    return float(solution[0]), values


def linear_curve(first: float, each: float, most: int = MOST_DEPTH) -> tuple[float, ...]:
    """S(n) = first + (n - 1) each: a launch, and as much again for every further request."""
    return tuple(first + n * each for n in range(most))


@dataclass(frozen=True, slots=True)
class WaitOptions:
    """Bounds of a wait; they hold whatever is predicted.

    Raises:
        ValueError: one is negative or not finite.
    """

    longest_wait: float = 0.05
    """Seconds that the oldest pending short may be held back in all, from its arrival."""
    margin: float = 0.002
    """Seconds that a batch is to be done before the earliest deadline in it."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be finite and at least 0, not {getattr(self, name)}")


class GainWindow:
    """The waiting window of one short queue: zero unless a wait is predicted to pay.

    Tell it every short that arrives (`arrived`); ask `until` when the device could take a batch,
    and call `prepare` where milliseconds do not matter.
    """

    def __init__(self, options: WaitOptions | None = None, rate: ArrivalRate | None = None) -> None:
        self._options = options or WaitOptions()
        self._rate = rate or ArrivalRate()
        self._plans: dict[Situation, WaitPlan] = {}
        self._wanted: Situation | None = None

    def arrived(self, now: float) -> None:
        """A short arrived."""
        self._rate.arrived(now)

    def rate(self, now: float) -> float:
        """Estimated arrivals a second."""
        return self._rate.rate(now)

    def plan(
        self, curve: tuple[float, ...], now: float, others: int = 0, idle: int = 0
    ) -> WaitPlan:
        """Return the plan in force. Rates and ``others`` are rounded down, so plans are reused.

        To solve for a plan takes milliseconds, which a decision does not have. In a situation that
        is new the plan is therefore never to wait, and `prepare` solves for the next time.
        """
        rate = self._rate.rate(now)
        if len(curve) < 2 or rate * curve[0] * (1 + others) < LIGHT_LOAD:
            return NEVER
        situation = (curve, rounded(rate), rounded(others), idle)
        plan = self._plans.get(situation)
        if plan is None:
            self._wanted = situation
            return NEVER
        return plan

    def prepare(self) -> None:
        """Solve for the plan that was missing last, if one was. Takes milliseconds."""
        situation, self._wanted = self._wanted, None
        if situation is None:
            return
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[situation] = plan_waits(*situation)

    def until(
        self,
        now: float,
        pending: int,
        oldest: float,
        curve: tuple[float, ...],
        *,
        due: float = inf,
        others: int = 0,
        idle: int = 0,
    ) -> float | None:
        """Return the time until which the pending shorts are held back; None if they go now.

        Ask again at that time, or when a short arrives. A call takes microseconds.

        Args:
            now: seconds.
            pending: shorts that would make up the batch.
            oldest: when the oldest of them arrived.
            curve: S(1), S(2), ... of such a batch; see `linear_curve`.
            due: the earliest deadline among them.
            others: requests that each launch keeps from the device (longs).
            idle: those of them that could run now but do not while the shorts are held back.
        """
        plan = self.plan(curve, now, others, idle)
        if not plan.waits_at(pending):
            return None
        depth = plan.target(pending)
        expected = now + (depth - pending) / self._rate.rate(now)
        latest = due - curve[min(depth, len(curve)) - 1] - self._options.margin
        until = min(expected, oldest + self._options.longest_wait, latest)
        return until if until > now else None


def rounded(value: float) -> float:
    """The next lower power of 1 + RATE_STEP, or 0: situations much alike find the same plan."""
    if value <= 0:
        return 0.0
    return (1 + RATE_STEP) ** int(np.floor(log(value) / log(1 + RATE_STEP) + 1e-9))
