"""Long prefills under length-aware: their order, their chunks, and what runs inside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.chunking import (
    efficient_chunk,
    timed_chunk,
)
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import Batch, BatchClass, Chunk, PrefillRequest
from pla_serve.policy.tuning import Tuning
from tests.policy.driving import CONFIG, PROFILE, add, make, names, ran, run, spread
from tests.policy.executor import Executor, Job


class TestLongs:
    def test_one_at_a_time_in_chunks(self) -> None:
        policy = make()
        add(policy, "a", 1100)
        add(policy, "b", 1100)
        sizes = []
        for _ in range(3):
            batch = run(policy, 0.0)
            assert names(batch) == ["a"]
            sizes.append(batch.tokens)
            policy.observe(batch, 0.4, 0.4)
        assert sizes == [490, 490, 120]
        assert names(run(policy, 0.4)) == ["b"]

    def test_shortest_remaining_first_unless_it_waited(self) -> None:
        """Due 4.97 s after its arrival, and 2.24 s, with a full batch of 2.06 s."""
        for arrival, expected in ((2.7, "small"), (2.8, "big")):
            policy = make(replace(CONFIG, patience=2.0))
            spread(policy)
            add(policy, "big", 3000, 0.0)
            add(policy, "small", 600, arrival)
            assert names(run(policy, arrival)) == [expected]

    def test_near_the_order_of_arrival_if_all_are_much_alike(self) -> None:
        """With light spread a small one passes what arrived shortly before it, not more."""
        for arrival, expected in ((0.1, "small"), (20.0, "big")):
            policy = make()
            add(policy, "big", 3000, 0.0)
            add(policy, "small", 600, arrival)
            assert names(run(policy, arrival)) == [expected]

    def test_small_ones_share_a_launch_if_many_wait(self) -> None:
        few, many = make(), make()
        for n in range(2):
            add(few, f"l{n}", 300)
        for n in range(60):
            add(many, f"l{n}", 300)
        config = replace(CONFIG, long_chunk_tokens=1000)
        roomy = make(config)
        for n in range(100):
            add(roomy, f"l{n}", 300)
        assert names(run(few, 0.0)) == ["l0"]
        assert names(run(many, 0.0)) == ["l0"], "no room for two in 490 tokens"
        assert names(run(roomy, 0.0)) == ["l0", "l1", "l2"]

    def test_without_patience_in_order_of_arrival(self) -> None:
        policy = make(replace(CONFIG, patience=0.0))
        add(policy, "big", 3000, 0.0)
        add(policy, "small", 300, 0.001)
        assert names(run(policy, 0.1)) == ["big"]

    def test_a_deadline_moves_a_long_forward_while_it_can_be_met(self) -> None:
        policy = make()
        add(policy, "small", 300)
        add(policy, "hurried", 2000, deadline=2.5)
        assert names(run(policy, 0.1)) == ["hurried"]
        policy = make()
        add(policy, "small", 300)
        add(policy, "hopeless", 2000, deadline=1.5)
        assert names(run(policy, 0.1)) == ["small"]

    def test_switch_only_if_it_is_worth_it(self) -> None:
        for tokens, expected in ((1900, "begun"), (1500, "new")):
            policy = make()
            spread(policy)
            add(policy, "begun", 2500)
            batch = run(policy, 0.0)
            policy.observe(batch, 0.5, 0.5)  # 2000 left
            add(policy, "new", tokens, 0.5)
            assert names(run(policy, 0.5)) == [expected]

    def test_the_order_follows_the_cost_model(self) -> None:
        """History turns out to be dear: the long with little of it goes first after all."""
        cost = CostModel(PROFILE)
        policy = LengthAware(CONFIG, cost)
        add(policy, "plain", 3000)
        add(policy, "deep", 2000, history=20_000)
        truth = CostModel(replace(PROFILE, per_attention=1e-7))
        for n in range(600):
            sample = Batch(BatchClass.LONG, (Chunk("other", 100 + n, 1000 * (n % 20), False),))
            policy.observe(sample, truth.seconds(sample), 0.0)
        assert cost.epoch > 0
        assert names(run(policy, 0.0)) == ["plain"]

    def test_priority_first(self) -> None:
        policy = make()
        add(policy, "small", 300)
        add(policy, "urgent", 9000, priority=-1)
        assert names(run(policy, 0.0)) == ["urgent"]


class TestNested:
    def running(self, policy: LengthAware, tokens: int = 4000) -> Batch:
        add(policy, "outer", tokens)
        return run(policy, 0.0)

    def test_a_small_long_runs_inside_a_much_longer_one(self) -> None:
        policy = make()
        outer = self.running(policy)
        add(policy, "medium", 300, 0.01)
        inner = policy.at_layer_boundary(0.02, outer)
        assert inner == Batch(BatchClass.LONG, (Chunk("medium", 300, 0),))
        policy.observe(inner, 0.31, 0.33)
        policy.observe(outer, 0.5, 0.83)
        assert names(run(policy, 0.83)) == ["outer"]

    @pytest.mark.parametrize(
        ("outer_tokens", "tokens", "priority"),
        [(4000, 1100, 0), (700, 640, 0), (4000, 300, 1)],
        ids=["more than a chunk", "hardly less", "less urgent"],
    )
    def test_not_if_too_big_or_not_worth_it(
        self, outer_tokens: int, tokens: int, priority: int
    ) -> None:
        policy = make(replace(CONFIG, long_chunk_tokens=1024))
        outer = self.running(policy, outer_tokens)
        add(policy, "medium", tokens, 0.01, priority=priority)
        assert policy.at_layer_boundary(0.02, outer) is None

    def test_a_short_runs_inside_the_inner_one_and_nothing_else_does(self) -> None:
        policy = make()
        outer = self.running(policy)
        add(policy, "medium", 400, 0.01)
        inner = policy.at_layer_boundary(0.02, outer)
        assert names(inner) == ["medium"]
        assert inner is not None
        add(policy, "small", 300, 0.03)
        assert policy.at_layer_boundary(0.04, inner) is None, "two keep their activations already"
        add(policy, "short", 100, 0.05)
        express = policy.at_layer_boundary(0.06, inner)
        assert names(express) == ["short"]
        assert express is not None
        policy.observe(express, 0.11, 0.17)
        assert policy.at_layer_boundary(0.2, inner) is None
        assert ran(policy) == pytest.approx(0.04 + 0.03), "of the inner one"
        policy.observe(inner, 0.41, 0.54)
        assert names(policy.at_layer_boundary(0.6, outer)) == ["small"]

    def test_no_cliff_at_the_boundary(self) -> None:
        """A prompt one token over the boundary waits hardly longer than one just below it."""
        firsts = []
        for tokens in (256, 257):
            cost = CostModel(PROFILE)
            policy = LengthAware(CONFIG, cost)
            jobs = [Job(f"l{n}", 0.0, 6000) for n in range(3)] + [Job("probe", 1.0, tokens)]
            Executor(policy, CONFIG, cost, jobs, layers=30, separate=True).run()
            assert jobs[-1].first_token is not None
            firsts.append(jobs[-1].first_token - 1.0)
        assert firsts[1] <= firsts[0] * 1.1


class TestChunks:
    def first_chunk(self, config: PolicyConfig = CONFIG, decoding: bool = False) -> int:
        policy = make(config)
        if decoding:
            policy.start_decode("d", 10, 0.0, 0.0)
            policy.observe(run(policy, 0.0), 0.011, 0.011)
        add(policy, "long", 100_000, 0.011)
        return run(policy, 0.011).prefills[0].tokens

    def test_large_enough_for_a_launch_not_to_matter(self) -> None:
        assert self.first_chunk() == pytest.approx(490, rel=0.01), "10 ms are 2% of 500"

    @pytest.mark.parametrize(("target", "tokens"), [(44, 33), (200, 189), (1000, 490)])
    def test_ends_when_the_streams_in_it_are_due(self, target: float, tokens: int) -> None:
        """44 ms are 10 of a launch, 1 of the stream, and 33 tokens; never more than without."""
        config = replace(CONFIG, itl_slo_ms=target)
        assert self.first_chunk(config, True) == pytest.approx(tokens, abs=1)

    def test_leaves_longs_their_share_beside_streams(self) -> None:
        config = replace(CONFIG, itl_slo_ms=12, long_share=0.75)
        assert self.first_chunk(config, True) == 30, "10 ms of a launch, 30 of tokens"

    def test_a_layer_takes_no_longer_than_a_part_of_a_short_prompt(self) -> None:
        cost = CostModel(PROFILE)
        short = cost.prefill_seconds(Tuning().typical_short, 0)
        for layers in (6, 7, 8):
            tokens = self.first_chunk(replace(CONFIG, layers=layers))
            assert cost.prefill_seconds(tokens, 0) / layers <= Tuning().layer_share * short
            assert cost.prefill_seconds(tokens + 1, 0) / layers > Tuning().layer_share * short

    def test_layers_do_not_cut_prompts_to_pieces(self) -> None:
        few = self.first_chunk(replace(CONFIG, layers=1))
        assert few == max(256, efficient_chunk(PROFILE, 0, Tuning().overhead_for_layers))
        assert self.first_chunk(replace(CONFIG, layers=1000)) == self.first_chunk()

    @given(st.floats(0.001, 10), st.integers(0, 100_000))
    def test_most_tokens_in_a_time(self, seconds: float, history: int) -> None:
        tokens = timed_chunk(PROFILE, history, seconds)
        cost = CostModel(PROFILE)
        assert tokens == 0 or cost.prefill_seconds(tokens, history) <= seconds * (1 + 1e-9)
        assert cost.prefill_seconds(tokens + 1, history) > seconds * (1 - 1e-9)

    def test_the_setting_wins(self) -> None:
        assert self.first_chunk(replace(CONFIG, long_chunk_tokens=1000)) == 1000

    def test_smaller_on_an_idle_machine_that_cannot_be_interrupted(self) -> None:
        config = replace(CONFIG, interruptible=False)
        assert self.first_chunk(config) == 256


class TestStreams:
    """Riders get a token at the end of a long's pass, so it must not be put off without end."""

    def ride(self) -> tuple[LengthAware, Batch]:
        policy = make(replace(CONFIG, long_chunk_tokens=1000, itl_slo_ms=1100))
        policy.start_decode("stream", 40, 0.0, 0.0)
        policy.observe(run(policy, 0.0), 0.011, 0.011)
        add(policy, "outer", 20_000, 0.02)
        outer = run(policy, 0.02)
        assert [chunk.request_id for chunk in outer.decodes] == ["stream"]
        return policy, outer

    def test_longs_inside_take_at_most_as_long_again(self) -> None:
        policy, outer = self.ride()
        alone = CostModel(PROFILE).seconds(outer)
        spread(policy)
        now, inside = 0.03, 0.0
        while True:
            add(policy, f"small{now}", 257, now)
            inner = policy.at_layer_boundary(now, outer)
            if inner is None:
                break
            seconds = CostModel(PROFILE).seconds(inner)
            now, inside = now + seconds, inside + seconds
            policy.observe(inner, seconds, now)
        assert 0 < inside <= alone + 0.01

    def test_an_aborted_long_keeps_its_place_while_streams_ride(self) -> None:
        """Its pass goes on for them: other streams get steps no more often than before."""
        policy, outer = self.ride()
        policy.start_decode("other", 40, 0.0, 0.1)
        first = policy.at_layer_boundary(1.2, outer)
        assert first is not None
        policy.observe(first, 0.011, 1.211)
        policy.remove("outer")
        assert policy.at_layer_boundary(1.212, outer) is None, "not due again so soon"
        policy.observe(Batch(BatchClass.LONG, (), outer.decodes), 0.3, 1.5)
        assert run(policy, 1.5).kind is BatchClass.DECODE


def test_express_work_that_is_abandoned_is_charged() -> None:
    """Clients that break off shorts again and again do not starve a long."""
    policy = make(replace(CONFIG, express_burst_seconds=0.3))
    add(policy, "long", 5000, 0.0)
    running = run(policy, 0.0)
    now = 0.0
    for n in range(10):
        add(policy, f"s{n}", 100, now)
        express = policy.at_layer_boundary(now + 0.001, running)
        if express is None:
            break
        policy.remove(f"s{n}")
        now += 0.1
        policy.observe(Batch(express.kind), 0.099, now)
    assert n == 4, "three times 0.099 s are not yet the burst"


def test_a_mate_comes_no_later_than_those_that_may_pass() -> None:
    config = replace(CONFIG, patience=0.0, long_chunk_tokens=2000)
    for late, expected in ((0.0, ["head", "mate"]), (0.1, ["head"])):
        policy = make(config)
        add(policy, "head", 300, 0.0)
        add(policy, "mate", 300, late)
        for n in range(200):
            add(policy, f"behind{n}", 1900, late)
        assert names(run(policy, 0.2)) == expected


def test_what_comes_back_with_other_numbers_is_no_arrival() -> None:
    policy = make()
    for n in range(30):
        add(policy, f"l{n}", 300, float(n))
    rate = policy._offered.rate(30.0)
    for n in range(29):
        policy.add(PrefillRequest(f"l{n}", float(n), 290, 10), 30.0)
    assert policy._offered.rate(30.0) == pytest.approx(rate, rel=0.1)
