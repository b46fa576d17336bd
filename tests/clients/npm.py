"""Packages from npm, installed once into the user's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

SECONDS = 300
"""How long an installation may take."""


def installed(**packages: str) -> Path:
    """Return a folder whose ``node_modules`` has these packages.

    Skips the test where npm is missing or cannot fetch them; there is no other way to have these
    clients.

    Args:
        packages: versions by name; for names that are no Python names, pass a dict with ``**``.
    """
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed here, and this client comes from npm only")
    wanted = "+".join(f"{name}@{version}" for name, version in packages.items())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pla-serve" / "npm"
    folder = cache / wanted.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            manifest = {"private": True, "type": "module", "dependencies": packages}
            (folder / "package.json").write_text(json.dumps(manifest))
            command = [npm, "install", "--no-audit", "--no-fund"]
            try:
                subprocess.run(
                    command, cwd=folder, check=True, capture_output=True, timeout=SECONDS
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                said = (error.stderr or b"").decode(errors="replace")[-500:]
                pytest.skip(f"npm could not fetch {wanted}: {said or error}")
            (folder / "done").touch()
    return folder
