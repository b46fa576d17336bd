"""How far the host gets ahead of the device, and what express work then waits for."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.batch.staging import DirectUploader, Scratch
from pla_serve.engine.device.capture import NoCapture
from pla_serve.engine.device.marks import DeviceMark, HostDevice
from pla_serve.engine.device.run_ahead import RunAhead
from pla_serve.engine.run.executor import BatchExecutor
from pla_serve.engine.run.graphs.grid import GridLimits, ShapeGrid
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import create_policy
from pla_serve.policy.shapes.ladder import Shape
from tests.engine.chaos import ChaosPolicy
from tests.engine.fake_device import FakeDevice, HostClock
from tests.engine.test_outputs import serve_at_random
from tests.engine.tiny import BLOCK, Engine, make_engine, padded_runner

LAYERS = 12


def on_host_clock(device: FakeDevice, depth: int) -> RunAhead:
    clock = HostClock(least=1.0)
    return RunAhead(device, depth, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize("depth", [1, 2, 3])
@given(seed=st.integers(0, 2**32))
def test_never_more_than_depth_layers_ahead(depth: int, seed: int) -> None:
    """Whatever runs between the layers, and however slow the device is."""
    rng = Random(seed)
    device = FakeDevice()
    ahead = on_host_clock(device, depth)

    def assert_bound() -> None:
        waiting = [work for work in device.unfinished if work.startswith("layer")]
        assert len(waiting) < depth, "express work would wait for more"

    def run(name: str, layers: int) -> None:
        def ask() -> None:
            assert_bound()
            if rng.random() < 0.2:
                device.enqueue("express")
            if name == "outer" and rng.random() < 0.2:
                run("inner", rng.randint(1, 3))

        for layer in range(layers):
            ahead.before_layer(ask)
            assert_bound()
            device.enqueue(f"layer {layer} of {name}")
            if rng.random() < 0.3:
                device.finished = rng.randint(device.finished, len(device.enqueued))

    for _ in range(3):
        run("outer", LAYERS)


def test_a_layer_runs_while_the_host_enqueues_the_next() -> None:
    """With a depth of 2 the device has work at every moment but the first."""
    device = FakeDevice()
    ahead = on_host_clock(device, 2)
    for layer in range(LAYERS):
        ahead.before_layer(lambda: None)
        assert layer == 0 or device.unfinished
        device.enqueue(f"layer {layer}")


@dataclass
class TimedDevice:
    """Computes for as long as it is told, on the host's clock."""

    clock: HostClock
    free_at: float = 0.0
    idle_seconds: float = 0.0
    asynchronous: bool = True
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def enqueue(self, seconds: float) -> None:
        self.idle_seconds += max(0.0, self.clock.now - self.free_at)
        self.free_at = max(self.free_at, self.clock.now) + seconds

    def record(self) -> TimedMark:
        return TimedMark(self.clock, self.free_at)


@dataclass
class TimedMark:
    clock: HostClock
    at: float

    def done(self) -> bool:
        return self.clock.now >= self.at

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.at)

    def seconds_since(self, earlier: DeviceMark) -> float | None:
        assert isinstance(earlier, TimedMark)
        return self.at - earlier.at


@pytest.mark.parametrize("enqueueing", [0.0, 0.01, 0.1, 0.2])
def test_an_arrival_waits_for_the_layer_that_runs(enqueueing: float) -> None:
    """In layers of one second, from its arrival to the moment at which it could begin to run."""
    clock = HostClock()
    device = TimedDevice(clock)
    ahead = RunAhead(device, 2, clock=clock, sleep=clock.sleep)
    rng = Random(0)
    arrivals = sorted(rng.uniform(5, 290) for _ in range(2000))
    waits: list[float] = []

    def ask() -> None:
        while arrivals and arrivals[0] <= clock.now:
            waits.append(device.free_at - arrivals.pop(0))

    for _ in range(300):
        ahead.before_layer(ask)
        clock.now += enqueueing
        device.enqueue(1.0)
    assert not arrivals
    assert sum(waits) / len(waits) <= max(1.1, 0.5 + 3 * enqueueing)
    assert max(waits) <= 1 + 2 * enqueueing + 0.01
    assert device.idle_seconds < 0.3, "the device never waits for the host"


def test_layers_that_become_shorter_cost_a_nap_at_most() -> None:
    clock = HostClock()
    device = TimedDevice(clock)
    ahead = RunAhead(device, 2, clock=clock, sleep=clock.sleep)
    for seconds in (1.0, 1.0, 0.01, 0.01, 0.01, 1.0, 0.002) * 20:
        ahead.before_layer(lambda: None)
        clock.now += 0.0001
        device.enqueue(seconds)
    assert device.idle_seconds < 140 * 0.0003


def test_a_host_that_computes_itself_is_not_held_up() -> None:
    ahead = RunAhead(HostDevice(), 1)
    asked: list[int] = []
    for layer in range(LAYERS):
        ahead.before_layer(lambda layer=layer: asked.append(layer))
    assert asked == list(range(LAYERS))


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RunAhead(FakeDevice(), 0)


def engine_on(device: FakeDevice, policy: PrefillPolicy) -> Engine:
    """A loop on a device that is never faster than it must be; small batches run as a whole."""
    runner = padded_runner("llama")
    limits = GridLimits(BLOCK, Scratch(256 * BLOCK, BLOCK), 512, 64, 1.0)
    shapes = [Shape(4, 4), Shape(16, 4), Shape(32, 8)]
    grid = ShapeGrid(
        runner, NoCapture(), DirectUploader(), shapes, lambda t, b: t, limits, torch.device("cpu")
    )
    grid.capture_all()
    counted = CountingRunner(runner, device)
    executor = BatchExecutor(counted, grid, DirectUploader(), device, BLOCK)
    return make_engine("llama", policy, executor=executor)


class CountingRunner(ModelRunner):
    """Tells the device of each pass, so that marks differ."""

    def __init__(self, runner: ModelRunner, device: FakeDevice) -> None:
        self._inner = runner
        self._fake = device

    def forward(self, batch, at_boundary=None):  # type: ignore[no-untyped-def]
        self._fake.enqueue("pass")
        return self._inner.forward(batch, at_boundary)

    def use_idle_time(self) -> bool:
        return self._inner.use_idle_time()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), aborts=st.booleans())
def test_tokens_that_come_late_are_the_right_ones(seed: int, aborts: bool) -> None:
    """Express batches are booked long after they were enqueued, in the middle of others."""
    engine = engine_on(FakeDevice(), ChaosPolicy(seed, express=0.5))
    serve_at_random(engine, "llama", Random(seed), count=8, aborts=aborts)
    assert not engine.loop._settlement.pending


# Those that interrupt a prefill.
@pytest.mark.parametrize("name", ["length-aware", "flowprefill"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_policies_bear_to_hear_late(name: str, seed: int) -> None:
    rng = Random(seed)
    config = PolicyConfig(
        boundary_tokens=rng.choice((4, 16)),
        max_batch_tokens=rng.choice((16, 64, 256)),
        max_batch_requests=rng.choice((1, 3, 8)),
    )
    engine = engine_on(FakeDevice(), create_policy(name, config, CostModel()))
    serve_at_random(engine, "llama", rng, count=8, aborts=True)
    assert not engine.loop._settlement.pending
