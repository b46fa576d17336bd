"""The whole of vLLM with SmolLM2, over HTTP: tokens equal those of its own scheduler.

Needs PLA_SERVE_TEST_MODEL, a folder with the model's weights (`make test-vllm` sets it).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

FOLDER = os.environ.get("PLA_SERVE_TEST_MODEL")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="PLA_SERVE_TEST_MODEL is not set")
OURS = ["--scheduler-cls", "pla_serve.plugins.vllm.LengthAwareScheduler"]
TINY_CACHE = ["--block-size", "32", "--num-gpu-blocks-override", "56"]
LEAVING = ["--distributed-executor-backend", "pla_serve.plugins.vllm.PreemptibleExecutor"]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
START_SECONDS = 400
STEMS = (
    "The lighthouse keeper wrote down every ship that passed, its flag, its course and the hour.",
    "In the valley below, the river bends twice before it reaches the old mill and the bridge.",
    "A good recipe says what to buy, what to do first, and how long everything has to rest.",
    "The committee met on Tuesday to hear what the engineers had found under the north wall.",
)
CONSTRAINED = 4
PATTERN = "[a-z]{3,8} [0-9]{4}"
Body = dict[str, Any]


def prompt(rng: Random, sentences: int) -> str:
    return " ".join(f"{rng.randint(1, 999)}. {rng.choice(STEMS)}" for _ in range(sentences))


def bodies() -> list[Body]:
    """Prompts of 20 to 1,100 tokens in an order that mixes them; answers of 24 to 64 tokens."""
    rng = Random(1)
    sentences = [1, 2, 1, 45, 3, 1, 8, 1, 2, 30, 1, 4, 1, 1, 50, 2, 1, 6, 1, 3, 1, 12]
    found: list[Body] = [
        {"prompt": prompt(rng, count), "max_tokens": rng.choice([24, 40, 64])}
        for count in sentences
    ]
    found[CONSTRAINED]["structured_outputs"] = {"regex": PATTERN}
    return [
        body | {"model": "model", "temperature": 0, "ignore_eos": "structured_outputs" not in body}
        for body in found
    ]


@contextmanager
def served(log: Path, *flags: str) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(FOLDER)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1600", "--enforce-eager", *flags]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | settings
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if httpx.get(url + "/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"vLLM did not come up:\n{log.read_text()[-3000:]}")


async def answers(url: str, wanted: list[Body], aborted: list[Body]) -> list[str]:
    """All at once, a little apart, while the ``aborted`` are begun and given up."""
    async with httpx.AsyncClient(base_url=url, timeout=900, trust_env=False) as client:

        async def ask(number: int, body: Body) -> str:
            await asyncio.sleep(0.05 * number)
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["text"])

        async def give_up(number: int, body: Body) -> None:
            await asyncio.sleep(0.1 * number)
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as it:
                async for _ in it.aiter_lines():
                    if number % 2:  # the even ones before their first token
                        break
                    return

        tasks = [ask(number, body) for number, body in enumerate(wanted)]
        gone = [give_up(number, body) for number, body in enumerate(aborted)]
        found, _ = await asyncio.gather(asyncio.gather(*tasks), asyncio.gather(*gone))
        return found


def metric(url: str, name: str) -> float:
    """The sum over all labels."""
    lines = httpx.get(url + "/metrics", trust_env=False).text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " "))
    )


def idle(url: str) -> bool:
    return metric(url, "vllm:num_requests_running") + metric(url, "vllm:num_requests_waiting") == 0


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """From vLLM's own scheduler."""
    with served(tmp_path_factory.mktemp("own") / "log") as url:
        return asyncio.run(answers(url, bodies(), []))


def test_outputs_equal_with_aborts_and_a_tiny_kv_cache(expected: list[str], tmp_path: Path) -> None:
    aborted = [body | {"max_tokens": 60} for body in bodies()[6:16]]
    with served(tmp_path / "log", *OURS, *TINY_CACHE) as url:
        assert asyncio.run(answers(url, bodies(), aborted)) == expected
        assert metric(url, "vllm:num_preemptions_total") > 0
        assert re.fullmatch(PATTERN, expected[CONSTRAINED])
        end = time.monotonic() + 20
        while not idle(url) and time.monotonic() < end:
            time.sleep(0.1)
        assert idle(url), "aborted requests stayed"
        assert metric(url, "pla_serve:prefills_unfinished") == 0
        assert metric(url, "pla_serve:time_to_first_token_seconds_count") >= len(expected)
        assert metric(url, "pla_serve:boundary_tokens") >= 256
    assert "Prefills are scheduled by length" in (tmp_path / "log").read_text()


def test_outputs_equal_with_steps_that_are_left(expected: list[str], tmp_path: Path) -> None:
    """Cached prefixes, a grammar, aborts and a tiny KV cache."""
    aborted = [body | {"max_tokens": 60} for body in bodies()[6:16]]
    with served(tmp_path / "log", *OURS, *LEAVING, *TINY_CACHE) as url:
        for _ in range(2):
            assert asyncio.run(answers(url, bodies(), aborted)) == expected
        assert metric(url, "pla_serve:nested_steps") > 0
        assert metric(url, "vllm:prefix_cache_hits_total") > 0
    assert "Long steps are left between layers" in (tmp_path / "log").read_text()


def test_outputs_equal_with_speculative_decoding_and_cached_prefixes(
    expected: list[str], tmp_path: Path
) -> None:
    """Steps cannot be left with the first, so they run whole, and the log says so."""
    with served(
        tmp_path / "log",
        *OURS,
        *LEAVING,
        "--speculative-config",
        json.dumps(NGRAM),
        "--scheduling-policy",
        "priority",
        "--additional-config",
        json.dumps({"pla_serve": {"step_seconds": 0.1}}),
    ) as url:
        wanted = [body | {"priority": number % 3} for number, body in enumerate(bodies())]
        for _ in range(2):  # the second time from the prefix cache
            assert asyncio.run(answers(url, wanted, [])) == expected
        assert metric(url, "vllm:prefix_cache_hits_total") > 0
        assert metric(url, "vllm:spec_decode_num_accepted_tokens_total") > 0
        assert metric(url, "pla_serve:nested_steps") == 0
    log = (tmp_path / "log").read_text()
    assert "Long steps are not left between layers: not with speculative decoding" in log


def test_a_wrong_option_ends_vllm_with_its_name(tmp_path: Path) -> None:
    options = ["--additional-config", json.dumps({"pla_serve": {"log_share": 0.3}})]
    with (
        pytest.raises(AssertionError, match="did not come up"),
        served(tmp_path / "log", *OURS, *options),
    ):
        pass
    assert "no option 'log_share'; it has: boundary_tokens" in (tmp_path / "log").read_text()
