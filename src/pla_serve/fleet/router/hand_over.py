"""The hand-over of a request's KV between two instances, as a pure state machine.

A request is prefilled on one instance (the source) and decoded on another (the target), which reads
the KV while the source computes it. The messages of a hand-over, explained in `wire/transfer.py`:

    source: AddRequest(hand_over) -> Offer -> Output "handed_over"  -> Release
    target:                  Reserve -> Accepted -> Begin -> Output, Output, ...

The source can also lend KV that it has cached. `Lend` then takes the place of `AddRequest`, the
target prefills what is not cached, and `Begin` carries no tokens. If a hand-over fails, the request
is continued like one whose instance was lost: prompt and output are prefilled again, from what is
cached at the place it goes to.

`advance` performs no I/O and knows no instance: `HandOverConductor` performs the effects. Example::

    state, effects = advance(HandOver(), Offered(b"address"))
    assert effects == (Effect.FIND_TARGET,)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Source(StrEnum):
    """State of the instance that has the KV."""

    WORKING = "working"
    """The source prefills the request, or looks up its cache; the target cannot read yet."""
    OFFERED = "offered"
    """The target may read, and the prefill goes on."""
    COMPLETE = "complete"
    """All KV is there; the source keeps it until `Effect.RELEASE` or the end of its lease."""
    GONE = "gone"
    """The source was lost or has given up; it keeps nothing."""


class Target(StrEnum):
    """State of the instance that will decode."""

    NONE = "none"
    CHOSEN = "chosen"
    """The request is charged to the target, which was sent nothing yet (lent KV only)."""
    RESERVING = "reserving"
    """The target was asked for memory."""
    RESERVED = "reserved"
    """The target has memory for the request and reads its KV."""
    BEGUN = "begun"
    """The target was told to make the next token."""


class Event(StrEnum):
    """Everything that can happen to a hand-over, beside `Offered`."""

    SOURCE_HANDED_OVER = "source handed over"
    """The prefill has ended; its token was delivered."""
    SOURCE_ENDED = "source ended"
    """The source refused the request, failed it, or finished it without a hand-over."""
    SOURCE_LOST = "source lost"
    TARGET_FOUND = "target found"
    """A target was chosen and charged; answers `Effect.FIND_TARGET`."""
    TARGET_MISSING = "target missing"
    """No instance can be the target; answers `Effect.FIND_TARGET`."""
    TARGET_UNREACHABLE = "target unreachable"
    """The target has no connection; answers `Effect.RESERVE`."""
    TARGET_ACCEPTED = "target accepted"
    TARGET_REFUSED = "target refused"
    """The target has no room, its reservation expired, or it came too late for `Begin`."""
    TARGET_OUTPUT = "target output"
    """The target made its first output, which may be an error."""
    TARGET_LOST = "target lost"
    DROPPED = "dropped"
    """The request has ended: its client closed it, or the router gave it up."""


@dataclass(frozen=True, slots=True)
class Offered:
    """The source says where its KV can be read. An empty ``address``: it has none to lend."""

    address: bytes


class Effect(StrEnum):
    """Everything that a hand-over asks of the router, beside `Outcome`."""

    FIND_TARGET = "find target"
    """Choose a target and charge the request to it; answered by an event."""
    RESERVE = "reserve"
    """Send `Reserve` to the target."""
    BEGIN = "begin"
    """Send `Begin` to the target; tokens come from there from now on."""
    SEND_WHOLE = "send whole"
    """Send the request itself to the target, which prefills all of it."""
    ABORT_TARGET = "abort target"
    """Send `AbortRequest` to the target."""
    SETTLE_TARGET = "settle target"
    """Take the request off the target's account."""
    SETTLE_SOURCE = "settle source"
    """Take the request off the source's account; messages from there no longer count."""
    RELEASE = "release"
    """Send `Release` to the source."""
    ORDINARY = "ordinary"
    """Treat the message or the loss as that of a request without hand-over."""
    PLACE_TOGETHER = "place together"
    """Place the request again, with prefill and decode on one instance."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Effect that counts how a hand-over has ended, or that it has begun."""

    name: str


Effects = tuple[Effect | Outcome, ...]
BEGUN = Outcome("begun")


@dataclass(frozen=True, slots=True)
class HandOverState:
    """State of one hand-over; the initial state of one with a prefill is ``HandOverState()``.

    With a prefill, ``CHOSEN`` never occurs. With lent KV, neither ``OFFERED``, ``NONE`` nor
    ``RESERVED`` does, since cached KV is complete and the target begins at once.
    """

    lent: bool = False
    """The source lends cached KV; otherwise it prefills the request."""
    source: Source = Source.WORKING
    target: Target = Target.NONE
    address: bytes = b""
    """Where the target reads; empty before `Offered`."""

    @property
    def reserved(self) -> bool:
        """The target has been sent `Reserve`, and not `Begin`."""
        return self.target in (Target.RESERVING, Target.RESERVED)

    @property
    def releases(self) -> Effects:
        """Effects that free the source's KV at the end of the hand-over."""
        return () if self.source is Source.GONE else (Effect.RELEASE,)

    def ended(self, *effects: Effect | Outcome) -> Transition:
        """The hand-over is over; ``effects`` follow the release of the source."""
        return None, (*self.releases, *effects)


Transition = tuple[HandOverState | None, Effects]
"""The next state, None once the hand-over is over, and the effects in order."""

LENDING = HandOverState(lent=True, target=Target.CHOSEN)
"""Initial state of a hand-over of cached KV."""


def advance(state: HandOverState, event: Event | Offered) -> Transition:
    """Return the next state and the effects to perform, in order.

    An event that cannot happen in ``state`` (a message that comes late or twice) changes nothing.
    Effects that answer with an event (`FIND_TARGET`, `RESERVE`) come last.
    """
    if isinstance(event, Offered):
        return _offered(state, event)
    if event is Event.DROPPED:
        if state.reserved and not state.lent:
            return state.ended(Effect.ABORT_TARGET, Effect.SETTLE_TARGET)
        return state.ended()
    if event in (Event.SOURCE_HANDED_OVER, Event.SOURCE_ENDED, Event.SOURCE_LOST):
        return _lent_source(state, event) if state.lent else _source(state, event)
    if event in (Event.TARGET_FOUND, Event.TARGET_MISSING):
        return _search_ended(state, found=event is Event.TARGET_FOUND)
    if state.target is Target.BEGUN:
        return _begun_target(state, event)
    return _target(state, event)


def _offered(state: HandOverState, offer: Offered) -> Transition:
    if state.source is not Source.WORKING or state.address:
        return state, ()
    if not state.lent:
        source = replace(state, source=Source.OFFERED, address=offer.address)
        return source, (Effect.FIND_TARGET,) if offer.address else ()
    if not offer.address:
        return _prefill_at_target(replace(state, source=Source.GONE), "nothing cached")
    asked = replace(state, source=Source.COMPLETE, target=Target.RESERVING, address=offer.address)
    return asked, (Effect.RESERVE,)


def _prefill_at_target(state: HandOverState, why: str) -> Transition:
    """Have the target, which was sent nothing yet, prefill the whole request."""
    return state.ended(Outcome(why), Effect.SEND_WHOLE)


def _lent_source(state: HandOverState, event: Event) -> Transition:
    """Handle the end of a source that lends KV: it refused, finished, or was lost."""
    if state.source is Source.GONE or event is Event.SOURCE_HANDED_OVER:
        return state, ()
    gone = replace(state, source=Source.GONE)
    if state.target is Target.CHOSEN:
        lost = event is Event.SOURCE_LOST
        return _prefill_at_target(gone, "source lost" if lost else "source refused")
    return gone, ()  # the target computes what it could not read


def _source(state: HandOverState, event: Event) -> Transition:
    """Handle the end of the prefill on the source, or of the source."""
    if state.source in (Source.COMPLETE, Source.GONE):
        if event is not Event.SOURCE_LOST:
            return state, ()
        gone = replace(state, source=Source.GONE)
        return gone.ended(Effect.PLACE_TOGETHER) if state.target is Target.NONE else (gone, ())
    if event is Event.SOURCE_ENDED:
        if state.reserved:
            return state.ended(Effect.ABORT_TARGET, Effect.SETTLE_TARGET, Effect.ORDINARY)
        return state.ended(Effect.ORDINARY)
    done = Source.GONE if event is Event.SOURCE_LOST else Source.COMPLETE
    after = replace(state, source=done)
    if state.target is Target.RESERVING:
        return after, (Effect.SETTLE_SOURCE,)
    if state.target is Target.RESERVED:
        begun = replace(after, target=Target.BEGUN)
        return begun, (Effect.SETTLE_SOURCE, Effect.BEGIN, BEGUN)
    if done is Source.GONE:
        return after.ended(Effect.ORDINARY)
    if state.address:
        return after, (Effect.SETTLE_SOURCE, Effect.FIND_TARGET)
    return after.ended(Effect.SETTLE_SOURCE, Outcome("no target"), Effect.PLACE_TOGETHER)


def _search_ended(state: HandOverState, *, found: bool) -> Transition:
    if state.target is not Target.NONE or not state.address:
        return state, ()
    if found:
        return replace(state, target=Target.RESERVING), (Effect.RESERVE,)
    if state.source is Source.OFFERED:
        return state, ()  # one may be found when the prefill ends
    return state.ended(Outcome("no target"), Effect.PLACE_TOGETHER)


def _begun_target(state: HandOverState, event: Event) -> Transition:
    """Handle an event of a target that was sent `Begin`.

    Once it sends output, it has read all KV that it will ever read.
    """
    if event is Event.TARGET_REFUSED:
        return state.ended(Outcome("late"), Effect.SETTLE_TARGET, Effect.PLACE_TOGETHER)
    if event in (Event.TARGET_OUTPUT, Event.TARGET_LOST):
        return state.ended(Effect.ORDINARY)
    return state, ()


def _target(state: HandOverState, event: Event) -> Transition:
    """Handle an event of a target that was not sent `Begin` yet."""
    if state.target is Target.CHOSEN:
        return state.ended(Effect.ORDINARY) if event is Event.TARGET_LOST else (state, ())
    if not state.reserved or event is Event.TARGET_OUTPUT:
        return state, ()
    if event is Event.TARGET_ACCEPTED:
        if state.lent or state.source in (Source.COMPLETE, Source.GONE):
            return replace(state, target=Target.BEGUN), (Effect.BEGIN, BEGUN)
        return replace(state, target=Target.RESERVED), ()
    if state.lent:
        if event is Event.TARGET_REFUSED:
            return state.ended(Outcome("target refused"), Effect.SEND_WHOLE)
        # Unreachable: its loss is still to come, to a request that is on the target.
        return state.ended(Effect.ORDINARY) if event is Event.TARGET_LOST else state.ended()
    refused = (Outcome("target refused"),) if event is Event.TARGET_REFUSED else ()
    if state.source is Source.GONE:
        return state.ended(*refused, Effect.SETTLE_TARGET, Effect.PLACE_TOGETHER)
    again = replace(state, target=Target.NONE)
    return again, (*refused, Effect.SETTLE_TARGET, Effect.FIND_TARGET)
