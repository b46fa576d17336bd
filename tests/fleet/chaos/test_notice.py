"""A real instance of a real fleet is told that it will end: its streams go on at another one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from pla_serve.engine.transfer.installed import installed_module
from tests.fleet.chaos.tiny_fleet import METRICS_KEY, TinyFleet, start_fleet, write_model

PROMPTS = [[7 * n + k for k in range(3, 60)] for n in range(1, 5)]
TOKENS = 600
"""Far more than are made until the moves begin."""


def stream(url: str, prompt: list[int], begun: threading.Event | None = None) -> str:
    body = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if begun is not None:
                begun.set()
            if line.startswith("data: {"):
                event = httpx.Response(200, text=line[6:]).json()
                assert "error" not in event, event
                text += event["choices"][0]["text"]
    return text


def link_key(fleet: TinyFleet) -> dict[str, str]:
    environment = psutil.Process(fleet.instances()[0].pid).environ()
    return {"authorization": f"Bearer {environment['PLA_SERVE_LINK_KEY']}"}


def hand_overs(fleet: TinyFleet) -> dict[str, float]:
    headers = {"authorization": f"Bearer {METRICS_KEY}"}
    text = httpx.get(f"{fleet.url}/metrics", headers=headers).text
    found = {}
    for line in text.splitlines():
        if line.startswith("pla_serve_router:hand_overs_total{"):
            name, _, value = line.rpartition(" ")
            found[name.split('outcome="')[1].split('"')[0]] = float(value)
    return found


@pytest.mark.skipif(installed_module() is None, reason="NIXL is not installed")
def test_streams_of_an_instance_that_ends_go_on_with_their_kv(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    words = ("--kv-transfer", "--kv-cache-gib", "0.1")
    with (
        start_fleet(model, ["--mixed", "2"], tmp_path / "log", *words, count=2) as fleet,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        expected = list(pool.map(lambda prompt: stream(fleet.url, prompt), PROMPTS))
        begun = [threading.Event() for _ in PROMPTS]
        answers = [
            pool.submit(stream, fleet.url, prompt, event)
            for prompt, event in zip(PROMPTS, begun, strict=True)
        ]
        for event in begun:
            assert event.wait(60)
        leaving = fleet.instances()[0]
        key = link_key(fleet)
        told = httpx.post(f"{leaving.url}/drain", json={"grace_seconds": 2.5}, headers=key)
        assert told.status_code == 202
        assert [answer.result(120) for answer in answers] == expected
        assert httpx.get(f"{leaving.url}/ready").status_code == 503
        outcomes = hand_overs(fleet)
        assert outcomes.get("moved", 0) >= 1, (outcomes, fleet.log(30))
        assert stream(fleet.url, PROMPTS[0]) == expected[0]
        assert httpx.delete(f"{leaving.url}/drain", headers=key).json()["requests"] == 0
        fleet.wait_ready(2)
