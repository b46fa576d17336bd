"""GGUF files: the converted model is the original one, or the file is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from pla_serve.engine.loading import ModelSource, UnsupportedModel, eos_token_ids
from pla_serve.engine.loading import gguf as gguf_cache
from pla_serve.engine.loading.convert import _config, _read, convert
from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.progress import NoLoadingProgress
from pla_serve.engine.loading.rope import llama3_scaling
from tests.engine.loading import tiny

TOKENS = torch.arange(3, 33)[None]


def written(path: Path, family: str = "Llama", **extra: Any) -> Any:
    source = tiny.model(tiny.config(family, head_dim=16, tie_word_embeddings=family == "Llama"))
    tiny.write_gguf(path, source, **extra)
    return source


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_the_converted_model_is_the_original(tmp_path: Path, family: str) -> None:
    changes = {} if family == "Qwen2" else {"head_dim": 16}
    settings = tiny.config(family, tie_word_embeddings=family == "Llama", rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, **changes)  # fmt: skip
    source = tiny.model(settings)
    tiny.write_gguf(tmp_path / "m.gguf", source)
    out = tmp_path / "out"
    convert(tmp_path / "m.gguf", out)

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.config.tie_word_embeddings == (family == "Llama")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, source.eval()(TOKENS).logits)
    # the end of a turn ends a text too
    assert eos_token_ids(ModelSource("m", out, "here")) == (1, 2)


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {},
    ),
    "llama3 of 32": (
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {},
    ),
    "linear": ({"factor": 4.0}, {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 64},
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
         "rope__scaling__original_context_length": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaled_rotary_embedding_is_the_original_one(tmp_path: Path, kind: str) -> None:
    parameters, keys = SCALINGS[kind]
    rope = {"rope_type": kind, "rope_theta": 500000.0, **parameters}
    settings = tiny.config(
        "Llama", head_dim=16, max_position_embeddings=16384, rope_parameters=rope
    )
    source = tiny.model(settings)
    tiny.write_gguf(tmp_path / "m.gguf", source, **keys)
    convert(tmp_path / "m.gguf", tmp_path / "out")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    positions = torch.arange(len(TOKENS[0]))[None] * 500
    with torch.no_grad():
        expected = source.eval()(TOKENS, position_ids=positions).logits
        found = loaded(TOKENS, position_ids=positions).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_unknown_rope_factors_are_refused(tmp_path: Path) -> None:
    config = tiny.config("Llama", head_dim=16)
    with pytest.raises(UnsupportedModel, match=r"not those of Llama 3\.1"):
        llama3_scaling(config, np.linspace(1, 8, 8))


def test_the_tokenizer_keeps_specials_whole_and_digits_apart(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|start|><|turn|>")["input_ids"] == [0, 2]
    # the vocabulary has "198" and "1984" as tokens; this split must not reach them
    assert tokenizer.tokenize("1984") == ["1", "9", "8", "4"]
    assert tokenizer.decode(tokenizer("hello wörld 🙂\n")["input_ids"]) == "hello wörld 🙂\n"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|start|>hi<|turn|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.model_max_length == 64


def test_gpt2_splits_keep_digits_together(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", pre="gpt-2")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("1984") == ["1984"]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"rope__scaling__type": "longrope"}, "scales its rotary embedding by 'longrope'"),
        ({"rope__scaling__type": "yarn"}, "'yarn' with factor None"),
        ({"rope__scaling__attn_factor": 2}, r"sets rope\.scaling\.attn_factor"),
        ({"attention__sliding_window": 4096}, r"sets attention\.sliding_window"),
        ({"expert_count": 8}, "sets expert_count"),
        ({"rope__dimension_count": 8}, r"rope\.dimension_count is not the size of a head"),
        ({"pre": "from-the-future"}, "from-the-future"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path: Path, extra: dict[str, Any], reason: str) -> None:
    written(tmp_path / "m.gguf", **extra)
    with pytest.raises(UnsupportedModel, match=reason):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_settings_that_say_nothing_special_are_passed_over(tmp_path: Path) -> None:
    source = written(tmp_path / "m.gguf", rope__scaling__type="none", expert_count=0)
    metadata, _ = _read(tmp_path / "m.gguf")
    assert _config(tmp_path / "m.gguf", metadata).head_dim == source.config.head_dim


def test_a_tensor_that_transformers_passes_over_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that nobody would multiply with make another model of it."""
    plain = GGUFWriter.write_header_to_file

    def with_more(self: GGUFWriter, *args: Any) -> None:
        self.add_tensor("extra_scale.weight", np.ones(8, dtype=np.float32))
        plain(self, *args)

    monkeypatch.setattr(GGUFWriter, "write_header_to_file", with_more)
    written(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModel, match=r"not used: extra_scale\.weight"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_a_part_of_a_split_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GGUFWriter.write_header_to_file

    def as_a_part(self: GGUFWriter, *args: Any) -> None:
        self.add_uint16("split.count", 3)
        plain(self, *args)

    monkeypatch.setattr(GGUFWriter, "write_header_to_file", as_a_part)
    written(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModel, match="one of 3 parts"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="'gemma2' is not converted; llama, qwen2, qwen3"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("keep", [4, 100, 3000, -5000])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    written(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:keep])
    with pytest.raises(UnsupportedModel, match="broken or cut short"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_a_refusal_crosses_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test through the real converter process; it must leave nothing in the cache."""
    monkeypatch.setenv("PLA_SERVE_CACHE", str(tmp_path / "cache"))
    written(tmp_path / "m.gguf", expert_count=8)
    with pytest.raises(UnsupportedModel, match=r"m\.gguf: its metadata sets expert_count"):
        gguf_cache.converted(tmp_path / "m.gguf", NoLoadingProgress())
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert all(name.endswith(".lock") for name in left)


def test_a_crash_of_the_converter_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false") or "/bin/false")
    with pytest.raises(ModelUnavailable, match="exit status 1"):
        gguf_cache.convert(tmp_path / "m.gguf", tmp_path, NoLoadingProgress())


def test_a_changed_file_is_converted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLA_SERVE_CACHE", str(tmp_path / "cache"))
    seen: list[bytes] = []
    monkeypatch.setattr(
        gguf_cache, "convert", lambda path, *_, **__: seen.append(path.read_bytes())
    )
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF one")
    first = gguf_cache.converted(file, NoLoadingProgress())
    assert gguf_cache.converted(file, NoLoadingProgress()) == first
    file.write_bytes(b"GGUF, two")
    assert gguf_cache.converted(file, NoLoadingProgress()) != first
    assert seen == [b"GGUF one", b"GGUF, two"]
