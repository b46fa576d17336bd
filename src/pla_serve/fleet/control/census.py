"""Builds the reports for pool controllers: an instance's last report, and counts of the period."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.fleet.link.protocol import InstanceReport, Link
from pla_serve.policy.pools.protocol import Pool, PoolReport


@dataclass(slots=True)
class InstanceCensus:
    """One instance during a control period."""

    reports: int = 0
    busy: int = 0
    """Reports with work in progress or waiting."""
    lateness: float = 0.0
    """Seconds by which first tokens missed their deadlines, summed; early ones count negative."""
    first_tokens: int = 0
    moved_from: Pool | None = None
    """The pool that it left, until it has begun with its new one."""


class Census:
    """Counts what happens to each instance between two decisions."""

    def __init__(self) -> None:
        self._seen: dict[str, InstanceCensus] = {}

    def report(self, url: str, report: InstanceReport) -> None:
        """Count a report."""
        seen = self._seen.setdefault(url, InstanceCensus())
        seen.reports += 1
        seen.busy += bool(report.requests or report.load.running or report.load.waiting_tokens)

    def first_token(self, url: str, lateness: float) -> None:
        """Count the first token of a request that came ``lateness`` seconds after its deadline."""
        seen = self._seen.setdefault(url, InstanceCensus())
        seen.lateness += lateness
        seen.first_tokens += 1

    def moved(self, url: str, source: Pool) -> None:
        self._seen.setdefault(url, InstanceCensus()).moved_from = source

    def close(self, link: Link, pool: Pool) -> PoolReport:
        """End the control period of a connected instance, and return its report."""
        report = link.last_report
        assert report is not None
        seen = self._seen.pop(link.url, None) or InstanceCensus()
        # One that interrupts a prefill serves its new class at once, whatever it still holds.
        express = link.facts is not None and link.facts.express
        held = _held(report, pool)
        draining = False
        if seen.moved_from is not None and not express:
            draining = _held(report, seen.moved_from) > 0 and seen.moved_from is not pool
        if draining:
            self._seen[link.url] = InstanceCensus(moved_from=seen.moved_from)
        return PoolReport(
            link.url,
            pool,
            queued_short=report.load.queued_short_seconds,
            queued_long=report.load.queued_long_seconds,
            deadline_error=seen.lateness / seen.first_tokens if seen.first_tokens else 0.0,
            utilisation=seen.busy / seen.reports if seen.reports else 0.0,
            drain_seconds=0.0 if express else held,
            draining=draining,
            kv_usage=report.load.kv_usage,
        )

    def forget(self, url: str) -> None:
        """Forget what was counted of an instance that was lost."""
        self._seen.pop(url, None)


def _held(report: InstanceReport, pool: Pool) -> float:
    """Seconds of prefill of a class that an instance still has to do."""
    if pool is Pool.SHORT:
        return report.load.queued_short_seconds
    if pool is Pool.LONG:
        return report.load.queued_long_seconds
    return report.load.queued_seconds
