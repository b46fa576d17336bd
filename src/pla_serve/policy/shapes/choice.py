"""Chooses the shapes that are captured at start."""

from __future__ import annotations

from collections.abc import Iterable

from pla_serve.policy.shapes.histogram import SizeCount
from pla_serve.policy.shapes.ladder import Layout, Shape, ShapeCost, grid
from pla_serve.policy.shapes.optimise import Budget, optimise

AUTO = "auto"
PAPER = "paper"
AUTO_SHAPES = 24
"""Number of prefill shapes that ``auto`` chooses, beside the shapes of decode steps."""
STEP = 8
"""Resolution in tokens of the sizes that ``auto`` optimises for."""


def parse_shapes(text: str) -> tuple[Shape, ...] | None:
    """Parse a list of shapes. Returns None for ``auto`` and ``paper``.

    Example: ``parse_shapes("64x4,256x16")`` is ``(Shape(64, 4), Shape(256, 16))``.

    Raises:
        ValueError: the text is neither a list nor one of the two words. The message shows the form.
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
    """Return the shapes that ``--capture-shapes`` asks for: tokens of the whole batch, requests.

    Args:
        text: ``auto``, ``paper``, or a list of shapes.
        most_tokens: most tokens of a batch that is captured.
        most_batch: most requests of a batch.
        cost: predicted seconds of a shape, which ``auto`` minimises.

    Raises:
        ValueError: ``text`` is malformed, or a shape in it exceeds the limits.
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
    """Return the cheapest ladder for a demand in which no size is likelier than its double.

    All batch sizes that are powers of two are equally likely, and so are all octaves of tokens.
    Before anything was served, nothing more is known.
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
    """Return the powers of two below ``most``, and ``most``."""
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


def _unique(shapes: Iterable[Shape], most_batch: int) -> tuple[Shape, ...]:
    return tuple(sorted({s for s in shapes if s.batch <= most_batch}))
