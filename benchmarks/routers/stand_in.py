"""A server whose accelerator is a wait: `pla-serve serve`, all of it but the model's passes.

Each pass takes the seconds that the simulator's machine of that name takes for it, asleep, and its
tokens mean nothing. So many instances can stand side by side on a few cores without slowing each
other down, as they do not on accelerators of their own. API server, scheduler, KV accounts and
prefix cache are the real ones. The scheduler's cost model begins with the machine's coefficients
and fits them as usual.

    python benchmarks/routers/stand_in.py h200-qwen2.5-32b FLAGS OF pla-serve serve
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.build.engine import build_parts
from pla_serve.engine.build.sampling import build_sampling
from pla_serve.engine.build.scheduling import build_scheduling
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.device.marks import HostDevice
from pla_serve.engine.kv.sizing import KVPlan
from pla_serve.engine.loading import NoLoadingProgress, load_config, resolve
from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.engine.requests.admission import RequestLimits
from pla_serve.engine.run.executor import Executed
from pla_serve.engine.run.runner import AtBoundary
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
from pla_serve.simulator.machine import load_machine
from pla_serve.wire.engine import EngineReady, Inbound, Outbound

MACHINE = "PLA_SERVE_STAND_IN"
"""The environment variable by which the engine's process is told the machine."""
LAYER_SECONDS = 0.002
"""Shorter layers are taken together: waking up costs the host something."""


class Waiting:
    """The executor. Time that the host spends between layers is hidden, as on an accelerator."""

    carries = False

    def __init__(self, cost: CostModel, layers: int, vocabulary: int) -> None:
        self.device = HostDevice()
        self._cost = cost
        self._layers = layers
        self._vocabulary = vocabulary
        self._nested = 0.0
        """Seconds of the passes that have run inside the one at hand."""

    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        """See `Executor`."""
        began = time.monotonic()
        outer, self._nested = self._nested, 0.0
        seconds = self._seconds(requests)
        steps = max(1, min(self._layers, round(seconds / LAYER_SECONDS)))
        try:
            for step in range(steps):
                at_boundary()
                due = began + self._nested + seconds * (step + 1) / steps
                time.sleep(max(0.0, due - time.monotonic()))
        finally:
            self._nested = outer + time.monotonic() - began
        rows = sum(request.wants_logits for request in requests)
        logits = torch.zeros(rows, self._vocabulary)
        logits[:, 1] = 1.0
        return Executed(logits, False)

    def _seconds(self, requests: Sequence[SpanRequest]) -> float:
        chunks = (Chunk("", len(request.tokens), request.history) for request in requests)
        return self._cost.seconds(Batch(BatchClass.MIXED, tuple(chunks)))

    def end_warm_up(self) -> None:
        """See `Executor`."""

    def use_idle_time(self) -> bool:
        """See `Executor`."""
        return False

    def counts(self) -> None:
        """See `Executor`."""


class StandInCore:
    """In the place of `pla_serve.engine.build.engine.EngineCore`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        inbox: Callable[[], Iterable[Inbound]],
        emit: Callable[[Outbound], None],
        clock: Callable[[], float],
    ) -> None:
        torch.set_num_threads(1)
        machine = load_machine(os.environ[MACHINE])
        if machine.captured is not None:
            raise ValueError(f"{machine.name} pads batches to shapes, which is not done here")
        source = resolve(config.model, config.load_format, progress=NoLoadingProgress())
        model = load_config(source)
        blocks = machine.kv_tokens // config.block_tokens
        plan = KVPlan(blocks, int(config.short_kv_reserve * blocks), model.max_position_embeddings)
        limits = RequestLimits(plan.max_model_len, model.vocab_size, frozenset(), config.seed)
        cost = CostModel(machine.profile)
        parts = build_parts(
            config,
            plan,
            Waiting(machine.cost, machine.layers, limits.vocab_size),
            build_sampling(source, limits, torch.device("cpu"), time.monotonic),
            build_scheduling(
                config, cost, layers=machine.layers, kv_tokens=blocks * config.block_tokens
            ),
        )
        self._loop = EngineLoop(parts, inbox=inbox, emit=emit, clock=clock)
        emit(
            EngineReady(
                max_model_len=limits.max_model_len,
                kv_tokens=parts.kv.capacity_tokens,
                kv_bytes_per_token=int(machine.kv_bytes_per_token),
                layers=machine.layers,
                vocab_size=limits.vocab_size,
                device=f"stand-in for {machine.name}",
                dtype="none",
                policy=config.policy,
                capabilities=parts.policy.capabilities,
            )
        )

    def step(self) -> float | None:
        """See `EngineLoop.step`."""
        return self._loop.step()


def main() -> None:
    """`pla-serve serve` with this engine."""
    from pla_serve import cli
    from pla_serve.server import command

    os.environ[MACHINE] = sys.argv.pop(1)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    command.start = partial(command.start, engine="stand_in:StandInCore")  # type: ignore[assignment]
    sys.exit(cli.main(["serve", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
