"""One request inside the engine, from its admission to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field

from pla_serve.engine.kv.manager import BlockTable
from pla_serve.engine.run.pooling import HiddenPool
from pla_serve.engine.run.scoring import ScoredTokens
from pla_serve.engine.sampling import SequenceSampling
from pla_serve.policy.calibration import Forecast
from pla_serve.policy.protocol import PrefillRequest, ServiceLevel
from pla_serve.wire.engine import AddRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, KV blocks and sampling state of one request.

    Three counts say how far the sequence is. Example: of 10 tokens, a prompt of 8 and 2 of output,
    8 are computed and settled, and a dispatched batch computes one more::

        len(tokens) = 10   computed = 8   dispatched = 1   enqueued = 9
    """

    request: AddRequest
    sampling: SequenceSampling
    short: bool
    """Whether the prefill counted as short on arrival. Reports and the memory gate go by this."""
    tokens: list[int]
    """Prompt and output so far."""
    computed: int = 0
    """Leading tokens whose KV is in ``table``."""
    table: BlockTable = field(default_factory=BlockTable)
    """KV blocks of the sequence."""
    dispatched: int = 0
    """Tokens after the computed ones that a batch computes which is dispatched and not settled."""
    chosen_row: int | None = None
    """Row of the token after ``tokens`` among those that the dispatched batch chooses, while only
    the device knows that token. None at all other times."""
    in_flight: int = 0
    """Enqueued batches and KV transfers that write to the blocks. They are kept until it is 0."""
    claims: int = 0
    """How often its blocks were claimed for another tenant."""
    over: bool = False
    """Whether the request has ended or was aborted. Results that still arrive are dropped."""
    seen_version: int = -1
    """Version of the prefix cache (`KVManager.version`) when the prefix was last looked up."""
    seen_cached: int = 0
    """Cached tokens found then. The policy counts these as history until the prefill begins."""
    cached_tokens: int | None = None
    """Tokens found in the prefix cache when KV was first reserved."""
    started: float | None = None
    """Time at which the first chunk began."""
    scores: list[ScoredTokens] = field(default_factory=list)
    """Log probabilities of the prompt's tokens so far, without gaps, from the second token on; they
    are given away with the first output."""
    pool: HiddenPool | None = None
    """Hidden states for the embedding of the prompt; None if none is wanted."""
    forecast: Forecast | None = None
    """Predicted time of the first token, until it is compared with the real one."""

    @property
    def id(self) -> str:
        """Id of the request."""
        return self.request.id

    @property
    def enqueued(self) -> int:
        """Leading tokens whose KV is written once the device has done all enqueued work."""
        return self.computed + self.dispatched

    @property
    def precedence(self) -> tuple[int, float]:
        """Order in which sequences get KV memory: the smallest (priority, arrival) goes first."""
        return (self.request.priority, self.request.arrival)

    @property
    def made(self) -> int:
        """Output tokens that this engine has made."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Output tokens so far, including those that another engine made before a hand-over."""
        return self.made + self.request.generated

    @property
    def scored(self) -> int:
        """Tokens of the prompt that have their log probabilities."""
        return sum(map(len, self.scores))

    @property
    def scoring(self) -> bool:
        """Whether some token of the prompt still needs its log probabilities."""
        if self.made or not self.request.scores_prompt:
            return False
        return self.scored < len(self.request.prompt) - 1

    @property
    def reusable(self) -> int:
        """Most leading tokens that may come from the prefix cache.

        The last token is always computed, for its logits. Where log probabilities or an embedding
        of the prompt are wanted, so is every token that comes before one which has not given its
        own yet.
        """
        last = len(self.tokens) - 1
        if self.pool is not None and self.pool.next < self.pool.end:
            last = min(last, self.pool.next)
        return min(last, self.scored) if self.scoring else last

    @property
    def queued_seconds(self) -> float | None:
        """Seconds from arrival to the first chunk, or None before that."""
        return None if self.started is None else self.started - self.request.arrival

    def prefill(self, history: int) -> PrefillRequest:
        """Return the rest of the prefill as the policy sees it, given ``history`` cached tokens."""
        return prefill_request(self.request, len(self.tokens), history, first=self.generated == 0)


def prefill_request(
    request: AddRequest, tokens: int, history: int, *, first: bool
) -> PrefillRequest:
    """Return a prefill as the policy sees it: as numbers.

    Args:
        tokens: tokens of the sequence. All but ``history`` of them are new.
        first: whether the prefill makes the first token of the answer, which has a deadline. An
            answer that has begun is refused for no promise.
    """
    kept = first or request.service is not ServiceLevel.PROMISED
    return PrefillRequest(
        id=request.id,
        arrival=request.arrival,
        new_tokens=tokens - history,
        history=history,
        deadline=request.deadline if first else None,
        priority=request.priority,
        tenant=request.tenant,
        service=request.service if kept else ServiceLevel.USUAL,
        tpot=request.tpot if request.hand_over is None else None,
    )
