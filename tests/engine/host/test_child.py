"""Private folders: nobody else reads them, and those of killed processes are removed."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from pla_serve.engine.child import LOCK, PrivateFolder, remove_leftovers

OWNER = """
import sys
from pathlib import Path
from pla_serve.engine.child import PrivateFolder

folder = PrivateFolder(Path(sys.argv[1]))
(folder.path / "socket").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_private_and_short_lived(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    remove_leftovers(tmp_path)  # its owner lives
    assert folder.path.exists()
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_killed_process_is_removed_at_the_next_start(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        other = PrivateFolder(tmp_path)
        assert left.exists(), "its owner still lived"
        owner.kill()
    another = PrivateFolder(tmp_path)
    assert not left.exists()
    assert other.path.exists()
    other.remove()
    another.remove()


def test_what_is_not_a_private_folder_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    parent = tmp_path / "temporary"
    parent.mkdir()
    (parent / "pla-serve-link").symlink_to(elsewhere)
    (parent / "pla-serve-file").touch()
    (parent / "pla-serve-without-lock").mkdir()
    (parent / "other").mkdir()
    remove_leftovers(parent)
    assert len(list(parent.iterdir())) == 4
    assert (elsewhere / LOCK).exists()
