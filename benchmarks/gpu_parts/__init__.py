"""The parts of ``benchmarks/gpu.py``.

A machine for measurements may have neither the project installed nor the packages that only
serving needs: this makes ``src`` importable, and grammars, which are not measured, do without
llguidance.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[2]

if find_spec("pla_serve") is None:
    sys.path.insert(0, str(ROOT / "src"))
if find_spec("llguidance") is None:
    for missing in ("llguidance", "llguidance.hf", "llguidance.numpy"):
        sys.modules[missing] = MagicMock(spec=ModuleType)
        sys.modules[missing].LLParserLimits = MagicMock()  # type: ignore[attr-defined]
