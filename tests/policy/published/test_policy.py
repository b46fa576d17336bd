"""The published system as a policy: what it bounds, what it does not, and that it is the text's."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, BatchClass, PrefillRequest, Run, Wait
from pla_serve.policy.published.boundary import FittedBoundary
from pla_serve.policy.published.latency import LatencyModel
from pla_serve.policy.published.policy import PlaServe, PlaServeOptions
from pla_serve.policy.registry import create_policy
from pla_serve.policy.temporal import PrefillFirst
from tests.policy.executor import Executor, Job

PROFILE = CostProfile(1e-5, 1e-9, 1e-8, 1e-5, 4e-3)
"""A tenth of a millisecond for ten tokens and four milliseconds a batch."""
CONFIG = PolicyConfig(boundary_tokens=256)


def make(**options: object) -> PlaServe:
    cost = CostModel(PROFILE)
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]
    return PlaServe(CONFIG, cost, PlaServeOptions(**options))  # type: ignore[arg-type]


def add(policy: PlaServe, name: str, tokens: int, now: float, **rest: object) -> None:
    policy.add(PrefillRequest(name, now, tokens, **rest), now)  # type: ignore[arg-type]


def ids(decision: object) -> list[str]:
    assert isinstance(decision, Run)
    return [chunk.request_id for chunk in decision.batch.prefills]


def test_a_round_then_a_long_one_in_chunks() -> None:
    policy = make(chunk_tokens=1000, window=0.007)
    add(policy, "long", 2500, 0.0)
    add(policy, "other", 300, 0.0)
    add(policy, "a", 20, 0.001)
    assert policy.next(0.002) == Wait(0.002 + 0.007), "the device rests although longs wait"
    add(policy, "b", 30, 0.003)
    first = policy.next(0.0091)
    assert ids(first) == ["a", "b"]
    assert isinstance(first, Run)
    assert first.batch.kind is BatchClass.SHORT
    policy.observe(first.batch, 0.004, 0.013)
    now = 0.013
    for name, tokens in (("long", 1000), ("long", 1000), ("long", 500), ("other", 300)):
        decision = policy.next(now)
        assert ids(decision) == [name]
        assert isinstance(decision, Run)
        assert decision.batch.kind is BatchClass.LONG
        assert decision.batch.tokens == tokens
        assert policy.at_layer_boundary(now, decision.batch) is None
        now += 0.02
        policy.observe(decision.batch, 0.02, now)


def test_window_and_depth_follow_the_feedback_rule() -> None:
    """W starts at 7 ms and D at the deepest shape, 64. d >= D: W <- clip(tau); else D <- d."""
    policy = make(window=0.007, window_max=0.02)
    now, number = 0.0, 0
    seen = []
    for count, seconds in ((3, 0.5), (3, 0.012), (5, 0.5), (2, 0.001), (2, 0.001)):
        for _ in range(count):
            add(policy, f"r{number}", 20, now)
            number += 1
        decision = policy.next(now)
        if isinstance(decision, Wait):
            now = decision.until
            decision = policy.next(now)
        assert len(ids(decision)) == count
        assert isinstance(decision, Run)
        now += seconds
        policy.observe(decision.batch, seconds, now)
        seen.append((policy.awd.depth, policy.awd.window))
        now += 100.0  # the estimated rate is that of another age
    assert [depth for depth, _ in seen] == [3, 3, 3, 2, 2]
    assert seen[1][1] == 0.012
    assert seen[2][1] == 0.02, "clipped to W_max"
    assert seen[4][1] == 0.001


def test_token_max_admits_while_below_the_target() -> None:
    policy = make(mode="token_max", token_target=100)
    for number in range(6):
        add(policy, f"r{number}", 60, 0.0, deadline=0.0)
    assert ids(policy.next(0.0)) == ["r0", "r1"]


def test_decode_steps_join_batches_or_alternate() -> None:
    policy = make(window=0.007)
    policy.start_decode("d", 50, 0.0, 0.0)
    add(policy, "a", 20, 0.0)
    step = policy.next(0.0)
    assert isinstance(step, Run)
    assert step.batch.kind is BatchClass.DECODE, "it runs while the round gathers"
    policy.observe(step.batch, 0.001, 0.001)
    mixed = policy.next(0.007)
    assert isinstance(mixed, Run)
    assert (len(mixed.batch.prefills), len(mixed.batch.decodes)) == (1, 1)

    alone = PrefillFirst(make(window=0.0), CONFIG, CostModel(PROFILE))
    alone.start_decode("d", 50, 0.0, 0.0)
    alone.add(PrefillRequest("a", 0.0, 20), 0.0)
    pure = alone.next(0.0)
    assert isinstance(pure, Run)
    assert not pure.batch.decodes


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[float, int, float | None]]:
    rows, now = [], 0.0
    for _ in range(draw(st.integers(1, 40))):
        now += draw(st.sampled_from([0.0, 0.001, 0.01, 0.2]))
        tokens = draw(st.one_of(st.integers(1, 256), st.integers(257, 3000)))
        rows.append((now, tokens, draw(st.sampled_from([None, None, now + 0.03, now + 1.0]))))
    return rows


@given(
    rows=streams(),
    mode=st.sampled_from(["deadline", "token_max"]),
    head_wait=st.sampled_from([0.0, 0.01, 0.05]),
)
@settings(max_examples=60, deadline=None)
def test_no_short_is_held_beyond_t_max_and_longs_run_when_shorts_idle(
    rows: list[tuple[float, int, float | None]], mode: str, head_wait: float
) -> None:
    policy = make(mode=mode, head_wait=head_wait, window=0.02, chunk_tokens=1024)
    now, waiting = 0.0, dict[str, tuple[float, int]]()
    coming = [(at, f"r{i}", tokens, due) for i, (at, tokens, due) in enumerate(rows)][::-1]
    while coming or waiting:
        while coming and coming[-1][0] <= now:
            at, name, tokens, due = coming.pop()
            add(policy, name, tokens, at, deadline=due)
            waiting[name] = (at, tokens)
        following = coming[-1][0] if coming else inf
        shorts = {name: at for name, (at, tokens) in waiting.items() if tokens <= 256}
        decision = policy.next(now)
        if isinstance(decision, Wait):
            head = min(shorts.values())
            assert now < decision.until <= head + head_wait
            assert decision.until <= now + 0.02
            now = min(decision.until, following)
        elif isinstance(decision, Run):
            batch = decision.batch
            kinds = {waiting[chunk.request_id][1] <= 256 for chunk in batch.prefills}
            assert len(kinds) == 1, "a batch of both classes"
            if shorts:
                assert kinds == {True}, "shorts go first"
                head = min(shorts.values())
                if now >= head + head_wait and mode == "token_max":
                    oldest = {name for name, at in shorts.items() if at == head}
                    assert oldest & {chunk.request_id for chunk in batch.prefills}
            else:
                assert kinds == {False}, "longs run when no short waits"
                assert len(batch.prefills) == 1
            now += policy._cost.seconds(batch)
            for chunk in batch.prefills:
                if chunk.completes:
                    del waiting[chunk.request_id]
            policy.observe(batch, policy._cost.seconds(batch), now)
        else:
            assert not waiting
            now = following


def test_shorts_that_keep_coming_starve_the_longs() -> None:
    """Not bounded, as published; `length-aware` serves the long one meanwhile."""
    jobs = [Job("long", 0.0, 3000), *(Job(f"s{n}", n * 0.01, 200) for n in range(500))]
    served = {}
    for name in ("pla-serve", "length-aware"):
        cost = CostModel(CostProfile(1e-4, 0, 0, 0, 1e-2))
        config = PolicyConfig(boundary_tokens=256, max_batch_tokens=8192)
        executor = Executor(
            create_policy(name, config, cost), config, cost, [Job(**vars(j)) for j in jobs],
            separate=True, waits=name == "pla-serve",
        )  # fmt: skip
        executor.run()
        served[name] = executor.jobs["long"].first_token or inf
    assert served["pla-serve"] > 5.0
    assert served["length-aware"] < 3.0


class TestBoundary:
    def test_it_starts_from_the_usual_setting_and_grows_with_history(self) -> None:
        boundary = FittedBoundary(PROFILE, 0, 10_000)
        assert boundary.tokens(0) == 256
        assert boundary.tokens(0) != boundary.tokens(4000)
        bounded = FittedBoundary(PROFILE, 150, 512)
        assert all(150 <= bounded.tokens(history) <= 512 for history in (0, 100, 10_000, 10**6))

    def test_it_follows_the_machine(self) -> None:
        """Samples of a machine with another gamma_w move L_m to that machine's."""
        true = LatencyModel(PROFILE.per_attention / 2, PROFILE.per_token, 1.05e-5, PROFILE.per_kv)
        boundary = FittedBoundary(PROFILE, 0, 10_000)
        for number in range(512):
            tokens, history = 16 << number % 8, 1000 * (number % 4)
            request = PrefillRequest("a", 0.0, tokens, history)
            policy = make()
            policy.add(request, 0.0)
            batch = policy.next(1.0)
            assert isinstance(batch, Run)
            boundary.observe(batch.batch, true.seconds(tokens, history))
        assert boundary.model.gamma_w == pytest.approx(true.gamma_w, rel=0.01)
        assert boundary.tokens(0) == pytest.approx(true.boundary(0), rel=0.1)

    def test_batches_of_several_teach_nothing(self) -> None:
        boundary = FittedBoundary(PROFILE, 0, 10_000)
        before = boundary.model
        policy = make(window=0.0)
        for number in range(2):
            add(policy, f"r{number}", 20, 0.0)
        batch = policy.next(0.0)
        assert isinstance(batch, Run)
        for _ in range(1000):
            boundary.observe(batch.batch, 5.0)
            boundary.observe(Batch(BatchClass.DECODE), 5.0)
        assert boundary.model is before

    def test_a_fixed_boundary_goes_before_the_model(self) -> None:
        policy = make()
        assert policy.waits_as_short(256, 100_000)
        assert not policy.waits_as_short(257, 0)
