"""Asks a pool controller once in a control period, with what a router knows of its fleet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pla_serve.policy.pools.protocol import Move, PoolController, PoolReport
from pla_serve.policy.routing.router import Router
from pla_serve.simulator.node import Node


class PoolControl:
    """Moves instances between the short and the long pool.

    Args:
        period: seconds between two decisions.
        interruptible: a moved instance serves its new class at once, and does not drain first.
        recalls: what waits on a moved instance is sent elsewhere; only what was begun drains.

    Raises:
        ValueError: ``period`` is not positive.
    """

    def __init__(
        self, controller: PoolController, period: float, *, interruptible: bool, recalls: bool
    ) -> None:
        if not period > 0:
            raise ValueError(f"a control period must be positive, not {period}")
        self.controller = controller
        self.period = period
        self.moves: list[tuple[float, Move]] = []
        """All so far, with their times."""
        self._interruptible = interruptible
        self._recalls = recalls

    def decide(self, nodes: Iterable[Node], router: Router, now: float) -> Sequence[Move]:
        """Carry out what the controller decides."""
        living = {node.id: node for node in nodes if node.alive}
        reports = [self._report(node, router, now) for node in living.values()]
        moves = self.controller.decide(now, reports)
        for move in moves:
            node = living[move.instance_id]
            node.pool = move.target
            node.moved_at = now
            router.moved(node.id, move.target)
            self.moves.append((now, move))
        return moves

    def _report(self, node: Node, router: Router, now: float) -> PoolReport:
        entry = router.view.entry(node.id)
        oldest = next(iter(entry.waiting.values()), None)
        drain, draining = 0.0, False
        if oldest is not None and not self._interruptible:
            draining = oldest.at < node.moved_at
            drain = oldest.seconds if self._recalls else router.view.wait(entry.index, False, now)
        busy = node.instance.busy_seconds - node.busy_before
        report = PoolReport(
            node.id,
            node.pool,
            queued_short=entry.express_work,
            queued_long=entry.work - entry.express_work,
            deadline_error=node.lateness / node.first_tokens if node.first_tokens else 0.0,
            utilisation=min(1.0, busy / self.period),
            drain_seconds=drain,
            draining=draining,
        )
        node.busy_before = node.instance.busy_seconds
        node.lateness, node.first_tokens = 0.0, 0
        return report
