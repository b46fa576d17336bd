"""Requests that this engine takes over: it reserves memory for them and reads their KV into it.

No block is reused while a read may still write to it, even after its request has ended. Such blocks
stay in quarantine until the reader reports that the read is over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.admission import Intake
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.transfer.credentials import Credentials, OfferRefused
from pla_serve.engine.transfer.layout import KVLayout, KVSource
from pla_serve.engine.transfer.protocol import Arrival
from pla_serve.engine.transfer.pull import PullReport, PullRequest
from pla_serve.engine.transfer.reader import Reader
from pla_serve.wire.engine import (
    Accepted,
    Begin,
    FinishReason,
    Output,
    Rejected,
    Reserve,
)

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""A router may try again after this time when there was no memory."""
STALL_SECONDS = 1.0
"""A request that has begun waits this long for a reader that makes no progress."""
END_SECONDS = 0.05
"""After this time the blocks of a cancelled read go into quarantine."""


@dataclass(slots=True)
class _Reservation:
    sequence: Sequence
    lease: float
    until: float
    """Moment at which the request is given up, or goes on without KV that was not read by then."""
    key: int | None = None
    """Key of the running pull; None if none runs."""
    offered: int = 0
    """Number of tokens that the other engine offers."""
    begun: bool = False
    cancelled: bool = False
    end: Output | None = None


class Reservations:
    """All reserved sequences of one engine, by request id."""

    def __init__(
        self,
        reader: Reader,
        layout: KVLayout,
        credentials: Credentials,
        intake: Intake,
        gate: MemoryGate,
        kv: KVManager,
    ) -> None:
        self._reader = reader
        self._layout = layout
        self._credentials = credentials
        self._intake = intake
        self._gate = gate
        self._kv = kv
        self._reservations: dict[str, _Reservation] = {}
        self._by_key: dict[int, _Reservation] = {}
        self._quarantine: dict[int, list[int]] = {}
        """Blocks that an abandoned pull may still write to, by the key of the pull."""
        self._keys = 0
        self.taken_over = 0
        self.recomputed = 0
        self.expired = 0
        self.bytes_read = 0
        self.bytes_early = 0

    def __len__(self) -> int:
        return len(self._reservations)

    def reserve(self, message: Reserve, now: float) -> tuple[Accepted | Rejected, Sequence | None]:
        """See `KVExchange`."""
        request = msgspec.structs.replace(message.request, hand_over=None)
        try:
            source = self._source(message)
        except OfferRefused as error:
            log.warning("request %s: %s", request.id, error)
            return Rejected(id=request.id, reason=str(error), retry_after=None), None
        sequence = self._intake.take_over(request)
        if isinstance(sequence, Rejected):
            return sequence, None
        if not self._gate.try_reserve(sequence, sequence.short, now):
            reason = f"there is no KV memory for {len(sequence.tokens)} more tokens now"
            return Rejected(id=request.id, reason=reason, retry_after=RETRY_SECONDS), None
        lease = message.lease_seconds
        reservation = _Reservation(sequence, lease, now + lease)
        sequence.in_flight += 1
        self._reservations[request.id] = reservation
        if source is not None and source.tokens > sequence.computed:
            self._start(reservation, source)
        return Accepted(request.id, sequence.computed), sequence

    def begin(self, message: Begin, now: float) -> Rejected | None:
        """See `KVExchange`."""
        reservation = self._reservations.get(message.id)
        if reservation is None or reservation.begun:
            reason = f"request {message.id} is not reserved here; its lease may be over"
            return Rejected(id=message.id, reason=reason, retry_after=None)
        reservation.begun = True
        reservation.until = now + STALL_SECONDS
        reservation.end = self._append(reservation.sequence, message.tokens)
        return None

    def abandon(self, sequence: Sequence) -> None:
        """See `KVExchange`."""
        reservation = self._reservations.get(sequence.id)
        if reservation is not None and reservation.sequence is sequence:
            self._leave(reservation)

    def poll(self, now: float) -> list[Arrival]:
        """See `KVExchange`."""
        for report in self._reader.reports():
            self._take(report, now)
        return list(self._arrivals(now)) if self._reservations else []

    @property
    def reading(self) -> bool:
        """Whether the reader will report something."""
        return bool(self._by_key or self._quarantine)

    def next_expiry(self) -> float | None:
        """Return when the next request is given up or goes on without all KV; None without any."""
        return min((r.until for r in self._reservations.values()), default=None)

    def _source(self, message: Reserve) -> KVSource | None:
        """Return what is to be read, or None if nothing is offered. Raises OfferRefused."""
        if not message.source:
            return None
        request = message.request
        return self._credentials.check(
            message.source, self._layout, request.prompt, request.cache_scope
        )

    def _start(self, reservation: _Reservation, source: KVSource) -> None:
        self._keys += 1
        sequence = reservation.sequence
        reservation.key = self._keys
        reservation.offered = source.tokens
        self._by_key[self._keys] = reservation
        runs = list(sequence.table.runs())
        self._reader.start(PullRequest(self._keys, source, runs, sequence.computed))

    def _append(self, sequence: Sequence, tokens: list[int]) -> Output | None:
        """Append output of the other engine; return the end of the request if that ends it."""
        reason: FinishReason | None = None
        if sequence.generated + len(tokens) > sequence.request.sampling.max_tokens:
            return _failed(sequence, "more tokens were made than the request asked for")
        for token in tokens:
            if not 0 <= token < self._intake.limits.vocab_size:
                return _failed(sequence, f"token id {token} is outside this model's vocabulary")
            sampled = sequence.sampling.accept(token, None)
            if sampled.error is not None:
                return _failed(sequence, sampled.error)
            sequence.tokens.append(token)
            if sampled.stopped or sampled.grammar_finished:
                reason = "stop"
        limits = self._intake.limits
        if reason is None and (
            sequence.generated >= sequence.request.sampling.max_tokens
            or len(sequence.tokens) >= limits.max_model_len
        ):
            reason = "length"
        return None if reason is None else Output(id=sequence.id, tokens=[], finish_reason=reason)

    def _take(self, report: PullReport, now: float) -> None:
        self.bytes_read += report.bytes_read
        self.bytes_early += report.bytes_early
        reservation = self._by_key.get(report.key)
        if reservation is not None:
            reservation.sequence.computed = report.confirmed
            if not reservation.cancelled:
                reservation.until = now + (
                    STALL_SECONDS if reservation.begun else reservation.lease
                )
        if not report.ended:
            return
        if reservation is not None:
            del self._by_key[report.key]
            reservation.key = None
        else:
            self._kv.unpin(self._quarantine.pop(report.key))

    def _arrivals(self, now: float) -> Iterator[Arrival]:
        for reservation in list(self._reservations.values()):
            sequence = reservation.sequence
            late = reservation.until <= now
            if reservation.end is not None:
                self._leave(reservation)
                yield Arrival(sequence, reservation.end)
            elif not reservation.begun:
                if late:
                    self.expired += 1
                    self._leave(reservation)
                    seconds = f"{reservation.lease:.1f} s"
                    reason = f"nobody began this request, and no KV was read for {seconds}"
                    yield Arrival(sequence, _failed(sequence, reason))
            elif reservation.key is None:
                yield self._go_on(reservation)
            elif late and not reservation.cancelled:
                reservation.cancelled = True
                reservation.until = now + END_SECONDS
                self._reader.cancel(reservation.key)
            elif late:
                # Blocks that were read and blocks that may still be written to cannot be told
                # apart, so the prefill starts from the beginning in other blocks.
                self._leave(reservation)
                self._gate.release(sequence)
                sequence.computed = 0
                self.recomputed += 1
                yield Arrival(sequence, None)

    def _go_on(self, reservation: _Reservation) -> Arrival:
        sequence = reservation.sequence
        if sequence.computed >= reservation.offered:
            self.taken_over += 1
        else:
            self.recomputed += 1
        self._leave(reservation)
        # The last token is always computed here: the next one is sampled from its logits.
        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        if not self._kv.grow(sequence.table, len(sequence.tokens)):
            # No memory for the tokens of the other engine: wait for some like any other request.
            self._gate.release(sequence)
            sequence.computed = 0
        return Arrival(sequence, None)

    def _leave(self, reservation: _Reservation) -> None:
        """Make it an ordinary sequence; blocks that may still be written to go into quarantine."""
        sequence = reservation.sequence
        del self._reservations[sequence.id]
        sequence.in_flight -= 1
        if reservation.key is not None:
            self._kv.pin(sequence.table.blocks)
            self._quarantine[reservation.key] = list(sequence.table.blocks)
            del self._by_key[reservation.key]
            self._reader.cancel(reservation.key)


def _failed(sequence: Sequence, error: str) -> Output:
    return Output(id=sequence.id, tokens=[], finish_reason="error", error=error)
