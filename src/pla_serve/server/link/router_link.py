"""Requests of one router on this instance, from its ids and clock to the engine's, and back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from pla_serve.logs import REQUESTS
from pla_serve.server.api.guard import Traffic
from pla_serve.server.engine.session import EngineDiedError, MessageRoutes
from pla_serve.wire.codec import BadMessage
from pla_serve.wire.engine import (
    AbortRequest,
    AddRequest,
    Begin,
    Inbound,
    Lend,
    Offer,
    Output,
    Rejected,
    Release,
    RequestAnswer,
    Reserve,
)
from pla_serve.wire.frames import Outbox, Overflow
from pla_serve.wire.link import FromInstance

log = logging.getLogger(REQUESTS)

MOST_UNSENT_BYTES = 8 << 20
"""Bytes that may wait for one router; beyond it the link is closed."""
MOST_OFFERS = 4096
"""Offers kept for `Release`; older ones are forgotten, and end with their lease."""
MOST_ID = 256
"""Characters of a router's id; the engine's has a prefix before it."""
MOST_SECONDS = 1e8
"""Beyond this, the time from now to a deadline says nothing."""
RETRY_SECONDS = 1.0


class RouterLink:
    """Translates between a router and the engine; receives the engine's answers.

    The engine gets a new id for a request each time it is sent, ``NUMBER.SERIAL:ID``. So routers
    that use the same ids do not disturb each other, and a request that is sent again after an abort
    is not taken for the first one.

    Args:
        number: number of this connection, never used again.
        cut: closes the connection; called with the reason, possibly more than once.
    """

    def __init__(
        self,
        number: int,
        engine: MessageRoutes,
        traffic: Traffic,
        cut: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outbox = Outbox(MOST_UNSENT_BYTES)
        self.has_facts = False
        """Whether the facts of the engine that runs now have been sent."""
        self._number = number
        self._serial = 0
        self._engine = engine
        self._traffic = traffic
        self._cut = cut
        self._clock = clock
        self._request_ids: dict[str, str] = {}
        """Ids of HTTP requests, for the log, by the router's ids of unfinished requests."""
        self._open: dict[str, str] = {}
        """Engine's ids of unfinished requests, by the router's ids."""
        self._offers: dict[str, str] = {}
        """Engine's ids of offers that are not released yet, by the router's ids."""
        self._lends: set[str] = set()
        """Router's ids of unfinished `Lend` requests, which end with their `Offer`."""
        self._lent: set[str] = set()
        """Router's ids of offers that answered a `Lend` and are not released yet."""

    @property
    def requests(self) -> int:
        """Number of unfinished requests."""
        return len(self._open)

    def handle(self, message: Inbound) -> None:
        """Pass a message of the router on to the engine, or refuse it."""
        if isinstance(message, AddRequest):
            self._begin(message.id, lambda name: self._timed(message, name))
            self._remember(message)
        elif isinstance(message, AbortRequest):
            name = self._open.get(message.id)
            if name is not None:
                self._forget(message.id)
                self._engine.send(AbortRequest(name))
            self._release(message.id)
        elif isinstance(message, Reserve):
            self._begin(
                message.id,
                lambda name: replace(message, request=self._timed(message.request, name)),
            )
            self._remember(message.request)
        elif isinstance(message, Lend):
            self._begin(message.id, lambda name: replace(message, id=name), lends=True)
        elif isinstance(message, Begin):
            name = self._open.get(message.id)
            if name is None:
                self._refuse(message.id, "nothing is reserved under this id", None)
            else:
                self._engine.send(replace(message, id=name))
        else:
            self._release(message.id)

    def refuse(self, message: BadMessage) -> None:
        """Answer a message with a field out of range, and end the request if it runs."""
        name = self._open.get(message.id)
        if name is not None:
            self._forget(message.id, "refused")
            self._engine.send(AbortRequest(name))
        self._refuse(message.id, f"invalid message: {message.reason}", None)

    def say(self, message: FromInstance) -> None:
        """Queue a message for the router; close the link if too much waits."""
        try:
            self.outbox.put(message)
        except Overflow as error:
            self._cut(str(error))

    def take(self, message: RequestAnswer) -> None:
        """Pass an answer of the engine on to the router, under the router's id."""
        id = message.id.partition(":")[2]
        if isinstance(message, Offer):
            self._remember_offer(id, message)
            if id in self._lends:
                self._forget(id)
        elif isinstance(message, Rejected):
            self._forget(id, "refused")
        elif isinstance(message, Output) and message.finish_reason is not None:
            self._forget(id, message.finish_reason)
        self.say(replace(message, id=id))

    def fail(self, failure: Exception) -> None:
        """Forget all requests: the engine is gone, and the hub sends `EngineLost`."""
        self._traffic.change(-len(self._open) - len(self._lent))
        self._open.clear()
        self._lent.clear()
        self._request_ids.clear()
        self._lends.clear()
        self._offers.clear()

    def close(self) -> None:
        """End all requests and release all offers: the router is gone."""
        for id, name in list(self._open.items()):
            self._forget(id)
            self._engine.send(AbortRequest(name))
        for id in list(self._offers):
            self._release(id)

    def _begin(self, id: str, message: Callable[[str], Inbound], lends: bool = False) -> None:
        if self._traffic.draining and not lends:
            self._refuse(id, "the instance is shutting down", 5.0)
            return
        if len(id) > MOST_ID:
            self._refuse(id, f"ids of requests have at most {MOST_ID} characters", None)
            return
        if id in self._open:
            self._refuse(id, f"request {id} runs already; ids must be unique", None)
            return
        self._serial += 1
        name = f"{self._number}.{self._serial}:{id}"
        try:
            self._engine.open_route(name, self)
        except EngineDiedError as error:
            self._refuse(id, str(error), RETRY_SECONDS)
            return
        self._open[id] = name
        if lends:
            self._lends.add(id)
        self._traffic.change(+1)
        self._engine.send(message(name))

    def _timed(self, request: AddRequest, name: str) -> AddRequest:
        """Return the request with the engine's id, and with times on this machine's clock."""
        now, deadline = self._clock(), request.deadline
        return replace(
            request,
            id=name,
            arrival=now + min(max(request.arrival, -MOST_SECONDS), 0.0),
            deadline=None if deadline is None else now + min(deadline, MOST_SECONDS),
        )

    def _remember_offer(self, id: str, offer: Offer) -> None:
        if not offer.source:
            return
        if len(self._offers) >= MOST_OFFERS:
            oldest = next(iter(self._offers))
            del self._offers[oldest]
            self._settle_loan(oldest)
        self._offers[id] = offer.id
        if id in self._lends:
            # A server that ends waits until what it lends has been read.
            self._lent.add(id)
            self._traffic.change(+1)

    def _settle_loan(self, id: str) -> None:
        if id in self._lent:
            self._lent.discard(id)
            self._traffic.change(-1)

    def _release(self, id: str) -> None:
        self._settle_loan(id)
        name = self._offers.pop(id, None)
        if name is not None:
            self._engine.send(Release(name))

    def _refuse(self, id: str, reason: str, retry_after: float | None) -> None:
        self.say(Rejected(id=id, reason=reason, retry_after=retry_after))

    def _remember(self, request: AddRequest) -> None:
        if request.request_id and request.id in self._open:
            self._request_ids[request.id] = request.request_id

    def _forget(self, id: str, outcome: str = "aborted") -> None:
        request_id = self._request_ids.pop(id, None)
        if request_id is not None and log.isEnabledFor(logging.INFO):
            extra = {"request_id": request_id, "outcome": outcome, "attempt": id}
            log.info("request of a router: %s", outcome, extra=extra)
        self._lends.discard(id)
        name = self._open.pop(id, None)
        if name is not None:
            self._engine.close_route(name)
            self._traffic.change(-1)
