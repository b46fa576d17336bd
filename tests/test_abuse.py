"""The abuse campaign: its short form against a live server, its replay, and its verdicts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SECONDS = 40
"""Of attacks. With the start of the server and the time without attacks it is a minute."""
MOST_SECONDS = 300


@pytest.fixture(scope="module")
def abuse() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("abuse")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.campaign
def test_a_server_holds_for_a_minute(tmp_path: Path) -> None:
    """Nothing fails for those who behave, nothing ends, nothing is answered with 500. Times are not
    judged here, because test machines are shared."""
    output = tmp_path / "abuse.json"
    command = [
        *(sys.executable, str(BENCHMARKS / "abuse.py"), "--target", "serve", "--tiny"),
        *("--seconds", str(SECONDS), "--round-seconds", "3", "--no-times", "-o", str(output)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(output.read_text())["targets"]["serve"]
    assert result["rounds"] >= 1
    assert result["with_attacks"]["requests"] > 0
    assert sum(sum(counts.values()) for counts in result["attacks"].values()) > 0


def test_a_seed_grows_the_same_attacks_again(abuse: ModuleType) -> None:
    bodies = importlib.import_module("abuse_parts.bodies")
    links = importlib.import_module("abuse_parts.links")

    def grow(seed: int) -> list[Any]:
        found: list[Any] = list(islice(bodies.hostile_bodies(Random(seed)), 30))
        return [*found, *(links.frame(Random(f"{seed}/{n}")) for n in range(30))]

    assert grow(3) == grow(3)
    assert grow(3) != grow(4)


class FakeWatch:
    def __init__(self, gone: list[str], growth: dict[str, float]) -> None:
        self.gone = gone
        self.growth = growth

    def ended(self) -> list[str]:
        return self.gone


def seen(ttft: float, itl: float, health: float, failures: list[str]) -> Any:
    innocents = importlib.import_module("abuse_parts.innocents")
    return innocents.Seen([ttft] * 20, [itl] * 200, [health] * 20, failures)


def test_verdicts(abuse: ModuleType) -> None:
    """What holds, and everything that can break."""
    rounds = importlib.import_module("abuse_parts.rounds")
    calm, good = seen(0.1, 0.01, 0.01, []), FakeWatch([], {"server 1": 10.0})
    fine = abuse.report(calm, seen(0.29, 0.029, 0.2, []), [], good, "0.02")
    assert (fine["broken"], fine["late"]) == ([], [])
    late = abuse.report(calm, seen(0.31, 0.031, 0.3, []), [], good, "0.5")
    assert [problem.split()[0] for problem in late["late"]] == ["ttft_p90", "itl_p99", "/health"]
    fault = rounds.RoundResult(4, "bodies", {}, ["round 4, body 2: 500"])
    watch = FakeWatch(["engine 7"], {"server 1": 300.0})
    broken = abuse.report(calm, seen(0.1, 0.01, 0.01, ["closed"]), [fault], watch, None)["broken"]
    for what in ("engine 7", "round 4, body 2", "closed", "300.0"):
        assert any(what in problem for problem in broken)
