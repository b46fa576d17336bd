"""These run where the agents are installed (`make test-agents`)."""

from pathlib import Path

if not (Path(__file__).parent / "node_modules").exists():
    collect_ignore_glob = ["test_*.py"]
