"""What became of the promises of each tier, in /metrics."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

from pla_serve.policy.tiers import Tier

PromiseOutcome = Literal["met", "late_first_token", "late_token", "refused", "unfinished"]
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 600.0)
TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class TierMetrics:
    """Families of one server; they stay empty without tiers.

    Args:
        label: of every sample.
    """

    def __init__(self, registry: CollectorRegistry, label: dict[str, str]) -> None:
        self._label = label
        names = [*label, "tier"]
        self._requests = Counter(
            "pla_serve:tier_requests",
            "Requests by tier that kept its targets (met), had their first token late or a later "
            "one, were refused, or ended before their last token without being late.",
            [*names, "outcome"],
            registry=registry,
        )
        self._ttft = Histogram(
            "pla_serve:tier_time_to_first_token_seconds",
            "Arrival to first token, by tier.",
            names,
            registry=registry,
            buckets=SECONDS,
        )
        self._itl = Histogram(
            "pla_serve:tier_inter_token_latency_seconds",
            "Between tokens, by tier.",
            names,
            registry=registry,
            buckets=TOKEN_SECONDS,
        )

    def ended(self, tier: Tier, outcome: PromiseOutcome) -> None:
        """Count a request that has ended."""
        self._requests.labels(**self._label, tier=tier.name, outcome=outcome).inc()

    def first_token(self, tier: Tier, seconds: float) -> None:
        """Count the first token of a request, so long after its arrival."""
        self._ttft.labels(**self._label, tier=tier.name).observe(seconds)

    def next_tokens(self, tier: Tier, seconds_each: float) -> None:
        """Count tokens of a choice that came together."""
        self._itl.labels(**self._label, tier=tier.name).observe(seconds_each)


class TierWatch:
    """Compares when the tokens of one request come with when they are due.

    The first token of a choice is due at its arrival plus the tier's TTFT target, if it has one,
    and token i after it i TPOT targets later. Without a TTFT target they are counted from the first
    token, as are those of further choices of a prompt (``n``), which follow the first one.

    Args:
        arrival: of the request, in monotonic seconds.
        ttft, tpot: its targets in seconds, which may be others than the tier's.
    """

    def __init__(
        self,
        metrics: TierMetrics,
        tier: Tier,
        arrival: float,
        ttft: float | None,
        tpot: float | None,
    ) -> None:
        self._metrics = metrics
        self._tier = tier
        self._arrival = arrival
        self._ttft = ttft
        self._tpot = tpot
        self._due: dict[int, float] = {}
        """When the first token of each choice was due, by its index."""
        self._last: dict[int, float] = {}
        self._late: PromiseOutcome | None = None

    def tokens(self, index: int, *, leads: bool, before: int, count: int, now: float) -> None:
        """Note tokens of a choice that have come together.

        Args:
            index: of the choice.
            leads: whether it is the first choice of its prompt.
            before: tokens of the choice that came earlier.
            count: of tokens that came now.
        """
        if not count:
            return
        if before == 0:
            self._first(index, leads, now)
        else:
            self._metrics.next_tokens(self._tier, (now - self._last[index]) / count)
        earliest = max(before, 1)
        late = self._tpot is not None and now > self._due[index] + earliest * self._tpot
        if before + count > earliest and late:
            self._late = self._late or "late_token"
        self._last[index] = now

    def ended(self, *, refused: bool, finished: bool) -> None:
        """Note that the request is over; call it once.

        Args:
            finished: whether all choices had their last token.
        """
        outcome: PromiseOutcome = "met" if finished else "unfinished"
        self._metrics.ended(self._tier, "refused" if refused else self._late or outcome)

    def _first(self, index: int, leads: bool, now: float) -> None:
        self._due[index] = now
        if not leads:
            return
        self._metrics.first_token(self._tier, now - self._arrival)
        if self._ttft is not None:
            self._due[index] = self._arrival + self._ttft
            if now > self._due[index]:
                self._late = "late_first_token"
