"""What an exact choice of captured shapes gains over the published grid.

Lengths come from a CSV (a column of new or input tokens) or, without one, from a lognormal. Batches
form as on a device that takes whatever waits: arrivals are Poisson, and a batch takes what the cost
says. Times are *modelled* from a roofline, not measured; the launch times are options.

    python benchmarks/shape_ladder.py --lengths lmsys_user_messages_10k.csv.gz --load 0.8
"""

from __future__ import annotations

import argparse
import csv
import gzip
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pla_serve.policy.cost import CostProfile
from pla_serve.policy.shapes.histogram import ShapeDemand, ShapeHistogram
from pla_serve.policy.shapes.ladder import (
    GRID_BATCHES,
    Footprint,
    Ladder,
    Layout,
    Shape,
    grid,
    size_of,
)
from pla_serve.policy.shapes.optimise import Budget, Structure, expected_seconds, optimise

BOUNDARY = 256
MOST_BATCH = 64
COLUMNS = ("new_tokens", "input_tokens", "tokens")

Cost = Callable[[float, int], float]


def read_lengths(path: Path) -> list[int]:
    """New tokens of every row, at most BOUNDARY."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    name = next((column for column in COLUMNS if column in rows[0]), None)
    if name is None:
        raise SystemExit(f"{path} has none of the columns {', '.join(COLUMNS)}")
    lengths = [int(row[name]) for row in rows]
    return [length for length in lengths if 1 <= length <= BOUNDARY]


def costs(launch: float, ordinary_launch: float) -> tuple[Cost, Cost]:
    """(captured, ordinary) of a 14B model in bf16 at the peaks of an H200 (NVIDIA data sheet)."""
    unit = CostProfile.roofline(
        parameters=14e9,
        weight_bytes=28e9,
        attention_width=5120,
        layers=48,
        kv_bytes_per_token=196_608,
        flops=989e12,
        bytes_per_second=4.8e12,
        launch_seconds=0.0,
    )

    def ordinary(tokens: float, batch: int) -> float:
        return unit.per_launch + ordinary_launch + unit.per_token * tokens

    def captured(tokens: float, batch: int) -> float:
        return unit.per_launch + launch + unit.per_token * tokens

    return captured, ordinary


def observe(
    lengths: list[int], cost: Cost, load: float, layout: Layout, count: int, seed: int
) -> ShapeDemand:
    """Batches of a device that takes what waits; load in requests a launch time."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(cost(1, 1) / load, count))
    drawn = random.choice(lengths, count)
    most = BOUNDARY if layout is Layout.PADDED else BOUNDARY * MOST_BATCH
    histogram = ShapeHistogram(most, MOST_BATCH, granularity=1 if layout is Layout.PADDED else 64)
    now, at = 0.0, 0
    while at < count:
        now = max(now, float(arrivals[at]))
        end = min(int(np.searchsorted(arrivals, now, side="right")), at + MOST_BATCH)
        batch = drawn[at:end].tolist()
        histogram.record(size_of(batch, layout), sum(batch))
        now += cost(sum(batch), len(batch))
        at = end
    return histogram.demand()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=Path, help="CSV, may be gzipped")
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 2.0, 8.0])
    parser.add_argument("--launch", type=float, default=0.0005, help="seconds, captured")
    parser.add_argument("--ordinary-launch", type=float, default=0.008, help="seconds")
    parser.add_argument("--layout", type=Layout, choices=list(Layout), default=Layout.PADDED)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.lengths is not None:
        lengths = read_lengths(options.lengths)
    else:
        drawn = np.random.default_rng(options.seed).lognormal(3.0, 1.2, 10_000)
        lengths = [int(x) for x in drawn if 1 <= x <= BOUNDARY]
    captured, ordinary = costs(options.launch, options.ordinary_launch)
    padded = options.layout is Layout.PADDED

    def shape_cost(tokens: int, batch: int) -> float:
        return captured(tokens * batch if padded else tokens, batch)

    shapes = grid() if padded else grid([8 * 2**i for i in range(12)], GRID_BATCHES)
    table = Table("load", "ladder", "shapes", "GB", "ms a batch", "against grid", "chosen in s")
    footprint = Footprint(bytes_per_shape=240e6, seconds_per_shape=10.0)  # arXiv 2601.11589, 14B
    for load in options.load:
        demand = observe(lengths, captured, load, options.layout, options.requests, options.seed)

        def built(some: tuple[Shape, ...]) -> Ladder:
            return Ladder(some, shape_cost, eager=ordinary, layout=options.layout)

        rows: list[tuple[str, Ladder, float]] = [
            ("ordinary kernels", built(()), 0.0),
            ("grid", built(shapes), 0.0),
        ]
        for count in (len(shapes), len(shapes) // 2, len(shapes) // 4):
            began = time.perf_counter()
            budget = Budget(memory_bytes=count * 240e6, footprint=footprint)
            choice = optimise(
                demand,
                shape_cost,
                ordinary,
                budget,
                layout=options.layout,
                structure=Structure.ROWS,
            )
            rows.append((f"exact, {count}", choice.ladder, time.perf_counter() - began))
        base = expected_seconds(rows[1][1], demand)
        for name, ladder, took in rows:
            mean = expected_seconds(ladder, demand)
            table.add_row(
                f"{load:g}",
                name,
                str(len(ladder.shapes)),
                f"{ladder.memory_bytes(footprint) / 1e9:.2f}",
                f"{mean * 1e3:.3f}",
                f"{mean / base - 1:+.1%}",
                f"{took:.1f}" if took else "",
            )
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
