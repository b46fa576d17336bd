"""Random histories of a fleet on virtual time, one for each seed, and whether all invariants held.

The router, its hand-overs, its failover and its control are those of real fleets; instances, links
and time are simulated (`tests/fleet/seeds`). A seed that fails is printed with the end of its
history, and replayed by its number.

    python benchmarks/fleet_seeds.py --seeds 10000 -o benchmarks/results/fleet_seeds.json
    python benchmarks/fleet_seeds.py --seed 4711 --history

Ctrl-C or SIGTERM ends a run early; what ran until then is recorded.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pla_serve.environment import describe

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fleet.seeds.world import FAULTS, Outcome, play, replay_command

LINES = 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="the only one, or the first one", default=0)
    parser.add_argument("--seeds", type=int, help="how many", default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--history", action="store_true", help="print all of each history")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    environment = describe()  # of the code that runs, whatever is committed meanwhile
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    failed: list[int] = []
    requests = 0
    ran = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ProcessPoolExecutor(options.processes, initializer=_ignore_interrupts) as pool:
        seeds = range(options.seed, options.seed + options.seeds)
        try:
            for outcome in pool.map(play, seeds, chunksize=10):
                ran += 1
                counts += outcome.counts
                requests += outcome.requests
                if outcome.error:
                    failed.append(outcome.seed)
                if outcome.error or options.history:
                    _show(outcome, whole=options.history)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
    content = {
        "kind": "random histories of a fleet on virtual time",
        "first_seed": options.seed,
        "seeds": ran,
        "failed_seeds": failed,
        "requests": requests,
        "faults": {kind: counts.pop(kind, 0) for kind in FAULTS},
        "others": dict(sorted(counts.items())),
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment,
    }
    print(json.dumps(content, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    if failed:
        raise SystemExit(f"{len(failed)} of {ran} seeds failed")


def _ignore_interrupts() -> None:
    """Leave it to the parent to end a run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _show(outcome: Outcome, *, whole: bool) -> None:
    print("\n".join(outcome.history if whole else outcome.history[-LINES:]))
    verdict = outcome.error or "all invariants held"
    print(
        f"seed {outcome.seed}: {verdict}; history {outcome.digest}; "
        f"all of it: {replay_command(outcome.seed)}"
    )


if __name__ == "__main__":
    main()
