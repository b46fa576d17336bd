"""Measurements on an idle server before the load: warm-up, costs, idle TTFT."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pla_serve.bench.client import RequestTarget, TimedRequest, one
from pla_serve.bench.report import Percentiles, percentiles
from pla_serve.bench.text import Filler, FillerPart, WordFiller, calibrated
from pla_serve.bench.transport import RequestTransport
from pla_serve.bench.workload import BenchWorkload

WARM_UP_TOKENS = (16, 64, 256, 1024, 2048, 64, 256)
PREFILL_TOKENS = (32, 128, 512, 1024, 2048, 4096)
DECODERS = 8
"""Number of sequences that decode together while the cost of a token is measured."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that prefill and decode take on this server when nothing else runs."""

    prefill: tuple[tuple[int, float], ...]
    """New tokens and the seconds to the first token, from small to large."""
    decode_token: float
    """Seconds for one output token: the time of a step of `DECODERS` sequences, divided by
    `DECODERS`."""

    def seconds(self, new_tokens: int, output_tokens: int) -> float:
        """Return the service time of one request.

        Prefill is interpolated between the samples; beyond them it is extrapolated from the last
        two.
        """
        sizes, times = zip(*self.prefill, strict=True)
        if new_tokens <= sizes[-1]:
            prefill = float(np.interp(new_tokens, sizes, times))
        else:
            slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
            prefill = times[-1] + slope * (new_tokens - sizes[-1])
        return prefill + output_tokens * self.decode_token

    def capacity(self, workload: BenchWorkload) -> float:
        """Return the requests a second that keep the server busy all the time.

        Load is defined by this: offered load = rate / capacity, which is the mean service time of
        a request times the arrival rate.
        """
        total = sum(self.seconds(turn.new_tokens, turn.max_tokens) for turn in workload.turns)
        return workload.requests / total


@dataclass(frozen=True, slots=True)
class Probe:
    """Sends single requests, each with a text of its own.

    ``name`` goes into every text, so that two probes share no prefix.
    """

    transport: RequestTransport
    target: RequestTarget
    filler: Filler
    name: str
    ids: bool = False

    async def ask(self, key: str, tokens: int, answer: int) -> TimedRequest:
        pieces = (FillerPart(f"{self.name}/{key}", tokens),)
        if self.ids:
            return await one(self.transport, self.target, self.filler.ids(pieces), answer)
        text = self.filler.words(pieces)
        chat = self.target.endpoint == "chat"
        prompt = [{"role": "user", "content": text}] if chat else text
        return await one(self.transport, self.target, prompt, answer)

    async def together(self, key: str, count: int, tokens: int, answer: int) -> list[TimedRequest]:
        asked = (self.ask(f"{key}.{i}", tokens, answer) for i in range(count))
        return list(await asyncio.gather(*asked))


async def warm_up(probe: Probe, longest: int) -> None:
    """Send the same few requests to every server: each size once, then several together.

    This fills allocators and caches of compiled kernels, and a policy that fits its cost model
    while it serves gets samples.
    """
    for number, tokens in enumerate(WARM_UP_TOKENS):
        if tokens <= longest:
            await probe.ask(f"warm{number}", tokens, 4)
    await probe.together("warm", DECODERS, 32, 16)


async def measure_costs(probe: Probe, longest: int, repeat: int = 2) -> Costs:
    """Measure prompts alone, one after another, then sequences that decode together.

    A prompt of each size is sent ``repeat`` times, and the shortest time counts.
    """
    sizes = sorted({min(tokens, longest) for tokens in PREFILL_TOKENS})
    sizes = sizes if len(sizes) > 1 else [max(1, sizes[0] // 2), sizes[0] + 1]
    prefill = []
    for tokens in sizes:
        answers = [await probe.ask(f"cost{tokens}.{i}", tokens, 1) for i in range(repeat)]
        prefill.append((tokens, min(_ttft(answer) for answer in answers)))
    decoders = await probe.together("decode", DECODERS, 32, 48)
    gaps = [gap for answer in decoders for gap in answer.gaps]
    return Costs(tuple(prefill), statistics.median(gaps) / DECODERS if gaps else 0.0)


async def idle_ttft(probe: Probe, sizes: Sequence[int]) -> Percentiles | None:
    """Measure the TTFT of prompts of these sizes, sent one at a time; None for no sizes."""
    return percentiles(
        [_ttft(await probe.ask(f"idle{i}", tokens, 1)) for i, tokens in enumerate(sizes)]
    )


async def sized_by_server(probe: Probe, filler: WordFiller) -> WordFiller:
    """Return the filler with the number of tokens that one of its words has on this server.

    Two texts of different lengths are sent, so that the tokens of a chat template cancel out. The
    filler is returned unchanged if the server reports no usage.
    """
    few, many = 100, 500
    counts = [(await probe.ask(f"size{n}", n, 1)).prompt_tokens for n in (few, many)]
    if counts[0] is None or counts[1] is None:
        return filler
    return calibrated(filler, many - few, counts[1] - counts[0])


def _ttft(answer: TimedRequest) -> float:
    if answer.first is None or answer.sent is None:
        raise RuntimeError("an answer without a first token cannot be timed")
    return answer.first - answer.sent
