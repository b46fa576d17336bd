"""The router's page: what it is told of instances, and what a browser shows of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet.router.routed import KEY, Routed
from tests.server.page.browser import CHROMIUM, chromium
from tests.server.server_harness import DEADLINE, Live


@pytest.fixture
def fleet() -> Iterator[tuple[Routed, list[Live]]]:
    lives = [Live(link_key=KEY), Live(link_key=KEY, role="short")]
    for live in lives:
        live.wait_ready()
    routed = Routed(lives)
    yield routed, lives
    routed.close()
    for live in lives:
        live.close()


def samples(routed: Routed) -> Iterator[dict[str, Any]]:
    url = f"{routed.url}/ui/events"
    with httpx.stream("GET", url, timeout=DEADLINE) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_samples_tell_of_instances_latencies_and_losses(
    fleet: tuple[Routed, list[Live]],
) -> None:
    routed, lives = fleet
    stream = samples(routed)
    first = next(stream)
    assert first["kind"] == "router"
    assert {each["url"]: each["role"] for each in first["instances"]} == {
        lives[0].url: "mixed",
        lives[1].url: "short",
    }
    assert first["pools"] == {"mixed": 1, "short": 1}
    assert all(each["open"] and "cost" not in each["load"] for each in first["instances"])
    assert KEY not in json.dumps(first)
    with routed.client() as client:
        client.completions.create(model="org/echo", prompt="abc", max_tokens=4)
    sample = next(each for each in stream if each["latency"]["short"]["ttft"][0])
    assert sample["boundary_tokens"] == 256
    lives[0].close()
    gone = next(each for each in stream if not each["instances"][0]["connected"])
    assert gone["instances"][0]["last_loss"]
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt: chromium)")
def test_browser_shows_instances_and_what_becomes_of_them(
    fleet: tuple[Routed, list[Live]], tmp_path: Path
) -> None:
    routed, lives = fleet
    with chromium() as tab:
        tab.open(f"{routed.url}/ui")
        tab.until("document.querySelectorAll('#instances tbody tr').length === 2")
        assert lives[1].url in tab.text("#instances")
        assert "1 mixed, 1 short" in tab.text("#pools")
        lives[1].close()
        tab.until(
            f"document.querySelector('#events').innerText.includes('{lives[1].url} was lost')"
        )
        tab.until("document.querySelector('#instances').innerText.includes('down: ')")
        tab.screenshot(tmp_path / "router.png", dark=False)
