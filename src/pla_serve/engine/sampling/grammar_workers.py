"""Grammars of an engine, whose code runs in worker processes.

A mask depends only on the tokens before it, so a worker computes it while the model computes the
next logits. The engine waits for masks at most a few milliseconds in each batch. When a worker
ends, other workers take over its sequences and replay their tokens. Only the sequence that it was
computing for has used up a try; after MOST_TRIES it fails.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch

from pla_serve.engine.sampling.grammars import GrammarFollower, as_masks
from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.host import LOWEST_PRIORITY, NOT_NEEDED, GrammarHost, GrammarWorker
from pla_serve.grammar.limits import GRAMMARS_A_WORKER, GrammarLimits
from pla_serve.grammar.messages import Advance, Advanced, Close, GrammarMask, OpenGrammar
from pla_serve.grammar.structure import check_size
from pla_serve.grammar.tokenizer import GrammarVocabulary
from pla_serve.wire.engine import Grammar

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.005
"""Longest time that a batch waits for all of its masks together."""
LATE_POINTS, MOST_POINTS = 11, 32
"""A sequence gets LATE_POINTS when its mask is late, and loses one point with each token. Batches
do not wait for sequences with MOST_POINTS or more. So three late masks in a row are too many,
and one in eleven is not."""
SLOW_SECONDS = 0.02
"""A worker that computes for longer than this without an answer is slow: it goes on at low
priority."""
HEAVY_SECONDS, HEAVY_TOKENS = 0.002, 16
"""CPU time for a token above which a worker is heavy, on average over so many tokens. A sane
grammar takes 0.1 ms; 16 workers that take 10 ms each would keep the engine from running."""
HEAVY_COMPILE_SECONDS = 0.1
"""CPU time that a sequence may take on top of that to begin."""
MOST_WORKERS = 16
MOST_IDLE_WORKERS = 2
MOST_TRIES = 2
"""Number of workers that may end while they compute for one sequence, before the sequence fails."""


class WorkerFollower:
    """A `GrammarFollower` whose grammar runs in a worker. Made by `GrammarWorkers.start`."""

    def __init__(self, owner: GrammarWorkers, id: int, grammar: Grammar) -> None:
        self.eos_token_ids = owner.eos_token_ids
        self.error: str | None = None
        self.finished = False
        self.must_stop = False
        self.id = id
        self.grammar = grammar
        self.tokens: list[int] = []
        self.desk: Desk | None = None
        """Worker that follows the text; None before `GrammarWorkers.open` and after the worker's
        end."""
        self.unanswered = 0
        """Number of messages to the worker whose effect is not known yet."""
        self.bits: bytes | None = None
        self.tries = 0
        """Number of workers that ended while they computed for this sequence."""
        self.late = 0
        """Points for late masks; see LATE_POINTS."""
        self._owner = owner

    @property
    def settled(self) -> bool:
        """See `GrammarFollower`."""
        return self.error is not None or not (self.unanswered or self.desk is None)

    @property
    def ready(self) -> bool:
        """See `GrammarFollower`."""
        return self.error is not None or (self.settled and self.bits is not None)

    def advance(self, token: int) -> None:
        """See `GrammarFollower`."""
        self.tokens.append(token)
        self.bits = None
        self.finished = self.must_stop = False
        self.late = max(0, self.late - 1)
        if self.desk is not None:
            self.unanswered += 1
            self._owner.ask(self.desk, Advance(self.id, token))

    def close(self) -> None:
        """See `GrammarFollower`."""
        self._owner.leave(self)
        self.error = self.error or "its text has ended"

    def fail(self, error: str) -> None:
        """End the follower; ``error`` is the message for the client."""
        self.error = error
        self._owner.leave(self)


class Desk:
    """One worker, its followers, and the state of its work."""

    def __init__(self, worker: GrammarWorker, now: float) -> None:
        self.worker = worker
        self.followers: dict[int, WorkerFollower] = {}
        self.grammars: OrderedDict[Grammar, None] = OrderedDict()
        """Grammars that the worker keeps compiled, the least recently used first."""
        self.owed = 0
        """Number of `Advanced` messages that the worker has still to send."""
        self.changed = now
        """Time of the last message from or to the worker."""
        self.cpu_seconds: float | None = None
        """CPU time of the worker when its present work was first seen to exceed SLOW_SECONDS."""
        self.slow = False
        self.heavy = False
        """Whether its tokens are costly. The worker goes on at the lowest priority."""
        self.weighed: float | None = None
        """CPU time that the worker had taken when it was last looked at for that."""
        self.allowance = 0.0
        """CPU time that the worker may have taken since then."""
        self.answered = 0
        """Number of tokens since then."""

    @property
    def busy(self) -> bool:
        """Whether the worker computes, or owes an answer to a follower."""
        return self.owed > 0 or any(not one.ready for one in self.followers.values())

    @property
    def idle(self) -> bool:
        """Whether the worker has neither work nor followers, and is not being killed."""
        return not self.followers and not self.owed and self.worker.killed_for is None


class GrammarWorkers:
    """See `Grammars`. Belongs to one thread.

    Args:
        clock: seconds, monotonic; only time that workers take is measured with it.

    Raises:
        OSError: no process can be started.
    """

    def __init__(
        self,
        vocabulary: GrammarVocabulary,
        limits: GrammarLimits | None = None,
        *,
        most_workers: int = MOST_WORKERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.eos_token_ids = vocabulary.eos_token_ids
        self.limits = limits or GrammarLimits()
        self._no_mask = bytes(4 * ((vocabulary.size + 31) // 32))
        self._host = GrammarHost(vocabulary, self.limits)
        self._most_workers = most_workers
        self._clock = clock
        self._desks: list[Desk] = []
        self._started = 0
        self._desks.append(Desk(self._host.fork(), clock()))

    @property
    def desks(self) -> Sequence[Desk]:
        """All workers, for tests."""
        return self._desks

    @property
    def nursery_pid(self) -> int:
        """Process id of the nursery, for tests."""
        return self._host.nursery_pid

    def start(self, grammar: Grammar) -> WorkerFollower:
        """See `Grammars`."""
        check_size(grammar, self.limits)
        self._started += 1
        return WorkerFollower(self, self._started, grammar)

    def open(self, follower: GrammarFollower) -> None:
        """See `Grammars`."""
        assert isinstance(follower, WorkerFollower)
        if follower.desk is not None or follower.error is not None:
            return
        try:
            desk = self._desk_for(follower)
        except (GrammarError, OSError) as error:
            follower.fail(str(error))
            return
        desk.followers[follower.id] = follower
        desk.grammars[follower.grammar] = None
        desk.grammars.move_to_end(follower.grammar)
        if len(desk.grammars) > GRAMMARS_A_WORKER:
            desk.grammars.popitem(last=False)
        follower.desk = desk
        follower.unanswered = 1
        desk.allowance += HEAVY_COMPILE_SECONDS + len(follower.tokens) * HEAVY_SECONDS
        self.ask(desk, OpenGrammar(follower.id, follower.grammar, follower.tokens))
        desk.worker.frames.flush()

    def ask(self, desk: Desk, message: OpenGrammar | Advance) -> None:
        """Put a message to a worker. It is sent with others, by the next `poll` at the latest."""
        desk.changed = self._clock()
        desk.owed += 1
        desk.worker.frames.put(message)

    def settle(self, followers: Sequence[GrammarFollower]) -> None:
        """See `Grammars`."""
        self._wait(followers, lambda one: one.settled)

    def prepare(self, followers: Sequence[GrammarFollower]) -> None:
        """See `Grammars`."""
        self._wait(followers, lambda one: one.ready)

    def masks(self, followers: Sequence[GrammarFollower]) -> torch.Tensor:
        """See `Grammars`."""
        rows = []
        for one in followers:
            assert isinstance(one, WorkerFollower)
            rows.append(self._no_mask if one.error is not None or not one.bits else one.bits)
        return as_masks(rows)

    def poll(self) -> None:
        """See `Grammars`."""
        self._host.poll()
        now = self._clock()
        for desk in list(self._desks):
            desk.worker.frames.flush()
            for message in desk.worker.receive():
                desk.changed, desk.cpu_seconds = now, None
                self._take(desk, message)
            if desk.answered >= HEAVY_TOKENS and desk.worker.end is None:
                self._weigh(desk)
            if desk.worker.end is not None:
                self._ended(desk)
            elif desk.busy and desk.worker.pid is not None:
                self._watch(desk, now - desk.changed)

    def leave(self, follower: WorkerFollower) -> None:
        """Release the worker of a follower that has ended."""
        computing = not follower.ready
        desk, follower.desk = follower.desk, None
        if desk is None:
            return
        desk.followers.pop(follower.id, None)
        if desk.worker.end is not None:
            return
        desk.worker.frames.send(Close(follower.id))
        if desk.slow and computing:
            self._host.kill(desk.worker)  # it would compute on for nobody
        elif not desk.followers:
            self._retire(desk)

    def close(self) -> None:
        """End all workers."""
        self._host.close()
        self._desks.clear()

    # Inside

    def _wait(
        self, followers: Iterable[GrammarFollower], done: Callable[[WorkerFollower], bool]
    ) -> None:
        mine = [one for one in followers if isinstance(one, WorkerFollower)]
        for one in mine:
            self.open(one)
        deadline = self._clock() + PATIENCE_SECONDS
        self.poll()
        while waiting := [one for one in mine if one.late < MOST_POINTS and not done(one)]:
            left = deadline - self._clock()
            if left <= 0:
                for one in waiting:
                    one.late += LATE_POINTS
                return
            select.select([self._host.control, *_sockets(waiting)], [], [], left)
            self.poll()

    def _take(self, desk: Desk, message: Advanced | GrammarMask) -> None:
        if isinstance(message, Advanced):
            desk.owed -= 1
        follower = desk.followers.get(message.id)
        if follower is None:
            return
        if isinstance(message, Advanced):
            follower.unanswered -= 1
            desk.answered += 1
            follower.finished = message.finished
            follower.must_stop = message.finished
        elif not follower.unanswered:  # else tokens have come after this mask
            follower.bits, follower.must_stop = message.bits, message.must_stop
        if message.error is not None:
            follower.fail(message.error)

    def _weigh(self, desk: Desk) -> None:
        """Lower the priority of a worker whose tokens are costly."""
        cpu = self._host.cpu_seconds(desk.worker)
        allowed = desk.allowance + desk.answered * HEAVY_SECONDS
        if desk.weighed is not None and cpu - desk.weighed > allowed and not desk.heavy:
            desk.heavy = True
            self._host.lower_priority(desk.worker, LOWEST_PRIORITY)
        desk.weighed, desk.allowance, desk.answered = cpu, 0.0, 0

    def _watch(self, desk: Desk, seconds: float) -> None:
        if seconds > SLOW_SECONDS and not desk.slow:
            cpu = self._host.cpu_seconds(desk.worker)
            if desk.cpu_seconds is None:
                desk.cpu_seconds = cpu
            elif cpu - desk.cpu_seconds > SLOW_SECONDS:
                desk.slow = True
                self._host.lower_priority(desk.worker)
        waiting = [self._cpu_seconds(one) for one in desk.followers.values() if not one.ready]
        most = self.limits.wall_seconds + max(waiting, default=self.limits.compile_seconds)
        if seconds > most:
            self._host.kill(desk.worker, f"it takes more than {most:g} s; simplify it")

    def _cpu_seconds(self, follower: WorkerFollower) -> float:
        """Return the CPU seconds that the present work for a follower may take."""
        if not follower.unanswered:
            return self.limits.step_seconds
        return self.limits.replay_seconds(len(follower.tokens))

    def _ended(self, desk: Desk) -> None:
        """Remove a worker that has ended, and give its followers to other workers."""
        self._desks.remove(desk)
        end = desk.worker.end
        assert end is not None
        desk.worker.frames.socket.close()
        culprit = desk.followers.get(end.working)
        for follower in list(desk.followers.values()):
            follower.desk = None
            follower.bits = None
            if follower is culprit and desk.worker.killed_for != NOT_NEEDED:
                follower.tries += 1
                if follower.tries >= MOST_TRIES:
                    cause = end.cause(self.limits, self._cpu_seconds(follower))
                    log.warning("a grammar was given up: %s", cause)
                    follower.fail(f"the grammar cannot be followed: {cause}")
                    continue
            self.open(follower)

    def _desk_for(self, follower: WorkerFollower) -> Desk:
        """Return the worker that is to follow a text.

        Workers that have compiled the grammar come first, then idle ones, then a new one. If no
        more workers are allowed, it is the one with the fewest followers.
        """
        desks = [desk for desk in self._desks if desk.worker.killed_for is None and not desk.slow]
        if not follower.tries:
            for desk in desks:
                if follower.grammar in desk.grammars:
                    return desk
            for desk in desks:
                if desk.idle and not desk.heavy:
                    return desk
        if len(self._desks) < self._most_workers:
            desk = Desk(self._host.fork(), self._clock())
            self._desks.append(desk)
            return desk
        return min(desks or self._desks, key=lambda desk: (desk.heavy, len(desk.followers)))

    def _retire(self, desk: Desk) -> None:
        """Keep a worker without followers for later; end one if it is slow or many are idle."""
        idle = [one for one in self._desks if one.idle]
        if desk.slow or desk.heavy:
            self._host.kill(desk.worker)
        elif len(idle) > MOST_IDLE_WORKERS:
            self._host.kill(idle[0].worker)


def _sockets(followers: Iterable[WorkerFollower]) -> list[socket.socket]:
    """Return the sockets of the followers' workers, each once, but for workers that have ended."""
    desks = {id(one.desk): one.desk for one in followers if one.desk is not None}
    return [desk.worker.frames.socket for desk in desks.values() if not desk.worker.frames.ended]
