"""Requests that this engine takes over: their memory, what is being read into it, and until when.

No block is reused while a read may still write to it, whatever became of its request: such blocks
are kept back, in quarantine, until the reader says that nothing is under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.admission import Intake
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.requests.sequence import Sequence
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

RETRY_SECONDS = 0.5
"""After a refusal for want of memory."""
STALL_SECONDS = 1.0
"""A begun request waits no longer than this for a reader that makes no progress."""
END_SECONDS = 0.05
"""How long the end of a cancelled read is waited for, before its blocks go into quarantine."""


@dataclass(slots=True)
class _Reservation:
    sequence: Sequence
    lease: float
    until: float
    """When it is given up, or goes on without what is still to be read."""
    key: int | None = None
    """Of the pull that is under way."""
    offered: int = 0
    """Tokens that the other engine offers."""
    begun: bool = False
    cancelled: bool = False
    end: Output | None = None


class Reservations:
    """Reserved sequences, by request."""

    def __init__(
        self, reader: Reader, layout: KVLayout, intake: Intake, gate: MemoryGate, kv: KVManager
    ) -> None:
        self._reader = reader
        self._layout = layout
        self._intake = intake
        self._gate = gate
        self._kv = kv
        self._reservations: dict[str, _Reservation] = {}
        self._by_key: dict[int, _Reservation] = {}
        self._quarantine: dict[int, list[int]] = {}
        """Blocks that an abandoned pull may still write to."""
        self._keys = 0
        self.taken_over = 0
        self.recomputed = 0
        self.expired = 0
        self.bytes_read = 0
        self.bytes_early = 0

    def __len__(self) -> int:
        return len(self._reservations)

    def reserve(self, message: Reserve, now: float) -> tuple[Accepted | Rejected, Sequence | None]:
        """See `Exchange`."""
        request = msgspec.structs.replace(message.request, hand_over=None)
        source = self._source(message)
        if isinstance(source, str):
            return Rejected(id=request.id, reason=source, retry_after=None), None
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
        """See `Exchange`."""
        reservation = self._reservations.get(message.id)
        if reservation is None or reservation.begun:
            reason = f"request {message.id} is not reserved here; its lease may be over"
            return Rejected(id=message.id, reason=reason, retry_after=None)
        reservation.begun = True
        reservation.until = now + STALL_SECONDS
        reservation.end = self._append(reservation.sequence, message.tokens)
        return None

    def abandon(self, sequence: Sequence) -> None:
        """See `Exchange`."""
        reservation = self._reservations.get(sequence.id)
        if reservation is not None and reservation.sequence is sequence:
            self._leave(reservation)

    def poll(self, now: float) -> list[Arrival]:
        """See `Exchange`."""
        for report in self._reader.reports():
            self._take(report, now)
        return list(self._arrivals(now)) if self._reservations else []

    @property
    def reading(self) -> bool:
        """Reports are to be expected."""
        return bool(self._by_key or self._quarantine)

    def next_expiry(self) -> float | None:
        """When the next lease ends, or something goes on without it."""
        return min((r.until for r in self._reservations.values()), default=None)

    def _source(self, message: Reserve) -> KVSource | str | None:
        """What is to be read; None if nothing is, a text if it cannot be."""
        if not message.source:
            return None
        try:
            source = msgspec.msgpack.decode(message.source, type=KVSource)
        except msgspec.MsgspecError as error:
            return f"the source is not one of this version's offers: {error}"
        if source.kind != self._layout.kind:
            return (
                f"the KV offered is of another kind than this instance's ({source.kind}, not "
                f"{self._layout.kind}); serve the same model with the same settings on both"
            )
        if source.tokens > len(message.request.prompt):
            return "the offer is of more tokens than the prompt has"
        return source

    def _start(self, reservation: _Reservation, source: KVSource) -> None:
        self._keys += 1
        sequence = reservation.sequence
        reservation.key = self._keys
        reservation.offered = source.tokens
        self._by_key[self._keys] = reservation
        runs = list(sequence.table.runs())
        self._reader.start(PullRequest(self._keys, source, runs, sequence.computed))

    def _append(self, sequence: Sequence, tokens: list[int]) -> Output | None:
        """Output of the other engine becomes this one's; the end, if that ends it."""
        reason: FinishReason | None = None
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
                    reason = f"nobody began this request, and nothing came of it for {seconds}"
                    yield Arrival(sequence, _failed(sequence, reason))
            elif reservation.key is None:
                yield self._go_on(reservation)
            elif late and not reservation.cancelled:
                reservation.cancelled = True
                reservation.until = now + END_SECONDS
                self._reader.cancel(reservation.key)
            elif late:
                # What has been read cannot be told from what may still be written: start afresh.
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
        # The last token is always computed here, because what follows it is.
        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        if not self._kv.grow(sequence.table, len(sequence.tokens)):
            # No room for what the other engine made: wait for it like everyone else.
            self._gate.release(sequence)
            sequence.computed = 0
        return Arrival(sequence, None)

    def _leave(self, reservation: _Reservation) -> None:
        """It is an ordinary sequence from now on; blocks being written stay behind it."""
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
