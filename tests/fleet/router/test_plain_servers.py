"""The router as clients see it in front of plain vLLM and SGLang servers, which are fakes here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from pla_serve.fleet.route_command import RouteSettings, build
from pla_serve.fleet.router.circuit import CircuitOptions
from pla_serve.fleet.router.contract import FleetOptions
from pla_serve.server.model import ServedModel
from pla_serve.server.run import listen
from pla_serve.server.settings import ServerSettings
from tests.fleet.link.fake_http import FakeServer, Json, serving, sglang_events, vllm_events
from tests.server.server_harness import DEADLINE, MODEL, check_grammar, make_tokenizer

EVENTS: dict[str, Callable[[Json], Iterator[Json]]] = {
    "vllm": vllm_events,
    "sglang": sglang_events,
}
BOTH = pytest.mark.parametrize("kind", EVENTS)
HI = [ord("H"), ord("i")]


@asynccontextmanager
async def routed(
    kind: str,
    vocab_size: int | None = None,
    most_failures: int = 4,
    follows_grammars: bool = True,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeServer]]:
    """A router on this event loop, connected to one server of this kind."""
    circuit = CircuitOptions(failures=2, open_seconds=60.0)
    async with serving(FakeServer(EVENTS[kind], follows_grammars=follows_grammars)) as fake:
        router = RouteSettings(
            instances=(f"{kind}+{fake.url}",),
            fleet=FleetOptions(patience_seconds=5.0, circuit=circuit, most_failures=most_failures),
        )
        settings = ServerSettings(model_names=(MODEL,), model_root="", restart_wait=5.0)
        model = ServedModel(make_tokenizer(), check_grammar, vocab_size=vocab_size)
        server = build(settings, router, model, "here")
        listener = listen("127.0.0.1", 0)
        task = asyncio.create_task(server.run(listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=DEADLINE, trust_env=False) as client:
                yield client, fake
        finally:
            server.stop()
            await task


def run(
    kind: str,
    check: Callable[[httpx.AsyncClient, FakeServer], Awaitable[None]],
    **options: Any,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(2 * DEADLINE), routed(kind, **options) as (client, fake):
            await check(client, fake)

    asyncio.run(main())


async def complete(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": MODEL, "prompt": HI, **fields})


@BOTH
def test_token_ids_are_checked_against_the_routers_own_vocabulary(kind: str) -> None:
    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        served = await complete(client, logit_bias={"256": -1}, stop_token_ids=[105])
        assert served.status_code == 200, served.text
        assert served.json()["choices"][0]["finish_reason"] == "stop"
        body = fake.bodies[-1]
        params = body.get("sampling_params", body)
        assert body.get("prompt", body.get("input_ids")) == HI
        assert params["logit_bias"] == {"256": -1}
        assert params["stop_token_ids"] == [105]
        for wrong in ({"prompt": [257]}, {"logit_bias": {"257": 1}}, {"stop_token_ids": [257]}):
            refused = await complete(client, **wrong)
            assert refused.status_code == 400
            assert "257" in refused.json()["error"]["message"]

    run(kind, check)


@pytest.mark.parametrize("follows", [True, False])
def test_vllm_gets_the_grammar_of_tool_calls_if_it_can_follow_it(follows: bool) -> None:
    """The router asks when it connects: a vLLM engine keeps to one library of grammars."""

    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        }
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert ("structured_outputs" in fake.bodies[-1]) == follows
        required = await client.post(
            "/v1/chat/completions", json={**body, "tool_choice": "required", "max_tokens": 2}
        )
        assert required.status_code == (200 if follows else 400), required.text
        if not follows:
            message = required.json()["error"]["message"]
            assert "--structured-outputs-config.backend guidance" in message
        assert (await complete(client, guided_regex="a")).status_code == 200

    run("vllm", check, follows_grammars=follows)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_vllm_scores_prompts(stream: bool, max_tokens: int) -> None:
    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        answer = await complete(
            client, echo=True, logprobs=1, max_tokens=max_tokens, stream=stream, temperature=0
        )
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines] or answer.json()["choices"]
        parts = [choice["logprobs"] for choice in choices]
        values = [value for part in parts for value in part["token_logprobs"]]
        assert values == [None, -1.0, *[-0.5] * max_tokens]
        assert parts[0]["top_logprobs"][:2] == [None, {"i": -1.0, "\x07": -0.25}]
        assert "".join(choice["text"] for choice in choices) == "Hi" + "Hi"[:max_tokens]
        assert fake.bodies[-1]["echo"] is True
        scored = await complete(client, prompt_logprobs=1, max_tokens=max_tokens)
        [entry] = scored.json()["choices"][0]["prompt_logprobs"][1:]
        assert entry["105"] == {"logprob": -1.0, "rank": 2, "decoded_token": "i"}

    run("vllm", check)


@pytest.mark.parametrize(
    "fields", [{"prompt_logprobs": 0}, {"echo": True, "logprobs": 0}, {"max_tokens": 0}]
)
def test_sglang_scores_no_prompts(fields: dict[str, Any]) -> None:
    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        refused = await complete(client, **fields)
        assert refused.status_code == 400
        assert "scored on SGLang" in refused.json()["error"]["message"]

    run("sglang", check)


@BOTH
def test_a_padded_embedding_has_more_token_ids_than_the_tokenizer(kind: str) -> None:
    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        assert (await complete(client, logit_bias={"300": -1})).status_code == 200
        assert (await complete(client, logit_bias={"320": -1})).status_code == 400

    run(kind, check, vocab_size=320)


async def state(client: httpx.AsyncClient) -> str:
    """State of the server's circuit as the router shows it."""
    [instance] = (await client.get("/fleet")).json()["instances"]
    return str(instance["circuit"])


@BOTH
@pytest.mark.parametrize("status", [500, 502, 503, 404])
def test_a_server_that_fails_requests_is_502_and_opens_its_circuit(kind: str, status: int) -> None:
    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        fake.status, fake.headers = status, {}
        for before in ("closed", "closed", "open"):
            assert await state(client) == before
            failed = await complete(client)
            assert failed.status_code == 502, failed.text
            message = failed.json()["error"]["message"]
            assert "given up after 1 failures; the router's log has them" in message

    run(kind, check, most_failures=1)


@BOTH
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_without_room_is_429_and_keeps_its_circuit_closed(kind: str, status: int) -> None:
    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        fake.status = status
        for _ in range(3):
            full = await complete(client)
            assert full.status_code == 429
            assert full.headers["retry-after"] == "7"
        assert await state(client) == "closed"

    run(kind, check)


def test_a_router_tokenizes_by_itself() -> None:
    async def check(client: httpx.AsyncClient, fake: FakeServer) -> None:
        answer = await client.post("/tokenize", json={"model": MODEL, "prompt": "Hi"})
        assert answer.json() == {
            "count": 2,
            "max_model_len": 1024,
            "tokens": HI,
            "token_strs": None,
        }
        answer = await client.post("/detokenize", json={"model": MODEL, "tokens": HI})
        assert answer.json() == {"prompt": "Hi"}
        assert not fake.bodies

    run("vllm", check)
