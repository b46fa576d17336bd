"""Gets models from the Hugging Face hub, or from the cache of its client.

A short look-up comes first and shows whether the hub can be reached, so that an unreachable hub
costs seconds and not minutes. After a failure the process does not ask again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils.tqdm import tqdm

from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.progress import LoadingProgress
from pla_serve.engine.loading.source import require_weights

T = TypeVar("T")

SETTINGS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""Patterns of small files: config, tokenizer, chat template."""
WEIGHTS = ("model.safetensors", "model-*.safetensors")
NOT_NEEDED = ("*/*",)
"""Files in folders, which the engine does not read."""


class HubUnreachable(Exception):
    """The hub did not answer, and the cache does not have the model."""


class HubClient(Protocol):
    """The two calls of huggingface_hub that are used; tests have their own."""

    def look_up(self, repo: str, timeout: float) -> tuple[str, tuple[str, ...]]:
        """Return the commit of a repository and the names of its files."""
        ...

    def fetch(
        self, repo: str, commit: str | None, patterns: Sequence[str], *, local: bool, bars: bool
    ) -> Path:
        """Return a folder with the files that match; ``local`` looks in the cache only."""
        ...


class Hub:
    """Gets repositories, and remembers if the hub cannot be reached."""

    def __init__(self, client: HubClient, *, offline: bool, timeout: float = 4.0) -> None:
        self._client = client
        self._timeout = timeout
        self._down = "HF_HUB_OFFLINE is set" if offline else None

    def settings(self, repo: str, progress: LoadingProgress) -> Path:
        """Return a folder with at least config and tokenizer. Raises the errors of `weights`."""
        return self._get(repo, SETTINGS, progress)

    def weights(self, repo: str, progress: LoadingProgress) -> Path:
        """Return a folder with config, tokenizer and safetensors.

        Raises:
            HubUnreachable: the hub does not answer and the model is not cached; the text says why.
            ModelUnavailable: the hub answered that there is no such model, that it needs a login,
                or that it has no safetensors; or a download broke off.
        """
        return self._get(repo, SETTINGS + WEIGHTS, progress)

    def _get(self, repo: str, patterns: Sequence[str], progress: LoadingProgress) -> Path:
        found = self._look_up(repo)
        if found is None:
            return self._cached(repo, patterns)
        commit, names = found
        if WEIGHTS[0] in patterns and not any(name.endswith(".safetensors") for name in names):
            raise ModelUnavailable(_no_safetensors(repo, names))
        if not self._has(repo, commit, patterns):
            progress.say(f"Fetching {repo} from the Hugging Face hub.")
        try:
            return self._client.fetch(repo, commit, patterns, local=False, bars=progress.bars)
        except Exception as error:  # the client raises the errors of its HTTP library
            raise ModelUnavailable(
                f"Fetching {repo} from the Hugging Face hub broke off: {_first_line(error)} "
                "What has arrived is kept; start again to go on."
            ) from error

    def _look_up(self, repo: str) -> tuple[str, tuple[str, ...]] | None:
        """Return commit and file names; None if the hub does not answer."""
        if self._down is not None:
            return None
        try:
            return _bounded(lambda: self._client.look_up(repo, self._timeout), 1.25 * self._timeout)
        except hub_errors.GatedRepoError as error:
            raise ModelUnavailable(
                f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and log in "
                "with `hf auth login`, or set HF_TOKEN."
            ) from error
        except hub_errors.RepositoryNotFoundError as error:
            raise ModelUnavailable(
                f"The Hugging Face hub has no model {repo}, or it is private. Check the spelling; "
                "for a private model log in with `hf auth login`; a local folder must exist."
            ) from error
        except hub_errors.HFValidationError as error:
            raise ModelUnavailable(_not_an_id(repo)) from error
        except Exception as error:  # no route, proxy errors, time-outs, 5xx: all mean "not now"
            self._down = _first_line(error)
            return None

    def _has(self, repo: str, commit: str, patterns: Sequence[str]) -> bool:
        try:
            self._client.fetch(repo, commit, patterns, local=True, bars=False)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def _cached(self, repo: str, patterns: Sequence[str]) -> Path:
        try:
            folder = self._client.fetch(repo, None, patterns, local=True, bars=False)
            if WEIGHTS[0] in patterns:
                require_weights(folder)
        except hub_errors.HFValidationError as error:
            raise ModelUnavailable(_not_an_id(repo)) from error
        except (FileNotFoundError, ValueError, ModelUnavailable) as error:
            raise HubUnreachable(self._down) from error
        return folder


class _LibraryClient:
    def look_up(self, repo: str, timeout: float) -> tuple[str, tuple[str, ...]]:
        info = huggingface_hub.HfApi().model_info(repo, timeout=timeout)
        names = tuple(sibling.rfilename for sibling in info.siblings or ())
        return info.sha or "main", names

    def fetch(
        self, repo: str, commit: str | None, patterns: Sequence[str], *, local: bool, bars: bool
    ) -> Path:
        folder: str = huggingface_hub.snapshot_download(
            repo,
            revision=commit,
            allow_patterns=list(patterns),
            ignore_patterns=list(NOT_NEEDED),
            local_files_only=local,
            tqdm_class=tqdm if bars else _NoBar,
        )
        return Path(folder)


class _NoBar(tqdm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


@functools.cache
def default_hub() -> Hub:
    """Return the hub of this process, so that an unreachable one is looked for once only."""
    return Hub(_LibraryClient(), offline=huggingface_hub.constants.HF_HUB_OFFLINE)


def _bounded(call: Callable[[], T], seconds: float) -> T:
    """Return the result of ``call``, or raise TimeoutError: DNS queries have no time-out."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hub-look-up", daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no answer in {seconds:g} s") from error


def _not_an_id(repo: str) -> str:
    return f"{repo!r} is neither a folder or file on this machine nor a valid Hugging Face id."


def _no_safetensors(repo: str, names: Sequence[str]) -> str:
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return (
            f"{repo} holds GGUF files and no safetensors. Fetch one of them, for instance with "
            f"`hf download {repo} {gguf[0]}`, and give its path."
        )
    return f"{repo} holds no safetensors. Convert it with transformers' save_pretrained first."


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
