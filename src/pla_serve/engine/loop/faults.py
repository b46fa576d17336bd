"""Exceptions that belong to one request: they end that request, and the others go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pla_serve.engine.loop.output import failure
from pla_serve.engine.loop.parts import LoopContext
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.sampling import NOT_OF_ONE_REQUEST

log = logging.getLogger(__name__)


class RequestFaults:
    """Ends requests whose handling raised an exception.

    Example: the KV of one member of a batch cannot be registered. Its client is told that the
    engine failed, its blocks are given back, and the other members get their tokens::

        for member in members:
            with faults.of(member.sequence):
                settle(member)
    """

    def __init__(self, context: LoopContext, requests: RequestTable) -> None:
        self._context = context
        self._requests = requests

    @contextmanager
    def of(self, sequence: Sequence) -> Iterator[None]:
        """Run a block on behalf of one sequence, and end the sequence if the block raises.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        try:
            yield
        except NOT_OF_ONE_REQUEST:
            raise
        except Exception as error:
            self.end(sequence, error)

    def end(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence because of an exception; its client hears of an engine's fault."""
        log.error("request %s failed inside the engine", sequence.id, exc_info=error)
        if not sequence.over:
            parts = self._context.parts
            self._context.emit(failure(sequence, fault_text(error), of_request=False))
            parts.exchange.abandon(sequence)
            parts.intake.settle_forecast(sequence, self._context.clock(), served=False)
            self._requests.end(sequence)
        elif not sequence.in_flight and self._requests.get(sequence.id) is sequence:
            self._requests.remove(sequence)


def fault_text(error: Exception) -> str:
    """Return the message for the client of a request that an exception has ended."""
    return f"the engine failed on this request ({type(error).__name__}); its log says more"
