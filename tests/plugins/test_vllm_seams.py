"""`benchmarks/vllm_seams.py` without a network and without vLLM: made-up wheels and sources."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from benchmarks import vllm_seams

SCHEDULER = "v1/core/sched/scheduler.py"


def wheel(folder: Path, **files: str) -> Path:
    path = folder / "vllm-9.9.9-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def package(folder: Path, method: str) -> Path:
    """A folder of vLLM whose scheduler has this one method."""
    path = folder / SCHEDULER
    path.parent.mkdir(parents=True)
    path.write_text(f"class Other:\n    def schedule(self): ...\nclass Scheduler:\n    {method}\n")
    return folder


def test_only_python_files_of_vllm_are_unpacked(tmp_path: Path) -> None:
    files = {"vllm/a.py": "1", "vllm/_C.so": "2", "vllm-9.9.9.dist-info/METADATA": "3", "x.py": "4"}
    vllm_seams.unpack(wheel(tmp_path, **files), tmp_path / "out")
    out = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert out == [tmp_path / "out" / "vllm" / "a.py"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"other/a.py": "1"}, "no Python files"),
        ({"vllm/../../a.py": "1"}, "outside of its folder"),
        ({"vllm/a.py": "1", "vllm/b.py": "1", "vllm/c.py": "1"}, "more than 2 Python files"),
        ({"vllm/a.py": "1" * 101}, "or 100 bytes"),
    ],
)
def test_a_wheel_that_does_not_fit_is_refused_and_leaves_nothing(
    files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_seams, "MOST_FILES", 2)
    monkeypatch.setattr(vllm_seams, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match=message):
        vllm_seams.unpack(wheel(tmp_path, **files), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vllm.whl"
    path.write_bytes(b"not a wheel")
    with pytest.raises(ValueError, match=r"vllm\.whl is damaged"):
        vllm_seams.unpack(path, tmp_path / "out")


@pytest.mark.parametrize("version", ["", "0", "latest", "../0.33.0", "0.33.0 --pre", "0.33.0\n"])
def test_what_is_no_version_never_reaches_pip(version: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a version"):
        vllm_seams.fetch(version, tmp_path)


def test_a_release_is_downloaded_once(tmp_path: Path) -> None:
    (tmp_path / "9.9.9").mkdir()
    assert vllm_seams.fetch("9.9.9", tmp_path) == tmp_path / "9.9.9"


def test_a_download_that_fails_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"pip has no wheel of vllm 9\.9\.9"):
        vllm_seams.fetch("9.9.9", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("after", "line"),
    [
        ("def schedule(self, throttle=False): ...", []),
        (
            "def schedule(self): ...",
            ["schedule takes (self), where it took (self, throttle=False)"],
        ),
        ("def plan(self): ...", ["schedule is not in v1/core/sched/scheduler.py any more"]),
        ("schedule = None", ["schedule is not in v1/core/sched/scheduler.py any more"]),
    ],
)
def test_a_seam_that_differs_is_named(after: str, line: list[str], tmp_path: Path) -> None:
    known = package(tmp_path / "known", "def schedule(self, throttle=False): ...")
    release = package(tmp_path / "release", after)
    assert vllm_seams.changes(known, release) == [f"Scheduler.{text}" for text in line]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    known = package(tmp_path / "known", "def schedule(self): ...")
    found = vllm_seams.changes(known, tmp_path / "nothing")
    assert found == ["Scheduler.schedule is not in v1/core/sched/scheduler.py any more"]


def test_an_environment_without_vllm_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="make test-vllm"):
        vllm_seams.installed(tmp_path / "python")
