"""Report of a run: percentiles and rates by class. Times are seconds, rates are per second of the
run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from pla_serve.bench.load import Record, RunResult
from pla_serve.bench.tiers import kept
from pla_serve.flags import Flag
from pla_serve.policy.knobs import check_knobs
from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.tiers import Tier, TierShare, parse_tier_share, tiers_by_name

GOALS = "Objectives"
SHORT, LONG, ALL = "short", "long", "all"
REFUSED = "http 429"
LATE = 0.1
"""Seconds of send lag (P99) above which the report warns that the client was too slow."""


def read_milliseconds(text: str) -> float:
    """Convert a text in milliseconds to seconds.

    Raises:
        ValueError: the text is no number.
    """
    return float(text) / 1000


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latency objectives of requests, in seconds, and where short requests end.

    Raises:
        ValueError: a field is out of range.
    """

    short_tokens: Annotated[
        int,
        Flag(
            "At most this many new tokens are short, whatever boundary the server uses.",
            unit="tokens",
            least=0,
            panel=GOALS,
        ),
    ] = 256
    ttft_short: Annotated[
        float | None,
        Flag(
            "TTFT of all requests.",
            unit="milliseconds",
            above=0,
            panel=GOALS,
            name="--slo-ttft-ms",
            read=read_milliseconds,
        ),
    ] = None
    ttft_long: Annotated[
        float | None,
        Flag(
            "TTFT of long requests, if it is another.",
            unit="milliseconds",
            above=0,
            panel=GOALS,
            name="--slo-ttft-long-ms",
            read=read_milliseconds,
        ),
    ] = None
    itl: Annotated[
        float | None,
        Flag(
            "Mean gap between the tokens of one answer.",
            unit="milliseconds",
            above=0,
            panel=GOALS,
            name="--slo-itl-ms",
            read=read_milliseconds,
        ),
    ] = None

    tiers: Annotated[
        tuple[str, ...],
        Flag(
            "A tier with its targets and its share of the sessions; repeat it for each tier. "
            "Requests ask for it as service_tier, and the report has what was kept and refused. "
            "Servers that --compare starts are told of it; any other must have it.",
            panel=GOALS,
            name="--tier",
            metavar="NAME[:ttft=300ms,tpot=40ms,share=0.3]",
        ),
    ] = ()

    def __post_init__(self) -> None:
        check_knobs(self)
        tiers_by_name(str(each.tier) for each in self.tier_shares)

    @property
    def tier_shares(self) -> tuple[TierShare, ...]:
        """The tiers of requests, and how many sessions are of each."""
        return tuple(map(parse_tier_share, self.tiers))

    @property
    def given(self) -> bool:
        """Whether there is any objective."""
        return any(value is not None for value in (self.ttft_short, self.ttft_long, self.itl))

    def is_short(self, record: Record) -> bool:
        """Whether a request belongs to the short class."""
        return record.new_tokens <= self.short_tokens

    def met(self, record: Record) -> bool:
        """Whether a request met all objectives of its class; a failed request met none."""
        ttft = self.ttft_short if self.is_short(record) else self.ttft_long
        if not record.ok or record.ttft is None or (ttft is not None and record.ttft > ttft):
            return False
        gaps = record.exchange.gaps
        return self.itl is None or not gaps or sum(gaps) / len(gaps) <= self.itl


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of some values, interpolated linearly between closest ranks as numpy does."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int


@dataclass(frozen=True, slots=True)
class ClassReport:
    """Figures of one class. Times are those of requests that succeeded."""

    requests: int
    succeeded: int
    ttft: Percentiles | None
    itl: Percentiles | None
    """Percentiles of all gaps between tokens of all answers together."""
    pause: Percentiles | None
    """Percentiles of the longest pause of each answer: a stream that stops once is hardly seen
    among all gaps together."""
    longest_pause: float | None
    """The longest pause of any answer."""
    latency: Percentiles | None
    """Seconds from the due time to the end of the answer."""
    requests_per_second: float
    prompt_tokens_per_second: float
    """Rate of prompt tokens, cached ones included."""
    output_tokens_per_second: float
    prompt_tokens: int
    cached_tokens: int | None
    """Prompt tokens that were cached; None if the server does not report them."""
    output_tokens: int
    slo_attainment: float | None
    """Share of requests that met the objectives; None without objectives."""
    goodput: float | None
    """Requests a second that met the objectives; None without objectives."""


@dataclass(frozen=True, slots=True)
class TierFigures:
    """Figures of one tier. Times are those of requests that succeeded."""

    requests: int
    refused: int
    succeeded: int
    attainment: float | None
    """Share of requests, but for those refused, all of whose tokens came by their deadlines. One
    that failed kept none. None without targets, or if all were refused."""
    ttft: Percentiles | None
    itl: Percentiles | None
    longest_pause: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run."""

    seconds: float
    planned: int
    sent: int
    stopped: str | None
    send_lag: Percentiles | None
    errors: dict[str, int]
    classes: dict[str, ClassReport]
    tiers: dict[str, TierFigures] = field(default_factory=dict)
    """By the text of the tier."""
    warnings: list[str] = field(default_factory=list)


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return the percentiles of some values; None for no values."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(np.asarray(values, dtype=np.float64), (50, 90, 99))
    return Percentiles(float(p50), float(p90), float(p99), float(np.mean(values)), len(values))


def summarise(result: RunResult, objectives: Objectives) -> Report:
    """Make the report of a run, without the requests that Ctrl-C cut short."""
    records = [record for record in result.records if record.exchange.error != "interrupted"]
    short = [record for record in records if objectives.is_short(record)]
    long = [record for record in records if not objectives.is_short(record)]
    groups = {SHORT: short, LONG: long, ALL: records}
    lags = [record.lag for record in records if record.lag is not None]
    errors = Counter(r.exchange.error for r in result.records if r.exchange.error is not None)
    report = Report(
        seconds=result.seconds,
        planned=result.planned,
        sent=len(result.records),
        stopped=result.stopped,
        send_lag=percentiles(lags),
        errors=dict(errors.most_common()),
        classes={
            name: _of_class(group, result.seconds, objectives) for name, group in groups.items()
        },
        tiers={
            str(each.tier): _of_tier([r for r in records if r.tier == each.tier], each.tier)
            for each in objectives.tier_shares
        },
    )
    report.warnings.extend(_warnings(report))
    return report


def _of_class(records: list[Record], seconds: float, objectives: Objectives) -> ClassReport:
    good = [record for record in records if record.ok]
    met = sum(map(objectives.met, records)) if objectives.given else None
    prompt = _total(record.exchange.prompt_tokens for record in good)
    output = _total(record.exchange.output_tokens for record in good)
    cached = [record.exchange.cached_tokens for record in good]
    pauses = [r.exchange.pause for r in good if r.exchange.pause is not None]
    return ClassReport(
        requests=len(records),
        succeeded=len(good),
        ttft=percentiles([record.ttft for record in good if record.ttft is not None]),
        itl=percentiles([gap for record in good for gap in record.exchange.gaps]),
        pause=percentiles(pauses),
        longest_pause=max(pauses, default=None),
        latency=percentiles([r.latency for r in good if r.latency is not None]),
        requests_per_second=len(good) / seconds,
        prompt_tokens_per_second=prompt / seconds,
        output_tokens_per_second=output / seconds,
        prompt_tokens=prompt,
        cached_tokens=None if cached and None in cached else _total(cached),
        output_tokens=output,
        slo_attainment=None if met is None or not records else met / len(records),
        goodput=None if met is None else met / seconds,
    )


def _of_tier(records: list[Record], tier: Tier) -> TierFigures:
    asked = [record for record in records if record.exchange.error != REFUSED]
    good = [record for record in asked if record.ok]
    met = sum(kept(record.exchange, record.ttft, tier) for record in asked)
    pauses = [r.exchange.pause for r in good if r.exchange.pause is not None]
    promises = tier.service is ServiceLevel.PROMISED and bool(asked)
    return TierFigures(
        requests=len(records),
        refused=len(records) - len(asked),
        succeeded=len(good),
        attainment=met / len(asked) if promises else None,
        ttft=percentiles([record.ttft for record in good if record.ttft is not None]),
        itl=percentiles([gap for record in good for gap in record.exchange.gaps]),
        longest_pause=max(pauses, default=None),
    )


def _total(counts: Iterable[int | None]) -> int:
    return sum(count or 0 for count in counts)


def _warnings(report: Report) -> list[str]:
    found = []
    if report.send_lag is not None and report.send_lag.p99 > LATE:
        found.append(
            f"the client itself was late (send lag P99 {report.send_lag.p99:.3f} s): it had too "
            "little CPU, so the load was not the one asked for"
        )
    if report.stopped is not None:
        found.append(f"the run was {report.stopped}: {report.sent} of {report.planned} requests")
    failed = sum(count for kind, count in report.errors.items() if kind != "interrupted")
    if failed:
        found.append(f"{failed} requests failed; times are those of the others")
    if report.classes[ALL].cached_tokens is None:
        found.append("the server reports no cached tokens: classes go by planned new tokens")
    return found
