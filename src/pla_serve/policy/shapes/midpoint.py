"""Length levels by BucketServe's midpoint split (arXiv 2507.17120), to compare with.

BucketServe keeps buckets of lengths [low, high), first one for all. A bucket that holds more than
``capacity`` requests is split at its midpoint if more than ``theta`` of them lie below it, so that
these pad less; with few requests in all, the buckets become one again. Costs play no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pla_serve.policy.shapes.histogram import SizeCount
from pla_serve.policy.shapes.ladder import Shape

THETA = 0.5


class MidpointBucket(NamedTuple):
    """Lengths ``low`` <= length < ``high``, in tokens."""

    low: int
    high: int


def midpoint_split(
    lengths: Mapping[int, float],
    longest: int,
    *,
    capacity: float = 0.0,
    most: int | None = None,
    theta: float = THETA,
) -> tuple[MidpointBucket, ...]:
    """Split again and again, from one bucket for all lengths up to ``longest``.

    Args:
        lengths: weight of each length. Those above ``longest`` are left out.
        longest: most new tokens, at least 1.
        capacity: weight that a bucket may hold without being split. The total at or below it gives
            one bucket.
        most: split the heaviest bucket first, and stop at so many; None for no limit.
        theta: share of a bucket's weight that must lie below its midpoint.

    Raises:
        ValueError: ``longest`` or ``most`` is below 1, or ``theta`` is not in 0..1.
    """
    if longest < 1 or (most is not None and most < 1):
        raise ValueError(f"longest and most must be at least 1, not {longest} and {most}")
    if not 0 <= theta <= 1:
        raise ValueError(f"theta must lie in 0..1, not {theta}")
    buckets = [MidpointBucket(0, longest + 1)]
    while most is None or len(buckets) < most:
        ranked = sorted(buckets, key=lambda bucket: -_weight(lengths, bucket))
        chosen = next((b for b in ranked if _splits(lengths, b, capacity, theta)), None)
        if chosen is None:
            break
        middle = (chosen.low + chosen.high) // 2
        at = buckets.index(chosen)
        buckets[at : at + 1] = [
            MidpointBucket(chosen.low, middle),
            MidpointBucket(middle, chosen.high),
        ]
    return tuple(buckets)


def midpoint_shapes(
    demand: Mapping[Shape, SizeCount], count: int, batches: Sequence[int], *, theta: float = THETA
) -> tuple[Shape, ...]:
    """At most ``count`` shapes: the buckets' longest lengths, each with all ``batches``.

    Raises:
        ValueError: the demand is empty, or ``count`` has no room for one length.
    """
    if not demand or count < len(batches):
        raise ValueError(f"{count} shapes of {len(batches)} batch sizes: no room, or no demand")
    lengths: dict[int, float] = {}
    for size, seen in demand.items():
        lengths[size.tokens] = lengths.get(size.tokens, 0.0) + seen.weight
    most = count // len(batches)
    buckets = midpoint_split(lengths, max(lengths), most=most, theta=theta)
    levels = [bucket.high - 1 for bucket in buckets]
    return tuple(Shape(tokens, batch) for tokens in levels for batch in batches)


def _weight(lengths: Mapping[int, float], bucket: MidpointBucket) -> float:
    return sum(w for length, w in lengths.items() if bucket.low <= length < bucket.high)


def _splits(
    lengths: Mapping[int, float], bucket: MidpointBucket, capacity: float, theta: float
) -> bool:
    weight = _weight(lengths, bucket)
    middle = (bucket.low + bucket.high) // 2
    if weight <= capacity or middle - bucket.low < 1 or bucket.high - bucket.low <= 2:
        return False
    return _weight(lengths, MidpointBucket(bucket.low, middle)) > theta * weight
