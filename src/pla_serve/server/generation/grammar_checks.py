"""Whether grammars can be used, asked before a request costs anything.

    checks = GrammarChecks(vocabulary_of(tokenizer, len(tokenizer)))
    await checks(Grammar("regex", "a+"), "key-0")    # returns, or raises GrammarError

Each is compiled in a worker process under the limits of `GrammarLimits`. Tenants take turns, and
what is not done soon makes way for what may be: slow grammars delay slow grammars of the same
tenant and hardly anybody else. A cancelled check gives its place up, and its work ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field

from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.host import GrammarHost, GrammarWorker
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.grammar.messages import Advanced, Close, GrammarMask, OpenGrammar
from pla_serve.grammar.structure import check_size
from pla_serve.grammar.tokenizer import GrammarVocabulary
from pla_serve.grammar.turns import Turns
from pla_serve.wire.engine import Grammar

log = logging.getLogger(__name__)

QUICK_SECONDS = 0.05
"""A check that takes more CPU time is slow."""
QUICK_WORKERS, SLOW_WORKERS = 2, 2
"""Checks at once of either kind; of one tenant, one of each."""
MOST_WAITING = 64
"""Checks of one tenant that may wait at once."""
MOST_KNOWN = 4096
"""Results that are remembered, each by a digest of 32 bytes and an error of 1 KB at most."""


class TooManyChecks(Exception):
    """A tenant has as many checks waiting as it may; it may come again in a while."""


@dataclass(slots=True, eq=False)
class _Check:
    """One grammar that waits for a worker, or that a worker is busy with."""

    id: int
    grammar: Grammar
    digest: bytes
    tenant: str
    done: asyncio.Future[str | None]
    """Result: None if the grammar can be used, or the error for the client."""
    context: Context
    """Context of the request, so that log lines about the check carry its id."""
    tried: bool = False
    """Whether a worker was lost during the check, which may not be the grammar's fault. The next
    worker is a fresh one."""


@dataclass(slots=True, eq=False)
class _Place:
    """One worker, with timers for the check that it is busy with."""

    worker: GrammarWorker
    check: _Check | None = None
    checks: int = 0
    """Checks that the worker was given. Earlier ones, of any tenant, have left memory behind."""
    slow: bool = False
    timed: bool = False
    """Whether the time of the check has begun to count: once the worker runs."""
    cpu_seconds: float = 0.0
    """CPU time that the worker had taken then."""
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


class GrammarChecks:
    """See the module. All methods but the constructor belong to one event loop."""

    def __init__(self, vocabulary: GrammarVocabulary, limits: GrammarLimits | None = None) -> None:
        self._limits = limits or GrammarLimits()
        self._host = GrammarHost(vocabulary, self._limits)
        self._places: list[_Place] = []
        self._quick: Turns[_Check] = Turns()
        self._slow: Turns[_Check] = Turns()
        any_object = Grammar("json_object")
        self._known: OrderedDict[bytes, str | None] = OrderedDict({_digest(any_object): None})
        self._count = 0
        self._control: socket.socket | None = None
        """The nursery's socket that the event loop watches."""
        self._watched = -1

    async def __call__(self, grammar: Grammar, tenant: str) -> None:
        """Return if a text of this grammar can be begun.

        Raises:
            GrammarError: what is wrong, for the client.
            TooManyChecks: this tenant has too many checks waiting.
        """
        check_size(grammar, self._limits)
        digest = _digest(grammar)
        if digest in self._known:
            self._known.move_to_end(digest)
            error = self._known[digest]
        else:
            error = await self._ask(grammar, digest, tenant)
        if error is not None:
            raise GrammarError(error)

    @property
    def busy_pids(self) -> list[int]:
        """Process ids of workers that compile now, to look at or to kill."""
        busy = (place.worker.pid for place in self._places if place.check is not None)
        return [pid for pid in busy if pid is not None]

    @property
    def nursery_pid(self) -> int:
        """Process id of the nursery, for tests."""
        return self._host.nursery_pid

    def close(self) -> None:
        """End all workers; checks under way are cancelled."""
        for check in (*self._quick.clear(), *self._slow.clear()):
            check.done.cancel()
        for place in list(self._places):
            self._drop(place)
        self._unwatch()
        self._host.close()

    # Inside

    async def _ask(self, grammar: Grammar, digest: bytes, tenant: str) -> str | None:
        waiting = self._quick.count(tenant) + self._slow.count(tenant)
        if waiting >= MOST_WAITING:
            raise TooManyChecks(f"{waiting} grammars of yours wait to be checked already")
        self._count += 1
        done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        check = _Check(self._count, grammar, digest, tenant, done, copy_context())
        self._quick.add(tenant, check)
        self._work()
        try:
            return await done
        except asyncio.CancelledError:
            self._withdraw(check)
            raise

    def _withdraw(self, check: _Check) -> None:
        """Cancel a check, because its request has ended."""
        self._quick.remove(check.tenant, check)
        self._slow.remove(check.tenant, check)
        for place in list(self._places):
            if place.check is check:
                self._drop(place)
        self._work()

    def _work(self) -> None:
        """Start waiting checks while workers are free."""
        lanes = ((self._quick, False, QUICK_WORKERS), (self._slow, True, SLOW_WORKERS))
        for queue, slow, most in lanes:
            while len(busy := self._tenants(slow)) < most:
                check = queue.take(busy)
                if check is None:
                    break
                self._begin(check, slow)

    def _tenants(self, slow: bool) -> list[str]:
        """Return the tenants of the quick or the slow checks that run."""
        return [p.check.tenant for p in self._places if p.check is not None and p.slow is slow]

    def _begin(self, check: _Check, slow: bool) -> None:
        if check.digest in self._known:  # by now
            check.done.set_result(self._known[check.digest])
            return
        try:
            place = self._free_place(fresh=check.tried)
        except (GrammarError, OSError) as error:
            check.done.set_result(str(error))
            return
        place.check, place.slow, place.timed = check, slow, False
        place.checks += 1
        place.worker.frames.send(OpenGrammar(check.id, check.grammar, []))
        self._flush(place)
        self._host.watch()
        if slow:
            self._host.lower_priority(place.worker)
        if place.worker.pid is not None:
            self._time(place)

    def _time(self, place: _Place) -> None:
        """Have the time of a check count, whose worker runs."""
        place.timed, place.cpu_seconds = True, self._host.cpu_seconds(place.worker)
        loop = asyncio.get_running_loop()
        wall = self._limits.compile_seconds + self._limits.wall_seconds
        reason = f"it takes more than {wall:g} s; simplify it"
        place.timers = [loop.call_later(wall, self._host.kill, place.worker, reason)]
        if not place.slow:
            place.timers.append(loop.call_later(QUICK_SECONDS, self._look, place))

    def _look(self, place: _Place) -> None:
        """See whether a check is slow by now, or only waits for a processor."""
        left = QUICK_SECONDS - (self._host.cpu_seconds(place.worker) - place.cpu_seconds)
        if left > 0:
            again = asyncio.get_running_loop().call_later(left, self._look, place)
            place.timers[-1] = again
        elif place.check is not None:
            self._becomes_slow(place, place.check)

    def _becomes_slow(self, place: _Place, check: _Check) -> None:
        """Let a check go on as slow; or restart it later, if too many slow ones run."""
        busy = self._tenants(True)
        if len(busy) < SLOW_WORKERS and check.tenant not in busy:
            place.slow = True
            self._host.lower_priority(place.worker)
        else:
            place.check = None
            self._drop(place)
            self._slow.add(check.tenant, check)
        self._work()

    def _free_place(self, *, fresh: bool) -> _Place:
        for place in () if fresh else self._places:
            if place.check is None and place.worker.end is None:
                return place
        place = _Place(self._host.fork())
        self._places.append(place)
        loop = asyncio.get_running_loop()
        if self._host.control is not self._control:  # the first nursery, or another one
            self._unwatch()
            self._control, self._watched = self._host.control, self._host.control.fileno()
            loop.add_reader(self._watched, self._learn)
        loop.add_reader(place.worker.frames.socket.fileno(), self._read, place)
        return place

    def _unwatch(self) -> None:
        """Stop watching a nursery that is gone. Its descriptor may have another use already."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._control = None

    def _flush(self, place: _Place) -> None:
        """Send what the socket did not take, when it takes more."""
        frames, loop = place.worker.frames, asyncio.get_running_loop()
        if frames.flush():
            loop.remove_writer(frames.socket.fileno())
        else:
            loop.add_writer(frames.socket.fileno(), self._flush, place)

    def _read(self, place: _Place) -> None:
        """Take the answers of a worker."""
        for message in place.worker.receive():
            check = place.check
            if check is None or not isinstance(message, (Advanced, GrammarMask)):
                continue
            if message.error is not None or isinstance(message, GrammarMask):
                place.worker.frames.send(Close(check.id))
                self._finish(place, message.error)
                break
        if place in self._places and place.worker.frames.ended:
            asyncio.get_running_loop().remove_reader(place.worker.frames.socket.fileno())
        self._work()

    def _learn(self) -> None:
        """Handle the start or end of workers, and the loss of the nursery."""
        self._host.poll()
        if self._host.control_lost:
            self._unwatch()
        for place in list(self._places):
            if place.worker.end is None:
                if place.check is not None and not place.timed and place.worker.pid is not None:
                    self._time(place)
                continue
            self._read(place)  # its last words
            if place in self._places:
                self._lost(place)
        self._work()

    def _lost(self, place: _Place) -> None:
        end = place.worker.end
        assert end is not None
        check = place.check
        certain = end.certain and place.checks == 1
        if check is not None and not (certain or end.killed_for or check.tried):
            place.check, check.tried = None, True
            (self._slow if place.slow else self._quick).add(check.tenant, check)
        elif check is not None:
            cause = end.cause(self._limits, self._limits.replay_seconds(0))
            check.context.run(log.warning, "a grammar was refused: %s", cause)
            error = f"the grammar cannot be compiled: {cause}"
            self._finish(place, error, certain=certain)
        self._drop(place)

    def _finish(self, place: _Place, error: str | None, *, certain: bool = True) -> None:
        """Set the result of a check. It is remembered if another try would give the same."""
        check, place.check = place.check, None
        assert check is not None
        for timer in place.timers:
            timer.cancel()
        if certain:
            self._known[check.digest] = error
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        if not check.done.done():
            check.done.set_result(error)
        if place.worker.niceness:
            self._drop(place)  # what comes next shall not pay for it

    def _drop(self, place: _Place) -> None:
        """End a worker, whatever it does."""
        if place not in self._places:
            return
        self._places.remove(place)
        check, place.check = place.check, None
        if check is not None:
            check.done.cancel()
        for timer in place.timers:
            timer.cancel()
        loop, sock = asyncio.get_running_loop(), place.worker.frames.socket
        loop.remove_reader(sock.fileno())
        loop.remove_writer(sock.fileno())
        self._host.kill(place.worker)
        sock.close()


def refuse_grammars(reason: str) -> Callable[[Grammar, str], Awaitable[None]]:
    """Return a check that refuses every grammar for this reason."""

    async def refuse(grammar: Grammar, tenant: str) -> None:
        raise GrammarError(f"structured output is off for this model: {reason}")

    return refuse


def _digest(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind}\0{grammar.spec}".encode("utf-8", "replace")).digest()
