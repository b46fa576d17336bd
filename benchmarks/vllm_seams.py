"""Shows what a release of vLLM breaks in the plugin, within a minute, without its compiled code.

    python benchmarks/vllm_seams.py 0.33.0

pip downloads the release's wheel (about 340 MB), of which only the Python files are kept. They go
before those of the environment of `make test-vllm`, which has every package that vLLM needs, and
the tests of the plugin's seams run on the release's own scheduler, queue and KV blocks, with no
model. So packages are those of that environment, and nothing is run on a device.

It prints the methods that the plugin overrides or calls whose arguments are other ones than in
that environment, then what pytest says. The exit status is 0 if all tests pass, 1 if not, and 2 if
the release could not be tried.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile, ZipFile

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CACHE = ROOT / ".vllm-releases"

TESTS = tuple(f"tests/plugins/vllm/test_{name}.py" for name in ("queue", "scheduler", "metrics"))
SEAMS: Mapping[str, tuple[str, ...]] = {
    "v1/core/sched/scheduler.py": (
        "Scheduler.schedule",
        "Scheduler.update_from_output",
        "Scheduler.make_stats",
        "Scheduler._reserve_prefill_lookahead",
        "Scheduler._preempt_request",
        "Scheduler._free_request",
        "Scheduler._get_local_prefix_cache_hit",
    ),
    "v1/core/sched/request_queue.py": (
        "RequestQueue.add_request",
        "RequestQueue.pop_request",
        "RequestQueue.peek_request",
        "RequestQueue.prepend_request",
        "RequestQueue.prepend_requests",
        "RequestQueue.remove_request",
        "RequestQueue.remove_requests",
    ),
    "v1/core/kv_cache_manager.py": (
        "KVCacheManager.get_computed_blocks",
        "KVCacheManager.get_block_ids",
    ),
    "v1/engine/core.py": (
        "EngineCore.step",
        "EngineCore._attach_weight_version",
        "EngineCoreProc._handle_client_request",
    ),
    "v1/executor/uniproc_executor.py": (
        "UniProcExecutor._init_executor",
        "UniProcExecutor.execute_model",
    ),
    "v1/worker/gpu_model_runner.py": (
        "GPUModelRunner.execute_model",
        "GPUModelRunner.sample_tokens",
        "GPUModelRunner.may_reinitialize_input_batch",
        "GPUModelRunner.initialize_metadata_builders",
    ),
}
"""It lists the methods of vLLM that `plugins.vllm` overrides or calls, by file."""

DOWNLOAD_SECONDS, TEST_SECONDS = 300, 300
MOST_FILES, MOST_BYTES = 20_000, 500_000_000
"""They bound what is unpacked: 0.33.0 has 3,900 Python files of 53 MB together."""
_VERSION = re.compile(r"\d+(\.\d+){1,3}((rc|\.post)\d+)?")


def fetch(version: str, cache: Path) -> Path:
    """Return a folder with the Python files of ``vllm==version``, downloaded unless it is there.

    Raises:
        ValueError: ``version`` is not a release's number, or pip's wheel is not as expected.
        RuntimeError: pip failed or took longer than `DOWNLOAD_SECONDS`; the message has its words.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is not a version; give one as in 0.33.0")
    folder = cache / version
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        wheels, files = Path(temporary, "wheels"), Path(temporary, "files")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        download += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(wheels)]
        try:
            done = subprocess.run(
                [*download, f"vllm=={version}"],
                capture_output=True,
                text=True,
                check=False,
                timeout=DOWNLOAD_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"pip took longer than {DOWNLOAD_SECONDS} s") from None
        if done.returncode:
            raise RuntimeError(f"pip has no wheel of vllm {version}:\n{done.stderr[-2000:]}")
        unpack(next(wheels.glob("*.whl")), files)
        # Only a complete folder gets the name that the next run looks for.
        files.rename(folder)
    return folder


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the Python files of the package ``vllm``.

    The wheel's metadata are left out, so that `importlib.metadata` keeps naming the version of the
    environment, which the plugin takes.

    Raises:
        ValueError: it has none, too many, too large ones, or ones that lie outside of ``vllm``.
    """
    try:
        with ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".py")]
            members = [m for m in members if m.filename.startswith("vllm/")]
            if not members:
                raise ValueError(f"{wheel.name} has no Python files of vllm")
            if len(members) > MOST_FILES or sum(m.file_size for m in members) > MOST_BYTES:
                raise ValueError(
                    f"{wheel.name} has more than {MOST_FILES} Python files or {MOST_BYTES} bytes "
                    "of them"
                )
            if any(".." in Path(m.filename).parts for m in members):
                raise ValueError(f"{wheel.name} has files that lie outside of its folder")
            for member in members:
                archive.extract(member, folder)
    except BadZipFile as error:
        raise ValueError(f"{wheel.name} is damaged: {error}") from None


def arguments(package: Path, file: str, method: str) -> str | None:
    """Return the arguments of a method in vLLM's source, as written; None if it is not there."""
    path = package / file
    if not path.is_file():
        return None
    name, _, function = method.partition(".")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == function:
                    return ast.unparse(part.args)
    return None


def changes(known: Path, release: Path) -> list[str]:
    """Compare the seams of two folders of the package ``vllm``; a line for each that differs."""
    found = []
    for file, methods in SEAMS.items():
        for method in methods:
            before, after = arguments(known, file, method), arguments(release, file, method)
            if after is None and before is not None:
                found.append(f"{method} is not in {file} any more")
            elif before != after:
                found.append(f"{method} takes ({after}), where it took ({before})")
    return found


def installed(python: Path) -> Path:
    """Return the folder of the package ``vllm`` in an environment.

    Raises:
        RuntimeError: there is none.
    """
    code = (
        "from importlib.util import find_spec as f; print(f('vllm').submodule_search_locations[0])"
    )
    if python.exists():
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        if not done.returncode:
            return Path(done.stdout.strip())
    raise RuntimeError(f"{python} has no vLLM; `make test-vllm` makes such an environment")


def run_tests(python: Path, release: Path, *options: str) -> int:
    """Run the tests of the seams with a release's Python files; return pytest's exit status.

    Raises:
        RuntimeError: they took longer than `TEST_SECONDS`.
    """
    path = os.pathsep.join([str(release), str(ROOT / "src"), str(ROOT)])
    command = [str(python), "-m", "pytest", "--tb=short", "-o", "filterwarnings=default"]
    command += ["--disable-warnings", "-p", "no:cacheprovider", *TESTS, *options]
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            command, cwd=ROOT, env=environment, check=False, timeout=TEST_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the tests took longer than {TEST_SECONDS} s") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("version", help="of vLLM, as in 0.33.0")
    parser.add_argument("--python", type=Path, default=PYTHON, help="of `make test-vllm`")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for Python files")
    options = parser.parse_args()
    try:
        known = installed(options.python)
        release = fetch(options.version, options.cache.resolve())
        differences = changes(known, release / "vllm")
        print(f"vLLM {options.version}: {len(differences)} seams with other arguments", flush=True)
        for line in differences:
            print(f"  {line}", flush=True)
        return 1 if run_tests(options.python, release) else 0
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
