"""An exception in the handling of one answer ends that answer; streams beside it are complete."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from pla_serve.server.api import formats
from pla_serve.server.engine.session import EngineSession
from pla_serve.server.generation.generation import Generation
from pla_serve.wire.engine import Output
from tests.server.server_harness import MODEL, Live

BAD_SEED = 31
BAD_LOGPROBS = 3


def raising(original: Any, guilty: Callable[..., bool]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if guilty(*args, **kwargs):
            raise RuntimeError("boom")
        return original(*args, **kwargs)

    return call


def is_bad(generation: Generation) -> bool:
    return generation.plan.sampling[0].seed == BAD_SEED


def stream(client: openai.OpenAI, seed: int) -> str:
    options: dict[str, Any] = {"stop": ["never"], "max_tokens": 20}
    options["logprobs"] = BAD_LOGPROBS if seed == BAD_SEED else 1
    chunks = client.completions.create(
        model=MODEL, prompt="one two three", seed=seed, stream=True, **options
    )
    return "".join(chunk.choices[0].text for chunk in chunks)


@pytest.mark.parametrize("place", ["stop string", "logprobs", "session"])
def test_other_streams_are_complete(
    place: str, serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve(env={"FAKE_PAUSE": "0.002"})
    with live.client() as client, ThreadPoolExecutor(8) as pool:
        expected = [stream(client, seed) for seed in range(6)]
        if place == "stop string":
            decode = raising(Generation._decode, lambda one, *_: is_bad(one))
            monkeypatch.setattr(Generation, "_decode", decode)
        elif place == "logprobs":
            monkeypatch.setattr(
                formats,
                "completion_logprobs",
                raising(
                    formats.completion_logprobs,
                    lambda _, entries, *__: any(len(e.top) == BAD_LOGPROBS for e in entries),
                ),
            )
        else:
            ids: set[str] = set()
            submit = EngineSession.submit

            def note(self: EngineSession, request: Any) -> None:
                if request.sampling.seed == BAD_SEED:
                    ids.add(request.id)
                submit(self, request)

            monkeypatch.setattr(EngineSession, "submit", note)
            take = raising(
                EngineSession.take, lambda _, m: isinstance(m, Output) and m.id in ids and m.tokens
            )
            monkeypatch.setattr(EngineSession, "take", take)
        bad = pool.submit(stream, client, BAD_SEED)
        others = [pool.submit(stream, client, seed) for seed in range(6)]
        assert [one.result(30) for one in others] == expected
        with pytest.raises(openai.APIError):
            bad.result(30)
        assert stream(client, 0) == expected[0]
