"""Deadlines of tokens, and the cheapest way to keep them while long prefills run.

Token i of a request is due at its first token's deadline plus i times its TPOT target (PolyServe,
arXiv 2507.17769). The policy holds a stream to a little more: each token is due one target after
the one before it. So the deadlines are kept, and what a stream is ahead of them buys no pause.

While a long prefill runs, there are two ways to keep them:

- *Ride*: streams are in the chunks of the long, which are cut so that each ends when a token is
  due. Each chunk costs what a launch adds to a batch of many tokens, and the history of the long is
  read again. Whoever rides is held until the chunk ends.
- *Step*: chunks stay long, and decode steps of their own run at layer boundaries. Each costs the
  launch of a small batch, which is the reading of all weights.

Where reading weights hides behind the arithmetic of a chunk, as on a CPU, riding costs little.
Where it does not, or the history is long, a step costs no more and holds nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2

from pla_serve.policy.chunking import efficient_chunk, timed_chunk
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.decodes import DecodePool
from pla_serve.policy.tuning import Tuning

COARSE = 8
"""Targets are rounded down to powers of 2^(1/8), by at most a twelfth, so that there are few."""


def coarse(target: float | None) -> float | None:
    """Return a TPOT target rounded down to the next power of 2^(1/COARSE), in seconds.

    None, which is no target, stays None.
    """
    if target is None:
        return None
    return float(2.0 ** (floor(log2(target) * COARSE) / COARSE))


@dataclass(frozen=True, slots=True)
class StreamCosts:
    """Seconds that all streams together cost beside one long prefill, in steps and in chunks."""

    step: float
    """One decode step of all of them, alone."""
    launch: float
    """The part of `step` that is paid because it is a batch of its own."""
    chunk: float
    """One further chunk of the same prefill, without the streams in it."""
    riders: float
    """Seconds that the tokens of all streams add to a batch that runs anyway."""

    @property
    def least(self) -> float:
        """One token for each stream, in the cheaper of the two ways."""
        return min(self.launch, self.chunk) + self.riders


class TokenDeadlines:
    """Says when tokens are due, and how a long prefill is run beside them."""

    def __init__(
        self, config: PolicyConfig, cost: CostModel, streams: DecodePool, tuning: Tuning
    ) -> None:
        self._config = config
        self._cost = cost
        self._streams = streams
        self._tuning = tuning

    def costs(self, history: int) -> StreamCosts:
        """Return what the streams cost beside a long prefill with ``history`` cached tokens."""
        count = self._streams.total
        context = self._streams.context
        unit, bulk = self._cost.profile, self._cost.bulk
        riders = (
            (unit.per_token + unit.per_sequence) * count
            + unit.per_attention * context
            + unit.per_kv * (context + count)
        )
        return StreamCosts(
            step=unit.per_launch + riders,
            launch=unit.per_launch,
            chunk=bulk.per_launch + bulk.per_sequence + bulk.per_kv * history,
            riders=riders,
        )

    def usual_target(self) -> float:
        """Return `target` beside a long prefill without history."""
        return self.target(self.costs(0))

    def target(self, costs: StreamCosts) -> float:
        """Return the seconds between two tokens of a stream without a target of its own.

        They are those of ``itl_slo_ms``. Where that is None, they are so many that streams take
        `Tuning.token_share` of the time, and at least those of `Tuning.token_steps` decode steps.
        """
        given, tuning = self._config.itl_slo_ms, self._tuning
        if given is not None:
            return given / 1000
        return max(tuning.token_steps * costs.step, costs.least / tuning.token_share)

    def rides(self, costs: StreamCosts, target: float, longs: int, shorts: float) -> bool:
        """Whether streams ride in chunks, rather than have steps of their own.

        Both ways are counted in request-seconds of waiting, a second: every long waits for what
        streams cost; and all streams that ride wait for each short that comes meanwhile.

        Args:
            longs: number of long prefills that wait or run.
            shorts: arrivals of short prefills a second.
        """
        if not self._config.interruptible:
            return True
        short = self._cost.prefill_seconds(self._tuning.typical_short, 0)
        held = shorts * short * self._streams.total
        return longs * costs.chunk / target + held <= longs * costs.launch / target

    def chunk_tokens(self, costs: StreamCosts, history: int, seconds: float) -> int:
        """Return the tokens of a chunk that takes ``seconds`` with all streams in it.

        They are at least so many that long prefills get their share of the time.
        """
        bulk, most = self._cost.bulk, self._config.max_batch_tokens
        tokens = timed_chunk(bulk, history, seconds - costs.riders)
        least = efficient_chunk(bulk, history, 1 - self._config.long_share)
        return int(min(most, max(tokens, least, self._tuning.least_riding)))

    def least_target(self, costs: StreamCosts, layer: float) -> float:
        """Return the shortest target that is kept in the longs' turn, in seconds.

        Between two steps longs then pay off twice what a step is charged (`fairness.ShareAccount`),
        so that their turn ends, and streams do not wait for that.

        Args:
            layer: seconds of a layer of the running batch, by which a step may be early.
        """
        share = self._config.long_share
        return layer + costs.step * (1 + 2 * share / (1 - share))
