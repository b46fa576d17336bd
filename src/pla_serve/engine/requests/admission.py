"""Admits requests or refuses them: first for faults of their own, then for what already waits."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.requests.sequence import Sequence, prefill_request
from pla_serve.engine.run.pooling import HiddenPool
from pla_serve.engine.sampling import GrammarError, Sampler, SamplingError
from pla_serve.policy.admission import Admission, Admit, Refuse
from pla_serve.policy.calibration import Calibration
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy, PrefillRequest
from pla_serve.wire.codec import range_fault
from pla_serve.wire.engine import AddRequest, Rejected
from pla_serve.wire.limits import MOST_PROMPT_LOGPROBS

SCORES_STAY = (
    "a request for log probabilities or an embedding of its prompt is not handed over between "
    "instances"
)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds of what a request may ask of the model that is served."""

    max_model_len: int
    """Most tokens of prompt and output together."""
    vocab_size: int
    """Token ids run from 0 to one less than this."""
    eos_token_ids: frozenset[int]
    """Tokens that end an output, unless a request ignores them."""
    default_seed: int
    """Seed of requests that give none."""


class Intake:
    """Makes a sequence of a request, or a refusal with its reason.

    Example: ``intake.admit(AddRequest(id="a", prompt=[], ...), now)`` returns ``Rejected(id="a",
    reason="the prompt is empty; give at least one token", retry_after=None)``.
    """

    def __init__(
        self,
        limits: RequestLimits,
        admission: Admission,
        kv: KVManager,
        sampler: Sampler,
        policy: PrefillPolicy,
        cost: CostModel,
        gate: MemoryGate,
    ) -> None:
        self.limits = limits
        self._admission = admission
        self._kv = kv
        self._sampler = sampler
        self._policy = policy
        self._cost = cost
        self._gate = gate

    def admit(self, request: AddRequest, now: float) -> Sequence | Rejected:
        """Admit a request that waits for its prefill here.

        A refusal costs no more than a lookup in the prefix cache. Only a request that the queues
        can bear has its grammar compiled, by a worker, while it waits.
        """
        fault = self._fault(request)
        if fault is not None:
            return Rejected(id=request.id, reason=fault, retry_after=None)
        cached = self._cached_prefix(request)
        prefill = prefill_request(
            request, len(request.prompt), cached, first=request.generated == 0
        )
        short = self._waits_as_short(request, cached)
        verdict = self._weigh(prefill, short, now)
        if isinstance(verdict, Refuse):
            return Rejected(
                id=request.id, reason=verdict.reason, retry_after=verdict.retry_after_seconds
            )
        sequence = self._sequence(request, short, cached)
        if isinstance(sequence, Sequence) and not request.service.unhurried:
            # Others are not delayed as it is, because it gives way to all that come later. So its
            # wait does not correct forecasts.
            sequence.forecast = verdict.forecast
        return sequence

    def take_over(self, request: AddRequest) -> Sequence | Rejected:
        """Admit a request that another engine prefills. It waits in no queue here."""
        fault = self._fault(request)
        if fault is None and request.reads_prompt:
            fault = SCORES_STAY
        if fault is not None:
            return Rejected(id=request.id, reason=fault, retry_after=None)
        cached = self._cached_prefix(request)
        short = self._waits_as_short(request, cached)
        return self._sequence(request, short, cached)

    def _waits_as_short(self, request: AddRequest, cached: int) -> bool:
        """Return the class of a request, of whose prompt so many tokens are cached."""
        if request.service.unhurried:
            return False
        return self._policy.waits_as_short(len(request.prompt) - cached, cached)

    def _cached_prefix(self, request: AddRequest) -> int:
        """Return how many tokens need no prefill; all of a prompt do that is read whole."""
        if request.scores_prompt or request.sampling.embedding in ("mean", "cls"):
            return 0
        return self._kv.cached_prefix(request.prompt, request.cache_scope)

    @property
    def calibration(self) -> Calibration:
        """Corrections of predicted waits, learned from how long earlier requests waited."""
        return self._admission.calibration

    def settle_forecast(self, sequence: Sequence, now: float, *, served: bool) -> None:
        """Compare the predicted time of the first token with the real one, once.

        Args:
            served: whether the first token was made. False if the request ended without one.
        """
        forecast, sequence.forecast = sequence.forecast, None
        if forecast is None:
            return
        if served:
            self.calibration.observe(forecast, now)
        else:
            self.calibration.gave_up(forecast, now)

    def _sequence(self, request: AddRequest, short: bool, cached: int) -> Sequence | Rejected:
        """Check the sampling parameters, have the grammar compiled, and make the sequence."""
        try:
            own = len(request.prompt) - request.generated
            sampling = self._sampler.start(
                request.id,
                request.prompt[:own],
                request.sampling,
                self.limits.eos_token_ids,
                default_seed=self.limits.default_seed,
                output=request.prompt[own:],
                tenant=request.tenant,
            )
        except (GrammarError, SamplingError) as error:
            return Rejected(id=request.id, reason=str(error), retry_after=None)
        return Sequence(
            request=request,
            sampling=sampling,
            short=short,
            tokens=list(request.prompt),
            table=BlockTable(scope=request.cache_scope),
            seen_version=self._kv.version,
            seen_cached=cached,
            pool=_pool(request),
        )

    def _weigh(self, prefill: PrefillRequest, short: bool, now: float) -> Admit | Refuse:
        """Compare a request with what waits in the policy, and with what is parked for memory."""
        own = self._cost.prefill_seconds(prefill.new_tokens, prefill.history)
        requests, tokens = self._gate.backlog(short)
        _, others = self._gate.backlog(not short)
        parked = requests * self._cost.prefill_seconds(tokens // requests, 0) if requests else 0.0
        return self._admission.decide(
            prefill,
            self._policy,
            own,
            now,
            parked_tokens=tokens + others,
            own_parked_tokens=self._gate.parked_tokens(prefill.tenant),
            parked_seconds=parked,
        )

    def _fault(self, request: AddRequest) -> str | None:
        """Return why the model cannot serve this request at any time, or None if it can."""
        limits = self.limits
        if request.prompt and not 0 <= request.generated < len(request.prompt):
            return (
                f"generated says that {request.generated} of {len(request.prompt)} tokens are "
                "output; at least one of them must be prompt"
            )
        out_of_range = range_fault(request)
        if out_of_range is not None:
            return f"invalid request: {out_of_range}"
        if not request.prompt:
            return "the prompt is empty; give at least one token"
        if len(request.prompt) + bool(request.sampling.max_tokens) > limits.max_model_len:
            output = "; with at least one of output that is" if request.sampling.max_tokens else ","
            return (
                f"the prompt has {len(request.prompt)} tokens{output} more than this model's "
                f"{limits.max_model_len}"
            )
        if not (min(request.prompt) >= 0 and max(request.prompt) < limits.vocab_size):
            return f"the prompt has a token id outside 0 to {limits.vocab_size - 1}"
        if request.sampling.max_tokens and request.generated >= request.sampling.max_tokens:
            return (
                f"nothing is left to make: {request.generated} of "
                f"{request.sampling.max_tokens} tokens were made already"
            )
        return _scoring_fault(request) or _embedding_fault(request)


def _pool(request: AddRequest) -> HiddenPool | None:
    kind = request.sampling.embedding
    return None if kind is None else HiddenPool.of(kind, len(request.prompt))


def _embedding_fault(request: AddRequest) -> str | None:
    """Return why the prompt of a request cannot be embedded, or None if it can or need not."""
    sampling = request.sampling
    if sampling.embedding is None:
        return None
    if request.hand_over is not None:
        return SCORES_STAY
    if sampling.max_tokens or sampling.grammar is not None or request.generated:
        return "an embedding comes without output: max_tokens 0, no grammar, nothing generated"
    return None


def _scoring_fault(request: AddRequest) -> str | None:
    """Return why the prompt of a request cannot be scored, or None if it can or need not."""
    top = request.sampling.prompt_logprobs
    if top is None or not request.scores_prompt:
        return None
    if request.hand_over is not None:
        return SCORES_STAY
    if (wanted := len(request.prompt) * (1 + top)) > MOST_PROMPT_LOGPROBS:
        return (
            f"{wanted} log probabilities of the prompt are wanted, more than the "
            f"{MOST_PROMPT_LOGPROBS} that one prompt may be given; ask for fewer of each token"
        )
    return None
