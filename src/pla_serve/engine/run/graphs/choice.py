"""Which shapes are captured at start."""

from __future__ import annotations

from collections.abc import Iterable

from pla_serve.policy.shapes.histogram import SizeCount
from pla_serve.policy.shapes.ladder import Layout, Shape, ShapeCost, grid
from pla_serve.policy.shapes.optimise import Budget, optimise

AUTO = "auto"
PAPER = "paper"
AUTO_SHAPES = 24
"""Prefill shapes beside those of decode steps."""
STEP = 8
"""Tokens between two sizes that are told apart."""


def parse_shapes(text: str) -> tuple[Shape, ...] | None:
    """``auto`` and ``paper`` give None; else shapes as ``TOKENSxREQUESTS``, with commas.

    Raises:
        ValueError: it is neither; the message shows the form.
    """
    if text in (AUTO, PAPER):
        return None
    shapes = []
    for part in text.split(","):
        tokens, cross, batch = part.strip().partition("x")
        if not (cross and tokens.isdigit() and batch.isdigit() and int(tokens) and int(batch)):
            raise ValueError(
                f"{part.strip()!r} is no shape: give {AUTO}, {PAPER}, none, or tokens x requests, "
                "such as 64x4,256x16"
            )
        shapes.append(Shape(int(tokens), int(batch)))
    return tuple(shapes)


def choose_shapes(
    text: str, *, most_tokens: int, most_batch: int, cost: ShapeCost
) -> tuple[Shape, ...]:
    """Flat shapes (tokens of the whole batch, requests) by the value of ``--capture-shapes``.

    Args:
        most_tokens, most_batch: no batch to capture is larger.
        cost: seconds of a shape, for ``auto``.

    Raises:
        ValueError: a shape that was named exceeds the limits, or is none.
    """
    named = parse_shapes(text)
    if named is not None:
        for shape in named:
            if shape.tokens > most_tokens or shape.batch > most_batch:
                raise ValueError(
                    f"the shape {shape.tokens}x{shape.batch} is larger than any batch "
                    f"({most_tokens} tokens, {most_batch} requests); raise --max-batch-tokens or "
                    "--max-batch-requests"
                )
        return named
    decode = [Shape(count, count) for count in _powers(most_batch)]
    if text == PAPER:
        flat = (Shape(tokens * batch, batch) for tokens, batch in grid())
        return _unique([*decode, *(s for s in flat if s.tokens <= most_tokens)], most_batch)
    return _unique([*decode, *_optimised(most_tokens, most_batch, cost)], most_batch)


def _optimised(most_tokens: int, most_batch: int, cost: ShapeCost) -> tuple[Shape, ...]:
    """The ladder for a demand that favours no size over its double.

    Each batch size that is a power of two is as likely as any other, and so is each octave of
    tokens: before anything was served, nothing more is known.
    """
    demand: dict[Shape, SizeCount] = {}
    for batch in _powers(most_batch):
        for tokens in range(STEP, most_tokens + 1, STEP):
            if tokens >= 2 * batch:
                demand[Shape(tokens, batch)] = SizeCount(1 / tokens, tokens - STEP / 2)
    if not demand:
        return ()
    slow = 2 * cost(most_tokens, most_batch)
    choice = optimise(
        demand, cost, lambda tokens, batch: slow, Budget(shapes=AUTO_SHAPES), layout=Layout.FLAT
    )
    return choice.ladder.shapes


def _powers(most: int) -> list[int]:
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


def _unique(shapes: Iterable[Shape], most_batch: int) -> tuple[Shape, ...]:
    return tuple(sorted({s for s in shapes if s.batch <= most_batch}))
