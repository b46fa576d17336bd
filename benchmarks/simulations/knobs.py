"""Every setting of every baseline that the sweep tries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from pla_serve.policy.registry import parse_policy

OURS = "length-aware"
PLAIN = "fcfs"
FLOW = "flowprefill"
"""The baseline that can interrupt a prefill."""
STIFF = ("fcfs", "hrrn", "srpt", "bucketserve", "fastserve", "laps")
"""Those that cannot."""

BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
"""max-batch-tokens."""
BUCKET_BUDGETS = (4096, 8192, 16384)
"""With smaller ones bucketserve splits a bucket around each long prompt, and takes minutes a run.
"""
CLASSIFY = ("raw", "uncached")
CHUNKS = (None, 512, 1024, 2048)
"""long-chunk-tokens."""

Knobs = Mapping[str, object]


def policies() -> dict[str, list[str]]:
    """Specs by policy, the default of each first."""
    grids: dict[str, Iterable[Knobs]] = {
        OURS: [],
        "fcfs": _batches(),
        "hrrn": _batches(),
        "srpt": _times(_batches((None, 512)), aging=(0, 0.01, 0.1, 1)),
        "bucketserve": _times(_budgets(*BUCKET_BUDGETS), order=("fcfs", "sjf")),
        "fastserve": _times(
            _budgets(2048, 8192),
            levels=(4, 10),
            quantum_seconds=(0.02, 0.2),
            starve_seconds=(10, 1000),
        ),
        "laps": [
            *_times([{}], window_seconds=(0, 0.007), chunk_tokens=BUDGETS, classify=CLASSIFY),
            *_times([{"classify": "uncached", "boundary_tokens": 256}], chunk_tokens=BUDGETS),
        ],
        FLOW: [
            *_times(_budgets(2048, 8192), order=("s-edf", "edf"), slo_stretch=(5, 10, 20, 50, 200)),
            *_times([{}], slo_seconds=(0.1, 1)),
            *_times([{}], batch_tokens=(256, 4096)),
        ],
    }
    return {name: _specs(name, grid) for name, grid in grids.items()}


def unbounded(policy: str) -> bool:
    """Whether, by its order alone, a request may be passed by later ones for ever."""
    spec = parse_policy(policy)
    knobs = dict(spec.knobs)
    if spec.name == "srpt":
        return knobs.get("aging") == 0
    if spec.name == "bucketserve":
        return knobs.get("order") == "sjf"
    if spec.name == FLOW:
        return knobs.get("order", "s-edf") == "s-edf"
    return spec.name == "laps"


def as_published(policy: str) -> bool:
    """All but laps by uncached length, a knob that its authors did not have."""
    return not (policy.startswith("laps") and "classify=uncached" in policy)


def textbook(policy: str) -> bool:
    """Shortest remaining time first, without ageing."""
    return policy.startswith("srpt") and unbounded(policy)


def _batches(chunks: Sequence[int | None] = CHUNKS) -> list[Knobs]:
    """Budgets and caps; a cap that is no less than its budget would change nothing."""
    return [
        {"max-batch-tokens": budget} | ({} if chunk is None else {"long-chunk-tokens": chunk})
        for budget, chunk in product(BUDGETS, chunks)
        if chunk is None or chunk < budget
    ]


def _budgets(*budgets: int) -> list[Knobs]:
    return [{"max-batch-tokens": budget} for budget in budgets]


def _times(grid: Iterable[Knobs], **more: Sequence[object]) -> list[Knobs]:
    """The product; None leaves a knob at its default."""
    added = [dict(zip(more, values, strict=True)) for values in product(*more.values())]
    return [
        {**knobs, **{k: v for k, v in extra.items() if v is not None}}
        for knobs in grid
        for extra in added
    ]


def _specs(name: str, grid: Iterable[Knobs]) -> list[str]:
    found = [name]
    for knobs in grid:
        pairs = (f"{key.replace('_', '-')}={value}" for key, value in knobs.items())
        found.append(":".join((name, *pairs)))
    return found
