"""Runs express steps of the scheduler at the layer boundaries of a long step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreRequestType

from pla_serve.plugins.vllm.preemption.pace import DeviceEvent, HostPace
from pla_serve.plugins.vllm.preemption.twin import empty, make_twin

EXPRESS_MESSAGES = (EngineCoreRequestType.ADD, EngineCoreRequestType.ABORT)
"""Messages of clients that are taken at a layer boundary. Others change the engine as a whole
(caches, pauses, weights); they wait for the end of the step, and what came after them, too."""


class Nesting:
    """Asked at each layer boundary of the outer step; runs nested steps there.

    A boundary is where a layer's attention begins: Python runs there whether the model is compiled
    or not. Everything happens on the engine's own thread, in the order in which vLLM would do it:
    messages, schedule, execute, sample, update, outputs.

    Args:
        engine: vLLM's ``EngineCoreProc``, whose scheduler is a `LengthAwareScheduler`.
        runner: the model runner of its worker.
    """

    def __init__(self, engine: Any, runner: Any) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._twin = make_twin(runner)
        self._outer: SchedulerOutput | None = None
        self._futile = False
        """The last nested step had no room for what waits."""
        self._run_ahead = HostPace(_event_maker(runner.device))
        for layer in attention_layers(runner):
            layer.impl.forward = self._before(layer.impl.forward)

    def may_leave(self, output: SchedulerOutput) -> bool:
        """Whether the step ``output`` is one that express work is worth leaving."""
        return self._scheduler.may_leave(output)

    @contextmanager
    def within(self, output: SchedulerOutput) -> Iterator[None]:
        """Leave the step ``output`` at its layer boundaries while the context lasts."""
        empty(self._twin)
        self._outer, self._futile = output, False
        self._scheduler.enter(output)
        try:
            yield
        finally:
            self._outer = None
            self._run_ahead.end()

    def _before(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def at_boundary_first(*args: Any, **kwargs: Any) -> Any:
            if self._outer is not None:
                self._at_boundary(self._outer)
            return forward(*args, **kwargs)

        return at_boundary_first

    def _at_boundary(self, outer: SchedulerOutput) -> None:
        self._run_ahead.pace()
        self._take_messages(outer)
        if self._futile:
            return
        output = self._scheduler.schedule_nested()
        if output is None:
            return
        self._futile = not output.num_scheduled_tokens
        self._outer = None
        try:
            self._run(output)
        finally:
            self._outer = outer

    def _run(self, output: SchedulerOutput) -> None:
        """Run a nested step, and send its tokens."""
        engine, scheduler, twin = self._engine, self._scheduler, self._twin
        result = twin.execute_model(output)
        if result is None:
            result = twin.sample_tokens(scheduler.get_grammar_bitmask(output))
        outputs = scheduler.update_from_output(output, result)
        engine._attach_weight_version(outputs)
        for item in outputs.items():
            engine.output_queue.put_nowait(item)

    def _take_messages(self, outer: SchedulerOutput) -> None:
        """Take requests and aborts that have come; aborts of the outer step's wait for its end."""
        messages, outer_ids = self._engine.input_queue, outer.num_scheduled_tokens
        while messages.queue and messages.queue[0][0] in EXPRESS_MESSAGES:
            kind, content = messages.queue[0]
            if kind == EngineCoreRequestType.ADD and content[0].request_id in outer_ids:
                return  # more input for a session that is under way
            messages.get_nowait()
            if kind == EngineCoreRequestType.ABORT:
                ids = [content] if isinstance(content, str) else list(content)
                later = [name for name in ids if name in outer_ids]
                content = [name for name in ids if name not in outer_ids]
                if later:
                    self._engine.aborts_queue.put_nowait(later)
            self._futile = False
            self._engine._handle_client_request(kind, content)


def attention_layers(runner: Any) -> list[Any]:
    """Return the attention layers of a model, in whose ``impl.forward`` a boundary lies."""
    layers = runner.compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, AttentionLayerBase)]


def _event_maker(device: torch.device) -> Callable[[], DeviceEvent] | None:
    if device.type == "cpu":
        return None
    return lambda: torch.Event(device)
