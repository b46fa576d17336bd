"""Grammars of an engine, whose code runs in worker processes.

A mask depends only on the tokens before it, so a worker computes it while the model computes the
next logits, and the engine does not wait for what a token has done to its text. It waits for masks
that are late, but only during a small part of its time, which tenants share, and for no text whose
masks are late again and again. When a worker ends, other workers take over its texts and replay
their tokens. Only the text that it was computing for has used up a try; after MOST_TRIES it fails.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from pla_serve.engine.sampling.grammar_desks import (
    LATE_POINTS,
    MOST_POINTS,
    Desk,
    GrammarDesks,
    WorkerFollower,
)
from pla_serve.engine.sampling.grammars import GrammarFollower, as_masks
from pla_serve.engine.sampling.wait_budget import WaitBudget
from pla_serve.grammar.host import NOT_NEEDED, GrammarHost
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.grammar.messages import Advanced, GrammarMask
from pla_serve.grammar.structure import check_size
from pla_serve.grammar.tokenizer import GrammarVocabulary
from pla_serve.wire.engine import Grammar

log = logging.getLogger(__name__)

WAIT_SHARE = 0.05
"""Part of the engine's time that it may wait for masks."""
WAIT_BURST_SECONDS = 0.01
PATIENCE_SECONDS = 0.005
"""Longest time that one batch waits for all of its masks together."""
LEAST_WAIT_SECONDS = 0.0002
"""Less is not worth a wait."""
WATCH_SECONDS = 0.05
"""Time between two looks at workers that owe answers."""
MOST_TRIES = 2
"""Number of workers that may end while they compute for one text, before the text fails."""


class GrammarWorkers:
    """See `Grammars`. Belongs to one thread.

    Args:
        clock: seconds, monotonic; it measures time that workers take, and that is waited for them.

    Raises:
        OSError: no process can be started.
    """

    def __init__(
        self,
        vocabulary: GrammarVocabulary,
        limits: GrammarLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or GrammarLimits()
        self._no_mask = bytes(4 * ((vocabulary.size + 31) // 32))
        self._clock = clock
        self._host = GrammarHost(vocabulary, self.limits)
        self._desks = GrammarDesks(self._host, vocabulary.eos_token_ids, clock)
        self._budget = WaitBudget(WAIT_SHARE, WAIT_BURST_SECONDS)
        self._started = 0
        self._watched = clock()

    @property
    def desks(self) -> Sequence[Desk]:
        """All workers, for tests."""
        return self._desks.all

    @property
    def nursery_pid(self) -> int:
        """Process id of the nursery, for tests."""
        return self._host.nursery_pid

    def start(self, grammar: Grammar, tenant: str = "") -> WorkerFollower:
        """See `Grammars`."""
        check_size(grammar, self.limits)
        self._started += 1
        return WorkerFollower(self._desks, self._started, grammar, tenant)

    def open(self, follower: GrammarFollower) -> None:
        """See `Grammars`."""
        assert isinstance(follower, WorkerFollower)
        if follower.desk is None and not follower.queued and follower.error is None:
            self._desks.place(follower)

    def settle(self, followers: Sequence[GrammarFollower]) -> None:
        """See `Grammars`."""
        self._wait(followers, lambda one: one.settled)

    def prepare(self, followers: Sequence[GrammarFollower]) -> None:
        """See `Grammars`."""
        for one in self._wait(followers, lambda one: one.ready):
            if one.late < MOST_POINTS:
                one.late += LATE_POINTS

    def masks(self, followers: Sequence[GrammarFollower]) -> torch.Tensor:
        """See `Grammars`."""
        rows = []
        for one in followers:
            assert isinstance(one, WorkerFollower)
            rows.append(self._no_mask if one.error is not None or not one.bits else one.bits)
        return as_masks(rows)

    def poll(self) -> None:
        """See `Grammars`."""
        for desk in self._desks.all:
            desk.worker.frames.flush()
        self._read(0.0)

    def close(self) -> None:
        """End all workers."""
        self._host.close()
        self._desks.all.clear()

    # Inside

    def _wait(
        self, followers: Iterable[GrammarFollower], done: Callable[[WorkerFollower], bool]
    ) -> list[WorkerFollower]:
        """Wait for followers as long as the budget allows; return those that are not done."""
        mine = [one for one in followers if isinstance(one, WorkerFollower)]
        for one in mine:
            self.open(one)
        self.poll()
        now = self._clock()
        deadline = now + PATIENCE_SECONDS
        while waiting := [one for one in mine if one.late < MOST_POINTS and not done(one)]:
            tenants = {one.tenant for one in waiting}
            granted = {tenant: self._budget.granted(tenant, now) for tenant in tenants}
            left = min(deadline - now, max(granted.values()))
            if left < LEAST_WAIT_SECONDS:
                break
            self._read(left)
            before, now = now, self._clock()
            paying = [tenant for tenant, seconds in granted.items() if seconds > 0]
            self._budget.spend(paying, now - before, now)
        return [one for one in mine if not done(one)]

    def _read(self, seconds: float) -> None:
        """Take what has arrived, and wait for so many seconds at most if nothing has."""
        desks = {desk.worker.frames.socket: desk for desk in self._desks.all}
        sockets: list[socket.socket] = [s for s, d in desks.items() if not d.worker.frames.ended]
        readable, _, _ = select.select([self._host.control, *sockets], [], [], seconds)
        if self._host.control in readable or self._host.control_lost:
            self._host.poll()
        for sock in readable:
            desk = desks.get(sock)
            if desk is not None:
                self._receive(desk)
        for desk in list(self._desks.all):
            if desk.worker.end is not None:
                self._receive(desk)  # messages that it sent before it ended
                self._ended(desk)
            elif desk.worker.slow_for is not None:
                text, desk.worker.slow_for = desk.worker.slow_for, None
                self._desks.slow_down(desk, desk.followers.get(text))
        now = self._clock()
        if now - self._watched >= WATCH_SECONDS:
            self._watched = now
            self._watch(now)
        self._desks.open_waiting()

    def _receive(self, desk: Desk) -> None:
        for message in desk.worker.receive():
            desk.changed = self._clock()
            self._take(desk, message)

    def _take(self, desk: Desk, message: Advanced | GrammarMask) -> None:
        if isinstance(message, Advanced):
            desk.owed -= 1
        follower = desk.followers.get(message.id)
        if follower is None:
            return
        heavy = follower.weigh(message.seconds, mask=isinstance(message, GrammarMask))
        if isinstance(message, Advanced):
            follower.unanswered -= 1
            follower.finished = message.finished
            follower.must_stop = message.finished
        elif not follower.unanswered:  # else tokens have come after this mask
            follower.bits, follower.must_stop = message.bits, message.must_stop
        if follower.ready or message.error is not None:
            self._desks.opened(follower)
        if message.error is not None:
            follower.fail(message.error)
        elif heavy:
            self._desks.move_costly(follower)

    def _watch(self, now: float) -> None:
        """Kill workers that owe an answer for too long, and have slow ones watched."""
        for desk in self._desks.all:
            if not (desk.busy and desk.usable and desk.worker.pid is not None):
                continue
            if desk.slow:
                self._host.watch()
            waiting = [self._cpu_seconds(one) for one in desk.followers.values() if not one.ready]
            most = self.limits.wall_seconds + max(waiting, default=self.limits.compile_seconds)
            if now - desk.changed > most:
                self._host.kill(desk.worker, f"it takes more than {most:g} s; simplify it")

    def _cpu_seconds(self, follower: WorkerFollower) -> float:
        """Return the CPU seconds that the present work for a follower may take."""
        if not follower.unanswered:
            return self.limits.step_seconds
        return self.limits.replay_seconds(len(follower.tokens))

    def _ended(self, desk: Desk) -> None:
        """Remove a worker that has ended, and give its followers to other workers."""
        end = desk.worker.end
        assert end is not None
        culprit = desk.followers.get(end.working)
        followers = self._desks.lost(desk)
        desk.worker.frames.socket.close()
        for follower in followers:
            if follower is culprit and desk.worker.killed_for != NOT_NEEDED:
                follower.tries += 1
                if follower.tries >= MOST_TRIES:
                    seconds = self.limits.replay_seconds(len(follower.tokens))
                    cause = end.cause(self.limits, seconds)
                    log.warning("a grammar was given up: %s", cause)
                    follower.fail(f"the grammar cannot be followed: {cause}")
                    continue
            self._desks.place(follower)
