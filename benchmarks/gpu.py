"""Checks and measures the GPU path in one command of less than 8 minutes.

Random weights of published configs (Qwen2.5-7B, 14B, 32B); ceilings are measured in the same run.
Parts run in the order of their worth, each within a budget: one that overruns is cut and says so,
and one that fails does not take the others along. Results are written after each step. What the
machine lacks is said first, in a line.

    python benchmarks/gpu.py                        # on a GPU
    python benchmarks/gpu.py --device cpu --tiny    # everything but the kernels, in seconds
    python benchmarks/gpu.py --only leak --leak-seconds 600    # memory under ten minutes of load
    python benchmarks/gpu.py --carry 3.12           # fetch what an image without them needs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_parts import LEAK_SECONDS, environment

LIMIT_SECONDS = 450.0
PARTS = (
    "attention", "correctness", "model 7B", "shapes 7B", "shorts 7B", "longs 7B", "cost model",
    "preemption", "decode", "axes", "piecewise", "leak", "other Qwen2.5-14B", "other Qwen2.5-32B",
    "other tiny",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: for tests")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="for the whole run")
    parser.add_argument(
        "--leak-seconds", type=float, help=f"of the leak part; beyond {LEAK_SECONDS:.0f} on top"
    )
    parser.add_argument(
        "--only", help=f"parts to run, with commas; the ceilings always run: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--carry", metavar="PYTHON", help="fetch packages for that version of Python, and end"
    )
    parser.add_argument("-o", "--output", type=Path, help="default: $OUT, or benchmarks/results")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(PARTS) if options.only else set()
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def main() -> int:
    """Check the environment, then run the parts."""
    options = arguments()
    if options.carry:
        return environment.carry(options.carry)
    environment.use_carried()
    lacking = environment.missing()
    for line in (*lacking, *environment.remarks()):
        print(line, file=sys.stderr)
    if lacking:
        return 2
    from gpu_parts.run import run  # imports what was checked above

    return run(options)


if __name__ == "__main__":
    raise SystemExit(main())
