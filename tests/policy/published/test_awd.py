"""AWD as published: rounds, windows, breaks and the feedback rule, under a fake clock."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.pending import Pending
from pla_serve.policy.published.awd import (
    AdaptiveWaitDepth,
    AwdOptions,
    Cause,
    Dispatch,
    WaitUntil,
)
from pla_serve.policy.published.levels import LengthLevels
from pla_serve.policy.shapes.ladder import (
    GRID_TOKENS,
    Fallback,
    Ladder,
    Layout,
    Shape,
    grid,
    slots,
)


def cost(tokens: int, batch: int) -> float:
    return 0.004 + 1e-5 * tokens * batch


def eager(tokens: int, batch: int) -> float:
    return 0.012 + 1e-5 * tokens


LADDER = Ladder(grid(), cost, eager=eager)


def short(name: int, tokens: int, arrival: float, deadline: float | None = None) -> Pending:
    return Pending(str(name), arrival, deadline, 0, name, tokens, 0, True, 0.0, None)


def shorts(*lengths: int, arrival: float = 0.0) -> list[Pending]:
    return [short(i, length, arrival + i * 1e-6) for i, length in enumerate(lengths)]


def decide(
    awd: AdaptiveWaitDepth, pending: list[Pending], now: float
) -> Dispatch | WaitUntil | None:
    queue = LengthLevels(GRID_TOKENS)
    for request in pending:
        queue.push(request)
    decision = awd.decide(queue, now)
    for request in pending:
        queue.discard(request)
    assert len(queue) == 0
    assert queue.most_urgent() is None
    return decision


def test_a_round_ends_with_its_window() -> None:
    awd = AdaptiveWaitDepth(AwdOptions(window=0.007), LADDER)
    pending = shorts(30, 20)
    assert decide(awd, [], 0.9) is None
    assert decide(awd, pending, 0.01) == WaitUntil(0.01 + 0.007)
    assert isinstance(decide(awd, pending, 0.0169), WaitUntil)
    done = decide(awd, pending, 0.01 + 0.007)
    assert isinstance(done, Dispatch)
    assert done.cause is Cause.WINDOW
    assert done.ids == ("0", "1")
    assert done.fit.shape == Shape(32, 2)
    again = decide(awd, pending, 0.017)
    assert again == WaitUntil(0.017 + 0.007)


def test_a_round_ends_at_depth() -> None:
    awd = AdaptiveWaitDepth(AwdOptions(), LADDER)
    awd.observe(3, 0.01)
    assert awd.depth == 3
    assert isinstance(decide(awd, shorts(30, 20), 0.0), WaitUntil)
    done = decide(awd, shorts(30, 20, 25), 0.001)
    assert isinstance(done, Dispatch)
    assert done.cause is Cause.DEPTH
    assert done.fit.shape == Shape(32, 4)


def test_the_first_depth_is_the_deepest_shape_within_memory() -> None:
    assert AdaptiveWaitDepth(AwdOptions(), LADDER).depth == 64
    assert AdaptiveWaitDepth(AwdOptions(memory_tokens=8 * 16), LADDER).depth == 16
    assert AdaptiveWaitDepth(AwdOptions(max_requests=9), Ladder([], cost)).depth == 9


@given(
    st.lists(st.tuples(st.integers(1, 70), st.floats(0, 0.1)), max_size=20),
    st.floats(0, 0.005),
    st.floats(0.02, 0.05),
)
def test_the_feedback_rule_is_the_published_one(
    batches: list[tuple[int, float]], low: float, high: float
) -> None:
    awd = AdaptiveWaitDepth(AwdOptions(window_min=low, window_max=high), LADDER)
    window, depth = 0.007, 64
    for d, tau in batches:
        awd.observe(d, tau)
        if d >= depth:
            window = min(max(tau, low), high)
        else:
            depth = d
        assert (awd.window, awd.depth) == (window, depth)


def test_the_window_follows_deadlines_and_the_rate() -> None:
    options = AwdOptions(window_max=1.0, delta=0.05, sigma=0.0, head_wait=9.0)
    service = cost(32, 1)
    awd = AdaptiveWaitDepth(options, LADDER)
    decide(awd, [short(0, 30, 0.0, deadline=0.2)], 0.0)
    assert awd.window == pytest.approx(0.2 - service - 0.05)

    busy = AdaptiveWaitDepth(options, LADDER)
    for step in range(1001):
        busy.arrived(step / 100)
    decide(busy, [short(0, 30, 10.0)], 10.0)
    assert busy.window == pytest.approx(63 / 100, rel=0.01)
    decide(busy, [], 10.0)
    decide(busy, [short(0, 30, 10.0, deadline=10.1)], 10.0)
    assert busy.window == pytest.approx(0.1 - service - 0.05)
    decide(busy, [], 10.0)
    decide(busy, [short(0, 30, 10.0, deadline=10.01)], 10.0)
    assert busy.window == options.window_min


def test_a_close_deadline_and_an_old_head_break_the_round() -> None:
    awd = AdaptiveWaitDepth(AwdOptions(window_max=1.0, window=1.0, head_wait=0.05), LADDER)
    old = short(0, 200, 0.0)
    assert decide(awd, [old], 0.0) == WaitUntil(0.05)
    urgent = short(1, 20, 0.01, deadline=0.03)
    done = decide(awd, [old, urgent], 0.02)
    assert isinstance(done, Dispatch)
    assert done.cause is Cause.SLACK
    assert done.ids == ("1",)
    late = decide(awd, [old], 0.05)
    assert isinstance(late, Dispatch)
    assert late.cause is Cause.HEAD


def test_token_max_fills_up_and_ignores_deadlines() -> None:
    options = AwdOptions(mode="token_max", token_target=100)
    awd = AdaptiveWaitDepth(options, LADDER)
    waiting = decide(awd, [short(0, 60, 0.0, deadline=0.0)], 0.0)
    assert waiting == WaitUntil(0.007)
    done = decide(awd, shorts(60, 50), 0.001)
    assert isinstance(done, Dispatch)
    assert done.cause is Cause.TOKENS
    assert done.fit.shape == Shape(64, 2)


def test_a_batch_that_can_take_no_more_goes() -> None:
    awd = AdaptiveWaitDepth(AwdOptions(mode="token_max", memory_tokens=512), LADDER)
    done = decide(awd, shorts(200, 220, 240), 0.0)
    assert isinstance(done, Dispatch)
    assert done.cause is Cause.FULL
    assert done.ids == ("0", "1")


def test_lengths_are_grouped_and_empty_rows_are_filled() -> None:
    awd = AdaptiveWaitDepth(AwdOptions(window=0.0), LADDER)
    done = decide(awd, shorts(100, 5, 120, 6, 110, 250), 0.0)
    assert isinstance(done, Dispatch)
    assert done.ids == ("0", "2", "4", "1")
    assert done.fit.shape == Shape(128, 4)


def test_what_fits_no_shape_runs_on_ordinary_kernels() -> None:
    awd = AdaptiveWaitDepth(AwdOptions(window=0.0), LADDER)
    done = decide(awd, shorts(300, 20), 0.0)
    assert isinstance(done, Dispatch)
    assert done.fit.reason is Fallback.TOO_LONG
    assert done.ids == ("0", "1")


requests = st.lists(
    st.tuples(st.integers(1, 300), st.floats(0, 0.2), st.none() | st.floats(0, 0.4)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(requests, st.sampled_from(["deadline", "token_max"]), st.integers(200, 4000))
def test_everybody_is_dispatched_once_within_every_bound(
    rows: list[tuple[int, float, float | None]], mode: str, memory: int
) -> None:
    """The device is always free, so that nothing but AWD delays anybody."""
    options = AwdOptions(mode=mode, memory_tokens=memory, head_wait=0.03)
    ladder = Ladder(grid(), cost, eager=eager)
    awd = AdaptiveWaitDepth(options, ladder)
    coming = sorted((short(i, *row) for i, row in enumerate(rows)), key=lambda r: r.arrival)
    pending: list[Pending] = []
    now, seen, steps = 0.0, set(), 0
    while coming or pending:
        steps += 1
        assert steps < 500
        while coming and coming[0].arrival <= now:
            awd.arrived(coming[0].arrival)
            pending.append(coming.pop(0))
        following = coming[0].arrival if coming else inf
        decision = decide(awd, pending, now)
        if decision is None:
            now = following
        elif isinstance(decision, WaitUntil):
            assert decision.time > now
            now = min(decision.time, following)
            head = min(r.arrival for r in pending)
            assert decision.time <= head + options.head_wait + 1e-9
            assert decision.time <= now + options.window_max + 1e-9
            if mode == "deadline":
                due = min((r.deadline for r in pending if r.deadline is not None), default=inf)
                assert decision.time <= due - options.sigma
        else:
            group = [r for r in pending if r.id in decision.ids]
            assert len(group) == len(decision.ids) > 0
            assert not seen & set(decision.ids)
            seen |= set(decision.ids)
            tokens = sum(r.new_tokens for r in group)
            if decision.fit.shape is not None:
                assert slots(decision.fit.shape, Layout.PADDED) <= memory
            else:
                assert tokens <= memory or len(group) == 1
            pending = [r for r in pending if r.id not in decision.ids]
            awd.observe(len(group), decision.fit.seconds)
    assert len(seen) == len(rows)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="sigma must be finite"):
        AwdOptions(sigma=-1)
    with pytest.raises(ValueError, match="token_target must be at least 1"):
        AwdOptions(token_target=0)
    with pytest.raises(ValueError, match="between window_min and window_max"):
        AwdOptions(window=1.0)
    with pytest.raises(ValueError, match="at least one request"):
        AdaptiveWaitDepth(AwdOptions(), LADDER).observe(0, 1.0)
