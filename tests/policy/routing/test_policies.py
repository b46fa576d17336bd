from __future__ import annotations

from collections import Counter
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.cache_aware import CacheAware
from pla_serve.policy.routing.class_pools import ClassPools
from pla_serve.policy.routing.least_loaded import LeastLoaded
from pla_serve.policy.routing.predicted import Predicted
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.registry import ROUTINGS, parse_routing
from pla_serve.policy.routing.request import FleetModel, NoInstance, RouteRequest
from pla_serve.policy.routing.round_robin import RoundRobin
from pla_serve.policy.routing.router import Placement, Router


def router(policy: RoutingPolicy, *pools: Pool, **model: object) -> Router:
    """Instances i0, i1, ... of these pools; a millisecond a token."""
    made = Router(policy, FleetModel(lambda new, history: new * 1e-3, **model))  # type: ignore[arg-type]
    for number, pool in enumerate(pools):
        made.added(f"i{number}", pool, 0.0)
    return made


def send(made: Router, now: float, name: str, tokens: int, **cached: int) -> str:
    request = RouteRequest(name, tokens, cached)
    chosen = made.choose(request, now)
    made.dispatched(request, chosen, now)
    return chosen


def test_round_robin_goes_round() -> None:
    made = router(RoundRobin(), *[Pool.MIXED] * 3)
    assert [send(made, 0.0, str(n), 10) for n in range(4)] == ["i0", "i1", "i2", "i0"]
    made.removed("i2")
    made.added("i3", Pool.MIXED, 0.0)
    assert {send(made, 0.0, str(n), 10) for n in range(4, 7)} == {"i0", "i1", "i3"}


def test_round_robin_takes_turns_in_each_pool() -> None:
    policy, made = RoundRobin(), router(RoundRobin(), Pool.SHORT, Pool.LONG, Pool.SHORT, Pool.LONG)
    request = RouteRequest("r", 10)
    view = made.view
    turns = [policy.choose(request, view, p, 0.0) for p in (Pool.LONG, Pool.SHORT) * 3]
    assert turns == [1, 0, 3, 2, 1, 0]


@pytest.mark.parametrize(("by", "expected"), [("requests", "i0"), ("tokens", "i1")])
def test_least_loaded(by: str, expected: str) -> None:
    made = router(LeastLoaded(by), Pool.MIXED, Pool.MIXED)  # type: ignore[arg-type]
    made.dispatched(RouteRequest("long", 5000), "i0", 0.0)
    for n in range(3):
        made.dispatched(RouteRequest(f"short{n}", 10), "i1", 0.0)
    assert send(made, 0.0, "next", 10) == expected


def test_an_idle_fleet_is_used_evenly() -> None:
    for policy in (LeastLoaded(), LeastLoaded("tokens"), CacheAware(), Predicted(), RoundRobin()):
        made = router(policy, *[Pool.MIXED] * 4)
        used: Counter[str] = Counter()
        for n in range(40):
            used[send(made, float(n), str(n), 100)] += 1
            made.finished(str(n), n + 0.5)
        assert set(used.values()) == {10}, policy


def test_requests_count_until_finished_and_tokens_until_prefilled() -> None:
    made = router(LeastLoaded(), Pool.MIXED)
    send(made, 0.0, "r", 70)
    assert (made.view.requests[0], made.view.tokens[0]) == (1, 70)
    made.prefilled("r", 1.0)
    assert (made.view.requests[0], made.view.tokens[0]) == (1, 0)
    made.finished("r", 2.0)
    made.finished("r", 2.0)
    assert made.view.requests[0] == 0


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=5),
    st.integers(1, 1000),
    st.dictionaries(st.integers(0, 4), st.integers(0, 1000)),
    st.floats(0, 1),
    st.integers(0, 6),
    st.floats(1, 3),
)
def test_cache_aware_step_by_step(loads, prompt, cached, threshold, abs_, rel) -> None:
    made = router(CacheAware(threshold, abs_, rel), *[Pool.MIXED] * len(loads))
    for index, load in enumerate(loads):
        for n in range(load):
            made.dispatched(RouteRequest(f"{index}.{n}", 10 + index), f"i{index}", 0.0)
    held = {f"i{index}": min(c, prompt - 1) for index, c in cached.items() if index < len(loads)}
    chosen = int(made.choose(RouteRequest("r", prompt, held), 0.0)[1:])
    best = max(held.values(), default=0)
    if max(loads) - min(loads) > abs_ and max(loads) > rel * min(loads):
        assert loads[chosen] == min(loads)
    elif best and best > threshold * prompt:
        tied = [n for n in range(len(loads)) if held.get(f"i{n}", 0) == best]
        assert chosen in tied
        assert loads[chosen] == min(loads[n] for n in tied)
    else:
        sizes = [load * (10 + index) for index, load in enumerate(loads)]
        assert sizes[chosen] == min(sizes)


def test_predicted_weighs_queue_against_cache() -> None:
    made = router(Predicted(others=0.0), Pool.MIXED, Pool.MIXED, express=False)
    made.dispatched(RouteRequest("a", 2000), "i0", 0.0)
    assert send(made, 0.0, "b", 3000, i0=1500) == "i1", "2.0 + 1.5 s against 3.0 s"
    assert send(made, 0.0, "c", 3000, i0=2900) == "i0", "2.0 + 0.1 s against 3.0 + 3.0 s"


def test_predicted_weighs_what_others_lose() -> None:
    """1.6 s of queue and 0.1 s of work, or 1.5 s of work; one request waits on two instances."""
    for others, expected in ((0.0, "i1"), (0.4, "i0")):
        made = router(Predicted(others), Pool.MIXED, Pool.MIXED, express=False)
        made.dispatched(RouteRequest("a", 1600), "i0", 0.0)
        assert send(made, 0.0, "b", 1500, i0=1400) == expected
    made.finished("a", 0.0)
    made.removed("i0")
    assert made.view.waiting == 0


def test_predicted_lets_shorts_pass_longs_only_where_the_instance_does() -> None:
    for express, expected in ((True, "i0"), (False, "i1")):
        made = router(Predicted(), Pool.MIXED, Pool.MIXED, express=express)
        made.dispatched(RouteRequest("long", 9000), "i0", 0.0)
        for n in range(3):
            made.dispatched(RouteRequest(f"s{n}", 200), "i1", 0.0)
        assert send(made, 0.0, "s", 100) == expected


def test_of_equal_express_queues_the_emptier_instance() -> None:
    made = router(Predicted(), Pool.MIXED, Pool.MIXED)
    made.dispatched(RouteRequest("long", 9000), "i0", 0.0)
    assert send(made, 0.0, "s", 100) == "i1"


def test_work_that_is_done_early_or_late_is_corrected() -> None:
    made = router(Predicted(), Pool.MIXED, Pool.MIXED, express=False)
    made.dispatched(RouteRequest("a", 5000), "i0", 0.0)
    made.dispatched(RouteRequest("b", 1000), "i0", 0.0)
    assert made.view.wait(0, False, 0.0) == 6.0
    made.prefilled("a", 2.0)
    assert made.view.wait(0, False, 2.0) == 1.0, "early"
    made.prefilled("b", 9.0)
    assert made.view.wait(0, False, 9.0) == 0.0, "late"


def test_shorts_that_are_a_little_late_are_joined_and_slow_instances_are_not() -> None:
    """They share a launch; 200 tokens at most take 0.2 s here."""
    made = router(Predicted(), Pool.MIXED, Pool.MIXED)
    made.dispatched(RouteRequest("long", 9000), "i1", 0.0)
    made.dispatched(RouteRequest("s", 100), "i0", 0.0)
    late = made.view.model.grace_seconds
    assert made.choose(RouteRequest("a", 100), 0.1 + 0.9 * late) == "i0"
    assert made.choose(RouteRequest("b", 100), 0.1 + 1.1 * late) == "i1"


def test_a_report_counts_what_was_dispatched_after_it() -> None:
    made = router(Predicted(), Pool.MIXED, express=True)
    made.dispatched(RouteRequest("a", 4000), "i0", 1.0)
    made.dispatched(RouteRequest("b", 200), "i0", 3.0)
    made.reported("i0", 7.0, 0.5, at=2.0)
    assert made.view.wait(0, False, 3.0) == pytest.approx(2.0 + 7.0 + 0.2 - 3.0)
    assert made.view.wait(0, True, 2.0) == pytest.approx(0.5 + 0.2)
    made.reported("gone", 7.0, 0.5, at=2.0)


def test_shorts_of_one_queue_share_a_launch() -> None:
    made = router(Predicted(), Pool.MIXED, launch_seconds=0.05)
    for n in range(3):
        made.dispatched(RouteRequest(f"s{n}", 100), "i0", 0.0)
    assert made.view.wait(0, True, 0.0) == pytest.approx(0.1 + 2 * 0.05)
    made.dispatched(RouteRequest("long", 1000), "i0", 0.0)
    assert made.view.wait(0, False, 0.0) == pytest.approx(0.2 + 1.0)


def test_kv_is_fetched_where_that_is_faster() -> None:
    made = router(
        Predicted(others=0.0), Pool.MIXED, Pool.MIXED, transfer_seconds=lambda tokens: 0.3
    )
    request = RouteRequest("r", 1000, {"i0": 900})
    assert made.place(request, "i0") == Placement(100, 900, None, 0, 0.1)
    assert made.place(request, "i1") == Placement(100, 900, "i0", 900, pytest.approx(0.4))
    near = RouteRequest("r", 1000, {"i0": 900, "i1": 800})
    assert made.place(near, "i1") == Placement(200, 800, None, 0, 0.2)
    for n in range(4):
        made.dispatched(RouteRequest(f"s{n}", 100), "i0", 0.0)
    assert send(made, 0.0, "r", 1000, i0=900) == "i1", "0.4 + 0.1 s against 0.4 s"


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=5),
    st.integers(1, 4000),
    st.dictionaries(st.integers(0, 4), st.integers(0, 4000)),
    st.booleans(),
    st.one_of(st.none(), st.floats(0, 2)),
    st.floats(0, 3),
)
def test_predicted_against_brute_force(queued, prompt, cached, express, transfer, others) -> None:
    fetch = None if transfer is None else (lambda tokens: transfer)
    policy = Predicted(others)
    made = router(policy, *[Pool.MIXED] * len(queued), express=express, transfer_seconds=fetch)
    for index, tokens in enumerate(queued):
        if tokens:
            made.dispatched(RouteRequest(f"q{index}", tokens), f"i{index}", 0.0)
    request = RouteRequest("r", prompt, {f"i{index}": c for index, c in cached.items()})
    costs = [policy.cost(request, made.view, n, 0.1) for n in range(len(queued))]
    chosen = int(made.choose(request, 0.1)[1:])
    # Of almost equal express queues, by TIE of 4 s, the one with less other work is taken.
    assert costs[chosen] == pytest.approx(min(costs), abs=0.005 if express else 1e-6)


def pools_of(made: Router, **prompts: int) -> dict[str, str]:
    return {name: send(made, 0.0, name, tokens) for name, tokens in prompts.items()}


def test_class_pools_keep_the_classes_apart() -> None:
    made = router(ClassPools(overflow_seconds=inf), Pool.SHORT, Pool.LONG)
    assert pools_of(made, a=100, b=5000, c=256, d=257) == {
        "a": "i0",
        "b": "i1",
        "c": "i0",
        "d": "i1",
    }


def test_a_class_is_what_its_pool_lacks() -> None:
    """History in the long pool is of no use to the short one, unless KV can be fetched."""
    near, far = {"i0": 900}, {"i1": 900}
    for transfer, expected in ((None, Pool.LONG), (lambda tokens: 0.0, Pool.SHORT)):
        made = router(ClassPools(), Pool.SHORT, Pool.LONG, transfer_seconds=transfer)
        assert ClassPools().pool_of(RouteRequest("r", 1000, near), made.view) is Pool.SHORT
        assert ClassPools().pool_of(RouteRequest("r", 1000, far), made.view) is expected


def test_overflow_into_an_idle_pool_with_a_reserve_for_shorts() -> None:
    made = router(ClassPools(reserve=1), Pool.SHORT, Pool.SHORT, Pool.LONG)
    assert send(made, 0.0, "a", 5000) == "i2"
    assert send(made, 0.0, "b", 5000) in ("i0", "i1"), "one of two idle"
    assert send(made, 0.0, "c", 5000) == "i2", "the last idle one is the shorts'"
    assert send(made, 0.0, "d", 100) in ("i0", "i1")


def test_shorts_overflow_into_an_idle_long_instance() -> None:
    made = router(ClassPools(overflow_seconds=0.15), Pool.SHORT, Pool.LONG)
    sent = [send(made, 0.0, str(n), 100) for n in range(3)]
    assert sent == ["i0", "i0", "i1"]


def test_an_empty_pool_is_served_by_the_other() -> None:
    made = router(ClassPools(), Pool.LONG)
    assert pools_of(made, a=100, b=5000) == {"a": "i0", "b": "i0"}
    decode = router(ClassPools(), Pool.DECODE)
    assert send(decode, 0.0, "a", 100) == "i0"


@given(
    st.sampled_from(sorted(ROUTINGS)),
    st.lists(st.sampled_from([Pool.SHORT, Pool.LONG, Pool.MIXED]), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 4), st.integers(0, 5000)), max_size=30),
)
@settings(deadline=None)
def test_every_policy_chooses_a_living_instance_and_repeats_itself(name, pools, requests) -> None:
    def choices() -> list[str]:
        made = router(parse_routing(name), *pools)
        sent = []
        for number, (prompt, holder, cached) in enumerate(requests):
            sent.append(send(made, number * 0.1, str(number), prompt, **{f"i{holder}": cached}))
            if number % 7 == 3 and len(made.view) > 1:
                made.removed(sent[-1])
            assert len(made.view)
        return sent

    assert choices() == choices()


def test_misuse_is_named() -> None:
    made = router(Predicted(), Pool.MIXED)
    with pytest.raises(ValueError, match="added before"):
        made.added("i0", Pool.MIXED, 0.0)
    with pytest.raises(KeyError, match="no instance 'x'"):
        made.removed("x")
    made.dispatched(RouteRequest("r", 10), "i0", 0.0)
    with pytest.raises(ValueError, match="dispatched already"):
        made.dispatched(RouteRequest("r", 10), "i0", 0.0)
    assert made.removed("i0") == ["r"]
    with pytest.raises(NoInstance, match="no instance is ready"):
        made.choose(RouteRequest("r", 10), 0.0)
    with pytest.raises(ValueError, match="launch_seconds"):
        FleetModel(lambda new, history: 0.0, launch_seconds=-1.0)
    with pytest.raises(ValueError, match="boundary_tokens"):
        FleetModel(lambda new, history: 0.0, boundary_tokens=-1)


def test_parse() -> None:
    assert parse_routing("cache-aware:cache-threshold=0.5:balance_abs=32") == CacheAware(0.5, 32)
    assert parse_routing("least-loaded:by=tokens") == LeastLoaded("tokens")
    pools = parse_routing("class-pools:inner=least-loaded:overflow_seconds=inf")
    assert pools == ClassPools(LeastLoaded(), inf)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nearest", "unknown routing 'nearest'; known are: round-robin"),
        ("round-robin:step=2", "has no knob 'step'; it has none"),
        ("cache-aware:depth=2", "has no knob 'depth'; it has: cache_threshold"),
        ("cache-aware:balance_abs", "not of the form knob=value"),
        ("cache-aware:balance_abs=x", "is a whole number, not 'x'"),
        ("cache-aware:balance_abs=1:balance_abs=1", "given twice"),
        ("cache-aware:balance_rel=0.5", "balance_rel must be at least 1"),
        ("cache-aware:cache_threshold=2", "cache_threshold must lie in"),
        ("cache-aware:balance_abs=-1", "balance_abs must be at least 0"),
        ("predicted:others=-1", "others must be finite"),
        ("least-loaded:by=luck", "by must be requests or tokens"),
        ("class-pools:inner=class-pools", "another routing"),
        ("class-pools:inner=nearest", "unknown routing"),
        ("class-pools:reserve=-1", "reserve must be at least 0"),
        ("class-pools:overflow_seconds=nan", "overflow_seconds must be at least 0"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_routing(text)


def test_what_every_instance_holds_needs_no_list() -> None:
    listed = {"i0": 90, "i1": 90}
    for policy in (Predicted(), CacheAware(), ClassPools(), LeastLoaded()):
        made = router(policy, Pool.SHORT, Pool.LONG, boundary_tokens=20)
        common = RouteRequest("r", 100, {}, 90)
        assert made.choose(common, 0.0) == made.choose(RouteRequest("r", 100, listed), 0.0)
        assert made.place(common, "i0") == Placement(10, 90, None, 0, 0.01)
    more = RouteRequest("r", 100, {"i0": 95, "i1": 40}, 90)
    made = router(Predicted(), Pool.MIXED, Pool.MIXED)
    assert [made.place(more, name).history for name in ("i0", "i1")] == [95, 90]
    assert made.choose(more, 0.0) == "i0"


def test_bulk_work_counts_as_long_whatever_its_size() -> None:
    """So it has the pool of longs, and no short is predicted to wait for it."""
    pools = router(ClassPools(), Pool.SHORT, Pool.LONG)
    assert pools.choose(RouteRequest("bulk", 10, bulk=True), 0.0) == "i1"
    assert pools.choose(RouteRequest("usual", 10), 0.0) == "i0"
    made = router(Predicted(), Pool.MIXED, Pool.MIXED)
    for number in range(50):
        made.dispatched(RouteRequest(f"bulk{number}", 100, bulk=True), "i0", 0.0)
    made.dispatched(RouteRequest("short", 100), "i1", 0.0)
    assert made.choose(RouteRequest("next", 100), 0.0) == "i0"
    assert made.choose(RouteRequest("long", 5000), 0.0) == "i1"
