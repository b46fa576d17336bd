"""What the scripts of this folder share: a run of the simulator, its numbers, files and pictures.

Everything here is *simulated*: the project's policies on virtual time, on a roofline of an H200.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pla_serve.environment import describe
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.pools.protocol import PoolController
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import parse_policy
from pla_serve.policy.shapes.ladder import Layout
from pla_serve.simulator.captured import Captured
from pla_serve.simulator.cluster import Cluster
from pla_serve.simulator.cluster_options import ClusterOptions, ClusterResult, SimulatedTraffic
from pla_serve.simulator.machine import KnownCost, Machine, load_machine
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.turns import OpenLoop, SimulatedTurn, TurnSource, turns_of
from pla_serve.simulator.workload import at_load
from pla_serve.traces.rows import Row

RESULTS = Path(__file__).parents[1] / "results" / "paper"
STRICT_POOLS = "pla-serve"
"""As published: by class, nothing flows over."""
SHORT_TOKENS = 256
SLO_SECONDS = 0.4

LEAN_HOST = 0.006
"""Seconds of host time for a 64-layer pass on ordinary kernels: 12 kernels a layer at 8 us. An
assumption. It hides behind the 17 ms in which an H200 reads the weights of a 32B model."""
SLOW_HOST = 0.025
"""The same for model code that was not tuned: 20 kernels a layer at 20 us. An assumption."""
FLAT_TOKENS = tuple(8 * 2**i for i in range(9))
"""Token slots of our own captured shapes, 8 to 2,048 in a batch."""

Make = Callable[[PolicyConfig, CostModel], PrefillPolicy]


@dataclass(frozen=True)
class System:
    """What is compared: a policy, and how its short batches run."""

    label: str
    policy: str | Make
    color: str
    captured: Captured | None = None
    routing: str = "round-robin"
    style: str = "-"
    short_instances: int = 0
    controller: Callable[[], PoolController] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def make(self, machine: Machine) -> Callable[[], PrefillPolicy]:
        """Makes fresh policies."""
        cost = KnownCost(machine.profile)
        config = PolicyConfig(**{"max_batch_tokens": machine.max_batch_tokens, **self.config})
        policy = self.policy
        if isinstance(policy, str):
            spec = parse_policy(policy)
            return lambda: spec.create(config, cost)
        return lambda: policy(config, cost)


def ordinary(host: float) -> Captured:
    """No shape is captured: each pass pays the host."""
    return Captured(host, tokens=())


def published_grid(host: float) -> Captured:
    """L in 8..256 x B in 1..64, always padded to the nearest."""
    return Captured(host)


def our_ladder(host: float) -> Captured:
    """Flat shapes of powers of two, used where they pay."""
    return Captured(host, tokens=FLAT_TOKENS, layout=Layout.FLAT, always=False)


def run(
    system: System,
    machine: Machine,
    turns: Sequence[SimulatedTurn],
    source: TurnSource,
    **options: Any,
) -> ClusterResult:
    """Serve all turns to their end."""
    make = system.make(machine)
    options = {
        "routing": system.routing,
        "express": make().capabilities.leaves_at_layer_boundary,
        "short_instances": system.short_instances,
        **options,
    }
    return Cluster(
        ClusterOptions(**options),
        msgspec.structs.replace(machine, captured=system.captured),
        make,
        SimulatedTraffic(turns, source),
        controller=system.controller() if system.controller is not None else None,
    ).run()


class Clients:
    """A closed loop of clients in groups, each group with requests of its own.

    A client plays a session to its end, then takes the group's next one. Between an answer and the
    next request lies an exponential pause of ``pause`` seconds on average, drawn from ``seed``.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[SimulatedTurn], int]],
        *,
        pause: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._waiting = [deque(turn for turn in turns if turn.after < 0) for turns, _ in groups]
        self._counts = [count for _, count in groups]
        self._group = {turn.index: i for i, (turns, _) in enumerate(groups) for turn in turns}
        self._next = {t.after: t for turns, _ in groups for t in turns if t.after >= 0}
        self._pause = pause
        self._random = random.Random(seed)

    def start(self) -> Iterable[tuple[float, SimulatedTurn]]:
        first = [
            (self._draw(), queue.popleft())
            for queue, count in zip(self._waiting, self._counts, strict=True)
            for _ in range(min(count, len(queue)))
        ]
        return sorted(first, key=lambda pair: (pair[0], pair[1].index))

    def answered(self, turn: SimulatedTurn, now: float) -> Iterable[tuple[float, SimulatedTurn]]:
        later = self._next.get(turn.index)
        if later is None:
            queue = self._waiting[self._group[turn.index]]
            if not queue:
                return ()
            later = queue.popleft()
        return ((now + self._draw(), later),)

    def _draw(self) -> float:
        return self._random.expovariate(1 / self._pause) if self._pause else 0.0


def single_turns(prompts: Sequence[int], outputs: int = 1, first: int = 0) -> list[SimulatedTurn]:
    """Unique prompts: nothing of them is cached anywhere."""
    return [
        SimulatedTurn(first + i, 0.0, tokens, outputs, (), history=0)
        for i, tokens in enumerate(prompts)
    ]


def open_loop(
    rows: Sequence[Row], chip: Machine, load: float, instances: int
) -> tuple[list[SimulatedTurn], OpenLoop, float]:
    """Turns at their own times, stretched to ``load``, and the requests a second that makes."""
    work = at_load("", rows, KnownCost(chip.profile), load, instances=instances)
    turns = turns_of(work.rows, work.stretch)
    if instances == 1:
        for turn, known in zip(turns, turns_with_history(work.rows), strict=True):
            turn.history, turn.prompt = known.history, ()
    return turns, OpenLoop(turns, wait=False), len(turns) / work.span


def turns_with_history(rows: Sequence[Row]) -> list[SimulatedTurn]:
    """A session's earlier turns are cached wherever the next one goes."""
    turns = turns_of(rows)
    for turn, row in zip(turns, rows, strict=True):
        turn.history = min(row.cached_tokens or 0, row.input_tokens - 1)
        turn.prompt = ()
    return turns


def ttft(jobs: Sequence[SimulatedRequest]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds to first token."""
    return np.array([job.ttft for job in jobs])


def rank(values: Sequence[float] | np.ndarray[Any, Any], percent: float) -> float | None:
    """A percentile; None of nothing."""
    return float(np.percentile(values, percent)) if len(values) else None


def summary(jobs: Sequence[SimulatedRequest]) -> dict[str, Any]:
    """Requests a second of the makespan, and times to first token by class."""
    start = min(job.arrival for job in jobs)
    end = max(job.first_token for job in jobs)
    shorts = [job for job in jobs if job.new_tokens <= SHORT_TOKENS]
    longs = [job for job in jobs if job.new_tokens > SHORT_TOKENS]
    found: dict[str, Any] = {
        "requests": len(jobs),
        "requests_per_s": len(jobs) / (end - start),
        "new_tokens_per_s": sum(job.new_tokens for job in jobs) / (end - start),
        "cached_share": sum(job.history for job in jobs) / sum(job.prompt_tokens for job in jobs),
    }
    for name, some in (("all", jobs), ("short", shorts), ("long", longs)):
        times = ttft(some)
        found[name] = {
            "count": len(some),
            "mean": float(times.mean()) if len(some) else None,
            **{f"p{percent}": rank(times, percent) for percent in (50, 90, 99)},
            "over_slo": float((times > SLO_SECONDS).mean()) if len(some) else None,
        }
    return found


Runs = list[dict[str, Any]]
Simulate = Callable[[argparse.Namespace], tuple[dict[str, Any], Runs]]
Draw = Callable[[argparse.Namespace, Runs], None]


def main(doc: str | None, name: str, simulate: Simulate, draw: Draw) -> None:
    """A script: simulate, save ``OUTPUT.json``, draw ``OUTPUT.png``."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=RESULTS / name, help="file names without suffix"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on numbers of requests")
    parser.add_argument("--redraw", action="store_true", help="draw OUTPUT.json, simulate nothing")
    options = parser.parse_args()
    path = options.output.with_suffix(".json")
    if options.redraw:
        runs = json.loads(path.read_text())["runs"]
    else:
        about, runs = simulate(options)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"kind": "simulated", **about, "seed": options.seed}
        content |= {"environment": describe(), "runs": runs}
        path.write_text(json.dumps(_rounded(content), indent=1) + "\n")
    draw(options, runs)


def machine(size: str) -> Machine:
    """An H200 with a Qwen2.5 of 7b, 14b or 32b."""
    return load_machine(f"h200-qwen2.5-{size}")


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A picture and its axes, an array of ``rows`` by ``columns``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#aaaaaa",
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "lines.linewidth": 1.6,
            "lines.markersize": 4,
        }
    )
    return pyplot.subplots(
        rows, columns, figsize=(width, height), dpi=110, layout="constrained", squeeze=False
    )


def finish(options: argparse.Namespace, picture: Any, axes: Any, title: str, columns: int) -> None:
    """One legend below for all panels, the title above, and ``OUTPUT.png``."""
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    picture.suptitle(f"Simulated. {title}", x=0.01, ha="left", color="#666666", fontsize=9)
    picture.savefig(options.output.with_suffix(".png"))


def ticks(axes: Any, values: Sequence[float], label: str) -> None:
    """A logarithmic x axis with these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(label)


def seconds_axis(axes: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _rounded(value: Any) -> Any:
    """Five digits are more than a model deserves, and make small files."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
