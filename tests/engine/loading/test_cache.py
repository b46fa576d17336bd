"""A model is in the cache complete or not at all, and is built once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filelock import FileLock

from pla_serve.engine.loading.cache import build_once, cache_root
from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.progress import NoLoadingProgress


class Said(NoLoadingProgress):
    """Keeps what was announced, and lets a test wait for it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.spoke = threading.Event()

    def say(self, text: str) -> None:
        self.lines.append(text)
        self.spoke.set()


def fill(folder: Path) -> None:
    (folder / "weights").write_text("all of them")


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "models").iterdir() if path.suffix != ".lock"}


def test_it_is_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    first = build_once("m", build, NoLoadingProgress(), root=tmp_path)
    again = build_once("m", build, NoLoadingProgress(), root=tmp_path)
    assert first == again == tmp_path / "models" / "m"
    assert (first / "weights").read_text() == "all of them"
    assert len(calls) == 1
    assert names(tmp_path) == {"m"}


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        build_once("m", broken, NoLoadingProgress(), root=tmp_path)
    assert names(tmp_path) == set()
    assert build_once("m", fill, NoLoadingProgress(), root=tmp_path).is_dir()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "models" / ".m.abc123"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    other = tmp_path / "models" / ".other.abc123"
    other.mkdir()
    build_once("m", fill, NoLoadingProgress(), root=tmp_path)
    assert names(tmp_path) == {"m", ".other.abc123"}


def test_two_that_ask_at_once_build_once(tmp_path: Path) -> None:
    building, go_on = threading.Event(), threading.Event()
    calls: list[Path] = []

    def slow(folder: Path) -> None:
        calls.append(folder)
        building.set()
        assert go_on.wait(30)
        fill(folder)

    results: list[Path] = []
    second = Said()

    def ask(progress: NoLoadingProgress) -> None:
        results.append(build_once("m", slow, progress, root=tmp_path))

    threads = [
        threading.Thread(target=ask, args=(progress,)) for progress in (NoLoadingProgress(), second)
    ]
    threads[0].start()
    assert building.wait(30)
    threads[1].start()
    assert second.spoke.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert "Another process" in second.lines[0]
    assert len(calls) == 1
    assert results == [tmp_path / "models" / "m"] * 2


def test_a_lock_that_is_never_released_is_an_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    lock = tmp_path / "models" / "m.lock"
    with FileLock(lock), pytest.raises(ModelUnavailable, match="delete that file"):
        build_once("m", fill, NoLoadingProgress(), root=tmp_path, lock_timeout=0.01)


def test_a_cache_that_cannot_be_written_is_an_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelUnavailable, match="PLA_SERVE_CACHE"):
        build_once("m", fill, NoLoadingProgress(), root=tmp_path / "file")


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("PLA_SERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "pla-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/pla-serve")
    monkeypatch.setenv("PLA_SERVE_CACHE", "~/own")
    assert cache_root() == tmp_path / "own"
