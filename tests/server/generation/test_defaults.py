"""Sampling parameters that the model's generation config suggests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from pla_serve.server.api.params import sampling_params
from pla_serve.server.api.schema import CompletionRequest
from pla_serve.server.generation.defaults import SamplingDefaults, read_defaults
from pla_serve.wire.engine import SamplingParams
from tests.server.server_harness import MODEL, Live

FILE = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "do_sample": True,
    "eos_token_id": [1, 2],
    "min_p": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(FILE))
    return tmp_path


def test_the_file_of_the_model(folder: Path) -> None:
    found = read_defaults("auto", None, folder)
    assert found == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
    assert str(found) == "temperature 0.6, top_p 0.95, top_k 20"


def test_no_file(tmp_path: Path, folder: Path) -> None:
    assert read_defaults("vllm", None, folder) == SamplingDefaults()
    assert read_defaults("auto", None, tmp_path / "elsewhere") == SamplingDefaults()
    assert str(SamplingDefaults()) == "none"


def test_a_file_of_ones_own(tmp_path: Path, folder: Path) -> None:
    assert read_defaults(str(folder), None, tmp_path / "model").top_k == 20
    with pytest.raises(ValueError, match="takes auto, vllm or a folder"):
        read_defaults(str(folder / "missing"), None, folder)


def test_an_override_goes_first(folder: Path) -> None:
    found = read_defaults("auto", '{"temperature": 0, "max_new_tokens": 9}', folder)
    assert found == SamplingDefaults(temperature=0, top_p=0.95, top_k=20, max_new_tokens=9)
    assert read_defaults("vllm", '{"top_k": 3}', folder) == SamplingDefaults(top_k=3)


@pytest.mark.parametrize("override", ["{", "[]", '{"heat": 1}', '{"top_p": 2}', '{"top_k": 1.5}'])
def test_bad_overrides(folder: Path, override: str) -> None:
    with pytest.raises(ValueError, match="--override-generation-config"):
        read_defaults("auto", override, folder)


@pytest.mark.parametrize("content", ["{", '{"temperature": -1}', '{"top_p": "a"}', "[]", "\ufffd"])
def test_a_bad_file_names_the_cure(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="--generation-config vllm"):
        read_defaults("auto", None, folder)


def sampled(defaults: SamplingDefaults, **fields: Any) -> SamplingParams:
    request = CompletionRequest(prompt="x", **fields)
    return sampling_params(request, 8, 100, defaults)


def test_requests_go_before_defaults() -> None:
    defaults = SamplingDefaults(
        temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1
    )
    params = sampled(defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.1)
    params = sampled(defaults, temperature=0, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    assert params == sampled(SamplingDefaults(), temperature=0)


def test_a_limit_holds_for_every_request() -> None:
    live = Live(defaults=SamplingDefaults(max_new_tokens=3))
    try:
        live.wait_ready()
        for asked in (None, 2, 10):
            body = {"model": MODEL, "prompt": "abcdefgh", "max_tokens": asked}
            answer = httpx.post(f"{live.url}/v1/completions", json=body).json()
            assert answer["usage"]["completion_tokens"] == min(asked or 16, 3)
    finally:
        live.close()
