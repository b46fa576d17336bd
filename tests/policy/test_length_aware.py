"""What length-aware does at each point of choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import Batch, BatchClass, Chunk, Idle, PrefillRequest
from tests.policy.driving import CONFIG, PROFILE, add, make, names, ran, run
from tests.policy.executor import Executor, Job


class TestExpress:
    def test_a_short_is_taken_at_the_next_layer_boundary(self) -> None:
        policy = make()
        add(policy, "long", 2000)
        running = run(policy, 0.0)
        assert running.kind is BatchClass.LONG
        assert policy.at_layer_boundary(0.01, running) is None
        add(policy, "short", 100, 0.015)
        express = policy.at_layer_boundary(0.02, running)
        assert express == Batch(BatchClass.SHORT, (Chunk("short", 100, 0),))

    def test_shorts_are_not_interrupted(self) -> None:
        policy = make()
        add(policy, "one", 100)
        running = run(policy, 0.0)
        add(policy, "two", 100)
        assert policy.at_layer_boundary(0.01, running) is None

    def test_decode_steps_ride_with_shorts(self) -> None:
        policy = make()
        policy.start_decode("d", 40, 0.0, 0.0)
        add(policy, "short", 100)
        assert run(policy, 0.0) == Batch(
            BatchClass.SHORT, (Chunk("short", 100, 0),), (Chunk("d", 1, 40),)
        )

    @pytest.mark.parametrize(("longs", "riders"), [(True, 5), (False, 20)])
    def test_few_steps_ride_with_shorts_that_longs_wait_for(self, longs: bool, riders: int) -> None:
        policy = make()
        for n in range(20):
            policy.start_decode(f"d{n}", 40, 0.0, 0.0)
        add(policy, "short", 100)
        if longs:
            add(policy, "long", 2000)
        assert len(run(policy, 0.0).decodes) == riders, "110 ms, of which a twentieth; 1 ms a step"

    def test_what_counts_is_uncached_tokens(self) -> None:
        policy = make()
        add(policy, "turn", 200, history=30_000)
        add(policy, "prompt", 257)
        assert names(run(policy, 0.0)) == ["turn"]
        assert policy.waits_as_short(256, 9)
        assert not policy.waits_as_short(257, 9)


class TestLongTime:
    """Long work is timed by the clock, less the express work inside it."""

    def test_express_work_inside_does_not_count(self) -> None:
        policy = make()
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        add(policy, "short", 100, 0.1)
        express = policy.at_layer_boundary(0.1, running)
        assert express is not None
        policy.observe(express, 0.11, 0.21)
        assert policy.at_layer_boundary(0.25, running) is None
        assert ran(policy) == pytest.approx(0.1 + 0.04)

    def test_it_goes_on_if_the_express_work_is_taken_back(self) -> None:
        policy = make()
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        add(policy, "short", 100, 0.1)
        assert policy.at_layer_boundary(0.1, running) is not None
        policy.remove("short")
        assert policy.at_layer_boundary(0.15, running) is None
        assert policy.at_layer_boundary(0.5, running) is None
        assert ran(policy) == pytest.approx(0.45)

    def test_only_contested_time_is_charged(self) -> None:
        """A long that arrives at the end of an express batch has not waited for all of it."""
        policy = make()
        add(policy, "short", 100, 0.0)
        express = run(policy, 0.0)
        add(policy, "long", 5000, 0.08)
        policy.observe(express, 0.11, 0.11)
        assert policy._account.ahead == pytest.approx(0.03)

    def test_nothing_is_owed_once_no_long_is_left(self) -> None:
        policy = make(replace(CONFIG, express_burst_seconds=0.1))
        add(policy, "long", 300, 0.0)
        add(policy, "short", 100, 0.0)
        policy.observe(run(policy, 0.0), 0.11, 0.11)
        running = run(policy, 0.11)
        assert running.kind is BatchClass.LONG
        policy.remove("long")
        add(policy, "another", 5000, 5.0)
        add(policy, "short", 100, 5.0)
        assert run(policy, 5.0).kind is BatchClass.SHORT

    def test_an_aborted_long_no_longer_contests(self) -> None:
        policy = make()
        add(policy, "long", 5000, 0.0)
        run(policy, 0.0)
        policy.remove("long")
        policy.start_decode("d", 40, 0.0, 0.0)
        policy.observe(run(policy, 0.1), 0.1, 0.2)
        assert run(policy, 0.2).decodes, "no gap between steps: nothing contests"


class TestTokenDeadlines:
    def test_a_step_when_the_next_token_is_due(self) -> None:
        """A step takes 11 ms, and a token is due 44 ms after the one before it."""
        policy = make()
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        policy.start_decode("d", 40, 0.0, 0.01)
        assert policy.at_layer_boundary(0.042, running) is None
        step = policy.at_layer_boundary(0.044, running)
        assert step == Batch(BatchClass.DECODE, (), (Chunk("d", 1, 40),))
        policy.observe(step, 0.011, 0.055)
        assert policy.at_layer_boundary(0.086, running) is None
        again = policy.at_layer_boundary(0.089, running)
        assert again == Batch(BatchClass.DECODE, (), (Chunk("d", 1, 41),))

    def test_a_layer_earlier_where_layers_are_known(self) -> None:
        policy = make(replace(CONFIG, layers=50))
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        layer = CostModel(PROFILE).seconds(running) / 50
        policy.start_decode("d", 40, 0.0, 0.01)
        assert policy.at_layer_boundary(0.042 - layer, running) is None
        assert policy.at_layer_boundary(0.0435 - layer, running) is not None

    def test_a_request_has_its_own_target(self) -> None:
        policy = make()
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        policy.start_decode("slow", 40, 0.0, 0.0)
        policy.start_decode("fast", 40, 0.0, 0.0, tpot=2**-5)
        assert policy.at_layer_boundary(0.018, running) is None
        step = policy.at_layer_boundary(0.020, running)
        assert step is not None, "31 ms, less a step of both"
        assert {chunk.request_id for chunk in step.decodes} == {"slow", "fast"}

    @pytest.mark.parametrize(("streams", "gap"), [(1, 0.077), (4, 0.098)])
    def test_without_settings_streams_take_a_share(self, streams: int, gap: float) -> None:
        """A seventh of the time: 10 ms of a launch, and one for each of them."""
        policy = make(replace(CONFIG, itl_slo_ms=None))
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        for n in range(streams):
            policy.start_decode(f"d{n}", 40, 0.0, 0.0)
        step = 0.010 + 0.001 * streams
        assert policy.at_layer_boundary(gap - step - 0.001, running) is None
        assert policy.at_layer_boundary(gap - step + 0.001, running) is not None

    def test_steps_ride_along_with_the_next_chunk(self) -> None:
        policy = make(replace(CONFIG, max_batch_requests=3))
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        assert not running.decodes
        for name in "abc":
            policy.start_decode(name, 40, 0.0, 0.01)
        policy.observe(running, 0.5, 0.5)
        step = run(policy, 0.5)
        assert step.kind is BatchClass.DECODE, "they are late"
        policy.observe(step, 0.013, 0.513)
        riding = run(policy, 0.513)
        assert riding.kind is BatchClass.LONG
        assert [chunk.tokens for chunk in riding.decodes] == [1, 1], "as many as have a place"
        assert CostModel(PROFILE).seconds(riding) <= 0.044
        others = {"a", "b", "c"} - {chunk.request_id for chunk in riding.decodes}
        assert policy.at_layer_boundary(0.52, riding) is None, "not due yet"
        late = policy.at_layer_boundary(0.56, riding)
        assert late is not None
        assert {chunk.request_id for chunk in late.decodes} == others, "riders are in flight"

    def test_longs_that_share_the_launch_leave_fewer_places(self) -> None:
        policy = make(
            replace(CONFIG, max_batch_requests=4, itl_slo_ms=2000, long_chunk_tokens=2000)
        )
        for n in range(4):
            policy.start_decode(f"d{n}", 40, 0.0, 0.0)
        for n in range(40):
            add(policy, f"l{n}", 257)
        batch = run(policy, 0.0)
        assert len(batch.prefills) > 1
        assert len(batch.prefills) + len(batch.decodes) == 4

    def test_they_do_not_ride_where_steps_cost_less(self) -> None:
        """The history of the long would be read again for every chunk."""
        cost = CostModel(replace(PROFILE, per_kv=1e-6))
        policy = LengthAware(CONFIG, cost)
        policy.start_decode("d", 40, 0.0, 0.0)
        add(policy, "long", 5000, history=50_000)
        batch = run(policy, 0.0)
        assert not batch.decodes
        assert batch.tokens > 1000

    def test_without_longs_at_once(self) -> None:
        policy = make()
        policy.start_decode("d", 40, 0.0, 0.0)
        step = run(policy, 0.0)
        policy.observe(step, 0.011, 0.011)
        assert run(policy, 0.011).decodes == (Chunk("d", 1, 41),)

    @pytest.mark.parametrize("target", [30.0, 60.0, 120.0])
    @pytest.mark.parametrize("places", [1, 64])
    def test_gaps_are_kept(self, target: float, places: int) -> None:
        """Alone in a batch or not, every stream gets a token in time while a long runs."""
        config = replace(CONFIG, itl_slo_ms=target, max_batch_requests=places, layers=30)
        streams = 1 if places == 1 else 4
        policy = make(config)
        jobs = [Job(f"d{n}", 0.0, 5, outputs=400) for n in range(streams)]
        jobs.append(Job("long", 0.1, 8000))
        cost = CostModel(PROFILE)
        trace = Executor(policy, config, cost, jobs, layers=30, separate=True).run(until=5.0)
        times: dict[str, list[float]] = {}
        for _, end, batch in trace.batches:
            for chunk in batch.decodes:
                times.setdefault(chunk.request_id, []).append(end)
        gaps = [b - a for came in times.values() for a, b in pairwise(came)]
        step = cost.work_seconds(streams, 0, 0, streams, 1)
        least = 3 * step + trace.stretch  # in the longs' turn
        assert max(gaps) <= max(target / 1000, least) + trace.stretch
        assert max(gaps) >= target / 2000, "and no oftener than has to be"


class TestWindow:
    """Shorts share launches only where that is predicted to pay."""

    def arrive(self, policy: LengthAware, every: float, until: float) -> float:
        now = 0.0
        while now < until:
            now += every
            add(policy, f"s{now}", 5, now)
            policy.observe(run(policy, now), 0.001, now)
        return now

    def starts(self, every: float, longs: int, config: PolicyConfig = CONFIG) -> float:
        """The boundary at which a short that arrives at 0.001 is taken."""
        policy = make(config)
        now = self.arrive(policy, every, 3.0)
        for n in range(longs):
            add(policy, f"l{n}", 8000, now)
        running = run(policy, now)
        add(policy, "before", 5, now)  # for it there is no plan yet, and it goes at once
        before = policy.at_layer_boundary(now, running)
        assert before is not None
        policy.observe(before, 0.0, now)
        add(policy, "short", 5, now + 0.001)
        for boundary in (0.002, 0.012, 0.032):
            if policy.at_layer_boundary(now + boundary, running) is not None:
                return boundary
        raise AssertionError("held for too long")

    def test_zero_at_light_load(self) -> None:
        assert self.starts(every=2.0, longs=1) == 0.002

    def test_many_longs_wait_and_shorts_come_often(self) -> None:
        assert 0.002 < self.starts(every=0.02, longs=40) <= 0.032

    def test_it_can_be_turned_off(self) -> None:
        off = replace(CONFIG, express_wait_seconds=0.0)
        assert self.starts(every=0.02, longs=40, config=off) == 0.002

    def test_it_is_off_where_prefills_cannot_be_left(self) -> None:
        policy = make(replace(CONFIG, interruptible=False))
        assert not policy.capabilities.leaves_at_layer_boundary
        now = self.arrive(policy, 0.02, 3.0)
        for n in range(40):
            add(policy, f"l{n}", 8000, now)
        running = run(policy, now)
        add(policy, "short", 5, now + 0.001)
        assert policy.at_layer_boundary(now + 0.002, running) is None
        policy.observe(running, 0.002, now + 0.002)
        assert names(run(policy, now + 0.002)) == ["short"]


class TestShorts:
    def test_arrival_order_then_deadlines_that_can_be_met(self) -> None:
        policy = make(replace(CONFIG, max_batch_requests=1))
        add(policy, "first", 100, 0.0)
        add(policy, "hopeless", 100, 0.1, deadline=0.15)
        add(policy, "hurried", 100, 0.2, deadline=0.5)
        add(policy, "urgent", 100, 0.2, priority=-1)
        order = []
        for _ in range(4):
            batch = run(policy, 0.2)
            order += names(batch)
            policy.observe(batch, 0.0, 0.2)
        assert order == ["urgent", "hurried", "first", "hopeless"]

    def test_a_part_goes_on_first(self) -> None:
        policy = make(replace(CONFIG, max_batch_tokens=150))
        add(policy, "a", 100)
        add(policy, "b", 100)
        add(policy, "c", 100)
        batch = run(policy, 0.0)
        assert [(c.request_id, c.tokens, c.completes) for c in batch.prefills] == [
            ("a", 100, True),
            ("b", 50, False),
        ]
        policy.observe(batch, 0.1, 0.1)
        add(policy, "sooner", 10, 0.1, deadline=0.2)
        assert names(run(policy, 0.1)) == ["b", "sooner", "c"]


class TestContract:
    def test_idle_when_empty_and_when_all_is_in_flight(self) -> None:
        policy = make()
        assert policy.next(0.0) == Idle()
        add(policy, "a", 10)
        run(policy, 0.0)
        assert policy.next(0.0) == Idle()

    def test_adding_what_is_in_flight_is_refused(self) -> None:
        policy = make()
        add(policy, "a", 10)
        run(policy, 0.0)
        with pytest.raises(ValueError, match="'a' is in flight"):
            add(policy, "a", 10)

    @pytest.mark.parametrize(("tokens", "history"), [(0, 0), (-1, 0), (5, -1)])
    def test_nothing_to_compute_is_refused(self, tokens: int, history: int) -> None:
        with pytest.raises(ValueError, match="new_tokens of at least 1"):
            add(make(), "a", tokens, history=history)

    def test_observing_another_chunk_is_refused(self) -> None:
        policy = make()
        add(policy, "a", 10)
        run(policy, 0.0)
        with pytest.raises(ValueError, match="was observed, but"):
            policy.observe(Batch(BatchClass.SHORT, (Chunk("a", 9, 0, False),)), 0.1, 0.1)

    def test_new_numbers_keep_the_place(self) -> None:
        policy = make(replace(CONFIG, max_batch_requests=1))
        add(policy, "a", 100)
        add(policy, "b", 100)
        policy.add(PrefillRequest("a", 0.0, 40, 60), 1.0)
        assert run(policy, 1.0).prefills == (Chunk("a", 40, 60),)

    def test_a_decoding_request_may_come_back_as_a_prefill(self) -> None:
        policy = make()
        policy.start_decode("a", 50, 0.0, 0.0)
        add(policy, "a", 51)
        assert run(policy, 0.0) == Batch(BatchClass.SHORT, (Chunk("a", 51, 0),))

    def test_a_prefill_that_starts_to_decode_is_no_longer_one(self) -> None:
        policy = make()
        add(policy, "a", 51)
        policy.start_decode("a", 51, 0.0, 0.0)
        assert policy.state(0.0).short_requests == 0
        assert run(policy, 0.0) == Batch(BatchClass.DECODE, (), (Chunk("a", 1, 51),))

    def test_an_aborted_long_leaves_nothing_behind(self) -> None:
        policy = make()
        add(policy, "long", 5000)
        running = run(policy, 0.0)
        policy.remove("long")
        assert policy.at_layer_boundary(0.1, running) is None
        policy.observe(running, 0.5, 0.5)
        policy.remove("never heard of")
        assert policy.next(0.5) == Idle()
        assert policy.state(0.5).long_tokens == 0


class TestPredictedWait:
    def test_short_and_long_on_an_idle_machine(self) -> None:
        policy = make()
        assert policy.predicted_wait(100, 0, 0.0) == pytest.approx(0.11)
        assert policy.predicted_wait(1024, 0, 0.0) == pytest.approx(1.034)

    def test_a_short_does_not_count_longs(self) -> None:
        policy = make()
        for n in range(20):
            add(policy, f"l{n}", 5000)
        assert policy.predicted_wait(100, 0, 0.0) == pytest.approx(0.11)
        assert policy.predicted_wait(6000, 0, 0.0) > 20 * 5

    def test_a_small_long_counts_only_those_before_it(self) -> None:
        policy = make()
        for n in range(100):
            add(policy, f"l{n}", 5000)
        add(policy, "small", 500)
        assert policy.predicted_wait(600, 0, 0.0) < 5

    def test_shorts_ahead_count_and_the_longs_turn(self) -> None:
        policy = make(replace(CONFIG, express_burst_seconds=2.0))
        for n in range(10):
            add(policy, f"s{n}", 200)
        assert policy.predicted_wait(100, 0, 0.0) == pytest.approx(2.0 + 0.01 + 0.11)
        add(policy, "long", 5000)
        with_longs = policy.predicted_wait(100, 0, 0.0)
        assert with_longs == pytest.approx(2.12 + 0.12), "beyond a burst of 2 s, halves"
