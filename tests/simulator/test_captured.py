from __future__ import annotations

import random

import pytest

from pla_serve.policy.cost import CostProfile
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
from pla_serve.policy.shapes.ladder import Layout
from pla_serve.simulator.captured import Captured, CapturedCost
from pla_serve.simulator.machine import KnownCost

PROFILE = CostProfile(1e-4, 1e-7, 1e-6, 1e-3, 1e-2)
HOST = 0.03


def prefills(*sizes: tuple[int, int]) -> Batch:
    chunks = tuple(Chunk(str(i), new, history) for i, (new, history) in enumerate(sizes))
    return Batch(BatchClass.SHORT, chunks)


def seconds(batch: Batch, **options: object) -> float:
    return CapturedCost(PROFILE, Captured(HOST, **options)).seconds(batch)  # type: ignore[arg-type]


def device(batch: Batch) -> float:
    return KnownCost(PROFILE).seconds(batch)


def test_a_batch_that_fills_its_shape_takes_what_the_device_takes() -> None:
    batch = prefills((16, 100), (16, 30))
    assert seconds(batch) == pytest.approx(device(batch))
    assert seconds(batch) < HOST


def test_padding_costs_as_much_as_tokens() -> None:
    three = prefills((9, 50), (16, 0), (3, 7))
    four = prefills((16, 50), (16, 0), (16, 7), (16, 0))
    assert seconds(three) == pytest.approx(device(four))


def test_the_host_bounds_what_is_not_captured() -> None:
    small = prefills((16, 0))
    assert seconds(small, tokens=()) == HOST
    large = prefills((4096, 0))
    assert seconds(large) == device(large) > HOST
    rides = Batch(BatchClass.SHORT, small.prefills, (Chunk("d", 1, 10),))
    assert seconds(rides) == HOST
    steps = Batch(BatchClass.DECODE, decodes=(Chunk("d", 1, 10),))
    assert seconds(steps) == device(steps) < HOST


def test_who_may_choose_pads_only_where_it_pays() -> None:
    wasteful = prefills((200, 0), *[(8, 0)] * 32)  # 64 rows of 256
    assert seconds(wasteful) > 5 * device(wasteful)
    assert seconds(wasteful, always=False) == max(device(wasteful), HOST)
    assert seconds(prefills((16, 0)), always=False) < HOST


@pytest.mark.parametrize("layout", list(Layout))
def test_choosing_is_never_slower_and_a_shape_never_faster_than_the_device(layout: Layout) -> None:
    rng = random.Random(1)
    for _ in range(200):
        sizes = [(rng.randint(1, 300), rng.choice((0, 900))) for _ in range(rng.randint(1, 70))]
        batch = prefills(*sizes)
        tokens = (64, 256, 1024, 4096) if layout is Layout.FLAT else (8, 64, 256)
        always = seconds(batch, layout=layout, tokens=tokens)
        chosen = seconds(batch, layout=layout, tokens=tokens, always=False)
        assert chosen <= always
        assert chosen <= max(device(batch), HOST)
        assert always >= device(batch) * (1 - 1e-9)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="ordinary_seconds"):
        Captured(-1.0)
    with pytest.raises(ValueError, match="at least 1"):
        Captured(0.01, tokens=(0, 8))
