"""``/drain``: notice that a server will end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pla_serve.server.api.guard import Traffic
from pla_serve.server.records.metrics import Metrics
from tests.server.server_harness import Live, until

BODY = {"grace_seconds": 30}


def complete(server: Live, **more: object) -> httpx.Response:
    body = {"prompt": [5, 6], "max_tokens": 2, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def test_a_drained_server_takes_nothing_new_and_ends_what_it_has(
    serve: Callable[..., Live], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    server = serve(env={"FAKE_GATE": str(gate)})
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={"prompt": [5, 6], "max_tokens": 4, "seed": 8888, "stream": True, "ignore_eos": True},
        timeout=30,
    ) as running:
        lines = running.iter_lines()
        next(lines)
        answer = httpx.post(f"{server.url}/drain", json=BODY)
        assert answer.status_code == 202
        state = answer.json()
        assert (state["status"], state["requests"]) == ("draining", 1)
        assert 29 < state["ends_in"] <= 30
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        refused = complete(server)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        gate.touch()
        assert any("[DONE]" in line for line in lines)
    withdrawn = httpx.delete(f"{server.url}/drain")
    assert withdrawn.json() == {"status": "ready", "ends_in": None, "requests": 0}
    assert complete(server).status_code == 200


def test_routers_are_told_when_an_instance_ends(serve: Callable[..., Live]) -> None:
    server = serve()
    httpx.post(f"{server.url}/drain", json=BODY)
    report = httpx.get(f"{server.url}/fleet/instance").json()["report"]
    assert report["ready"] is False
    assert 29 < report["ends_in"] <= 30


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"grace_seconds": -1},
        {"grace_seconds": 1e9},
        {"grace_seconds": "30"},
        {"grace_seconds": None},
        {"grace_seconds": True},
        {"grace_seconds": 3, "now": True},
        [],
    ],
)
def test_nonsense_drains_nothing(live: Live, body: object) -> None:
    assert httpx.post(f"{live.url}/drain", json=body).status_code == 400
    assert httpx.get(f"{live.url}/ready").status_code == 200


def test_web_pages_and_clients_may_not_drain(serve: Callable[..., Live]) -> None:
    server = serve(api_keys=("sk-client",))
    client = {"authorization": "Bearer sk-client"}
    assert httpx.post(f"{server.url}/drain", json=BODY, headers=client).status_code == 403
    keyed = serve(api_keys=("sk-client",), link_key="link" * 8)
    for method in ("POST", "DELETE"):
        assert httpx.request(method, f"{keyed.url}/drain", headers=client).status_code == 401
    right = {"authorization": f"Bearer {'link' * 8}"}
    page = {**right, "origin": "https://elsewhere.example"}
    assert httpx.post(f"{keyed.url}/drain", json=BODY, headers=page).status_code == 403
    assert httpx.post(f"{keyed.url}/drain", json=BODY, headers=right).status_code == 202


def test_a_notice_does_not_hold_up_sigterm(serve: Callable[..., Live]) -> None:
    server = serve()
    httpx.post(f"{server.url}/drain", json=BODY)
    assert server.stop() == 0


def test_a_server_that_ends_cannot_be_called_back() -> None:
    async def main() -> None:
        traffic = Traffic(Metrics("m"), lambda: 100.0)
        traffic.give_notice(5.0)
        assert traffic.ends_in == 5.0
        traffic.withdraw_notice()
        assert (traffic.draining, traffic.ends_in, traffic.ending) == (False, None, False)
        assert await traffic.drain(1.0)
        assert (traffic.draining, traffic.ends_in, traffic.ending) == (True, 1.0, True)

    asyncio.run(main())


def test_while_it_ends_the_notice_is_final(serve: Callable[..., Live], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    server = serve(env={"FAKE_GATE": str(gate)}, drain_seconds=30)
    body = {"prompt": [5, 6], "max_tokens": 4, "seed": 8888, "stream": True, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=30) as running:
        lines = running.iter_lines()
        next(lines)
        server._loop.call_soon_threadsafe(server.instance.stop)
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.delete(f"{server.url}/drain").status_code == 409
        assert httpx.post(f"{server.url}/drain", json=BODY).status_code == 409
        gate.touch()
        assert any("[DONE]" in line for line in lines)
    assert server.status.result(30) == 0
