"""Trace files made here by hand, read back, and replayed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.bench.replay import TraceOptions, read_trace
from pla_serve.bench.text import make_filler
from pla_serve.bench.workload import BenchWorkload
from pla_serve.traces.files import read_rows
from pla_serve.traces.rows import TraceError

FILLER = make_filler("salt")


def prompts(workload: BenchWorkload) -> dict[str, list[int]]:
    return {turn.id: FILLER.ids(turn.pieces) for turn in workload.turns}


def shared(a: list[int], b: list[int]) -> int:
    """Tokens of the common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def csv_file(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    path = tmp_path / name
    body = "\n".join(line.strip() for line in text.strip().splitlines()) + "\n"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(body.encode()))
    else:
        path.write_text(body)
    return path


MOONCAKE = [
    {"timestamp": 27000, "input_length": 1300, "output_length": 7, "hash_ids": [46, 47, 48]},
    {"timestamp": 30000, "input_length": 1100, "output_length": 1, "hash_ids": [46, 47, 9]},
    {"timestamp": 30500, "input_length": 3, "output_length": 0, "hash_ids": [50]},
]


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_mooncake(tmp_path: Path, name: str) -> None:
    text = "\n".join(map(json.dumps, MOONCAKE)) + "\n\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())

    workload = read_trace(path, TraceOptions(speed=2.0))

    assert [session.start for session in workload.sessions] == [0.0, 1.5, 1.75]
    first, second, third = prompts(workload).values()
    assert [len(first), len(second), len(third)] == [1300, 1100, 3]
    assert shared(first, second) == 1024
    assert shared(first, third) < 3
    assert [turn.max_tokens for turn in workload.turns] == [7, 1, 1]
    assert [turn.new_tokens for turn in workload.turns] == [1300, 76, 3]


BLOCKS = """
    arrival_s,session_id,turn,input_tokens,cached_prefix_tokens,output_tokens,blocks
    0.0,0,1,200,0,5,|0-3
    1.5,1,1,130,128,6,0:2|4
    2.5,0,2,290,192,,"0:3|7,9"
    9.0,2,1,64,0,8,|5
"""


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_blocks_of_the_csv(tmp_path: Path, name: str) -> None:
    rows = read_rows(csv_file(tmp_path, BLOCKS, name))
    assert [[n for run in row.blocks or () for n in run] for row in rows] == [
        [0, 1, 2, 3],
        [0, 1, 4],
        [0, 1, 2, 7, 9],
        [5],
    ]
    workload = read_trace(csv_file(tmp_path, BLOCKS, name))
    assert workload.parameters["block_tokens"] == 64
    a, b, c, d = prompts(workload).values()
    assert [len(a), len(b), len(c), len(d)] == [200, 130, 290, 64]
    assert shared(a, b) == 128
    assert shared(a, c) == 192
    assert shared(a, d) < 4
    assert [turn.new_tokens for turn in workload.turns] == [200, 2, 98, 64]
    assert [session.start for session in workload.sessions] == [0.0, 1.5, 2.5, 9.0]


def test_blocks_rounded_down_leave_tails_of_their_own(tmp_path: Path) -> None:
    path = csv_file(
        tmp_path,
        """arrival_s,input_tokens,cached_prefix_tokens,output_tokens,blocks
        0,100,0,5,|1-3
        1,111,96,5,0:3|""",
    )
    workload = read_trace(path)
    assert workload.parameters["block_tokens"] == 32
    a, b = prompts(workload).values()
    assert (len(a), len(b)) == (100, 111)
    assert 96 <= shared(a, b) < 100


SESSIONS = """
    arrival_s,session_id,turn,input_tokens,cached_prefix_tokens,output_tokens,think_s
    0.0,7,1,100,0,9,
    3.0,7,2,150,100,9,1.5
    0.0,8,1,80,0,9,
    2.0,8.1,1,90,70,9,
    4.0,8,2,120,80,9,
"""


def test_sessions_with_clocks_of_their_own_need_starts(tmp_path: Path) -> None:
    path = csv_file(tmp_path, SESSIONS)
    with pytest.raises(TraceError, match="--rate"):
        read_trace(path)

    workload = read_trace(path, TraceOptions(rate=0.1, speed=2.0))

    by_first = {session.turns[0].id: session for session in workload.sessions}
    seven, eight, agent = by_first["r0"], by_first["r2"], by_first["r3"]
    assert [turn.think for turn in seven.turns] == [0.0, 0.75]
    assert [turn.offset for turn in eight.turns] == [0.0, 2.0]
    assert agent.start == eight.start + 1.0
    assert not any(session.remembers for session in workload.sessions)
    text = prompts(workload)
    assert shared(text["r0"], text["r1"]) == 100
    assert shared(text["r2"], text["r4"]) == 80
    assert len(text["r1"]) == 150
    starts = [session.start for session in workload.sessions]
    assert starts == sorted(starts)
    assert read_trace(path, TraceOptions(rate=0.1, speed=2.0, seed=1)) != workload


def test_what_is_shared_is_never_more_than_was_sent(tmp_path: Path) -> None:
    """A trace may count the answer to the prompt before as cached; filler has no answers."""
    path = csv_file(
        tmp_path,
        """session_id,turn,input_tokens,cached_prefix_tokens,output_tokens
        0,1,50,0,30
        0,2,90,80,5""",
    )
    workload = read_trace(path, TraceOptions(rate=1.0))
    first, second = prompts(workload).values()
    assert shared(first, second) == 50
    assert [turn.new_tokens for turn in workload.turns] == [50, 40]


def test_without_arrivals_only_the_answers_order_turns(tmp_path: Path) -> None:
    path = csv_file(
        tmp_path,
        """session_id,turn,input_tokens,cached_prefix_tokens,output_tokens
        0,1,50,0,5
        0,2,70,48,5
        1,1,50,0,5""",
    )
    workload = read_trace(path, TraceOptions(rate=1.0))
    assert sorted(len(session.turns) for session in workload.sessions) == [1, 2]
    assert all(turn.offset == turn.think == 0 for turn in workload.turns)


def test_limits(tmp_path: Path) -> None:
    path = csv_file(tmp_path, BLOCKS)

    dropped = read_trace(path, TraceOptions(max_input_tokens=150))
    assert [turn.id for turn in dropped.turns] == ["r1", "r3"]
    assert dropped.parameters["dropped_too_long"] == 2
    assert dropped.parameters["clipped"] == 0

    clipped = read_trace(path, TraceOptions(max_input_tokens=150, over_length="clip"))
    assert [len(prompt) for prompt in prompts(clipped).values()] == [150, 130, 150, 64]
    assert clipped.parameters["clipped"] == 2

    few = read_trace(path, TraceOptions(max_requests=2, max_output_tokens=5))
    assert [turn.max_tokens for turn in few.turns] == [5, 5]

    with pytest.raises(TraceError, match="every prompt"):
        read_trace(path, TraceOptions(max_input_tokens=10))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 30), max_size=6, unique=True),
            st.integers(0, 31),
            st.integers(0, 5),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_equal_ids_give_equal_text(tmp_path: Path, rows: list[Any]) -> None:
    """Delta-coded against the row before, decoded and written out: prefixes in ids are prefixes in
    tokens, and nothing more."""
    size, lines, lists = 32, [], []
    for number, (ids, tail, keep) in enumerate(rows):
        before = lists[-1] if lists else []
        head = before[: min(keep, len(before))]
        ids = [i for i in ids if i not in head]
        lists.append(head + ids)
        reference = f"{number - 1}:{len(head)}" if head else ""
        tokens = max(1, size * len(lists[-1]) + tail)
        blocks = f"{reference}|{','.join(map(str, ids))}" if lists[-1] else ""
        lines.append(f'{number},{tokens},5,"{blocks}"')
    path = csv_file(tmp_path, "arrival_s,input_tokens,output_tokens,blocks\n" + "\n".join(lines))

    workload = read_trace(path, TraceOptions(block_tokens=size))

    texts = list(prompts(workload).values())
    for i, one in enumerate(texts):
        for j in range(i):
            whole = shared(lists[i], lists[j])
            both_empty = not lists[i] and not lists[j]
            limit = size * whole + size
            assert both_empty or size * whole <= shared(one, texts[j]) < limit


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.csv", "x,y\n1,2\n", "needs the columns"),
        ("a.csv", "input_tokens,output_tokens\n", "no requests"),
        ("a.csv", "input_tokens,output_tokens\nfive,2\n", "data row 0"),
        ("a.csv", "input_tokens,output_tokens\n5,2\n-5,2\n", "data row 1.*negative"),
        ("a.csv", "input_tokens,output_tokens,blocks\n5,2,7-8\n", "bar"),
        ("a.csv", "input_tokens,output_tokens,blocks\n5,2,4:1|7\n", "data row 0"),
        ("a.csv", "input_tokens,output_tokens,blocks\n64,2,|1\n64,2,0:9|\n", "data row 1"),
        ("a.csv", "input_tokens,output_tokens,blocks\n64,2,|1-9\n64,2,|1\n", "--block-tokens"),
        ("a.csv", "input_tokens,output_tokens,blocks\n64,2,|1,3\n", "data row 0: more cells"),
        ("a.jsonl", '{"timestamp": 1}\n', "request 1: not a Mooncake line"),
        ("a.jsonl", "[1]\n", "conversation 0: not ShareGPT"),
        ("a.parquet", "x", "a.parquet: not a known trace"),
        ("a.csv.gz", "not gzip", "cannot read"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, text: str, why: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TraceError, match=why):
        read_trace(path, TraceOptions(rate=1.0))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read none\.csv"):
        read_trace(tmp_path / "none.csv")


@pytest.mark.parametrize("field", ["speed", "rate", "max_requests", "max_input_tokens"])
def test_options_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        TraceOptions(**{field: 0})
