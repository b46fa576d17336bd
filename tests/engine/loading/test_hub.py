"""The hub: asked once, bounded in time, and every answer it can give has its own message."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.hub import SETTINGS, WEIGHTS, Hub, HubUnreachable
from pla_serve.engine.loading.progress import NoLoadingProgress

FILES = ("config.json", "model.safetensors", "tokenizer.json", "onnx/model.onnx")


class FakeClient:
    """A hub with one repository, and a cache of the client with or without it."""

    def __init__(
        self,
        folder: Path,
        *,
        error: Exception | None = None,
        cached: bool = False,
        files: tuple[str, ...] = FILES,
        broken: bool = False,
    ) -> None:
        self.folder, self.error, self.cached = folder, error, cached
        self.files, self.broken = files, broken
        self.look_ups = 0
        self.fetched: list[tuple[str | None, tuple[str, ...]]] = []

    def look_up(self, repo: str, timeout: float) -> tuple[str, tuple[str, ...]]:
        self.look_ups += 1
        if self.error is not None:
            raise self.error
        return "c0ffee", self.files

    def fetch(
        self, repo: str, commit: str | None, patterns: Sequence[str], *, local: bool, bars: bool
    ) -> Path:
        if local and not self.cached:
            raise errors.LocalEntryNotFoundError("not in the cache")
        if not local:
            if self.broken:
                raise TimeoutError("the line went dead")
            self.fetched.append((commit, tuple(patterns)))
        return self.folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    return tmp_path


def hub(client: FakeClient, *, offline: bool = False) -> Hub:
    return Hub(client, offline=offline, timeout=1.0)


def http(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("no", response=response)


def test_only_the_files_that_are_needed_are_fetched_of_one_commit(folder: Path) -> None:
    client = FakeClient(folder)
    assert hub(client).weights("a/b", NoLoadingProgress()) == folder
    assert client.fetched == [("c0ffee", SETTINGS + WEIGHTS)]


def test_settings_are_fetched_without_weights(folder: Path) -> None:
    client = FakeClient(folder)
    hub(client).settings("a/b", NoLoadingProgress())
    assert client.fetched == [("c0ffee", SETTINGS)]


def test_an_unreachable_hub_is_asked_once(folder: Path) -> None:
    client = FakeClient(folder, error=ConnectionError("Name or service not known"))
    asked = hub(client)
    for _ in range(3):
        with pytest.raises(HubUnreachable, match="Name or service not known"):
            asked.weights("a/b", NoLoadingProgress())
    assert client.look_ups == 1


def test_a_hub_that_never_answers_is_given_up_on(folder: Path) -> None:
    hang = threading.Event()

    class Hanging(FakeClient):
        def look_up(self, repo: str, timeout: float) -> tuple[str, tuple[str, ...]]:
            hang.wait(60)
            return super().look_up(repo, timeout)

    asked = Hub(Hanging(folder), offline=False, timeout=0.04)
    with pytest.raises(HubUnreachable, match="no answer"):
        asked.weights("a/b", NoLoadingProgress())
    hang.set()


def test_without_a_hub_the_cache_serves(folder: Path) -> None:
    client = FakeClient(folder, error=ConnectionError("down"), cached=True)
    assert hub(client).weights("a/b", NoLoadingProgress()) == folder
    assert client.fetched == []


def test_a_cache_that_is_incomplete_does_not_serve(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    client = FakeClient(folder, error=ConnectionError("down"), cached=True)
    with pytest.raises(HubUnreachable, match="down"):
        hub(client).weights("a/b", NoLoadingProgress())


def test_offline_mode_asks_nobody(folder: Path) -> None:
    client = FakeClient(folder)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        hub(client, offline=True).weights("a/b", NoLoadingProgress())
    assert client.look_ups == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http(errors.GatedRepoError, 403), "accept its terms"),
        (http(errors.RepositoryNotFoundError, 404), "has no model a/b"),
        (errors.HFValidationError("two slashes"), "nor a valid Hugging Face id"),
    ],
)
def test_what_the_hub_refuses_is_said_and_not_taken_for_an_outage(
    folder: Path, error: Exception, message: str
) -> None:
    client = FakeClient(folder, error=error)
    asked = hub(client)
    with pytest.raises(ModelUnavailable, match=message):
        asked.weights("a/b", NoLoadingProgress())
    client.error = None
    assert asked.weights("a/b", NoLoadingProgress()) == folder


def test_a_server_error_counts_as_unreachable(folder: Path) -> None:
    client = FakeClient(folder, error=http(errors.HfHubHTTPError, 503))
    with pytest.raises(HubUnreachable):
        hub(client).weights("a/b", NoLoadingProgress())


def test_a_repository_without_safetensors_is_refused_before_fetching(folder: Path) -> None:
    client = FakeClient(folder, files=("config.json", "pytorch_model.bin"))
    with pytest.raises(ModelUnavailable, match="holds no safetensors"):
        hub(client).weights("a/b", NoLoadingProgress())
    client = FakeClient(folder, files=("m-Q4.gguf",))
    with pytest.raises(ModelUnavailable, match=r"hf download a/b m-Q4\.gguf"):
        hub(client).weights("a/b", NoLoadingProgress())
    assert client.fetched == []


def test_a_download_that_breaks_off_says_so(folder: Path) -> None:
    client = FakeClient(folder, broken=True)
    with pytest.raises(ModelUnavailable, match=r"broke off: the line went dead .*start again"):
        hub(client).weights("a/b", NoLoadingProgress())
