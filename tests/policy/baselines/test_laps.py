"""Short first without a bound, a window that is always on, chunks that nothing interrupts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pla_serve.policy.baselines.laps import LapsOptions
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import BatchClass, Idle, PrefillPolicy, Wait
from pla_serve.policy.registry import create_policy
from tests.policy.baselines.helpers import MILLISECOND_A_TOKEN, add, make, run, shape, step

from ..executor import Executor, Job

CONFIG = PolicyConfig(boundary_tokens=256, max_batch_requests=8)


def laps(knobs: str = "", config: PolicyConfig = CONFIG) -> PrefillPolicy:
    return make(f"laps{knobs}", config)


class TestWindow:
    def test_the_first_short_waits_for_it_and_no_longer(self) -> None:
        policy = laps()
        add(policy, "a", 10, 1.0)
        assert policy.next(1.0) == Wait(1.007)
        add(policy, "b", 10, 1.006)
        assert policy.next(1.006) == Wait(1.007)
        assert step(policy, 1.007) == [("a", 10), ("b", 10)]
        assert policy.next(1.007) == Idle()

    def test_depth_ends_it(self) -> None:
        policy = laps(":window_seconds=9:depth=2")
        add(policy, "a", 10, 1.0)
        assert isinstance(policy.next(1.0), Wait)
        add(policy, "b", 10, 1.1)
        assert step(policy, 1.1) == [("a", 10), ("b", 10)]

    def test_so_does_a_full_batch(self) -> None:
        policy = laps(":window_seconds=9:chunk_tokens=300")
        add(policy, "a", 200, 1.0)
        assert isinstance(policy.next(1.0), Wait)
        add(policy, "b", 200, 1.1)
        assert step(policy, 1.1) == [("a", 200), ("b", 100)]
        assert step(policy, 1.2) == [("b", 100)], "what has begun does not wait again"

    def test_zero_never_waits(self) -> None:
        policy = laps(":window_seconds=0")
        add(policy, "a", 10, 1.0)
        assert step(policy, 1.0) == [("a", 10)]

    def test_decode_steps_run_meanwhile(self) -> None:
        policy = laps()
        policy.start_decode("d", 5, 0.0, 0.0)
        add(policy, "a", 10, 1.0)
        batch = run(policy, 1.0)
        assert (batch.kind, len(batch.decodes)) == (BatchClass.DECODE, 1)
        policy.observe(batch, 0.01, 1.01)
        assert shape(run(policy, 1.01)) == [("a", 10)]

    def test_longs_wait_for_the_window_of_a_short(self) -> None:
        policy = laps()
        add(policy, "long", 1000, 0.0)
        add(policy, "a", 10, 1.0)
        assert policy.next(1.0) == Wait(1.007)


def test_longs_go_one_at_a_time_in_chunks_when_no_short_waits() -> None:
    policy = laps(":chunk_tokens=400:window_seconds=0")
    add(policy, "first", 700)
    add(policy, "second", 300, 0.1)
    policy.start_decode("d", 5, 0.0, 0.0)
    batch = run(policy)
    assert batch.kind is BatchClass.LONG
    assert (shape(batch), len(batch.decodes)) == ([("first", 399)], 1)
    add(policy, "short", 10, 1.0)
    assert policy.at_layer_boundary(1.01, batch) is None
    policy.remove("d")
    policy.observe(replace(batch, decodes=()), 0.4, 1.4)
    assert step(policy, 1.5) == [("short", 10)]
    assert step(policy, 1.8) == [("first", 301)]
    assert step(policy, 2.1) == [("second", 300)]


def test_chunk_tokens_stands_in_for_the_limits_of_others() -> None:
    policy = laps(config=replace(CONFIG, max_batch_tokens=64, long_chunk_tokens=16))
    add(policy, "long", 9000)
    assert step(policy, 1.0) == [("long", 8192)]


@pytest.mark.parametrize(("how", "short"), [("raw", False), ("uncached", True)])
def test_classes_by_raw_or_uncached_length(how: str, short: bool) -> None:
    policy = laps(f":classify={how}")
    assert policy.waits_as_short(100, 4000) is short
    assert policy.waits_as_short(100, 156)
    assert not policy.waits_as_short(257, 0)
    add(policy, "turn", 100, history=4000)
    assert run(policy).kind is (BatchClass.SHORT if short else BatchClass.LONG)


def test_shorts_that_keep_coming_starve_a_long() -> None:
    """The weakness that the project's own policy has a bound for."""
    long = Job("long", 0.0, 1000)
    flood = [Job(f"s{n}", n * 0.05, 100) for n in range(200)]
    cost = CostModel(MILLISECOND_A_TOKEN)
    config = replace(CONFIG, max_batch_tokens=8192)
    policy = create_policy("laps", config, cost)
    Executor(policy, config, cost, [long, *flood], separate=True, waits=True).run()
    assert long.first_token == max(job.first_token or 0.0 for job in [long, *flood])


def test_predicted_wait() -> None:
    policy = laps()
    assert policy.predicted_wait(100, 0, 1.0) == pytest.approx(0.107)
    add(policy, "long", 1000)
    run(policy, 0.0)
    add(policy, "short", 50, 0.9)
    assert policy.predicted_wait(100, 0, 0.9) == pytest.approx(0.1 + 0.05 + 0.1)
    assert policy.predicted_wait(300, 0, 0.9) == pytest.approx(1.05 + 0.3)


@pytest.mark.parametrize(
    ("field", "value"), [("window_seconds", -1.0), ("depth", 0), ("chunk_tokens", 0)]
)
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        LapsOptions(**{field: value})  # type: ignore[arg-type]
