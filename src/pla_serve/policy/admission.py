"""Whether to take a request at all, decided before any work is spent on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from pla_serve.policy.calibration import Calibration, Forecast
from pla_serve.policy.protocol import (
    PrefillPolicy,
    PrefillRequest,
    QueueState,
    ServiceLevel,
    TenantLoad,
)

LEAST_RETRY = 1.0
"""Shortest ``retry_after`` in seconds; with less a client would only ask again and again."""


@dataclass(frozen=True, slots=True)
class Admit:
    """Take it."""

    forecast: Forecast
    """To be handed to `Calibration.observe` when its first token is made."""
    late: bool
    """True if the chance to meet the deadline is below one half; for metrics."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Do not take it now."""

    reason: str
    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class Admission:
    """Bounds on what waits, in tokens and in predicted seconds; None is no bound.

    Both count what waits *before* the request, so that a machine with nothing to do takes a prompt
    of any size. A deadline of a request to which nothing was promised never refuses: whoever sets
    one would rather have the answer late than not at all, and a late short gives way to those that
    can be saved (`queues.DueQueue`). `Admit` tells that it will be late.

    A request to which its targets were promised (`ServiceLevel.PROMISED`) is refused if they are
    predicted not to be kept: its first token by what nine in ten predictions stay below, as soon as
    enough was seen for that, and its further tokens by `PrefillPolicy.token_seconds`. A machine
    with nothing to do takes it all the same, because no later moment would be better. Bulk work is
    refused by the two bounds only.

    Where several tenants have work, one that keeps to an equal part of a bound is not refused for
    what the others have queued, since the policy shares its time between them. So what waits is at
    most the bound, and one part of it more for each tenant.

    Predicted seconds are the policy's, corrected by what came of earlier ones (`Calibration`):
    the median, so that a policy that predicts too much does not refuse too much.

    Raises:
        ValueError: a bound is not positive.
    """

    max_queued_tokens: int | None = None
    max_predicted_wait: float | None = None
    calibration: Calibration = field(default_factory=Calibration, compare=False)
    """Learns; the executor tells it what became of `Admit.forecast`."""

    def __post_init__(self) -> None:
        for name in ("max_queued_tokens", "max_predicted_wait"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or None, not {value}")

    def decide(
        self,
        request: PrefillRequest,
        policy: PrefillPolicy,
        own_seconds: float,
        now: float,
        *,
        parked_tokens: int = 0,
        parked_seconds: float = 0.0,
        own_parked_tokens: int = 0,
    ) -> Admit | Refuse:
        """Weigh a request against what ``policy`` has queued.

        Args:
            own_seconds: predicted time of its prefill alone (`CostModel.prefill_seconds`).
            parked_tokens: what the executor keeps from the policy, for want of memory.
            parked_seconds: predicted time of the part of that which goes before the request.
            own_parked_tokens: the part of it that is the same tenant's.
        """
        state = policy.state(now)
        queued = state.short_tokens + state.long_tokens + parked_tokens
        limit = self.max_queued_tokens
        if (
            limit is not None
            and queued > 0
            and queued + request.new_tokens > limit
            and not _keeps_to_its_tokens(
                policy.load_of(request.tenant), request.new_tokens + own_parked_tokens, limit
            )
        ):
            excess = min(1.0, (queued + request.new_tokens - limit) / queued)
            return Refuse(
                f"{queued} prompt tokens wait already; with {request.new_tokens} more they would "
                f"exceed the limit of {limit}",
                max(LEAST_RETRY, excess * (state.seconds + parked_seconds)),
            )
        bulk = request.service.unhurried
        predicted = parked_seconds + policy.predicted_wait(
            request.new_tokens, request.history, now, request.deadline, bulk=bulk
        )
        short = not bulk and policy.waits_as_short(request.new_tokens, request.history)
        forecast = self.calibration.forecast(predicted, short, now)
        # Of what is wrong with the whole, the part that waits has its share: 0 on an idle machine.
        wait = predicted - own_seconds
        likely = forecast.factor * wait
        most = self.max_predicted_wait
        if (
            most is not None
            and likely > most
            and not _keeps_to_its_time(policy.load_of(request.tenant), own_seconds, most)
        ):
            return Refuse(
                f"the predicted wait of {likely:.1f} s exceeds the limit of {most:g} s",
                max(LEAST_RETRY, _until_below(most, wait, forecast.factor)),
            )
        busy = _is_busy(state, parked_seconds)
        if busy and (broken := _broken_promise(request, policy, forecast, wait, now)):
            return broken
        late = request.deadline is not None and now + forecast.median > request.deadline
        return Admit(forecast, late)


def _is_busy(state: QueueState, parked_seconds: float) -> bool:
    """Whether a later moment could be better for a request."""
    return state.seconds > 0 or state.decoding_requests > 0 or parked_seconds > 0


def _broken_promise(
    request: PrefillRequest, policy: PrefillPolicy, forecast: Forecast, wait: float, now: float
) -> Refuse | None:
    """Return the refusal of a request whose promised targets are predicted not to be kept.

    Args:
        wait: predicted seconds before its own prefill.
    """
    if request.service is not ServiceLevel.PROMISED:
        return None
    likely = forecast.upper if isfinite(forecast.upper) else forecast.median
    if request.deadline is not None and now + likely > request.deadline:
        factor = likely / forecast.predicted if forecast.predicted > 0 else 1.0
        left = request.deadline - now
        most = max(0.0, left - factor * (forecast.predicted - wait))
        return Refuse(
            f"the first token is predicted after {likely:.2f} s, and was promised within "
            f"{max(0.0, left):.2f} s; try again later, or ask for a tier that waits",
            max(LEAST_RETRY, _until_below(most, wait, factor)),
        )
    if request.tpot is None:
        return None
    pace = policy.token_seconds(request.new_tokens + request.history, request.tpot, now)
    if pace <= request.tpot:
        return None
    return Refuse(
        f"a token every {1000 * pace:.0f} ms is predicted, and one every "
        f"{1000 * request.tpot:.0f} ms was promised; try again later, or ask for a tier that waits",
        LEAST_RETRY,
    )


def _keeps_to_its_tokens(load: TenantLoad, more: int, limit: int) -> bool:
    """Whether a tenant, with so many tokens more, has at most an equal part of the limit."""
    return load.tenants > 1 and load.tokens + more <= limit / load.tenants


def _keeps_to_its_time(load: TenantLoad, more: float, limit: float) -> bool:
    """Whether a tenant's own work, with so many seconds more, is done in time with its share."""
    return load.tenants > 1 and (load.seconds + more) * load.tenants <= limit


def _until_below(limit: float, wait: float, factor: float) -> float:
    """Seconds after which a wait of ``factor * wait`` is at most ``limit``, if nobody comes.

    Two things make a factor. Where work takes ``factor`` times what was predicted, the wait falls
    by one second a second. Where newcomers pass the rest (a factor below 1), it is the work before
    them that falls by one second a second, and their wait only by ``factor``. The later of both:
    whoever is told too early asks in vain.
    """
    excess = factor * wait - limit
    return max(excess, excess / factor)
