from __future__ import annotations

from pathlib import Path

import pytest

from pla_serve.traces.load import load_trace
from pla_serve.traces.rows import TraceError

TRACE = """arrival_s,session_id,turn,input_tokens,cached_prefix_tokens,output_tokens,blocks
2.0,0,1,200,0,5,|0-3
4.5,1,1,130,128,6,0:2|4
5.0,0,2,290,192,7,"0:3|7,9"
9.0,2,1,64,0,8,|5
"""


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "t:x+y.csv"
    path.write_text(TRACE)
    return str(path)


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens\n" + "\n".join(str(3 + i % 7) for i in range(90)))
    return str(path)


def test_a_file(trace: str) -> None:
    loaded = load_trace(trace)
    assert loaded.name == "t:x+y.csv"
    assert loaded.clock == "the trace's arrivals"
    assert loaded.left_out == 0
    assert [row.arrival for row in loaded.rows] == [0, 2.5, 3, 7]
    assert [row.cached_tokens for row in loaded.rows] == [0, 128, 192, 0]
    assert {row.block_tokens for row in loaded.rows} == {64}
    assert [row.index for row in loaded.rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        (":max-input=200", [200, 130, 64]),
        (":min-input=200", [200, 290]),
        (":min-new=65", [200, 290]),
        (":max-new=64:min-input=100", [130]),
        (":first=2", [200, 130]),
        (":first=3:min-new=90", [200, 290]),
    ],
)
def test_limits_of_a_file(trace: str, options: str, inputs: list[int]) -> None:
    loaded = load_trace(trace + options)
    assert [row.input_tokens for row in loaded.rows] == inputs
    assert loaded.name == "t:x+y.csv" + options


def test_what_is_cached_is_recounted(trace: str) -> None:
    """Without the first prompt, nobody has sent blocks 0 to 2 but the second."""
    rows = load_trace(trace + ":min-input=100", max_requests=3).rows
    assert [row.cached_tokens for row in rows] == [0, 128, 192]
    left = load_trace(trace + ":min-input=201").rows
    assert [row.cached_tokens for row in left] == [0]


def test_limits_for_all(trace: str) -> None:
    loaded = load_trace(trace, max_input_tokens=150)
    assert [row.input_tokens for row in loaded.rows] == [130, 64]
    assert loaded.left_out == 2
    assert [row.arrival for row in loaded.rows] == [0, 4.5]
    assert len(load_trace(trace, max_requests=2).rows) == 2
    with pytest.raises(TraceError, match="every prompt of t:x"):
        load_trace(trace, max_input_tokens=9)
    with pytest.raises(ValueError, match="max_requests"):
        load_trace(trace, max_requests=0)


def test_a_mixture(trace: str, lengths: str) -> None:
    spec = f"mix:{lengths}@0.9+gen:chat+documents:requests=60:share=0.5@0.1"
    loaded = load_trace(spec, seed=3)
    assert loaded.name == "mix:lengths.csv@0.9+gen:chat+documents:requests=60:share=0.5@0.1"
    assert len(loaded.rows) == 100
    assert "Poisson" in loaded.clock
    times = [row.arrival or 0.0 for row in loaded.rows]
    assert times == sorted(times)
    assert times[0] == 0
    assert loaded == load_trace(spec, seed=3)
    assert loaded.rows != load_trace(spec, seed=4).rows
    assert len(load_trace(spec, max_requests=50).rows) == 50
    two = load_trace(f"mix:{trace}:min-new=65@1+{lengths}@9")
    assert sorted(row.input_tokens for row in two.rows)[-2:] == [200, 290]
    assert len(two.rows) == 20


def test_something_generated() -> None:
    loaded = load_trace("gen:burst-short:requests=70:share=0.2", seed=5)
    assert len(loaded.rows) == 70
    assert loaded.clock == "generated"
    assert sum(row.session is None for row in loaded.rows) == 14
    assert loaded.rows != load_trace("gen:burst-short:requests=70:share=0.2").rows


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("gen:nothing", "there are gen:chat, gen:documents"),
        ("gen:chat:color=3", "no option color; it has requests"),
        ("gen:chat:requests=many", "requests=many is not a whole number"),
        ("gen:chat:rate=0", "rate must be positive"),
        ("gen:chat:rate=1:rate=2", "rate is given twice"),
        ("{trace}:min-new=0", "min_new must be at least 1"),
        ("{trace}:min-new=9999", "within its limits"),
        ("{trace}:rate=2", "no option rate; it has min-new"),
        ("mix:{trace}", "a mixture is written"),
        ("mix:{trace}@1", "a mixture is written"),
        ("mix:{trace}@1+{trace}", "a mixture is written"),
        ("mix:{trace}@1+{trace}@1e", "not a number"),
        ("mix:{trace}@1+{trace}@0", "share"),
        ("none.csv", r"cannot read none\.csv"),
    ],
)
def test_what_is_wrong_is_said(trace: str, spec: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load_trace(spec.replace("{trace}", trace))
