"""Deadlines order, arrivals interrupt, hopeless requests step back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.baselines.flowprefill import DeadlineQueue, FlowOptions
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Batch, Idle, PrefillPolicy
from pla_serve.policy.registry import create_policy
from tests.policy.baselines.helpers import MILLISECOND_A_TOKEN, add, make, run, shape, step

from ..executor import Executor, Job

CONFIG = PolicyConfig(boundary_tokens=256, max_batch_tokens=4000)


def flow(knobs: str = "", config: PolicyConfig = CONFIG) -> PrefillPolicy:
    return make(f"flowprefill{knobs}", config)


def inside(policy: PrefillPolicy, now: float, running: Batch) -> Batch:
    """The batch that runs inside ``running``."""
    batch = policy.at_layer_boundary(now, running)
    assert batch is not None
    return batch


class TestOrder:
    def test_due_after_the_objective_or_a_multiple_of_the_own_time(self) -> None:
        """A long of 1 s is due after 5 s, a short after 0.5 s; whichever comes first."""
        policy = flow(":slo_stretch=5")
        add(policy, "long", 1000, 0.0)
        add(policy, "soon", 100, 4.5)
        add(policy, "later", 100, 4.7)
        assert step(policy, 4.8)[0] == ("soon", 100)

    def test_a_deadline_of_its_own_counts_instead(self) -> None:
        policy = flow(":slo_stretch=10")
        add(policy, "plain", 100)
        add(policy, "urgent", 100, deadline=0.3)
        add(policy, "patient", 50, deadline=9.0)
        assert step(policy, 0.0, 0.0) == [("urgent", 100), ("plain", 100), ("patient", 50)]

    @pytest.mark.parametrize(("order", "first"), [("s-edf", "saved"), ("edf", "hopeless")])
    def test_who_cannot_make_it_steps_back(self, order: str, first: str) -> None:
        policy = flow(f":order={order}")
        add(policy, "hopeless", 500, deadline=0.4)
        add(policy, "saved", 900, deadline=1.0)
        assert step(policy, 0.0)[0][0] == first

    def test_priority_goes_before_deadlines(self) -> None:
        policy = flow()
        add(policy, "urgent", 10, deadline=0.2)
        add(policy, "important", 10, deadline=0.0, priority=-1)  # and out of reach
        assert step(policy, 0.1)[0][0] == "important"


class TestBatch:
    def test_others_join_while_nobody_misses_a_deadline(self) -> None:
        policy = flow()
        add(policy, "a", 100, deadline=0.25)
        add(policy, "b", 100, deadline=0.26)
        add(policy, "c", 100, deadline=9.0)  # would end at 0.3
        assert step(policy, 0.0) == [("a", 100), ("b", 100)]

    def test_up_to_so_many_tokens(self) -> None:
        policy = flow(":batch_tokens=150:slo_seconds=9:slo_stretch=10")
        add(policy, "a", 100)
        add(policy, "b", 60, 0.1)
        add(policy, "c", 400, 0.2)
        assert step(policy, 0.2) == [("a", 100)]
        assert step(policy, 0.2) == [("b", 60)]
        assert step(policy, 0.2) == [("c", 400)], "one alone may be larger"


class TestInterruption:
    def test_an_arrival_with_an_earlier_deadline_goes_inside(self) -> None:
        policy = flow()
        add(policy, "long", 3000)
        outer = run(policy, 0.0)
        assert policy.at_layer_boundary(0.1, outer) is None
        add(policy, "short", 100, 0.15)
        inner = policy.at_layer_boundary(0.2, outer)
        assert inner is not None
        assert shape(inner) == [("short", 100)]
        policy.observe(inner, 0.1, 0.3)
        assert policy.at_layer_boundary(0.3, outer) is None
        policy.observe(outer, 3.0, 3.1)
        assert policy.state(3.1).seconds == 0

    def test_a_later_deadline_does_not(self) -> None:
        policy = flow()
        add(policy, "short", 100)
        outer = run(policy, 0.0)
        add(policy, "other", 100, 0.01)
        assert policy.at_layer_boundary(0.02, outer) is None

    def test_only_an_event_makes_a_decision(self) -> None:
        """A batch is late from some moment on, but nobody looks before something happens."""
        policy = flow(":batch_tokens=1")
        add(policy, "running", 1000, deadline=1.2)
        outer = run(policy, 0.0)
        add(policy, "waiting", 10, 0.1, deadline=1.3)
        assert policy.at_layer_boundary(0.1, outer) is None
        policy.remove("nobody")
        assert policy.at_layer_boundary(0.9, outer) is None
        add(policy, "third", 10, 0.91, deadline=0.91)
        assert policy.at_layer_boundary(0.92, outer) is None, "it is out of reach"

    def test_a_running_batch_that_is_out_of_reach_gives_way(self) -> None:
        policy = flow()
        add(policy, "hopeless", 1000, deadline=0.5)
        outer = run(policy, 0.0)
        add(policy, "saved", 100, 0.1, deadline=5.0)
        inner = policy.at_layer_boundary(0.2, outer)
        assert inner is not None
        assert shape(inner) == [("saved", 100)]

    def test_what_ran_inside_does_not_make_the_outer_one_late(self) -> None:
        """0.5 s inside, of which the outer one knows: it began so much later."""
        policy = flow(":slo_stretch=10")
        add(policy, "outer", 1000, deadline=2.0)
        outer = run(policy, 0.0)
        add(policy, "inner", 500, 0.1, deadline=0.7)
        inner = policy.at_layer_boundary(0.1, outer)
        assert inner is not None
        policy.observe(inner, 0.5, 0.6)
        add(policy, "later", 10, 0.7, deadline=2.1)
        assert policy.at_layer_boundary(0.7, outer) is None
        assert policy.predicted_wait(100, 0, 0.7) == pytest.approx(0.1)
        patient = policy.predicted_wait(5000, 0, 0.7)
        assert patient == pytest.approx(0.8 + 0.01 + 5.0, abs=1e-6)

    def test_one_that_was_taken_back_leaves_no_trace(self) -> None:
        policy = flow()
        add(policy, "outer", 1000)
        outer = run(policy, 0.0)
        add(policy, "inner", 100, 0.1)
        assert policy.at_layer_boundary(0.1, outer) is not None
        policy.remove("inner")
        assert policy.at_layer_boundary(0.5, outer) is None
        assert policy.predicted_wait(5000, 0, 0.5) == pytest.approx(0.5 + 5.0)


class TestNested:
    """Three batches, 4 s, 2 s and 0.1 s of work, each inside the one before."""

    def begin(self) -> tuple[PrefillPolicy, Batch, Batch]:
        """``outer`` runs from 0 and ``middle`` inside it from 1."""
        policy = flow(":batch_tokens=1")  # nobody joins another
        add(policy, "outer", 4000, deadline=9.0)
        outer = run(policy, 0.0)
        add(policy, "middle", 2000, 1.0, deadline=8.0)
        return policy, outer, inside(policy, 1.0, outer)

    def test_a_batch_inside_another_gives_way_too(self) -> None:
        policy, outer, middle = self.begin()
        assert shape(middle) == [("middle", 2000)]
        add(policy, "later", 100, 1.1, deadline=8.5)
        assert policy.at_layer_boundary(1.2, middle) is None, "before outer, but not before middle"
        add(policy, "inner", 100, 1.3, deadline=2.0)
        inner = inside(policy, 1.4, middle)
        assert shape(inner) == [("inner", 100)]
        policy.observe(inner, 0.1, 1.5)
        assert policy.at_layer_boundary(1.5, middle) is None
        policy.observe(middle, 2.0, 3.1)
        later = inside(policy, 3.1, outer)
        assert shape(later) == [("later", 100)]
        policy.observe(later, 0.1, 3.2)
        assert policy.at_layer_boundary(3.2, outer) is None
        policy.observe(outer, 4.0, 6.2)
        assert policy.state(6.2).seconds == 0

    def test_all_that_is_under_way_is_waited_for(self) -> None:
        policy, outer, middle = self.begin()
        add(policy, "inner", 500, 1.5, deadline=2.5)
        inner = inside(policy, 1.5, middle)
        patient = 9000  # due after everyone
        assert policy.predicted_wait(patient, 0, 1.7) == pytest.approx(
            3.0 + 1.5 + 0.3 + 9.0, abs=1e-6
        )
        policy.observe(inner, 0.5, 2.0)
        assert policy.predicted_wait(patient, 0, 2.5) == pytest.approx(3.0 + 1.0 + 9.0, abs=1e-6)
        policy.observe(middle, 2.0, 3.5)
        assert policy.predicted_wait(patient, 0, 4.5) == pytest.approx(2.0 + 9.0, abs=1e-6)
        policy.observe(outer, 4.0, 6.5)
        assert policy.predicted_wait(patient, 0, 6.5) == pytest.approx(9.0)

    @pytest.mark.parametrize(("pause", "late"), [(4.9, False), (5.1, True)])
    def test_a_pause_counts_for_what_can_still_be_reached(self, pause: float, late: bool) -> None:
        """Alone middle would be done at 3.0; it is due at 8."""
        policy, _, middle = self.begin()
        add(policy, "important", 4000, 1.5, deadline=99.0, priority=-1)
        important = inside(policy, 1.5, middle)
        policy.observe(important, pause, 1.5 + pause)
        add(policy, "other", 10, 6.7, deadline=8.5)
        assert (policy.at_layer_boundary(6.7, middle) is not None) is late

    def test_one_taken_back_as_a_whole_is_noticed(self) -> None:
        policy, outer, middle = self.begin()
        add(policy, "inner", 100, 1.5, deadline=2.0)
        inside(policy, 1.5, middle)
        policy.remove("inner")
        assert policy.at_layer_boundary(2.0, middle) is None
        assert policy.predicted_wait(9000, 0, 2.0) == pytest.approx(3.0 + 1.0 + 9.0, abs=1e-6)
        add(policy, "again", 100, 2.0, deadline=2.5)
        inside(policy, 2.0, middle)
        policy.remove("again")
        policy.observe(middle, 2.0, 3.0)
        assert policy.predicted_wait(9000, 0, 3.0) == pytest.approx(3.0 + 9.0, abs=1e-6)
        policy.observe(outer, 4.0, 6.0)
        assert policy.state(6.0).seconds == 0

    def test_its_place_is_offered_to_others(self) -> None:
        policy, _, middle = self.begin()
        add(policy, "inner", 100, 1.5, deadline=2.0)
        add(policy, "second", 2000, 1.5, deadline=7.0)
        assert shape(inside(policy, 1.5, middle)) == [("inner", 100)]
        policy.remove("inner")
        assert shape(inside(policy, 1.6, middle)) == [("second", 2000)]

    def test_a_part_of_a_batch_is_still_that_batch(self) -> None:
        """The executor gives back one of two, and its batch is another object."""
        policy = flow()
        add(policy, "outer", 3000, deadline=9.0)
        outer = run(policy, 0.0)
        for name in "ab":
            add(policy, name, 100, 0.5, deadline=5.0)
        both = inside(policy, 0.5, outer)
        assert shape(both) == [("a", 100), ("b", 100)]
        policy.remove("a")
        part = Batch(both.kind, both.prefills[1:])
        assert policy.at_layer_boundary(0.55, part) is None
        policy.observe(part, 0.1, 0.6)
        assert policy.predicted_wait(9000, 0, 0.6) == pytest.approx(2.5 + 9.0, abs=1e-6)

    def test_one_that_was_left_because_all_were_aborted(self) -> None:
        policy, outer, middle = self.begin()
        policy.remove("middle")
        policy.observe(Batch(middle.kind), 0.5, 1.5)
        assert policy.predicted_wait(9000, 0, 1.5) == pytest.approx(3.0 + 9.0, abs=1e-6)
        policy.remove("outer")
        policy.observe(Batch(outer.kind), 1.2, 1.7)
        assert policy.predicted_wait(9000, 0, 1.7) == pytest.approx(9.0)
        assert policy.next(1.7) == Idle()


def test_shorts_are_answered_at_once_beside_a_long() -> None:
    """End to end: each short waits for a layer at most."""
    cost = CostModel(MILLISECOND_A_TOKEN)
    config = PolicyConfig(boundary_tokens=256, max_batch_tokens=100_000)
    long = Job("long", 0.0, 20_000)
    shorts = [Job(f"s{n}", 1.0 + n, 100) for n in range(15)]
    policy = create_policy("flowprefill", config, cost)
    Executor(policy, config, cost, [long, *shorts], layers=100).run()
    for short in shorts:
        assert short.first_token is not None
        assert short.first_token - short.arrival <= 0.2 + 0.1 + 1e-6
    assert long.first_token == pytest.approx(20.0 + 1.5, abs=0.01)


@given(
    jobs=st.lists(
        st.tuples(st.floats(0, 5), st.floats(0.01, 3), st.integers(-1, 1)), min_size=1, max_size=20
    ),
    now=st.floats(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_the_head_is_the_best_by_definition(
    jobs: list[tuple[float, float, int]], now: float
) -> None:
    queue = DeadlineQueue(FlowOptions(), CostModel(MILLISECOND_A_TOKEN))
    crowd = []
    for order, (deadline, seconds, priority) in enumerate(jobs):
        request = Pending(f"r{order}", 0.0, deadline, priority, order, 10, 0, True, seconds, None)
        crowd.append(request)
        queue.push(request)
    best = min(crowd, key=lambda r: (r.priority, now + r.seconds > (r.deadline or 0), r.deadline))
    head = queue.head(now)
    assert head is not None
    late = now + head.seconds > (head.deadline or 0)
    assert (head.priority, late, head.deadline) == (
        best.priority, now + best.seconds > (best.deadline or 0), best.deadline
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [("slo_seconds", -1.0), ("slo_stretch", -1.0), ("batch_tokens", 0)],
)
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        FlowOptions(**{field: value})  # type: ignore[arg-type]
