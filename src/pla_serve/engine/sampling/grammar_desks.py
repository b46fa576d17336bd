"""Gives texts to grammar workers: quick ones, slow ones, and the queues before both.

A grammar is costly to begin (it is compiled) or to follow (its masks take long), and neither is
known before it was tried. So a text of a new grammar is *opened*: it gets a worker that opens
nothing else, and if the first mask does not come soon, that worker is a slow one from then on.
Texts that share the worker move to another one, and costly texts are gathered in few slow workers,
which run at low priority. Openings are few at a time, and tenants take turns. A tenant whose
grammars have been slow has one at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.host import GrammarHost, GrammarWorker
from pla_serve.grammar.limits import GRAMMARS_A_WORKER
from pla_serve.grammar.messages import Advance, Close, OpenGrammar
from pla_serve.grammar.turns import Turns
from pla_serve.wire.engine import Grammar

QUICK_WORKERS, SLOW_WORKERS = 4, 2
"""Most workers of either kind."""
MOST_IDLE_WORKERS = 2
OPENINGS = 4
"""Quick openings of one tenant at a time, before one of its grammars was slow."""
SUSPICION_SECONDS = 10.0
"""Time after a slow grammar during which its tenant has one quick opening at a time."""
HEAVY_SECONDS, HEAVY_TOKENS = 0.002, 16
"""A text is costly if it takes more than HEAVY_SECONDS times HEAVY_TOKENS of CPU time for so many
tokens, or fewer."""
LATE_POINTS, MOST_POINTS = 11, 32
"""A text gets LATE_POINTS when its mask is late, and loses one with each token. Nobody waits for
texts with MOST_POINTS or more. So three late masks in a row are too many, and one in eleven is
not."""
MOST_PROVEN = 4096
"""Grammars that are remembered to have begun quickly."""


class WorkerFollower:
    """A `GrammarFollower` whose grammar runs in a worker. Made by `GrammarWorkers.start`."""

    def __init__(self, desks: GrammarDesks, id: int, grammar: Grammar, tenant: str) -> None:
        self.eos_token_ids = desks.eos_token_ids
        self.error: str | None = None
        self.finished = False
        self.must_stop = False
        self.id = id
        self.grammar = grammar
        self.tenant = tenant
        self.tokens: list[int] = []
        self.desk: Desk | None = None
        """Worker that follows the text; None before it is opened and after the worker's end."""
        self.queued = False
        """Whether it waits to be opened."""
        self.unanswered = 0
        """Number of messages to the worker whose effect is not known yet."""
        self.bits: bytes | None = None
        self.tries = 0
        """Number of workers that ended while they computed for this text."""
        self.late = 0
        """Points for late masks; see LATE_POINTS."""
        self.costly = False
        """Whether it belongs in a slow worker."""
        self.spent, self.masks = 0.0, 0
        """CPU seconds for the last tokens, and the number of their masks; see HEAVY_SECONDS."""
        self._desks = desks

    @property
    def settled(self) -> bool:
        """See `GrammarFollower`."""
        return self.error is not None or not (self.unanswered or self.desk is None)

    @property
    def ready(self) -> bool:
        """See `GrammarFollower`."""
        return self.error is not None or (self.settled and self.bits is not None)

    @property
    def lags(self) -> bool:
        """See `GrammarFollower`."""
        return self.late >= MOST_POINTS and not self.ready

    def advance(self, token: int) -> None:
        """See `GrammarFollower`."""
        self.tokens.append(token)
        if self.desk is not None:
            self.desk.ask(Advance(self.id, token))
            self.unanswered += 1
        self.bits = None
        self.finished = self.must_stop = False
        self.late = max(0, self.late - 1)

    def close(self) -> None:
        """See `GrammarFollower`."""
        self._desks.leave(self)
        self.error = self.error or "its text has ended"

    def fail(self, error: str) -> None:
        """End the follower; ``error`` is the message for the client."""
        self.error = error
        self._desks.leave(self)

    def weigh(self, seconds: float, *, mask: bool) -> bool:
        """Count CPU seconds that were taken for the text, perhaps for a mask.

        Returns whether the text has become costly by it.
        """
        self.spent += seconds
        self.masks += mask
        heavy = self.spent > HEAVY_SECONDS * HEAVY_TOKENS
        if heavy or self.masks == HEAVY_TOKENS:
            self.spent, self.masks = 0.0, 0
        return heavy and not self.costly


class Desk:
    """A grammar worker with the texts that it follows and the state of its work."""

    def __init__(self, worker: GrammarWorker, clock: Callable[[], float], *, slow: bool) -> None:
        self.worker = worker
        self._clock = clock
        self.followers: dict[int, WorkerFollower] = {}
        self.grammars: OrderedDict[Grammar, None] = OrderedDict()
        """Grammars that the worker keeps compiled, the least recently used first."""
        self.opening: WorkerFollower | None = None
        """Follower that is being opened; see the module."""
        self.owed = 0
        """Number of `Advanced` messages that the worker has still to send."""
        self.changed = clock()
        """Time of the last message from the worker, or of the first one to it that it had not
        answered then."""
        self.slow = slow

    @property
    def usable(self) -> bool:
        """Whether the worker takes other texts."""
        return self.worker.killed_for is None and self.worker.end is None

    @property
    def busy(self) -> bool:
        """Whether the worker computes, or owes an answer to a follower."""
        return self.owed > 0 or any(not one.ready for one in self.followers.values())

    @property
    def idle(self) -> bool:
        """Whether the worker has neither work nor followers, and is not being killed."""
        return not self.followers and not self.owed and self.usable

    def ask(self, message: OpenGrammar | Advance) -> None:
        """Put a message to the worker. It is sent with others, by the next flush."""
        if not self.owed:
            self.changed = self._clock()
        self.owed += 1
        self.worker.frames.put(message)


class GrammarDesks:
    """All workers of an engine, and the texts that wait for one."""

    def __init__(
        self, host: GrammarHost, eos_token_ids: frozenset[int], clock: Callable[[], float]
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self.all: list[Desk] = []
        self._clock = clock
        self._host = host
        self._queues: dict[bool, Turns[WorkerFollower]] = {False: Turns(), True: Turns()}
        """Followers to be opened in quick (False) and in slow (True) workers."""
        self._proven: OrderedDict[Grammar, None] = OrderedDict()
        self._suspects: dict[str, float] = {}
        """Tenants whose grammars were slow, and until when they are suspected."""
        self._add(slow=False)  # so that the first text need not wait for a fork

    def place(self, follower: WorkerFollower) -> None:
        """Have a follower opened: at once if its grammar is known to be quick, or in its turn.

        It fails if workers do not start on this machine.
        """
        if follower.tries:
            follower.costly = True
        if not follower.costly:
            desk = self._known(follower)
            if desk is not None:
                self._open(follower, desk)
                return
        follower.queued = True
        self._queues[follower.costly].add(follower.tenant, follower)
        self.open_waiting()

    def open_waiting(self) -> None:
        """Open followers that wait, as far as workers are free."""
        for slow, queue in self._queues.items():
            while len(queue):
                follower = queue.take(self._barred(slow))
                if follower is None:
                    break
                try:
                    desk = self._free(slow)
                except (GrammarError, OSError) as error:
                    follower.queued = False
                    follower.fail(str(error))
                    continue
                if desk is None:
                    queue.put_back(follower.tenant, follower)
                    break
                follower.queued = False
                desk.opening = follower
                self._open(follower, desk)

    def opened(self, follower: WorkerFollower) -> None:
        """Note that the first mask of a follower has come, or that its opening has failed."""
        desk = follower.desk
        if desk is not None and desk.opening is follower:
            desk.opening = None
        if follower.error is None and not follower.costly:
            self._proven[follower.grammar] = None
            if len(self._proven) > MOST_PROVEN:
                self._proven.popitem(last=False)

    def slow_down(self, desk: Desk, follower: WorkerFollower | None) -> None:
        """Make a worker a slow one, because of the work that it does for ``follower``.

        Its other followers go to other workers. With too many slow workers this one ends, and the
        costly follower waits for its turn in another one.
        """
        if desk.slow:
            return
        desk.slow = True
        if follower is not None:
            self._suspect(follower)
        for other in list(desk.followers.values()):
            if other is not follower:
                self._move(other)
        if follower is not None and desk.opening is None:
            desk.opening = follower
        if sum(one.slow and one.usable for one in self.all) > SLOW_WORKERS:
            self._host.kill(desk.worker)
            if follower is not None:
                self._move(follower)
        elif follower is None:
            self._retire(desk)

    def move_costly(self, follower: WorkerFollower) -> None:
        """Move a follower whose tokens are costly to a slow worker."""
        self._suspect(follower)
        if follower.desk is not None and not follower.desk.slow:
            self._move(follower)

    def leave(self, follower: WorkerFollower) -> None:
        """Release the worker of a follower that has ended, or its place in a queue."""
        if follower.queued:
            follower.queued = False
            self._queues[follower.costly].remove(follower.tenant, follower)
        desk, follower.desk = follower.desk, None
        if desk is None:
            return
        desk.followers.pop(follower.id, None)
        if desk.worker.end is not None:
            return
        if desk.opening is follower:
            desk.opening = None
            if desk.slow:
                self._host.kill(desk.worker)  # it would compute on for nobody
                return
        desk.worker.frames.send(Close(follower.id))
        if not desk.followers:
            self._retire(desk)

    def lost(self, desk: Desk) -> list[WorkerFollower]:
        """Forget a worker that has ended; return its followers, which have no worker now."""
        self.all.remove(desk)
        followers = list(desk.followers.values())
        for follower in followers:
            follower.desk, follower.bits, follower.unanswered = None, None, 0
        return followers

    # Inside

    def _known(self, follower: WorkerFollower) -> Desk | None:
        """Return a quick worker for a grammar that is known to begin quickly."""
        for desk in self._quick():
            if follower.grammar in desk.grammars and desk.opening is None:
                return desk
        return self._least(self._quick()) if follower.grammar in self._proven else None

    def _quick(self) -> Iterator[Desk]:
        return (desk for desk in self.all if desk.usable and not desk.slow)

    def _least(self, desks: Iterator[Desk]) -> Desk | None:
        return min(desks, key=lambda d: (d.opening is not None, len(d.followers)), default=None)

    def _free(self, slow: bool) -> Desk | None:
        """Return a worker that may open a follower, perhaps a new one; None if all are busy."""
        desks = [d for d in self.all if d.usable and d.slow is slow]
        idle = next((desk for desk in desks if desk.idle), None)
        if idle is not None:
            return idle
        if len(desks) < (SLOW_WORKERS if slow else QUICK_WORKERS):
            return self._add(slow=slow)
        return self._least(desk for desk in desks if desk.opening is None)

    def _barred(self, slow: bool) -> set[str]:
        """Return the tenants that may open nothing more at present."""
        opening = [d.opening.tenant for d in self.all if d.opening is not None and d.slow is slow]
        return {
            tenant
            for tenant in set(opening)
            if opening.count(tenant) >= (1 if slow or self._suspected(tenant) else OPENINGS)
        }

    def _suspected(self, tenant: str) -> bool:
        return self._suspects.get(tenant, 0.0) > self._clock()

    def _suspect(self, follower: WorkerFollower) -> None:
        follower.costly = True
        now = self._clock()
        self._suspects = {name: end for name, end in self._suspects.items() if end > now}
        self._suspects[follower.tenant] = now + SUSPICION_SECONDS
        self._proven.pop(follower.grammar, None)

    def _add(self, *, slow: bool) -> Desk:
        desk = Desk(self._host.fork(), self._clock, slow=slow)
        if slow:
            self._host.lower_priority(desk.worker)
        self.all.append(desk)
        return desk

    def _open(self, follower: WorkerFollower, desk: Desk) -> None:
        desk.ask(OpenGrammar(follower.id, follower.grammar, follower.tokens))
        desk.followers[follower.id] = follower
        desk.grammars[follower.grammar] = None
        desk.grammars.move_to_end(follower.grammar)
        if len(desk.grammars) > GRAMMARS_A_WORKER:
            desk.grammars.popitem(last=False)
        follower.desk, follower.unanswered = desk, 1
        desk.worker.frames.flush()
        self._host.watch()

    def _move(self, follower: WorkerFollower) -> None:
        """Take a follower from its worker, and have it opened by another one."""
        desk = follower.desk
        assert desk is not None
        desk.followers.pop(follower.id, None)
        if desk.opening is follower:
            desk.opening = None
        desk.worker.frames.send(Close(follower.id))
        follower.desk, follower.bits, follower.unanswered = None, None, 0
        self.place(follower)
        if not desk.followers and desk in self.all:
            self._retire(desk)

    def _retire(self, desk: Desk) -> None:
        """Keep a worker without followers for later; end one if it is slow or many are idle."""
        idle = [one for one in self.all if one.idle]
        if desk.slow:
            self._host.kill(desk.worker)
        elif len(idle) > MOST_IDLE_WORKERS:
            self._host.kill(idle[0].worker)
