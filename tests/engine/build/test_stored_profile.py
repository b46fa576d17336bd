"""A stored cost profile is used where it holds, and ignored everywhere else."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.build.roofline import Ceilings
from pla_serve.engine.build.stored_profile import (
    MOST_BYTES,
    MOST_FILES,
    NEAR_ROOFLINE,
    SAME_SPEED,
    ProfileStore,
)
from pla_serve.policy.cost import CostModel, CostProfile

CEILINGS = Ceilings(flops=1e11, bytes_per_second=2e10, operation_seconds=1e-6)
ROOFLINE = CostProfile(
    per_token=1e-3, per_attention=1e-7, per_kv=1e-6, per_sequence=1e-4, per_launch=1e-2
)
MEASURED = replace(ROOFLINE, per_token=2e-3)
BULK = replace(MEASURED, per_launch=1e-3)
KEY = {"machine": "one", "model": "small"}


def store_in(folder: Path, **changes: Any) -> ProfileStore:
    return replace(ProfileStore(folder / "profiles", KEY, CEILINGS, ROOFLINE), **changes)


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    """A store that holds a profile."""
    store = store_in(tmp_path)
    assert store.read() is None
    store.write(CostModel(MEASURED, BULK))
    return store


def test_the_next_start_has_the_profile(store: ProfileStore, tmp_path: Path) -> None:
    cost = store_in(tmp_path).read()
    assert cost is not None
    assert (cost.profile, cost.bulk) == (MEASURED, BULK)
    assert [file.name for file in store.folder.iterdir()] == [store.path.name]


def edited(path: Path, **changes: object) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"profile": {"per_token": -1}},
        {"profile": {"per_token": "fast"}},
        {"profile": None},
        {"ceilings": {"flops": 0, "bytes_per_second": 1, "operation_seconds": 1}},
        {"key": {}},
        {"key": {**KEY, "machine": "another"}},
        {"more": 1},
        {"bulk": msgspec.to_builtins(replace(BULK, per_token=1e3))},
    ],
)
def test_other_content_is_ignored(
    store: ProfileStore, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    store.path.write_bytes(edited(store.path, **changes))
    with caplog.at_level(logging.WARNING):
        assert store.read() is None
    assert str(store.path) in caplog.text


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_no_damage_is_an_error(tmp_path_factory: Any, junk: bytes, at: int) -> None:
    """Bytes that are cut off or overwritten give a profile that holds here, or none."""
    store = store_in(tmp_path_factory.mktemp("cache"))
    store.write(CostModel(MEASURED, BULK))
    content = store.path.read_bytes()
    for damaged in (content[:at], content[:at] + junk + content[at + len(junk) :], junk):
        store.path.write_bytes(damaged)
        cost = store.read()
        assert cost is None or 0 < cost.work_seconds(64, 2048, 64, 1, 1) < 1000


def test_a_large_file_is_not_read(store: ProfileStore) -> None:
    store.path.write_bytes(store.path.read_bytes() + b" " * MOST_BYTES)
    assert store.read() is None


def test_what_is_no_file_is_ignored(store: ProfileStore) -> None:
    store.path.unlink()
    store.path.mkdir()
    assert store.read() is None
    store.write(CostModel(MEASURED))  # cannot take its place: logged, and nothing else
    assert [file.name for file in store.folder.iterdir()] == [store.path.name]


@pytest.mark.parametrize("name", ["flops", "bytes_per_second", "operation_seconds"])
@pytest.mark.parametrize("factor", [1.1 * SAME_SPEED, 0.9 / SAME_SPEED])
def test_a_machine_of_another_speed_measures_anew(
    store: ProfileStore, tmp_path: Path, name: str, factor: float
) -> None:
    changed: dict[str, float] = {name: getattr(CEILINGS, name) * factor}
    assert store_in(tmp_path, ceilings=replace(CEILINGS, **changed)).read() is None


def test_predictions_far_from_the_roofline_are_ignored(store: ProfileStore) -> None:
    far = CostProfile(*(2 * NEAR_ROOFLINE * unit for unit in (1e-3, 1e-7, 1e-6, 1e-4, 1e-2)))
    store.write(CostModel(far))
    assert store.read() is None


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profiles").write_text("a file in the way")
    store_in(tmp_path).write(CostModel(MEASURED))
    assert "cannot be stored" in caplog.text


def test_the_oldest_profiles_make_room(store: ProfileStore, tmp_path: Path) -> None:
    os.utime(store.path, (1, 1))
    for number in range(MOST_FILES):
        store_in(tmp_path, key={"number": str(number)}).write(CostModel(MEASURED))
    assert len(list(store.folder.iterdir())) == MOST_FILES
    assert not store.path.exists()
