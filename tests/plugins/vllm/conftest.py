"""These run where vLLM is: in an environment of its own (`make test-vllm`)."""

from importlib.util import find_spec

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
