from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.bench.calibrate import (
    DECODERS,
    Costs,
    Probe,
    idle_ttft,
    measure_costs,
    sized_by_server,
)
from pla_serve.bench.client import RequestTarget
from pla_serve.bench.text import make_filler
from pla_serve.bench.workload import WorkloadConfig, generate
from tests.bench.virtual import Script, ScriptedServer, run_virtual

COSTS = Costs(((100, 0.2), (200, 0.3), (400, 0.9)), 0.01)


def prompt_words(body: dict[str, Any]) -> int:
    return sum(len(message["content"].split()) for message in body["messages"])


def linear(body: dict[str, Any]) -> Script:
    """1 ms for each prompt token, 40 ms for each step."""
    return Script(ttft=prompt_words(body) / 1000, gap=0.04)


def probe(server: ScriptedServer) -> Probe:
    return Probe(server, RequestTarget("m"), make_filler("s"), "probe")


@pytest.mark.parametrize(
    ("tokens", "output", "seconds"),
    [(100, 0, 0.2), (150, 0, 0.25), (300, 10, 0.7), (500, 0, 1.2), (10, 0, 0.2)],
)
def test_service_time(tokens: int, output: int, seconds: float) -> None:
    assert COSTS.seconds(tokens, output) == pytest.approx(seconds)


@given(st.integers(0, 50), st.floats(0.1, 3))
def test_load_is_rate_times_mean_service_time(seed: int, load: float) -> None:
    workload = generate(WorkloadConfig(requests=40, seed=seed))
    rate = load * COSTS.capacity(workload)
    mean = sum(COSTS.seconds(t.new_tokens, t.max_tokens) for t in workload.turns) / 40
    assert rate * mean == pytest.approx(load)


def test_costs_are_what_the_server_takes() -> None:
    costs = run_virtual(measure_costs(probe(ScriptedServer(linear)), 3000))
    assert [tokens for tokens, _ in costs.prefill] == [32, 128, 512, 1024, 2048, 3000]
    for tokens, seconds in costs.prefill:
        assert seconds == pytest.approx(tokens / 1000)
    assert costs.decode_token == pytest.approx(0.04 / DECODERS)


def test_costs_of_a_workload_of_tiny_prompts() -> None:
    costs = run_virtual(measure_costs(probe(ScriptedServer(linear)), 1))
    assert costs.seconds(1, 0) > 0


def test_probes_go_one_at_a_time_and_are_unique() -> None:
    server = ScriptedServer(linear)
    found = run_virtual(idle_ttft(probe(server), [10, 20, 30]))

    assert found is not None
    assert found.p50 == pytest.approx(0.020)
    assert [seen.at for seen in server.seen] == pytest.approx([0.0, 0.010, 0.030])
    assert len({str(seen.body["messages"]) for seen in server.seen}) == 3


def test_without_short_requests_there_is_no_idle_value() -> None:
    assert run_virtual(idle_ttft(probe(ScriptedServer(linear)), [])) is None


def test_sizing_without_usage_changes_nothing() -> None:
    filler = make_filler("s")
    server = ScriptedServer(lambda body: Script(usage=False))
    assert run_virtual(sized_by_server(probe(server), filler)) == filler


def test_a_failing_server_stops_the_calibration_with_its_words() -> None:
    server = ScriptedServer(lambda body: Script(status=401))
    with pytest.raises(RuntimeError, match="http 401"):
        run_virtual(measure_costs(probe(server), 100))


def test_virtual_time_is_virtual() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 3600
