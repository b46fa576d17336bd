"""Length-aware prefill scheduling for vLLM.

    vllm serve MODEL --scheduler-cls pla_serve.plugins.vllm.LengthAwareScheduler
    vllm serve MODEL --scheduler-cls pla_serve.plugins.vllm.LengthAwareScheduler \\
      --distributed-executor-backend pla_serve.plugins.vllm.PreemptibleExecutor

Importing this raises `ImportError` if vLLM is missing or of a version that it was not made for.
"""

from typing import Any

from pla_serve.plugins.vllm.versions import check_version

check_version()

from pla_serve.plugins.vllm.scheduler import LengthAwareScheduler  # noqa: E402

__all__ = ["LengthAwareScheduler"]


def __getattr__(name: str) -> Any:
    """Import the executor when it is asked for: it needs more of vLLM than the scheduler does."""
    if name != "PreemptibleExecutor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pla_serve.plugins.vllm.preemption.executor import PreemptibleExecutor

    return PreemptibleExecutor
