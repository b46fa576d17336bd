"""The switch: ``--distributed-executor-backend pla_serve.plugins.vllm.PreemptibleExecutor``."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from pla_serve.plugins.vllm.preemption.nesting import Nesting, attention_layers
from pla_serve.plugins.vllm.preemption.refusals import why_not
from pla_serve.plugins.vllm.scheduler import LengthAwareScheduler

logger = init_logger("vllm.pla_serve")


class PreemptibleExecutor(UniProcExecutor):
    """Runs the model in the engine's process, where a step can look for new requests.

    Where steps cannot be left, it is vLLM's own executor, and the log names the reason.

    Raises:
        ValueError: the model is to be divided among several processes.
    """

    def _init_executor(self) -> None:
        parallel = self.vllm_config.parallel_config
        if parallel.world_size > 1:
            raise ValueError(
                "PreemptibleExecutor runs one process, and tensor or pipeline parallelism needs "
                f"{parallel.world_size}. Start without --distributed-executor-backend"
            )
        self._nesting: Nesting | None = None
        self._attached = False
        announce_engines()
        super()._init_executor()

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Return False: a nested step needs the tokens of the step before it."""
        return False

    def attach(self, engine: EngineCore) -> None:
        """Learn which engine steps this executor; `EngineCore.step` calls it before each step."""
        if self._attached:
            return
        self._attached = True
        runner = self.driver_worker.worker.model_runner
        reason = why_not(self.vllm_config) or _problem_of(engine, runner)
        if reason is not None:
            logger.warning("Long steps are not left between layers: not with %s", reason)
            return
        self._nesting = Nesting(engine, runner)
        engine.scheduler.leave_between_layers()
        logger.info("Long steps are left between layers for short prefills and decode steps")

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        nesting = self._nesting
        if nesting is None or not nesting.may_leave(scheduler_output):
            return super().execute_model(scheduler_output, non_block)
        with nesting.within(scheduler_output):
            return super().execute_model(scheduler_output, non_block)


def announce_engines() -> None:
    """Make each engine of this process tell its executor of itself.

    vLLM gives an executor no way to its engine: neither to the requests that come nor to the
    scheduler. So `EngineCore.step` is wrapped, once.
    """
    step = EngineCore.step
    if hasattr(step, "__wrapped__"):
        return

    @wraps(step)
    def announced(engine: EngineCore) -> Any:
        if isinstance(engine.model_executor, PreemptibleExecutor):
            engine.model_executor.attach(engine)
        return step(engine)

    EngineCore.step = announced


def _problem_of(engine: EngineCore, runner: Any) -> str | None:
    for layer in attention_layers(runner):
        if type(layer) is not Attention:
            return f"attention layers of another kind ({type(layer).__name__})"
    if not isinstance(engine.scheduler, LengthAwareScheduler):
        return "another scheduler (--scheduler-cls pla_serve.plugins.vllm.LengthAwareScheduler)"
    if not isinstance(engine, EngineCoreProc):
        return "an engine in its caller's own process (VLLM_ENABLE_V1_MULTIPROCESSING=1)"
    if isinstance(engine, DPEngineCoreProc):
        return "data parallelism"
    return None
