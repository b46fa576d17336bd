"""Shares the device's time between express work and long prefills, and says what a wait can be."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import LEAST_BOUNDARY, CostModel


class ShareAccount:
    """Seconds that express work (short prefills, decode steps) is ahead of its share.

    ``ahead`` grows by 1 for each second of express work while longs wait, and falls by
    (1 - s) / s for each second of long work, s being ``long_share``; never below 0, so that
    nobody saves up a claim. When it reaches the burst it is the longs' turn, until it is level
    again at 0. Hence, over any stretch in which longs wait, with express work of at
    most e seconds a batch::

        express <= long * (1 - s) / s + burst + e

    Long work is measured by the clock from `start_long` on, less the pauses in which express work
    ran inside it; `settle` brings it up to date.

    Args:
        share: s, between 0 and 1.
        burst: returns the burst in seconds, which may change with the cost model.
    """

    def __init__(self, share: float, burst: Callable[[], float]) -> None:
        self._paid_by_long = (1 - share) / share
        self._burst = burst
        self._since: float | None = None
        self._turn = False
        self.ahead = 0.0

    @property
    def longs_turn(self) -> bool:
        """Whether it is the longs' turn: long work runs without interruption."""
        return self._turn

    def clear(self) -> None:
        """Reset the account, because no long prefill waits any more."""
        self.ahead = 0.0
        self._turn = False

    def start_long(self, now: float) -> None:
        """Begin to measure long work, unless it is measured already."""
        if self._since is None:
            self._since = now

    def start_chunk(self, now: float) -> None:
        """Begin to measure a new batch of long work.

        Time since the last count is dropped: that batch was taken back.
        """
        self._since = now

    def stop_long(self, now: float) -> None:
        """Count the long work, which ends or pauses for express work, and stop measuring."""
        self.settle(now)
        self._since = None

    def settle(self, now: float) -> float:
        """Count the long work done since it was last counted; returns its seconds."""
        if self._since is None:
            return 0.0
        passed = now - self._since
        self.ahead -= self._paid_by_long * passed
        self._since = now
        if self.ahead <= 0:
            self.clear()
        return passed

    def charge_express(self, seconds: float) -> None:
        """Count express work that ran while long prefills waited."""
        self.ahead += seconds
        if self.ahead >= self._burst() and self.ahead > 0:
            self._turn = True

    def short_delay(self, work: float) -> float:
        """Estimate the seconds of long work that run before some express work is done.

        Args:
            work: seconds of this express work.
        """
        burst = self._burst()
        if self._turn:
            return (self.ahead + max(0.0, work - burst)) / self._paid_by_long
        return max(0.0, self.ahead + work - burst) / self._paid_by_long


def burst_seconds(config: PolicyConfig, cost: CostModel) -> float:
    """Seconds that express work may run ahead: by the settings, or by the machine."""
    given = config.express_burst_seconds
    return 2 * cost.prefill_seconds(LEAST_BOUNDARY, 0) if given is None else given


def long_wait_bound(
    config: PolicyConfig, long_work: float, express_batch: float, burst: float
) -> float:
    """Most seconds from the arrival of a long prefill to its first token, under any arrivals.

    Args:
        long_work: seconds of its own prefill and of all long prefills that may precede it or share
            its launch: those of its priority that arrived less than `passing_window` after it (for
            bulk work, `longs.BULK_PATIENCE` more), and all of a more urgent one.
        express_batch: seconds of the longest express batch.
        burst: `burst_seconds`, the most that it was meanwhile.

    One express batch may be under way when the request arrives, and is not charged before the
    policy hears of the request. From then on, by `ShareAccount`, express work takes at most
    ``long_work * (1 - s) / s + burst + express_batch``. Holds for an executor that is never idle
    while the policy has work.
    """
    return long_work / config.long_share + burst + 2 * express_batch


def short_wait_bound(
    config: PolicyConfig,
    batches: int,
    express_batch: float,
    stretch: float,
    burst: float,
    *,
    streams: bool = False,
) -> float:
    """Return the most seconds from a short prefill's arrival to its first token, in any traffic.

    Args:
        batches: express batches until its own is over, the one under way included. With as many
            shorts before it as `DueQueue` allows, that is at most their number plus 2, since each
            express batch finishes a short one if half of ``max_batch_tokens`` holds it.
        express_batch: seconds of the longest of them.
        stretch: seconds of the longest piece of long work that nothing can interrupt: a layer, or a
            chunk where the executor does not ask at layer boundaries.
        burst: `burst_seconds`, the most that it was meanwhile.
        streams: whether requests decode meanwhile.

    The longs' turns pay off at most what the account stood at plus what these batches charge; each
    turn and each batch may be preceded by one stretch. Before each batch shorts may be held back
    for others to share its launch, for ``express_wait_seconds``, and once for the stretch in which
    that ends. Steps of streams run in the longs' turns too, and take at most half of what those pay
    off.
    """
    express = batches * express_batch
    charged = burst + express_batch + express
    repaid = charged * config.long_share / (1 - config.long_share)
    if streams:
        repaid = 2 * (charged + repaid)
    held = batches * config.express_wait_seconds + stretch
    return express + repaid + held + 2 * (batches + 1) * stretch


def token_wait_bound(
    config: PolicyConfig,
    target: float,
    streams: int,
    express_batch: float,
    chunk: float,
    stretch: float,
    burst: float,
) -> float:
    """Return the most seconds from one token of a stream to the next, in any traffic.

    Args:
        target: its TPOT target.
        streams: that decode at the same time; of several tenants, the number of its own tenant's,
            times the tenants.
        express_batch: seconds of the longest express batch, decode steps included.
        chunk: seconds of the longest batch of long work with decode steps in it; 0 if none had any.
        stretch: seconds of the longest piece of long work that nothing can interrupt.
        burst: `burst_seconds`, the most that it was meanwhile.

    A token is due after its target, or in the longs' turn after `TokenDeadlines.least_target`. Then
    every express batch takes the stream along that is due first, and nobody who has had a token
    meanwhile is due before one that was due already. It may have to wait for the end of a chunk in
    which it rides; express work inside that is bounded as for longs, and longs inside it take at
    most as long again.
    """
    share = config.long_share
    least = stretch + express_batch * (1 + 2 * share / (1 - share))
    turns = (streams + 2) * (express_batch + stretch)
    riding = 2 * chunk / share + burst + 2 * express_batch if chunk else 0.0
    return max(target, least) + turns + riding


def passing_window(config: PolicyConfig, own_seconds: float, full_batch: float) -> float:
    """Seconds after the arrival of a long prefill within which a later one may still pass it.

    The square root lies between two extremes. A window of one length for all is first come, first
    served; one that grows with the prefill itself starves the longest ones while it hardly
    protects the middle. Measured against the time of a full batch it means the same on a fast
    machine and on a slow one.

    Args:
        own_seconds: of its prefill.
        full_batch: seconds of a batch of ``max_batch_tokens``.
    """
    return config.patience * sqrt(own_seconds * full_batch)
