"""Whether a request gets in: its own faults first, then what the queues can bear."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.sampling import Sampler, SamplingError
from pla_serve.policy.admission import Admission, Admit, Refuse
from pla_serve.policy.calibration import Calibration
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy, PrefillRequest
from pla_serve.wire.engine import AddRequest, Rejected


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of this model."""

    max_model_len: int
    """Most tokens of prompt and output together."""
    vocab_size: int
    eos_token_ids: frozenset[int]
    default_seed: int


class Intake:
    """Turns a message into a sequence that the policy may be told of, or into a refusal."""

    def __init__(
        self,
        limits: Limits,
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

    def admit(self, request: AddRequest, now: float) -> tuple[Sequence, PrefillRequest] | Rejected:
        """No work is spent beyond a look at the prefix cache and compiling a grammar."""
        fault = self._fault(request)
        if fault is not None:
            return Rejected(id=request.id, reason=fault, retry_after=None)
        cached = self._kv.cached_prefix(request.prompt, request.cache_scope)
        numbers = PrefillRequest(
            id=request.id,
            arrival=request.arrival,
            new_tokens=len(request.prompt) - cached,
            history=cached,
            deadline=request.deadline if request.generated == 0 else None,
            priority=request.priority,
        )
        short = self._policy.waits_as_short(numbers.new_tokens, numbers.history)
        verdict = self._weigh(numbers, short, now)
        if isinstance(verdict, Refuse):
            return Rejected(
                id=request.id, reason=verdict.reason, retry_after=verdict.retry_after_seconds
            )
        sequence = self._sequence(request, short, cached)
        if isinstance(sequence, Rejected):
            return sequence
        sequence.forecast = verdict.forecast
        return sequence, numbers

    def take_over(self, request: AddRequest) -> Sequence | Rejected:
        """For a request that another engine prefills: it waits in no queue here."""
        fault = self._fault(request)
        if fault is not None:
            return Rejected(id=request.id, reason=fault, retry_after=None)
        cached = self._kv.cached_prefix(request.prompt, request.cache_scope)
        short = self._policy.waits_as_short(len(request.prompt) - cached, cached)
        return self._sequence(request, short, cached)

    def _sequence(self, request: AddRequest, short: bool, cached: int) -> Sequence | Rejected:
        try:
            own = len(request.prompt) - request.generated
            sampling = self._sampler.start(
                request.id,
                request.prompt[:own],
                request.sampling,
                self.limits.eos_token_ids,
                default_seed=self.limits.default_seed,
                output=request.prompt[own:],
            )
        except SamplingError as error:
            return Rejected(id=request.id, reason=str(error), retry_after=None)
        return Sequence(
            request=request,
            sampling=sampling,
            short=short,
            tokens=list(request.prompt),
            table=BlockTable(scope=request.cache_scope),
            seen_version=self._kv.version,
            seen_cached=cached,
        )

    @property
    def calibration(self) -> Calibration:
        """How far predicted waits can be believed."""
        return self._admission.calibration

    def settle(self, sequence: Sequence, now: float, *, served: bool) -> None:
        """Its first token was made, or it left without one: compare with what was foreseen."""
        forecast, sequence.forecast = sequence.forecast, None
        if forecast is None:
            return
        if served:
            self.calibration.observe(forecast, now)
        else:
            self.calibration.gave_up(forecast, now)

    def _weigh(self, numbers: PrefillRequest, short: bool, now: float) -> Admit | Refuse:
        """Against what waits in the policy, and for memory."""
        own = self._cost.prefill_seconds(numbers.new_tokens, numbers.history)
        requests, tokens = self._gate.backlog(short)
        _, others = self._gate.backlog(not short)
        parked = requests * self._cost.prefill_seconds(tokens // requests, 0) if requests else 0.0
        return self._admission.decide(
            numbers,
            self._policy,
            own,
            now,
            parked_tokens=tokens + others,
            parked_seconds=parked,
        )

    def _fault(self, request: AddRequest) -> str | None:
        limits = self.limits
        if not request.prompt:
            return "the prompt is empty; give at least one token"
        if len(request.prompt) >= limits.max_model_len:
            return (
                f"the prompt has {len(request.prompt)} tokens; with at least one of output that is "
                f"more than this model's {limits.max_model_len}"
            )
        if not (min(request.prompt) >= 0 and max(request.prompt) < limits.vocab_size):
            return f"the prompt has a token id outside 0 to {limits.vocab_size - 1}"
        if request.sampling.max_tokens < 1:
            return "max_tokens must be at least 1"
        if not 0 <= request.generated < len(request.prompt):
            return (
                f"generated says that {request.generated} of {len(request.prompt)} tokens are "
                "output; at least one of them must be prompt"
            )
        if request.generated >= request.sampling.max_tokens:
            return (
                f"nothing is left to make: {request.generated} of "
                f"{request.sampling.max_tokens} tokens were made already"
            )
        return None
