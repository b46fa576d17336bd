"""The whole command against real processes and real HTTP, without a model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pla_serve.bench import job, servers
from pla_serve.bench.servers import ServerEntry, free_port, parse_entries, started
from tests.command_runner import pla_serve

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("http_server.py"))


def fake(serve_arguments: tuple[str, ...]) -> servers.Open:
    """What `servers.fresh` does, with the fake server."""

    @contextmanager
    def open_server(entry: ServerEntry) -> Iterator[str]:
        port = free_port()
        command = [sys.executable, SCRIPT, *serve_arguments, *entry.flags, "--port", str(port)]
        with started(command, f"http://127.0.0.1:{port}") as server:
            yield server.url

    return open_server


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command in a folder of its own; returns its output and exit status."""
    monkeypatch.setattr(job, "fresh", fake)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("TTFT_MS", json.dumps({"fcfs": 60, "length-aware": 5}))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Any:
        return pla_serve("bench", *arguments)

    return call


QUICK = ("--requests", "12", "--rate", "200", "--think-seconds", "0", "--output-tokens", "2-4")


def test_compare_saves_and_prints(run: Any, tmp_path: Path) -> None:
    result = run(
        *("--compare", "fcfs:max-batch-tokens=512,length-aware", "--repeat", "2", "--idle"),
        *(*QUICK, "--slo-ttft-ms", "40", "-o", "out/r", "--records", "--", "--threads", "1"),
    )

    assert result.exit_code == 0, result.output
    starts = (tmp_path / "starts").read_text().splitlines()
    assert starts == ["fcfs --threads 1 --max-batch-tokens 512", "length-aware --threads 1"] * 2
    saved = json.loads((tmp_path / "out/r.json").read_text())
    plain, ours = saved["summary"]
    assert plain["entry"] == "fcfs:max-batch-tokens=512"
    assert plain["runs"] == ours["runs"] == 2
    assert plain["values"]["short_ttft_p50"] > 0.055
    assert plain["values"]["all_slo_attainment"] == 0
    assert ours["ratios"]["short_ttft_p50"] < 1
    assert plain["values"]["idle_ttft_p50"] > 0.055
    assert (tmp_path / "out/r.png").read_bytes().startswith(b"\x89PNG")
    assert "length-aware" in result.output
    runs = saved["runs"]
    assert [run["entry"] for run in runs] == [plain["entry"], "length-aware"] * 2
    assert saved["environment"]["versions"]["pla_serve"]


def test_the_same_requests_at_the_same_times_for_every_entry(run: Any, tmp_path: Path) -> None:
    assert run("--compare", "fcfs,length-aware", *QUICK, "-o", "r", "--records").exit_code == 0
    one, other = json.loads((tmp_path / "r.json").read_text())["runs"]
    firsts = [
        sorted((r["due"], r["id"]) for r in run["records"] if r["id"].endswith(".0"))
        for run in (one, other)
    ]
    assert firsts[0] == firsts[1]
    sizes = [
        {r["id"]: (r["prompt_tokens"], r["output_tokens"]) for r in run["records"] if r["kind"]}
        for run in (one, other)
    ]
    assert sizes[0] == sizes[1]


def test_words_are_sized_by_the_servers_usage(run: Any, tmp_path: Path) -> None:
    """The fake counts two tokens a word and nine for its template, which it always has cached."""
    workload = ("--workload", "documents", "--document-tokens", "500", *QUICK)
    assert run("--compare", "fcfs", *workload, "-o", "r", "--records").exit_code == 0
    (found,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert {record["new_tokens"] for record in found["records"]} == {500}


def test_load_is_a_share_of_what_the_first_entry_can_do(run: Any, tmp_path: Path) -> None:
    """60 ms a prompt and nothing for a token: 16.7 requests a second."""
    arguments = ("--requests", "12", "--load", "0.5", "--think-seconds", "0")
    assert run("--compare", "fcfs,length-aware", *arguments, "-o", "r").exit_code == 0
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["rate"] == pytest.approx(0.5 / 0.06, rel=0.25)
    assert all(seconds > 0.055 for _, seconds in saved["costs"]["prefill"])


def test_a_trace_is_replayed(run: Any, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 100 * i, "input_length": 40, "output_length": 2, "hash_ids": [7]}
        for i in range(5)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--trace", "t.jsonl", "--speed", "2", "-o", "r", "--records")
    assert run("--compare", "fcfs", *arguments).exit_code == 0
    (found,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [record["due"] for record in found["records"]] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2]
    )


def test_a_running_server_is_measured_and_left_alone(run: Any) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with started([sys.executable, SCRIPT, "--port", str(port)], url) as server:
        result = run("--base-url", url, *QUICK)
        assert result.exit_code == 0, result.output
        assert "requests/s" in result.output
        os.kill(server.pid, 0)


def test_a_server_that_fails_to_start_says_why(run: Any) -> None:
    result = run("--compare", "fcfs", *QUICK, "--", "--fail")
    assert result.exit_code == 1
    assert "cannot load the model: no such file" in result.output


def test_no_server(run: Any) -> None:
    result = run("--base-url", f"http://127.0.0.1:{free_port()}", *QUICK)
    assert result.exit_code == 1
    assert "no server answers" in result.output
    assert "pla-serve serve" in result.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--rate", "1", "--load", "0.5"), "exclude each other"),
        (("--load", "-1"), "--load must be positive"),
        (("--rate", "0"), "rate must be positive"),
        (("--duration", "9"), "--duration needs --rate"),
        (("--trace", "missing.jsonl"), "cannot read missing.jsonl"),
        (("--trace", "x.csv", "--load", "0.5"), "use --speed"),
        (("--token-ids",), "--endpoint completions"),
        (("--compare", "fcfs,fcfs"), "with itself"),
        (("--compare", "fcfs:Max=3"), "a flag of serve"),
        (("--compare", "fcfs", "--baseline", "hrrn"), "none of fcfs"),
        (("--tokenizer", "."), "no tokenizer.json"),
        (("--slo-ttft-ms", "-1"), "ttft_short must be positive"),
        (("--", "--threads", "1"), "--compare starts"),
    ],
)
def test_flags_that_cannot_be(run: Any, arguments: tuple[str, ...], why: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert why in re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--document-tokens", "many"), "takes a range"),
        (("--extra-body", "{"), "not JSON"),
        (("--extra-body", "[]"), "JSON object"),
    ],
)
def test_text_that_cannot_be_read_is_a_usage_error(
    run: Any, arguments: tuple[str, ...], why: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert why in re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize("given", ["run-1.0", "run-1.0.json", "run-1.0.png"])
def test_names_of_output_keep_their_dots(given: str) -> None:
    found = job.output_paths(Path("out") / given)
    assert found == (Path("out/run-1.0.json"), Path("out/run-1.0.png"))


def test_entries() -> None:
    entries = parse_entries("fcfs, hrrn:max-batch-tokens=512:no-prefix-cache")
    assert entries == (
        ServerEntry("fcfs", ("--policy", "fcfs")),
        ServerEntry(
            "hrrn:max-batch-tokens=512:no-prefix-cache",
            ("--policy", "hrrn", "--max-batch-tokens", "512", "--no-prefix-cache"),
        ),
    )


def test_knobs_that_only_one_policy_has_stay_with_its_name() -> None:
    (entry,) = parse_entries("laps:window-seconds=0.01:max-batch-requests=8:depth=4")
    assert entry.flags == (
        "--policy", "laps:window-seconds=0.01:depth=4", "--max-batch-requests", "8"
    )  # fmt: skip


def test_ctrl_c_reports_what_there_is_and_leaves_no_server(tmp_path: Path) -> None:
    """A process of its own: the signal goes to it as from a terminal."""
    program = """
import sys
from pla_serve.cli import main
from tests.bench import test_bench
test_bench.job.fresh = test_bench.fake
sys.exit(main(["bench", *sys.argv[1:]]))
"""
    arguments = ("--compare", "fcfs", "--requests", "9999", "--rate", "20", "-o", "r")
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PID_FILE": str(tmp_path / "pid"),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
        },
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("9999 requests over" in line for line in lines)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    process.stdout.close()

    assert process.wait(30) == 130
    assert "interrupted" in rest
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["interrupted"]
    assert saved["runs"][0]["report"]["planned"] == 9999
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_tiers_are_asked_for_and_reported(run: Any, tmp_path: Path) -> None:
    """By the deadlines of each: one that is met by far, and one that is out of reach."""
    tiers = ("--tier", "patient:ttft=60s,tpot=60s,share=2", "--tier", "hasty:ttft=1ms,share=2")
    result = run("--compare", "fcfs", *tiers, *QUICK, "-o", "r", "--records")
    assert result.exit_code == 0, result.output
    assert "By tier" in result.output
    content = json.loads((tmp_path / "r.json").read_text())
    found = content["runs"][0]["report"]["tiers"]
    patient, hasty = found["patient:ttft=60s,tpot=60s"], found["hasty:ttft=0.001s"]
    assert (patient["attainment"], hasty["attainment"]) == (1.0, 0.0)
    records = content["runs"][0]["records"]
    of_session = {}
    for record in records:
        assert of_session.setdefault(record["session"], record["tier"]) == record["tier"]
    asked = [record["tier"] for record in records]
    assert asked.count("patient") == patient["requests"]
    assert asked.count("hasty") == hasty["requests"]


def test_bad_tiers_are_refused(run: Any) -> None:
    result = run("--tier", "a:share=1", "--tier", "a:ttft=1s", *QUICK)
    assert result.exit_code != 0
    assert "two tiers are named a" in result.output
