"""Files of every format, written here by hand in the form that their publishers use."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pla_serve.traces.files import read_rows
from pla_serve.traces.rows import Row, TraceError

PUBLISHED = Path(__file__).parents[3] / "shared" / "traces"
"""Beside a checkout that has them."""


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    body = "\n".join(line.strip() for line in text.strip().splitlines()) + "\n"
    path.write_bytes(gzip.compress(body.encode()) if name.endswith(".gz") else body.encode())
    return path


def numbers(rows: list[Row]) -> list[tuple[float | None, int, int]]:
    return [(row.arrival, row.input_tokens, row.output_tokens) for row in rows]


AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44
    2023-11-16 18:15:50.9951690,396,109
    2023-11-16 18:16:46.6805900,879,0"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
    2024-05-12 00:00:00.500000+00:00,2162,5
    2024-05-12 00:00:02+00:00,2399,6
    2024-05-12 00:00:01.250000+00:00,76,15"""


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "no_suffix"])
def test_azure(tmp_path: Path, name: str) -> None:
    rows = read_rows(write(tmp_path, AZURE_2023, name))
    assert [row.arrival for row in rows] == pytest.approx([0, 4.314579, 60])
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [
        (374, 44),
        (396, 109),
        (879, 1),
    ]
    assert rows[0].session is rows[0].cached_tokens is None
    assert numbers(read_rows(write(tmp_path, AZURE_2024, name))) == [
        (0.0, 2162, 5),
        (1.5, 2399, 6),
        (0.75, 76, 15),
    ]


def test_arrivals_count_from_the_earliest(tmp_path: Path) -> None:
    text = AZURE_2024.replace("00:00:01.250000", "00:00:00.000000")
    assert [row.arrival for row in read_rows(write(tmp_path, text))] == [0.5, 2.0, 0.0]


def test_burstgpt_first_release(tmp_path: Path) -> None:
    rows = read_rows(
        write(
            tmp_path,
            """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
            5,ChatGPT,472,18,490,Conversation log
            45,ChatGPT,1087,0,1087,API log
            118.5,GPT-4,417,276,693,Conversation log""",
        )
    )
    assert numbers(rows) == [(0.0, 472, 18), (40.0, 1087, 1), (113.5, 417, 276)]


def test_burstgpt_with_sessions(tmp_path: Path) -> None:
    rows = read_rows(
        write(
            tmp_path,
            "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
            """Log Type
            19440110.0,aa-1,43,GPT-4,906,446,1352,Conversation log
            19440161.0,,2,ChatGPT,36,29,65,API log
            19440192.0,aa-1,10,GPT-4,1400,20,1420,Conversation log
            19440195.0,aa-1,5,GPT-4,1500,20,1520,Conversation log""",
        )
    )
    assert [(row.session, row.turn) for row in rows] == [
        ("aa-1", 1),
        (None, None),
        ("aa-1", 2),
        ("aa-1", 3),
    ]
    assert [row.think for row in rows] == [None, None, 82 - 43, 0.0]


SHAREGPT = [
    {
        "id": "x_0",
        "conversations": [
            {"from": "human", "value": "abcd" * 10},
            {"from": "gpt", "value": "abcd" * 20},
            {"from": "human", "value": "abc"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "never answered"},
        ],
    },
    {"id": "x_1", "conversations": []},
    {
        "id": "x_2",
        "conversations": [
            {"from": "gpt", "value": "abcd" * 3},
            {"from": "system", "value": "abcd"},
            {"from": "user", "value": "abcd"},
            {"from": "assistant", "value": ""},
        ],
    },
]


@pytest.mark.parametrize("lines", [False, True])
def test_sharegpt(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / "s.json"
    path.write_text("\n".join(map(json.dumps, SHAREGPT)) if lines else json.dumps(SHAREGPT))
    rows = read_rows(path)
    assert rows == [
        Row(0, None, 10, 20, "0", 0, turn=1),
        Row(1, None, 31, 1, "0", 30, turn=2),
        Row(2, None, 5, 1, "2", 0, turn=1),
    ]
    assert [row.new_tokens for row in rows] == [10, 1, 5]
    words = read_rows(path, count_tokens=lambda text: len(text))
    assert [(row.input_tokens, row.output_tokens) for row in words[:2]] == [(40, 80), (123, 1)]
    assert len(read_rows(path, most=2)) == 2


def test_lengths_only(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "input_tokens\n17\n5"))
    assert rows == [Row(0, None, 17, 1), Row(1, None, 5, 1)]


def test_columns_of_the_project(tmp_path: Path) -> None:
    rows = read_rows(
        write(
            tmp_path,
            """arrival_s,session_id,turn,input_tokens,cached_prefix_tokens,output_tokens,api_s,think_s,blocks
            0.0,1,1,200,0,169,7.34,0.0,|1-3
            19.0,1.1,2,205,192,,9.19,12.0,"0:3|9,11-12"
            """,
        )
    )
    assert rows == [
        Row(0, 0.0, 200, 169, "1", 0, 0.0, (range(1, 4),), turn=1),
        Row(1, 19.0, 205, 1, "1.1", 192, 12.0, (range(1, 4), range(9, 10), range(11, 13)), turn=2),
    ]


def test_ids_that_count_up_are_one_range(tmp_path: Path) -> None:
    line = {"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [4, 5, 6, 2, 3]}
    path = write(tmp_path, json.dumps(line), "m.jsonl")
    assert read_rows(path)[0].blocks == (range(4, 7), range(2, 4))
    assert read_rows(path)[0].block_tokens == 512


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2", "data row 0: Invalid isoformat"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12,1.5,2", "data row 0.*whole number"),
        ("Timestamp,Request tokens,Response tokens\n1,2,3\n2,3,-1", "data row 1.*negative"),
        ("Timestamp,Request tokens,Response tokens\n1,2,3\n2,3", "data row 1: fewer cells.*cut"),
        ("[{", "malformed JSON"),
        ('[{"conversations": 3}]', "conversation 0"),
        ('[{"conversations": [{"from": "human"}]}]', "conversation 0.*value"),
        ("trace,models,requests,contexts\n1,a,2,3", "companion.*_sessions"),
        ("a,b\n1,2", r"needs the columns input_tokens.*it has a, b"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=f"^bad.csv.*{why}"):
        read_rows(path)


def test_binary_files(tmp_path: Path) -> None:
    for name, data in {
        "latin": b"\xff\xfe\x00",
        "cut.gz": gzip.compress(b"input_tokens\n" * 999)[:20],
        "torn.gz": b"\x1f\x8b\x08\x00" + b"x" * 40,
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TraceError, match=name):
            read_rows(tmp_path / name)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no published traces beside this checkout")
@pytest.mark.parametrize(
    ("name", "requests", "shorts"),
    [
        ("claude_code_weka", 46_218, 0.126),
        ("mooncake_conversation", 12_031, 0.031),
        ("mooncake_synthetic", 3_993, 0.411),
        ("miniswe_lmcache", 402, 0.662),
        ("taubench_gpt4o_airline", 2_454, 0.641),
        ("azure_conv_2023", 19_366, None),
        ("azure_code_2023", 8_819, None),
        ("lmsys_user_messages_10k", 10_000, None),
    ],
)
def test_published_traces(name: str, requests: int, shorts: float | None) -> None:
    """The counts and the share of short prompts that their description gives."""
    rows = read_rows(PUBLISHED / f"{name}.csv.gz")
    assert len(rows) == requests
    if shorts is not None:
        share = sum(row.new_tokens <= 256 for row in rows) / requests
        assert share == pytest.approx(shorts, abs=6e-4)
