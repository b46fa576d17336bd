"""Rules of the code that no linter knows: CONTRIBUTING.md, "Rules of the code"."""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / "src" / "pla_serve"
MOST_LINES = 60
MOST_PARAMETERS = 8
MOST_FILE_LINES = 450
FOREIGN = {"engine/attention/flashinfer.py:plan"}
"""Signatures of other projects' functions, which ours have to match."""


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def _defined_names(module: ast.Module) -> Iterator[str]:
    """Public classes and type aliases at the top of a module; type variables are no such names."""
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            called = node.value.func if isinstance(node.value, ast.Call) else None
            if name.isupper() or isinstance(called, ast.Name):
                continue
        else:
            continue
        if name[0].isupper():
            yield name


def test_a_public_class_name_means_one_thing() -> None:
    places = defaultdict(list)
    for path, module in _modules():
        for name in _defined_names(module):
            places[name].append(str(path))
    twice = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert not twice, f"rename one of each, see docs/lexicon.md: {twice}"


def test_files_fit_on_a_few_screens() -> None:
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path, _ in _modules()}
    assert not {path: count for path, count in lines.items() if count > MOST_FILE_LINES}


def test_functions_fit_on_a_screen_and_take_few_parameters() -> None:
    too_much = []
    for path, module in _modules():
        if path.name == "kernels.py":
            continue  # a kernel takes pointers, strides and constants one by one
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path}:{node.name}"
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
                if length > MOST_LINES or (len(named) > MOST_PARAMETERS and place not in FOREIGN):
                    too_much.append(f"{place}: {length} lines, {len(named)} parameters")
    assert not too_much, too_much


def _names_from_us(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pla_serve"):
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_benchmarks_import_names_that_exist() -> None:
    """Benchmarks are run by hand, so a renamed class would go unnoticed there."""
    missing = []
    for path in sorted((REPOSITORY / "benchmarks").rglob("*.py")):
        for module, name in _names_from_us(path):
            if module.startswith(("pla_serve.plugins.vllm", "pla_serve.plugins.ray")):
                continue  # they need vLLM and Ray, which live in environments of their own
            found = importlib.import_module(module)
            if not hasattr(found, name) and find_spec(f"{module}.{name}") is None:
                missing.append(f"{path.name}: {module}.{name}")
    assert not missing
