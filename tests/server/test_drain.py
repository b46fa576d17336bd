"""SIGTERM and SIGINT, sent to a real server process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.server.engine.test_supervision import is_alive
from tests.server.fake_core import GATED_SEED, SILENT_SEED
from tests.server.server_harness import DEADLINE, ENGINE_PATH, until

GATED = {"prompt": "abc", "seed": GATED_SEED, "stream": True}
SILENT = {"prompt": "abc", "seed": SILENT_SEED, "stream": True}


@dataclass
class Process:
    child: subprocess.Popen[bytes]
    port: int
    engine: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> int:
        return httpx.get(f"{self.url}/ready").status_code


@contextmanager
def server(drain_seconds: float, gate: Path | None = None) -> Iterator[Process]:
    env = {**os.environ, "FAKE_GATE": str(gate or "/nowhere"), "PYTHONPATH": ENGINE_PATH}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.server.serve_fake", str(drain_seconds)],
        stdout=subprocess.PIPE,
        env=env,
    ) as child:
        try:
            assert child.stdout is not None
            port, engine = child.stdout.readline().split()
            yield Process(child, int(port), int(engine))
        finally:
            child.kill()


def test_idle_server_leaves_with_status_zero() -> None:
    with server(drain_seconds=60) as process:
        process.child.send_signal(signal.SIGINT)
        assert process.child.wait(DEADLINE) == 0
        assert not is_alive(process.engine)


def test_drain_lets_work_finish_and_nobody_in(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with server(drain_seconds=60, gate=gate) as process:
        with httpx.stream("POST", f"{process.url}/v1/completions", json=GATED) as response:
            lines = response.iter_lines()
            assert '"text":"a"' in next(lines)
            process.child.send_signal(signal.SIGTERM)
            until(lambda: process.ready() == 503, "draining")
            refused = httpx.post(f"{process.url}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{process.url}/health").status_code == 200
            gate.touch()
            rest = list(lines)
            events = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
            assert "".join(event["choices"][0]["text"] for event in events) == "bc"
            assert "data: [DONE]" in rest
        assert process.child.wait(DEADLINE) == 0


def test_drain_ends_what_takes_too_long() -> None:
    with (
        server(drain_seconds=0.1) as process,
        httpx.stream("POST", f"{process.url}/v1/completions", json=SILENT) as response,
    ):
        process.child.send_signal(signal.SIGTERM)
        assert "shutting down" in response.read().decode()
        assert process.child.wait(DEADLINE) == 0
        assert not is_alive(process.engine)


def test_second_signal_quits_at_once() -> None:
    with (
        server(drain_seconds=60) as process,
        httpx.stream("POST", f"{process.url}/v1/completions", json=SILENT),
    ):
        process.child.send_signal(signal.SIGTERM)
        until(lambda: process.ready() == 503, "draining")
        process.child.send_signal(signal.SIGTERM)
        assert process.child.wait(DEADLINE) == 128 + signal.SIGTERM
        until(lambda: not is_alive(process.engine), "the engine's end")
