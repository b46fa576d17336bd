from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.traces.blocks import SeenBlocks, block_size, decode_blocks
from pla_serve.traces.rows import Row, TraceError

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda x: range(x[0], x[0] + x[1])),
    max_size=5,
)


def ids(ranges: tuple[range, ...] | list[range]) -> list[int]:
    return [block for run in ranges for block in run]


@st.composite
def coded(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Rows as they are written, and the ids that they mean."""
    rows: list[tuple[str, list[int]]] = []
    for _ in range(draw(st.integers(1, 8))):
        head: list[int] = []
        reference = ""
        if rows and draw(st.booleans()):
            row = draw(st.integers(0, len(rows) - 1))
            count = draw(st.integers(0, len(rows[row][1])))
            head, reference = rows[row][1][:count], f"{row}:{count}"
        runs = draw(RANGES)
        tail = ",".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
        rows.append((f"{reference}|{tail}", head + ids(runs)))
    return rows


@given(coded())
def test_decoding_is_what_was_coded(rows: list[tuple[str, list[int]]]) -> None:
    earlier: list[tuple[range, ...]] = []
    for text, meant in rows:
        earlier.append(decode_blocks(text, earlier))
        assert ids(earlier[-1]) == meant


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("7-8", "a bar"),
        ("1:2|", "not before"),
        ("-1:2|", "not before"),
        ("0:4|", "1 more"),
        ("0|3", "invalid literal"),
        ("0:1|x", "invalid literal"),
    ],
)
def test_bad_codes(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode_blocks(text, [(range(5, 8),)])


@given(st.lists(RANGES, max_size=12))
def test_seen_blocks_are_a_set(prompts: list[list[range]]) -> None:
    seen, reference = SeenBlocks(), set[int]()
    for prompt in prompts:
        blocks = ids(prompt)
        known = next((i for i, block in enumerate(blocks) if block not in reference), len(blocks))
        assert seen.add(prompt) == known
        reference.update(blocks)


@given(
    st.sampled_from([16, 64, 512]),
    st.booleans(),
    st.lists(st.integers(700, 5000), min_size=5, max_size=20),
)
def test_the_size_fits_every_row(size: int, up: bool, tokens: list[int]) -> None:
    counts = [-(-n // size) if up else n // size for n in tokens]
    rows = [
        Row(i, 0.0, n, 1, blocks=(range(count),))
        for i, (n, count) in enumerate(zip(tokens, counts, strict=True))
    ]
    found = block_size(rows, "t")
    assert found is not None
    assert found <= size  # few rows may fit several sizes
    for n, count in zip(tokens, counts, strict=True):
        assert n / found - 1 < count < n / found + 1


@pytest.mark.parametrize("size", [8, 64, 512])
def test_rows_of_many_sizes_leave_one_block_size(size: int) -> None:
    rows = [Row(i, 0.0, n, 1, blocks=(range(n // size),)) for i, n in enumerate((4096, 1500, 9000))]
    assert block_size(rows, "t") == size


def test_without_blocks_and_without_a_fitting_size() -> None:
    assert block_size([Row(0, 0.0, 5, 1)], "t") is None
    with pytest.raises(TraceError, match=r"t: .*--block-tokens.*:block-tokens=N"):
        block_size([Row(0, 0.0, 64, 1, blocks=(range(n),)) for n in (1, 9)], "t")
