"""Every kernel compiles for the GPU that it is meant for, and the large ones use its units."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HOPPER_SHARED_BYTES = 227 * 1024


def test_all_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == 9
    assert all(one["shared"] <= HOPPER_SHARED_BYTES for one in built)
    assert all(one["spilled_bytes"] == 0 for one in built)
    few, some, many, _ = (one for one in built if one["kernel"] == "attend_kernel")
    assert some["wgmma"]
    assert many["wgmma"]
    assert all(one["async_copies"] for one in (few, some, many)), "loads are not pipelined"
    # In each of the two loops, one tile is computed while the next one is being loaded.
    assert all(sum(wait > 0 for wait in one["waits"]) >= 4 for one in (few, some, many))
