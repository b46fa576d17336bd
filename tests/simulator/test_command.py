from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pla_serve.simulator.report import RunReport
from pla_serve.simulator.table import tables
from tests.command_runner import pla_serve

TRACE = "gen:chat+documents:requests=120:rate=2"
SESSIONS = "session_id,turn,arrival_s,input_tokens,output_tokens\n" + "".join(
    f"{session},{turn + 1},{turn * 4000},{500 * (turn + 1)},20\n"
    for session in range(30)
    for turn in range(2)
)


def simulate(*flags: str, fails: bool = False) -> str:
    result = pla_serve("simulate", *flags)
    assert (result.exit_code != 0) is fails, result.output
    return " ".join(result.output.split())


def saved(path: Path, *flags: str) -> Any:
    simulate(*flags, "--json", str(path))
    return json.loads(path.read_text())


def test_from_flags_to_json_table_and_picture(tmp_path: Path) -> None:
    target, picture = tmp_path / "out.json", tmp_path / "out.png"
    output = simulate(
        *("--trace", f"{TRACE},gen:all-long:requests=20", "--policy", "fcfs,length-aware"),
        *("--load", "0.5,0.9", "--seed", "4", "--jobs", "2"),
        *("--json", str(target), "--plot", str(picture)),
    )
    assert "load 0.9, h200-qwen2.5-32b: TTFT in seconds" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(target.read_text())
    runs = content["runs"]
    assert [(run["trace"].split(":")[1], run["load"], run["policy"]) for run in runs] == [
        (kind, load, policy)
        for kind in ("chat+documents", "all-long")
        for load in (0.5, 0.9)
        for policy in ("fcfs", "length-aware")
    ]
    wanted = {
        *("trace", "policy", "load", "instances", "machine", "seed", "requests", "makespan_s"),
        *("throughput_tokens_per_s", "ttft_s", "slo_violation", "wait_longest_s", "utilisation"),
    }
    for run in runs:
        assert wanted <= set(run)
        assert set(run["ttft_s"]) == set(run["slo_violation"]) == {"short", "long", "all"}
        for times in run["ttft_s"].values():
            assert set(times) == {"mean", "p50", "p90", "p99", "max", "count"}
    assert (runs[0]["requests"], runs[0]["seed"], runs[0]["instances"]) == (120, 4, 1)
    assert runs[-1]["ttft_s"]["short"] == dict.fromkeys(("mean", "p50", "p90", "p99", "max")) | {
        "count": 0
    }
    assert content["slo"] == {"seconds": 0.4, "stretch": 5.0, "token_seconds": 0.1}
    assert content["environment"]["date"]
    assert content["machine"]["name"] == "h200-qwen2.5-32b"
    assert content["interrupted"] is False


def test_equal_seeds_give_equal_numbers_however_many_jobs(tmp_path: Path) -> None:
    flags = ["--trace", TRACE, "--policy", "fcfs,length-aware", "--load", "0.6,0.8"]
    one = saved(tmp_path / "1.json", *flags, "--jobs", "1")["runs"]
    assert one == saved(tmp_path / "2.json", *flags, "--jobs", "2")["runs"]
    assert one != saved(tmp_path / "3.json", *flags, "--jobs", "1", "--seed", "1")["runs"]


def test_sessions_with_clocks_of_their_own(tmp_path: Path) -> None:
    trace = tmp_path / "s.csv"
    trace.write_text(SESSIONS)
    flags = ["--trace", str(trace), "--policy", "fcfs", "--jobs", "1"]
    run = saved(tmp_path / "1.json", *flags)["runs"][0]
    assert "pauses of at most 600 s" in run["arrivals"]
    assert 600 < run["makespan_s"] < 700
    run = saved(tmp_path / "2.json", *flags, "--max-pause", "50")["runs"][0]
    assert 50 < run["makespan_s"] < 150
    assert run["trace"] == "s.csv"


def test_no_folder_is_recorded(tmp_path: Path) -> None:
    trace = tmp_path / "s.csv"
    trace.write_text(SESSIONS)
    saved(tmp_path / "1.json", "--trace", str(trace), "--policy", "fcfs", "--jobs", "1")
    assert tmp_path.name not in (tmp_path / "1.json").read_text()


def test_a_closed_loop(tmp_path: Path) -> None:
    flags = ["--trace", TRACE, "--policy", "fcfs", "--clients", "4", "--jobs", "1"]
    run = saved(tmp_path / "1.json", *flags)["runs"][0]
    assert (run["load"], run["clients"]) == (None, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "fifo"], "unknown policy 'fifo'; known are"),
        (["--policy", "fcfs:patience=2"], "policy fcfs has no knob 'patience'"),
        (["--policy", "fcfs,,hrrn"], "--policy has an empty entry"),
        (["--policy", "fcfs,fcfs"], "--policy names something twice"),
        (["--load", "high"], "--load takes numbers such as 0.7,0.9"),
        (["--load", "-1"], "--load must be positive, not -1"),
        (["--load", "0.5", "--clients", "3"], "--load, or --clients"),
        (["--machine", "tpu"], "unknown machine 'tpu'; known are"),
        (["--kv-tokens", "lots"], "--kv-tokens takes a whole number or 'machine'"),
        (["--max-pause", "5"], "--max-pause is for traces whose sessions"),
        (["--down-seconds", "5"], "--down-seconds needs --fail-every"),
        (["--json", "/"], "/ is a folder; give a file name"),
        (["--slo-seconds", "-1"], "SLO seconds must be at least 0"),
    ],
)
def test_mistakes_are_named_before_anything_runs(flags: list[str], message: str) -> None:
    assert message in simulate("--trace", "gen:chat:requests=20", *flags, fails=True)


def test_a_trace_that_is_not_there() -> None:
    assert "cannot read nowhere.csv" in simulate("--trace", "nowhere.csv", fails=True)


def test_what_is_complete_when_interrupted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pla_serve.simulator import progress

    real, calls = progress.run_and_report, []

    def second_is_interrupted(*arguments: Any) -> RunReport:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(progress, "run_and_report", second_is_interrupted)
    target = tmp_path / "x.json"
    arguments = ["--trace", TRACE, "--policy", "fcfs,hrrn", "--jobs", "1", "--json", str(target)]
    result = pla_serve("simulate", *arguments)
    assert result.exit_code == 130
    content = json.loads(target.read_text())
    assert [run["policy"] for run in content["runs"]] == ["fcfs"]
    assert content["interrupted"] is True


def test_a_table_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    saved(tmp_path / "x.json", "--trace", TRACE, "--policy", "fcfs,length-aware", "--jobs", "1")
    from pla_serve.simulator.report import load_report

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables(load_report(tmp_path / "x.json")))
    assert "…" not in console.export_text()
