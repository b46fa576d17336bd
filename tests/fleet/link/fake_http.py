"""Servers that answer as vLLM and SGLang do, on this event loop.

vLLM's events are as recorded from vLLM 0.32; SGLang's are after its source. Both echo the prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pla_serve.server.run import listen

Json = dict[str, Any]
METRICS = """\
# HELP vllm:num_requests_running Number of requests.
process_start_time_seconds 1.79564979126e+09
vllm:num_requests_running{engine="0",model_name="smol"} 3.0
vllm:num_requests_waiting{engine="0",model_name="smol"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="smol"} 0.25
vllm:cache_config_info{block_size="128",cache_dtype="auto",num_gpu_blocks="182"} 1.0
sglang:num_running_reqs{model_name="smol"} 3.0
sglang:num_queue_reqs{model_name="smol"} 2.0
sglang:token_usage{model_name="smol"} 0.25
"""


@dataclass
class FakeServer:
    """Options may be changed while it runs."""

    events: Callable[[Json], Iterator[Json]]
    healthy: bool = True
    hangs: bool = False
    """``/health`` is not answered."""
    mute: bool = False
    """``/metrics`` is not answered."""
    asked: int = 0
    """How often ``/metrics`` was asked for."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Retry-After": "7"})
    """Of answers with another status than 200."""
    key: str | None = None
    metrics: str = METRICS
    info: Json | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Where an answer waits after its first event, if it is not set."""
    follows_grammars: bool = True
    breaks: bool = False
    """Answers end in the middle."""
    bodies: list[Json] = field(default_factory=list)
    open: int = 0
    """Answers under way."""
    url: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

    async def health(self, request: Request) -> Response:
        while self.hangs:
            await asyncio.sleep(0.01)
        return Response(status_code=200 if self.healthy else 503)

    async def models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return JSONResponse({"data": [{"id": "smol", "max_model_len": 1024}]})

    async def metrics_text(self, request: Request) -> Response:
        self.asked += 1
        while self.mute:
            await asyncio.sleep(0.01)
        return PlainTextResponse(self.metrics, 200 if self.metrics else 404)

    async def server_info(self, request: Request) -> Response:
        return JSONResponse(self.info or {}, 200 if self.info else 404)

    async def properties(self, request: Request) -> Response:
        return JSONResponse({"default_generation_settings": {"n_ctx": 1024}})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        if (
            "structured_outputs" in body and "stream" not in body
        ):  # the router asks whether grammars of tool calls are followed
            return JSONResponse({}, self.status if self.follows_grammars else 500)
        self.bodies.append(body)
        if self.status != 200:
            error = {"error": {"message": "no such thing", "code": self.status}}
            return JSONResponse(error, self.status, self.headers)
        return StreamingResponse(self.stream(self.bodies[-1]), media_type="text/event-stream")

    async def stream(self, body: Json) -> AsyncIterator[bytes]:
        self.open += 1
        try:
            for index, event in enumerate(self.events(body)):
                if index == 1:
                    await self.gate.wait()
                    if self.breaks:
                        raise RuntimeError("told to break")
                yield b"data: " + json.dumps(event).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            self.open -= 1


@asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[FakeServer]:
    app = Starlette(
        routes=[
            Route("/health", fake.health),
            Route("/v1/models", fake.models),
            Route("/metrics", fake.metrics_text),
            Route("/server_info", fake.server_info),
            Route("/v1/completions", fake.generate, methods=["POST"]),
            Route("/generate", fake.generate, methods=["POST"]),
            Route("/completion", fake.generate, methods=["POST"]),
            Route("/props", fake.properties),
        ]
    )
    listener = listen("127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield fake
    finally:
        fake.hangs = fake.mute = False
        fake.gate.set()
        server.should_exit = server.force_exit = True
        await task
        listener.close()


def echo(prompt: list[int], most: int, eos: int | None) -> list[int]:
    tokens = [*prompt, *([] if eos is None else [eos])]
    return tokens[:most]


def vllm_events(body: Json) -> Iterator[Json]:
    """One token an event; the prompt, then EOS (2)."""
    tokens = echo(body["prompt"], body["max_tokens"], None if body["ignore_eos"] else 2)
    if body.get("structured_outputs") == {"json": "{"}:
        yield {"error": {"message": "bad schema", "type": "BadRequestError", "code": 400}}
        return
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1 or token in body["stop_token_ids"]
        stop = token == 2 or token in body["stop_token_ids"]
        logprobs = None
        if "logprobs" in body:
            assert body["return_tokens_as_token_ids"]
            top = {f"token_id:{token}": -0.5} | {
                f"token_id:{token + i}": -0.25 * i for i in range(1, body["logprobs"])
            }
            logprobs = {
                "text_offset": [0],
                "token_logprobs": [-0.5],
                "tokens": [f"token_id:{token}"],
                "top_logprobs": [top],
            }
            if body.get("echo") and not index:
                _echo_scores(logprobs, body["prompt"])
        choice = {
            "index": 0,
            "text": "?",
            "logprobs": logprobs,
            "finish_reason": ("stop" if stop else "length") if last else None,
            "stop_reason": token if token in body["stop_token_ids"] else None,
            "prompt_token_ids": None,
            "token_ids": [token],
        }
        yield {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}
        if last:
            return


def _echo_scores(logprobs: Json, prompt: list[int]) -> None:
    """Put log probabilities of the prompt before those of the first token, the i-th being -i."""
    names = [f"token_id:{token}" for token in prompt]
    values = [None, *(-1.0 * i for i in range(1, len(prompt)))]
    tops = [None, *({names[i]: values[i], "token_id:7": -0.25} for i in range(1, len(prompt)))]
    logprobs["tokens"][:0] = names
    logprobs["token_logprobs"][:0] = values
    logprobs["top_logprobs"][:0] = tops


def sglang_events(body: Json, *, incremental: bool = False, step: int = 2) -> Iterator[Json]:
    """Some tokens an event: all so far, or with ``--incremental-streaming-output`` the new ones."""
    params = body["sampling_params"]
    if params.get("regex") == "(":
        yield {"error": {"message": "bad regex"}}
        return
    tokens = echo(body["input_ids"], params["max_new_tokens"], None if params["ignore_eos"] else 2)
    stops = {2, *params.get("stop_token_ids", [])}
    for index, token in enumerate(tokens):
        if token in stops:
            tokens = tokens[: index + 1]
            break
    for end in [*range(step, len(tokens), step), len(tokens)]:
        begin = max(0, end - step) if end % step == 0 else end - end % step
        shown = slice(begin if incremental else 0, end)
        last = end == len(tokens)
        finish: Json | None = None
        if last:
            stopped = tokens[-1] in stops
            finish = (
                {"type": "stop", "matched": tokens[-1]}
                if stopped
                else {"type": "length", "length": len(tokens)}
            )
        meta: Json = {
            "id": "1",
            "finish_reason": finish,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": end,
            "cached_tokens": 4,
        }
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[-0.5, t, None] for t in tokens[shown]]
            if body["top_logprobs_num"]:
                meta["output_top_logprobs"] = [
                    [[-0.25, t + 1, None], [-0.5, t, None]][: body["top_logprobs_num"]]
                    for t in tokens[shown]
                ]
        yield {"text": None, "output_ids": tokens[shown], "meta_info": meta}
