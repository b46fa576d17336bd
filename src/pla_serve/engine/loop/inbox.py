"""Messages from the server, as changes of the request table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from pla_serve.engine.loop.faults import RequestFaults, fault_text
from pla_serve.engine.loop.parts import LoopContext
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.sampling import NOT_OF_ONE_REQUEST
from pla_serve.engine.transfer.protocol import TransferMessage, receive
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Inbound,
    Lend,
    Rejected,
    Reserve,
)

log = logging.getLogger(__name__)


class RequestInbox:
    """Admits and aborts requests, and passes on what concerns KV transfer.

    Args:
        messages: returns what has arrived since it was called last. Never blocks.
    """

    def __init__(
        self,
        context: LoopContext,
        requests: RequestTable,
        faults: RequestFaults,
        messages: Callable[[], Iterable[Inbound]],
    ) -> None:
        self._context = context
        self._requests = requests
        self._faults = faults
        self._messages = messages
        self._intake = context.parts.intake
        self._policy = context.parts.policy
        self._exchange = context.parts.exchange

    def take(self) -> None:
        """Act on the messages that have arrived, and on KV that has arrived from other engines."""
        for message in self._messages():
            try:
                self._take(message)
            except NOT_OF_ONE_REQUEST:
                raise
            except Exception as error:
                self._fail(message, error)
        self._take_arrivals()

    def _take(self, message: Inbound) -> None:
        if isinstance(message, AbortRequest):
            self._abort(message.id)
        elif isinstance(message, AddRequest):
            self._add(message)
        else:
            self._transfer(message)

    def _fail(self, message: Inbound, error: Exception) -> None:
        """End or refuse the request of a message that raised an exception."""
        request_id = message.request.id if isinstance(message, Reserve) else message.id
        sequence = self._requests.get(request_id)
        if sequence is not None:
            self._faults.end(sequence, error)
        else:
            log.error("request %s failed inside the engine", request_id, exc_info=error)
            self._context.emit(Rejected(id=request_id, reason=fault_text(error), retry_after=None))

    def _add(self, request: AddRequest) -> None:
        refusal = self._refuse_taken_id(request.id) or self._exchange.refuses(request)
        admitted = refusal or self._intake.admit(request, self._context.clock())
        if isinstance(admitted, Rejected):
            self._context.emit(admitted)
            return
        self._requests.insert(admitted)
        self._context.emit(Accepted(request.id, admitted.seen_cached))
        self._requests.wait(admitted)

    def _refuse_taken_id(self, request_id: str) -> Rejected | None:
        if self._requests.get(request_id) is None:
            return None
        reason = f"request {request_id} runs already; ids must be unique"
        return Rejected(id=request_id, reason=reason, retry_after=None)

    def _abort(self, request_id: str) -> None:
        sequence = self._requests.get(request_id)
        if sequence is None:
            self._exchange.release(request_id)
        elif not sequence.over:
            self._exchange.abandon(sequence)
            self._intake.settle_forecast(sequence, self._context.clock(), served=False)
            self._requests.end(sequence)

    def _transfer(self, message: TransferMessage) -> None:
        fresh = isinstance(message, (Reserve, Lend))
        refusal = self._refuse_taken_id(message.id) if fresh else None
        if refusal is not None:
            self._context.emit(refusal)
            return
        answer, sequence = receive(self._exchange, message, self._context.clock())
        if sequence is not None:
            self._requests.insert(sequence)
        if answer is not None:
            self._context.emit(answer)

    def _take_arrivals(self) -> None:
        """Go on with requests that other engines have prefilled, as far as their KV has come."""
        if not self._exchange.pending:
            return
        now = self._context.clock()
        for sequence, end in self._exchange.poll(now):
            if end is None:
                with self._faults.of(sequence):
                    self._go_on(sequence, now)
            else:
                self._context.emit(end)
                self._requests.remove(sequence)

    def _go_on(self, sequence: Sequence, now: float) -> None:
        """Decode a sequence whose KV is complete, and prefill the rest of any other."""
        self._context.parts.kv.remember(sequence.tokens, sequence.computed, sequence.table)
        if not sequence.table.blocks:
            self._requests.look_up(sequence)
            self._requests.wait(sequence)
        elif sequence.generated and sequence.computed == len(sequence.tokens) - 1:
            self._requests.decode(sequence, sequence.computed, now)
        else:
            self._policy.add(sequence.prefill(sequence.computed), now)
