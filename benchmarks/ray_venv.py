"""Makes a virtual environment with Ray Serve, which also sees this project's packages.

Ray is not among the packages for development: it is large, and its own pins would bind the rest.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

RAY = "2.60.0"
ROOT = Path(__file__).resolve().parents[1]


def prepare(folder: Path) -> Path:
    """Return the environment's Python; make the environment if it is not there.

    Packages of the environment that runs this are seen, and never changed: pip installs what is
    missing there into ``folder``.

    Raises:
        subprocess.CalledProcessError: pip failed; standard error says why.
    """
    python = folder / "bin" / "python"
    if python.exists() and _works(python):
        return python
    print(f"installing ray[serve] {RAY} into {folder} (about 300 MB)", flush=True)
    venv.create(folder, with_pip=False)
    here = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    seen = [ROOT / "src", sysconfig.get_path("purelib")]
    (here / "packages-of-the-project.pth").write_text("".join(f"{path}\n" for path in seen))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", f"ray[serve]=={RAY}"], check=True)
    return python


def _works(python: Path) -> bool:
    check = [str(python), "-c", "import ray.serve, pla_serve.plugins.ray, pytest"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-ray")))
