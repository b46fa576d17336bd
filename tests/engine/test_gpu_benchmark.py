"""The GPU benchmark runs to its end on a CPU, so that nothing but the kernels is new on a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NO_RESULTS = shutil.ignore_patterns("results", ".carried", "__pycache__")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_it_runs_to_its_end(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = json.loads(result.read_text())["parts"]
    assert not [part for part in parts.values() if part["status"].startswith("failed")]
    assert parts["correctness"]["failed"] == []
    assert parts["correctness"]["cases"] > 10
    assert parts["model 7B"]["fused"] == 3
    assert parts["shapes 7B"]["capture"]["shapes"] == 3
    for name in ("preemption", "decode", "axes", "leak", "piecewise"):
        assert parts[name]["status"] == "complete" or parts[name]["status"].startswith("cut")


def test_a_part_that_fails_or_overruns_does_not_take_the_others_along(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
from gpu_parts.report import Report
from pathlib import Path
report = Report(Path({str(tmp_path / "r.json")!r}), time.monotonic() + 1000, {{"parts": {{}}}})
report.run("bad", 5, lambda: 1 / 0)
report.run("slow", -1, report.check)
report.run("good", 5, lambda: report.save("x", 1))
report.deadline = 0
report.run("late", 5, lambda: report.save("x", 1))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    parts = json.loads((tmp_path / "r.json").read_text())["parts"]
    assert parts["bad"]["status"].startswith("failed: ZeroDivisionError")
    assert parts["slow"]["status"].startswith("cut after")
    assert (parts["good"]["status"], parts["good"]["x"]) == ("complete", 1)
    assert parts["late"]["status"].startswith("not run")


def needed_by(*names: str) -> set[str]:
    """These distributions, and all that they require without extras."""
    found: set[str] = set()
    queue = [canonicalize_name(name) for name in names]
    while queue:
        name = queue.pop()
        try:
            requires = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in requires:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(canonicalize_name(requirement.name))
        queue = [name for name in queue if name not in found]
    return found


def link(folder: Path, distributions: set[str]) -> None:
    """Make the modules and the metadata of these distributions importable from ``folder``."""
    folder.mkdir(exist_ok=True)
    for name in distributions:
        distribution = metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in distribution.files or ()}:
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists():
                (folder / top).unlink(missing_ok=True)
                (folder / top).symlink_to(source)


def pack(folder: Path, wheel: Path) -> None:
    """Write an archive of what is in ``folder``, as wheels are."""
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for parent, _, names in os.walk(folder, followlinks=True):
            for name in names:
                path = Path(parent, name)
                archive.write(path, path.relative_to(folder))


def test_an_image_with_torch_and_transformers_is_enough(tmp_path: Path) -> None:
    """What it lacks is named in a line; carried along, the benchmark runs."""
    image = tmp_path / "image"
    link(image, needed_by("torch", "transformers", "triton"))
    project = tmp_path / "project"
    root = SCRIPT.parents[1]
    shutil.copytree(root / "benchmarks", project / "benchmarks", ignore=NO_RESULTS)
    (project / "src").symlink_to(root / "src")
    command = [sys.executable, "-S", str(project / "benchmarks" / "gpu.py")]
    command += ["--device", "cpu", "--tiny", "--only", "model 7B", "-o", str(tmp_path / "r.json")]
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(image), "HOME": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env=environment
        )

    bare = run()
    assert bare.returncode == 2, bare.stdout + bare.stderr
    assert "missing: msgspec, zmq" in bare.stderr
    assert "--carry 3." in bare.stderr
    carried = {"msgspec", "pyzmq", "psutil", "rich", "pygments", "markdown-it-py", "mdurl"}
    link(tmp_path / "carried", carried | {"scipy", "gguf"})
    pack(tmp_path / "carried", project / "benchmarks" / ".carried" / "all.whl")
    done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "FlashInfer is missing" in done.stderr


def test_batches_are_counted_however_the_policy_hears_of_them() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from gpu_parts.serving import Observed
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
class Policy:
    def __init__(self): self.heard = []
    def observe(self, *args): self.heard.append(("observe", *args))
    def dispatched(self, *args): self.heard.append(("dispatched", *args))
    def measured(self, *args): self.heard.append(("measured", *args))
policy = Policy()
observed = Observed(policy)
batch = Batch(BatchClass.SHORT, (Chunk("a", 5, 0),))
observed.observe(batch, 1.0, 2.0)
observed.dispatched(batch, 3.0)
observed.measured(batch, 0.5, 4.0)
assert observed.seconds[BatchClass.SHORT] == 1.5 and observed.batches[BatchClass.SHORT] == 2
assert [name for name, *_ in policy.heard] == ["observe", "dispatched", "measured"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
