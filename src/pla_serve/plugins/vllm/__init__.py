"""Length-aware prefill scheduling for vLLM.

    vllm serve MODEL --scheduler-cls pla_serve.plugins.vllm.LengthAwareScheduler

Importing this raises `ImportError` if vLLM is missing or of a version that it was not made for.
"""

from pla_serve.plugins.vllm.versions import check_version

check_version()

from pla_serve.plugins.vllm.scheduler import LengthAwareScheduler  # noqa: E402

__all__ = ["LengthAwareScheduler"]
