"""SmolLM2-135M-Instruct as it is served: what a newcomer gets from the first command."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.loading import (
    AttentionShape,
    ConsoleProgress,
    ModelSource,
    check_supported,
    eos_token_ids,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
)
from pla_serve.engine.loading.finder import DEFAULT_MODEL

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve(DEFAULT_MODEL, progress=ConsoleProgress())


@pytest.fixture(scope="module")
def tokenizer(source: ModelSource) -> Any:
    return load_tokenizer(source)


def chat(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return ids


def test_its_config(source: ModelSource) -> None:
    config = load_config(source)
    assert config.model_type == "llama"
    assert config.rope_parameters["rope_theta"] == 100000
    assert config.rms_norm_eps == 1e-5
    assert config.max_position_embeddings == 8192
    assert config.tie_word_embeddings
    assert check_supported(config) == AttentionShape(30, 9, 3, 64)


def test_its_special_tokens(source: ModelSource, tokenizer: Any) -> None:
    assert eos_token_ids(source) == (2,)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
    for index, token in enumerate(specials):
        assert tokenizer(token)["input_ids"] == [index]
        assert tokenizer.decode([index], skip_special_tokens=True) == ""
    assert tokenizer("plain text")["input_ids"][0] != 1  # no BOS of its own


def test_its_chat_template(tokenizer: Any) -> None:
    ids = chat(tokenizer, "Hi")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids[:8] == [1, 9690, 198, 2683, 359, 253, 5356, 5646]


def test_every_digit_is_a_token(tokenizer: Any) -> None:
    """As in the original tokenizer; transformers' reading of the GGUF file loses it."""
    assert tokenizer.tokenize("in 1984.") == ["in", "Ġ", "1", "9", "8", "4", "."]


# Bytes that the original vocabulary lacks too: control characters, unassigned planes, no UTF-8.
NOT_IN_VOCABULARY = frozenset(
    b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2" + bytes(range(0xF5, 0x100))
)


@given(text=st.text().filter(lambda text: NOT_IN_VOCABULARY.isdisjoint(text.encode())))
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_greedy_answer_is_sensible(source: ModelSource, tokenizer: Any) -> None:
    model: Any = load_model(source, torch.float32, torch.device("cpu"), 0)
    prompt = torch.tensor([chat(tokenizer, "What is the capital of France?")])
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == 2  # and it ends its turn
