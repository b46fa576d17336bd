"""Measures a running server of this project and makes a machine profile for the simulator.

The server fits its cost model to every batch that it runs. Ordinary traffic cannot tell some
coefficients apart, because their features always grow together, for example the number of launches
and the number of sequences. So an idle server gets requests in which each feature varies on its
own: new tokens, history, sequences in a batch, and decode steps on contexts of several lengths.
Then the fitted coefficients are read from ``/metrics``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from pla_serve.bench.calibrate import Probe
from pla_serve.bench.client import TimedRequest, one
from pla_serve.bench.text import FillerPart
from pla_serve.policy.cost import CostProfile
from pla_serve.simulator.machine import Machine, UnitSeconds

ALONE = (16, 64, 256, 512, 1024, 2048, 4096)
"""New tokens of prompts sent one at a time, without history."""
HISTORIES = (512, 2048, 6144)
NEW = (16, 128, 512)
"""New tokens of prompts with a history, and of prompts that are sent together."""
MOST_TOGETHER = 1024
"""Most new tokens of all prompts that are sent together."""
TOGETHER = (2, 4, 8, 16)
"""Numbers of requests that are sent at the same moment."""
CONTEXTS = (32, 1024, 4096)
STEPS = 12
"""Tokens of each answer while decoding is measured."""
MOST_CONTEXT = 8192
"""Most tokens of all contexts that decode together."""
SETTLE_STEPS = 300
"""Decode steps at the end: more than the cost model lets pass between two fits
(`policy.cost.REFIT_EVERY`), so that the last fit uses all samples."""
ROUNDS = 2

MetricSamples = dict[tuple[str, str], float]
"""Samples by the name of a metric and its label ``per``, which is empty where there is none."""
Tell = Callable[[str], None]


class ProfileError(RuntimeError):
    """The server cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Speed of KV transfers between two instances, which one server alone cannot measure."""

    bytes_per_second: float
    seconds: float


async def drive(probe: Probe, longest: int, tell: Tell) -> None:
    """Send all kinds of requests, ROUNDS times, then enough decode steps for a last fit.

    Args:
        probe: sends token ids, so that sizes are exact.
        longest: most tokens of a prompt together with its answer.

    Raises:
        ProfileError: the server has no prefix cache.
    """
    for number in range(ROUNDS):
        tell(f"round {number + 1} of {ROUNDS}: decoding")
        await _decode(probe, f"{number}", longest)
        tell(f"round {number + 1} of {ROUNDS}: prompts alone")
        for tokens in (size for size in ALONE if size < longest):
            await probe.ask(f"{number}/alone{tokens}", tokens, 1)
        tell(f"round {number + 1} of {ROUNDS}: prompts with history")
        await _with_history(probe, f"{number}", longest)
        tell(f"round {number + 1} of {ROUNDS}: prompts together")
        for count in TOGETHER:
            for tokens in (
                size for size in NEW if size < longest and size * count <= MOST_TOGETHER
            ):
                await probe.together(f"{number}/batch{tokens}x{count}", count, tokens, 1)
    tell("a last fit")
    await probe.ask("settle", 16, min(SETTLE_STEPS, longest - 17))


async def _decode(probe: Probe, key: str, longest: int) -> None:
    for context in (size for size in CONTEXTS if size + 16 + STEPS < longest):
        for count in (1, *TOGETHER):
            if context * count <= MOST_CONTEXT:
                await asyncio.gather(
                    *(_on_context(probe, context, i, f"{key}.{count}") for i in range(count))
                )


async def _on_context(probe: Probe, context: int, place: int, key: str) -> None:
    """Decode a few tokens on a context that is prefilled only the first time."""
    begun = FillerPart(f"{probe.name}/context{context}.{place}", context)
    more = FillerPart(f"{begun.key}/{key}", 16)
    await _ids(probe, (begun, more), STEPS)


async def _with_history(probe: Probe, key: str, longest: int) -> None:
    for history in HISTORIES:
        begun = FillerPart(f"{probe.name}/history{history}", history)
        for tokens in NEW:
            if history + tokens >= longest:
                continue
            await _ids(probe, (begun,), 1)
            more = FillerPart(f"{begun.key}/{key}.{tokens}", tokens)
            again = await _ids(probe, (begun, more), 1)
            if again.cached_tokens == 0:
                raise ProfileError(
                    "the server found nothing in its prefix cache, so histories cannot be "
                    "measured; start it without --no-prefix-cache and with more KV memory"
                )


async def _ids(probe: Probe, pieces: tuple[FillerPart, ...], answer: int) -> TimedRequest:
    return await one(probe.transport, probe.target, probe.filler.ids(pieces), answer)


async def wait_idle(read: Callable[[], MetricSamples], patience: float = 10.0) -> None:
    """Return as soon as the server has nothing to do.

    Raises:
        ProfileError: the server is still busy after ``patience`` seconds.
    """
    for _ in range(max(1, round(patience / 0.5))):
        found = read()
        if not any(found.get((f"vllm:num_requests_{what}", ""), 0) for what in _BUSY):
            return
        await asyncio.sleep(0.5)
    raise ProfileError("the server serves others; measure it while it is idle")


_BUSY = ("running", "waiting")


def machine_of(metrics: MetricSamples, name: str, source: str, transfer: Transfer) -> Machine:
    """Make the machine profile from the metrics of a server that `drive` has driven.

    Raises:
        ProfileError: a metric is missing, as with servers of another kind or version.
    """

    def metric(key: str, per: str = "") -> float:
        value = metrics.get((f"pla_serve:{key}", per))
        if value is None:
            raise ProfileError(
                f"/metrics has no pla_serve:{key}{f' per {per}' if per else ''}; "
                "only a pla-serve server of this version can be measured"
            )
        return value

    units = {field: field.removeprefix("per_") for field in CostProfile.__slots__}
    error = metric("cost_model_error")
    return Machine(
        name=name,
        source=f"{source}; median error of the last predictions {error:.1%}; transfers assumed",
        layers=round(metric("layers")),
        kv_tokens=round(metric("kv_tokens")),
        kv_bytes_per_token=metric("kv_bytes_per_token"),
        transfer_bytes_per_second=transfer.bytes_per_second,
        transfer_seconds=transfer.seconds,
        seconds=UnitSeconds(
            **{field: metric("cost_seconds", unit) for field, unit in units.items()}
        ),
    )
