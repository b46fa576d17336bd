"""The hand-over's state machine alone: every event in every reachable state."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.fleet.router.hand_over import (
    BEGUN,
    LENDING,
    Effect,
    Effects,
    Event,
    HandOverState,
    Offered,
    Outcome,
    Source,
    Target,
    advance,
)

EVENTS: list[Event | Offered] = [*Event, Offered(b"address"), Offered(b"")]
STARTS = [HandOverState(), LENDING]
TARGET_GAVE_UP = (Event.TARGET_REFUSED, Event.TARGET_LOST, Event.TARGET_UNREACHABLE)
LAST = (Effect.FIND_TARGET, Effect.RESERVE)
TERMINAL = (Effect.RELEASE, Effect.SEND_WHOLE, Effect.ORDINARY, Effect.PLACE_TOGETHER)


@dataclass(frozen=True)
class Ledger:
    """Consequences of all effects so far."""

    releases: int = 0
    charged: bool = False
    """The request is on the account of a target."""
    asked: bool = False
    """A target holds a reservation, as far as the router knows."""
    begins: int = 0
    source_settled: bool = False


def check_effects(before: HandOverState, event: Event | Offered, ledger: Ledger) -> Ledger:
    """Perform one transition on paper; asserts what must hold of its effects."""
    after, effects = advance(before, event)
    if event is Event.TARGET_FOUND and before.target is Target.NONE and before.address:
        ledger = replace(ledger, charged=True)
    begun_already = event is Event.TARGET_UNREACHABLE and not before.reserved
    if event in TARGET_GAVE_UP and not begun_already:
        ledger = replace(ledger, asked=False)
    for place, effect in enumerate(effects):
        if effect in LAST:
            assert place == len(effects) - 1, "its answer is an event of the next state"
        if effect in TERMINAL:
            assert after is None
        ledger = performed(before, effect, ledger)
    assert after is not None or not set(LAST) & set(effects)
    assert len(set(effects)) == len(effects)
    if after is None:
        check_end(before, event, effects, ledger)
    return ledger


def performed(before: HandOverState, effect: Effect | Outcome, ledger: Ledger) -> Ledger:
    if effect is Effect.RELEASE:
        return replace(ledger, releases=ledger.releases + 1)
    if effect is Effect.RESERVE:
        assert ledger.charged
        assert not ledger.asked, "two reservations at once"
        return replace(ledger, asked=True)
    if effect is Effect.BEGIN:
        assert ledger.asked
        assert not ledger.begins
        assert before.lent or ledger.source_settled, "two instances would make tokens"
        return replace(ledger, begins=1)
    if effect is Effect.ABORT_TARGET:
        assert ledger.asked
        return replace(ledger, asked=False)
    if effect is Effect.SETTLE_TARGET:
        assert ledger.charged
        assert not ledger.asked
        return replace(ledger, charged=False)
    if effect is Effect.SETTLE_SOURCE:
        assert not ledger.source_settled
        return replace(ledger, source_settled=True)
    if effect is Effect.SEND_WHOLE:
        assert before.lent
        assert not ledger.asked, "the target would get the same name twice"
    return ledger


def check_end(
    before: HandOverState, event: Event | Offered, effects: Effects, ledger: Ledger
) -> None:
    source_gone = before.source is Source.GONE or event is Event.SOURCE_LOST
    source_gave_up = before.lent and event in (Event.SOURCE_ENDED, Offered(b""))
    assert ledger.releases == (0 if source_gone or source_gave_up else 1)
    if before.lent or ledger.begins:
        return  # the target's attempt is that of the request, which the caller goes on with
    assert not ledger.asked, "a reservation that nobody will begin or abort"
    assert not ledger.charged


def explore() -> dict[tuple[HandOverState, Ledger], set[HandOverState | None]]:
    """All reachable states with their ledgers, and their successors; asserts on the way."""
    seen: dict[tuple[HandOverState, Ledger], set[HandOverState | None]] = {}
    queue = deque((start, Ledger(charged=start.lent)) for start in STARTS)
    while queue:
        state, ledger = queue.popleft()
        if (state, ledger) in seen:
            continue
        found = seen[state, ledger] = set()
        for event in EVENTS:
            after, _ = advance(state, event)
            next_ledger = check_effects(state, event, ledger)
            found.add(after)
            if after is not None:
                queue.append((after, next_ledger))
    return seen


def test_every_event_in_every_reachable_state_is_legal() -> None:
    seen = explore()
    states = {state for state, _ in seen}
    for state in states:
        assert state.target is not Target.CHOSEN or state.lent
        if state.lent:
            assert state.target in (Target.CHOSEN, Target.RESERVING, Target.BEGUN)
            assert state.source is not Source.OFFERED
        if state.target is Target.BEGUN and not state.lent:
            assert state.source in (Source.COMPLETE, Source.GONE)
        if state.source is Source.GONE:
            assert state.target is not Target.NONE, "nothing to wait for"
    assert {state.target for state in states} == set(Target)
    assert {state.source for state in states} == set(Source)
    for (state, _), found in seen.items():
        assert None in found, f"{state} never ends"


def test_each_target_is_charged_once_in_every_state() -> None:
    """A target's account and reservation exist exactly in the states that say so."""
    for state, ledger in explore():
        if state.lent:
            assert ledger.asked == (state.target is not Target.CHOSEN)
        else:
            assert ledger.charged == ledger.asked == (state.target is not Target.NONE)
        assert ledger.releases == 0
        assert ledger.begins == (state.target is Target.BEGUN)


@pytest.mark.parametrize(
    "event", [Offered(b"address"), Event.TARGET_ACCEPTED, Event.SOURCE_HANDED_OVER]
)
def test_a_message_that_comes_twice_changes_nothing(event: Event | Offered) -> None:
    for state, _ in explore():
        after, effects = advance(state, event)
        if after is not None and not set(LAST) & set(effects):
            assert advance(after, event) == (after, ())


def test_a_hand_over_that_goes_well() -> None:
    offered, effects = advance(HandOverState(), Offered(b"address"))
    assert effects == (Effect.FIND_TARGET,)
    assert offered is not None
    reserving, effects = advance(offered, Event.TARGET_FOUND)
    assert effects == (Effect.RESERVE,)
    assert reserving is not None
    reserved, effects = advance(reserving, Event.TARGET_ACCEPTED)
    assert effects == ()
    assert reserved is not None
    begun, effects = advance(reserved, Event.SOURCE_HANDED_OVER)
    assert effects == (Effect.SETTLE_SOURCE, Effect.BEGIN, BEGUN)
    assert begun is not None
    assert advance(begun, Event.TARGET_OUTPUT) == (None, (Effect.RELEASE, Effect.ORDINARY))


def test_lent_kv_that_is_lost_is_computed_by_the_target() -> None:
    reserving, effects = advance(LENDING, Offered(b"address"))
    assert effects == (Effect.RESERVE,)
    assert reserving is not None
    gone, effects = advance(reserving, Event.SOURCE_LOST)
    assert effects == ()
    assert gone is not None
    begun, effects = advance(gone, Event.TARGET_ACCEPTED)
    assert effects == (Effect.BEGIN, BEGUN)
    assert begun is not None
    assert advance(begun, Event.TARGET_OUTPUT) == (None, (Effect.ORDINARY,))


@given(st.sampled_from(STARTS), st.lists(st.sampled_from(EVENTS), max_size=30))
def test_any_order_of_events(start: HandOverState, events: list[Event | Offered]) -> None:
    state, ledger = start, Ledger(charged=start.lent)
    for event in events:
        ledger = check_effects(state, event, ledger)
        after, _ = advance(state, event)
        if after is None:
            return
        state = after
    ledger = check_effects(state, Event.DROPPED, ledger)
    assert advance(state, Event.DROPPED)[0] is None
