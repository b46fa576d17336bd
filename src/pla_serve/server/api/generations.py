"""Makes a generation of a validated body, and has the engine admit it.

Every endpoint that makes text goes this way. Those that speak another API than chat completions
translate their bodies into a `ChatRequest` first.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace

import msgspec
from starlette.requests import Request

from pla_serve.logs import request_id
from pla_serve.policy.decodes import LOOSE_TARGET
from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.tiers import Tier
from pla_serve.server.api.body import Upload
from pla_serve.server.api.cache_scope import CacheScopes
from pla_serve.server.api.choice_reading import Reading
from pla_serve.server.api.guard import OFFLINE_WORK, tenant, warn
from pla_serve.server.api.params import check_held_logprobs, sampling_params, unheld_keywords
from pla_serve.server.api.schema import (
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
)
from pla_serve.server.api.service import Service
from pla_serve.server.api.tiers import HEADER as TIER_HEADER
from pla_serve.server.api.tiers import TierChoice
from pla_serve.server.api.tool_constraint import Check, with_thought, with_tool_grammar
from pla_serve.server.errors import invalid, over_capacity, too_long, unsupported
from pla_serve.server.generation.generation import Generation, GenerationPlan
from pla_serve.server.generation.grammar_checks import TooManyChecks
from pla_serve.server.reasoning.formats import Beginning
from pla_serve.server.reasoning.reader import TextReader
from pla_serve.server.records.journal import JournalEntry
from pla_serve.server.records.tracing import TRACE_HEADERS
from pla_serve.server.tools.events import AnswerReader
from pla_serve.server.tools.tool import ToolUse
from pla_serve.wire.engine import EngineReady, Grammar

OFFLINE_PRIORITY = 2**31 - 1
"""Priority of lines of offline batches: the least urgent that there is."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Circumstances of one HTTP request.

    Attributes:
        request: the request itself.
        upload: its body.
        arrival: monotonic seconds.
    """

    request: Request
    upload: Upload
    arrival: float


@dataclass(frozen=True, slots=True)
class ChatRun:
    """A chat request that only has to be generated.

    Attributes:
        plan: what the engine is asked for.
        reading: how the answer is read; None: its text is the answer.
    """

    plan: GenerationPlan
    reading: Reading | None = None


class Generations:
    """Plans and admits the generations of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        settings = service.settings
        self._cache_scopes = CacheScopes(settings.api_keys, shared=settings.share_prefix_cache)
        self._tiers = TierChoice(settings)

    async def chat(
        self, asked: Asked, body: ChatRequest, id: str, *, cut_to_fit: bool = False
    ) -> ChatRun:
        """Render and tokenise a conversation, and check everything that it asks for.

        Args:
            cut_to_fit: lower ``max_tokens`` to what the context has left, rather than refuse it.

        Raises:
            ApiError: the request cannot be served, or not now.
        """
        service = self._service
        info = await service.ready_engine()
        size = asked.upload.size
        prompt = await service.encoder.chat(body, limit=info.max_model_len, size=size)
        if cut_to_fit and body.max_tokens is not None:
            room = max(info.max_model_len - len(prompt.tokens), 1)
            body = body.model_copy(update={"max_tokens": min(body.max_tokens, room)})
        plan = await self.plan(asked, body, id, [prompt.tokens], info)
        beginning = service.reasoning.beginning(prompt.ending, continued_text(body))
        budget = body.thinking_token_budget
        if budget and service.reasoning.reads and not service.reasoning.bounds:
            raise unsupported(
                "thinking_token_budget",
                "no single token ends this model's reasoning, so it has no bound",
            )
        thought = service.reasoning.thought(beginning, budget)
        use = body.tool_use()
        if use is None:
            plan = with_thought(plan, service.tools, thought)
            await self.check_grammar(asked.request, plan)
        else:
            plan = replace(plan, keep_special=service.tools.keep)
            check = self._checker(asked.request, "tools")
            plan = await with_tool_grammar(plan, use, service.tools, check, thought)
        return self._reader(body, plan, use, beginning)

    def _reader(
        self, body: ChatRequest, plan: GenerationPlan, use: ToolUse | None, beginning: Beginning
    ) -> ChatRun:
        """Return the run of ``plan`` with what reads its answer."""
        service = self._service
        reasoning, bytes_of = service.reasoning, service.token_bytes.within
        make_inner = None if use is None else service.tools.reader(use)
        parallel = use is None or use.parallel
        if not reasoning.reads:
            return ChatRun(
                plan, None if make_inner is None else Reading(make_inner, None, parallel)
            )
        plan = replace(plan, keep_special=plan.keep_special | reasoning.keep)
        grammar = plan.sampling[0].grammar
        closes = use is not None and (grammar is None or grammar.thought is None)

        def make_reader() -> AnswerReader:
            inner = None if make_inner is None else make_inner()
            if body.separate_reasoning is False:
                return inner or TextReader()
            return reasoning.reader(beginning, inner, calls=closes)

        return ChatRun(
            plan,
            Reading(
                make_reader,
                lambda: reasoning.counter(beginning, bytes_of, calls=closes),
                parallel,
                body.include_reasoning is not False,
            ),
        )

    async def plan(
        self,
        asked: Asked,
        body: ChatRequest | CompletionRequest,
        id: str,
        prompts: list[list[int]],
        info: EngineReady,
    ) -> GenerationPlan:
        """Return what the engine is asked for, in a thread if the body is large.

        Raises:
            ApiError: 400, a field is out of range for this model or contradicts another.
        """
        request = asked.request
        header, who = request.headers.get(TIER_HEADER) or None, tenant(request.scope)
        tier = self._tiers.of(body.service_tier, header, who)
        offline = OFFLINE_WORK in request.scope
        scope = self._cache_scopes.of(tenant(asked.request.scope), body.cache_salt)

        def work() -> tuple[GenerationPlan, list[str]]:
            plan = self._plan(body, id, asked.arrival, prompts, info, scope)
            if offline:
                plan = replace(plan, priority=OFFLINE_PRIORITY, offline=True)
            elif tier is not None:
                plan = of_tier(plan, tier)
            return plan, unheld_keywords(body)

        plan, unheld = await asked.upload.run(work)
        if unheld:
            warn(
                asked.request.scope,
                f"keywords of the schema that the answer is not held to: {', '.join(unheld)}",
            )
        return plan

    async def check_grammar(self, request: Request, plan: GenerationPlan) -> None:
        """Check the grammar that the request names, if it names one.

        Raises:
            ApiError: 400, it cannot be used; 429, too many of this client's are being checked.
        """
        if (grammar := plan.sampling[0].grammar) is not None:
            await self._checker(request)(grammar)

    def start(self, request: Request, plan: GenerationPlan) -> Generation:
        """Return a generation that is not yet admitted. Whoever takes it has to close it."""
        service = self._service
        session = service.engine.session(service.settings.max_unread_tokens, tenant(request.scope))
        trace = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        entry = JournalEntry(request_id.get() or plan.id, plan.arrival, trace)
        return Generation(
            plan,
            session,
            service.token_bytes,
            service.metrics,
            entry,
            service.journal,
        )

    def _plan(
        self,
        body: ChatRequest | CompletionRequest,
        id: str,
        arrival: float,
        prompts: list[list[int]],
        info: EngineReady,
        cache_scope: str,
    ) -> GenerationPlan:
        n = body.n or 1
        if body.priority and not self._service.settings.enable_priority:
            raise invalid(
                "priorities are not enabled on this server: leave out priority, or start the "
                "server with --enable-priority",
                "priority",
            )
        if len(prompts) * n > MAX_SEQUENCES:
            raise invalid(f"at most {MAX_SEQUENCES} choices in one request, over all prompts", "n")
        defaults = self._service.defaults
        most = defaults.max_new_tokens
        limits = [
            output_limit(len(each), body.output_limit, info.max_model_len, most) for each in prompts
        ]
        shared = sampling_params(body, min(limits), info.vocab_size, defaults)
        check_held_logprobs(body, shared, n * sum(limits), [len(each) for each in prompts] * n)
        sampling = [msgspec.structs.replace(shared, max_tokens=limit) for limit in limits]
        return GenerationPlan(
            id=id,
            prompts=prompts,
            sampling=sampling,
            n=n,
            arrival=arrival,
            ttft_slo=body.ttft_slo_ms / 1000 if body.ttft_slo_ms else None,
            tpot_slo=body.tpot_slo_ms / 1000 if body.tpot_slo_ms else None,
            priority=body.priority,
            cache_scope=cache_scope,
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            skip_special=body.skip_special_tokens,
        )

    def _checker(self, request: Request, param: str = "response_format") -> Check:
        """Return the check of grammars of this client; ``param`` is what errors name."""
        who = client_of(request)

        async def check(grammar: Grammar) -> None:
            try:
                await self._service.check_grammar(grammar, who)
            except ValueError as error:
                raise invalid(f"the constraint cannot be used: {error}", param) from None
            except TooManyChecks as error:
                raise over_capacity(str(error), 1.0) from None

        return check


def of_tier(plan: GenerationPlan, tier: Tier) -> GenerationPlan:
    """Return the plan of a request of a tier, whose targets count where it has none of its own.

    Bulk work waits, whatever it asks for: its first token has no deadline, and its TPOT target is
    no shorter than the tier's.
    """
    ttft, tpot = plan.ttft_slo, plan.tpot_slo
    if tier.service is ServiceLevel.BULK:
        return replace(plan, tier=tier, ttft_slo=None, tpot_slo=max(tpot or 0.0, LOOSE_TARGET))
    return replace(
        plan,
        tier=tier,
        ttft_slo=tier.ttft if ttft is None else ttft,
        tpot_slo=tier.tpot if tpot is None else tpot,
    )


def client_of(request: Request) -> str:
    """Return whom uploads are charged to: the key's tenant, or an address if there are no keys."""
    address = request.client.host if request.client else ""
    return tenant(request.scope) or address


def continued_text(body: ChatRequest) -> str | None:
    """Return the text of the message that the answer continues; None if it begins one."""
    return (body.messages[-1].content or "") if body.continue_final_message else None


def new_id(prefix: str) -> str:
    """Return the id of a new answer: ``chatcmpl-…``."""
    return f"{prefix}-{uuid.uuid4().hex}"


def output_limit(prompt: int, asked: int | None, context: int, most: int | None) -> int:
    """Return the most output tokens of a choice.

    Args:
        prompt: tokens of the prompt.
        asked: tokens that the request asks for; None for all that fit.
        context: most tokens of prompt and output together.
        most: most output tokens of any request; None for any number.

    Raises:
        ApiError: an empty prompt, or one that leaves too little of the context.
    """
    if prompt == 0:
        raise invalid("the prompt is empty", "prompt")
    if prompt + (asked != 0) > context:
        raise too_long(prompt, context)
    if asked is not None and prompt + asked > context:
        raise too_long(prompt, context, output=asked)
    wanted = context - prompt if asked is None else asked
    return wanted if most is None else min(wanted, most)
