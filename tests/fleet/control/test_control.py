"""The controller over links: what it must never do, and how fast it does what it should."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.fleet.control.control import FleetControl
from pla_serve.fleet.link.protocol import Role
from pla_serve.policy.pools.balance import BalanceController
from pla_serve.policy.pools.pressure import PressureController
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.pools.registry import parse_controller
from tests.fleet.control.fluid_fleet import FakeLink, FluidFleet

ROLES = ("short", "long", "decode")

fleets = st.builds(
    lambda short, long, decode: ["short"] * short + ["long"] * long + ["decode"] * decode,
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 3),
)
shares = st.floats(0, 1)


def rates(total: int, short: float, long: float, decode: float) -> tuple[float, float, float]:
    """Demands of three kinds, in instances; together up to a third more than there are."""
    whole = max(short + long + decode, 1e-9)
    return tuple(1.3 * total * part / max(whole, 1.0) for part in (short, long, decode))  # type: ignore[return-value]


@given(fleets, shares, shares, shares)
@settings(max_examples=40, deadline=None)
def test_steady_demand_comes_to_rest(
    roles: list[Role], short: float, long: float, decode: float
) -> None:
    """Whatever the demand is, moves end, unless no split can hold it."""
    fleet = FluidFleet(roles, BalanceController())
    asked = rates(len(roles), short, long, decode if "decode" in roles else 0.0)
    fleet.run(100, *asked)
    late = [move for moves in fleet.run(40, *asked) for move in moves]
    # Classes that cannot both be held take turns, as `BalanceController` says; nobody else does.
    fits = asked[0] <= fleet.count("short") and asked[1] <= fleet.count("long")
    if fits:
        assert late == []
    assert not [move for move in late if Pool.DECODE in (move.source, move.target)]


@given(
    fleets,
    st.lists(st.tuples(shares, shares, shares, st.integers(0, 14), st.booleans()), max_size=25),
    st.sampled_from(["balance", "pressure"]),
)
@settings(max_examples=40, deadline=None)
def test_no_needed_pool_is_left_empty(
    roles: list[Role], steps: list[tuple[float, float, float, int, bool]], controller: str
) -> None:
    """Under random demands, failures and returns: who moves leaves somebody behind, and nobody is
    told two things at once."""
    fleet = FluidFleet(roles, parse_controller(controller))
    for short, long, decode, number, restart in steps:
        link = fleet.links[number % len(fleet.links)]
        if link.connected:
            link.die()
            fleet.control.lost(link)  # type: ignore[arg-type]
        elif restart:
            link.restart()
        asked = rates(len(roles), short, long, decode)
        for period in range(3):
            before = {role: fleet.count(role) for role in ROLES}
            (moves,) = fleet.run(1, *asked)
            assert len({move.instance_id for move in moves}) == len(moves)
            # In its first period one that came back is told what it was before.
            for role in ROLES if period else ():
                assert fleet.count(role) >= min(1, before[role]), (role, before, moves)
            living = sum(link.connected for link in fleet.links)
            assert sum(fleet.count(role) for role in ROLES) == living
        if controller == "balance" and fleet.count("short") + fleet.count("long") >= 2:
            assert fleet.count("short")
            assert fleet.count("long")


@pytest.mark.parametrize("size", [4, 8, 100])
def test_step_of_the_mix_is_answered_in_two_periods(size: int) -> None:
    """Half and half becomes short only: after two decisions the pools fit the new mix."""
    half: list[Role] = ["short"] * (size // 2) + ["long"] * (size // 2)
    fleet = FluidFleet(half, BalanceController())
    fleet.run(30, 0.4 * size, 0.4 * size, jobs=64)
    assert fleet.count("short") == size // 2
    fleet.run(2, 0.7 * size, 0.05 * size, jobs=64)
    assert fleet.count("short") >= 0.7 * size
    moves = fleet.run(60, 0.7 * size, 0.05 * size, jobs=64)
    assert sum(map(len, moves)) <= 1
    assert fleet.queued[Pool.SHORT] < 0.1


def test_full_decode_pool_gets_a_prefill_instance_and_gives_it_back() -> None:
    fleet = FluidFleet(["short", "short", "long", "decode"], BalanceController())
    fleet.run(10, 0.3, 0.3, 0.5)
    assert fleet.control.moves_total == 0
    fleet.run(3, 0.3, 0.3, 1.5)
    assert fleet.count("decode") == 2
    fleet.run(60, 1.1, 1.1, 0.2)
    assert fleet.count("decode") == 1
    assert fleet.count("short") + fleet.count("long") == 3


def test_last_decode_instance_that_died_is_replaced() -> None:
    fleet = FluidFleet(["short", "short", "long", "decode"], BalanceController())
    fleet.run(2, 0.1, 0.1, 0.1)
    fleet.links[3].die()
    fleet.run(1, 0.1, 0.1, 0.1)
    assert fleet.count("decode") == 1
    assert fleet.count("short") == 1


def test_without_a_decode_pool_nobody_is_told_to_decode() -> None:
    fleet = FluidFleet(["short", "short", "long"], BalanceController())
    fleet.run(30, 0.1, 0.1)
    assert fleet.count("decode") == 0


def test_restarted_instance_is_told_its_role_again() -> None:
    fleet = FluidFleet(["short", "long", "long"], BalanceController())
    fleet.burst(Pool.SHORT, 60.0)
    fleet.run(1, 0.5, 0.1)
    (moved,) = [link for link in fleet.links if link.told]
    assert moved.role == "short"
    moved.die()
    fleet.control.lost(moved)  # type: ignore[arg-type]
    fleet.queued = dict.fromkeys(fleet.queued, 0.0)
    moved.restart()
    assert moved.role == "long"
    fleet.run(5, 0.5, 0.1)
    assert moved.role == "short"


def test_instances_that_take_no_requests_are_not_counted_and_not_moved() -> None:
    fleet = FluidFleet(["short", "long", "long", "long"], BalanceController())
    for link in fleet.links[2:]:
        link.say(draining=True)
    control = fleet.control
    control.dispatched(True, 50.0, 0.0)
    fleet.links[0].say(queued_short_seconds=50.0)
    assert not control.tick(1.0)
    assert not any(link.told for link in fleet.links)


def test_published_controller_moves_one_at_a_time() -> None:
    fleet = FluidFleet(["short"] + ["long"] * 5, PressureController())
    fleet.burst(Pool.SHORT, 500.0)
    made = [len(moves) for moves in fleet.run(12, 0.0, 0.0)]
    assert max(made) == 1
    assert 2 <= sum(made) <= 3  # the cool-down is 5 s


def test_without_controller_the_signal_is_kept_all_the_same() -> None:
    fleet = FluidFleet(["short", "long"], None)
    fleet.burst(Pool.LONG, 300.0)
    assert fleet.run(1, 0.5, 0.5) == [[]]
    desired = fleet.control.desired
    assert desired is not None
    assert desired.prefill >= 10  # 300 s of backlog in 30 s


def test_signal_counts_what_the_router_holds_back() -> None:
    control = FleetControl(list, None)
    control.tick(1.0, held_seconds=90.0)
    assert control.desired is not None
    assert control.desired.prefill == 3


def test_mixed_instances_are_left_alone() -> None:
    fleet = FluidFleet(["mixed"] * 4, BalanceController())
    assert not [m for moves in fleet.run(20, 3.0, 0.5) for m in moves]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "unknown controller 'magic'; known are: balance, pressure"),
        ("balance:depth=1", "no knob 'depth'"),
        ("pressure:alpha=x", "knob alpha of controller pressure is a number"),
        ("balance:min_instances=0.5", "a whole number"),
        ("balance:dead_band=2", "dead_band"),
    ],
)
def test_controllers_are_named_with_knobs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_controller(text)
    assert isinstance(parse_controller("pressure:cooldown-seconds=1"), PressureController)


def test_link_that_does_not_obey_is_told_again() -> None:
    fleet = FluidFleet(["short", "long", "long"], BalanceController())
    for link in fleet.links:
        link.deaf = True
    fleet.burst(Pool.SHORT, 60.0)
    fleet.run(8, 0.5, 0.1)
    told: list[FakeLink] = [link for link in fleet.links if link.told]
    assert len(told) == 1
    assert told[0].told == ["short"] * len(told[0].told)
    assert 2 <= len(told[0].told) <= 4
