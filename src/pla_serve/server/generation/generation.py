"""Runs the sequences of one HTTP request: prompts times n, stop strings, usage."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.tiers import USUAL, Tier
from pla_serve.server.engine.session import EngineDiedError, EngineSession, SlowReaderError, Update
from pla_serve.server.errors import ApiError, failed, invalid, over_capacity, unavailable
from pla_serve.server.generation.detokenize import Detokenizer, TokenBytes
from pla_serve.server.records.journal import Journal, JournalEntry
from pla_serve.server.records.metrics import Metrics
from pla_serve.server.records.tier_metrics import TierWatch
from pla_serve.wire.engine import (
    AddRequest,
    FinishReason,
    PromptLogprobs,
    Rejected,
    SamplingParams,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Sequences of one HTTP request, validated."""

    id: str
    prompts: list[list[int]]
    sampling: list[SamplingParams]
    """One for every prompt: without max_tokens each takes what its prompt leaves."""
    n: int
    arrival: float
    """Monotonic seconds."""
    ttft_slo: float | None
    """Seconds from arrival."""
    tpot_slo: float | None
    """Seconds from one token to the next."""
    priority: int
    cache_scope: str
    """As `AddRequest.cache_scope`."""
    stop: tuple[str, ...]
    include_stop: bool
    skip_special: bool
    keep_special: frozenset[int] = frozenset()
    """Special tokens that stay in the text: markers of the format of tool calls."""
    tier: Tier | None = None
    """None: the default, which promises nothing."""
    offline: bool = False
    """Whether it takes only the time that others leave."""

    @property
    def tier_name(self) -> str:
        """Name of the tier, as answers show it."""
        return USUAL if self.tier is None else self.tier.name

    def service(self, *, leads: bool) -> ServiceLevel:
        """Return how a choice is admitted and ordered.

        Those that follow the first one of their prompt are refused for no promise.
        """
        if self.offline:
            return ServiceLevel.OFFLINE
        level = ServiceLevel.USUAL if self.tier is None else self.tier.service
        return level if leads or level.unhurried else ServiceLevel.USUAL


@dataclass(slots=True)
class ChoiceDelta:
    """New text and tokens of one choice."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    """The stop string or stop token id that ended the choice; None for EOS and length."""
    prompt_logprobs: PromptLogprobs | None = None
    """With the first delta of a choice, if they were asked for."""
    embedding: bytes | None = None
    """As `Output.embedding`."""


@dataclass(slots=True)
class AnswerChoice:
    """One sequence under way."""

    index: int
    prompt: int
    id: str
    detokenizer: Detokenizer
    tokens: int = 0
    last_tokens_at: float = 0.0
    begun: bool = False
    """Whether the first delta of the choice was given."""
    done: bool = False


class Generation:
    """Call `admit`, then iterate `deltas` to the end, then `close` in any case.

    Of ``n`` choices the first goes ahead and the others follow when its first token is there, so
    that they find the prompt in the prefix cache. They count as one admission: a follower that is
    refused for want of capacity is sent again.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        session: EngineSession,
        token_bytes: TokenBytes,
        metrics: Metrics,
        entry: JournalEntry,
        journal: Journal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a generation that is not yet admitted.

        Args:
            entry: completed and written to ``journal`` by `close`.
        """
        self.plan = plan
        self._session = session
        self._metrics = metrics
        self._entry = entry
        self._journal: Journal | None = journal
        self._clock = clock
        self._choices = {
            choice.id: choice
            for index in range(len(plan.prompts) * plan.n)
            for choice in [self._choice(index, token_bytes)]
        }
        self._unfinished = len(self._choices)
        self._held: list[Update] = []
        self._followers: deque[AnswerChoice] = deque()
        """Choices to be submitted now that the first one of their prompt has a token."""
        self._cached: dict[int, int] = {}
        self._scores: dict[int, PromptLogprobs] = {}
        """Log probabilities of each prompt, for the first delta of each of its choices."""
        self._retries: set[asyncio.TimerHandle] = set()
        self._watch: TierWatch | None = None
        if plan.tier is not None:
            self._watch = TierWatch(
                metrics.tiers, plan.tier, plan.arrival, plan.ttft_slo, plan.tpot_slo
            )

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.plan.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self._choices.values())

    def usage(self) -> dict[str, Any]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    async def admit(self) -> None:
        """Returns once the engine took the first choice of every prompt.

        Raises:
            ApiError: 429 or 400 as the engine refuses, 503 if it died.
        """
        waiting = set()
        for choice in self._choices.values():
            if choice.index % self.plan.n == 0:
                waiting.add(choice.id)
                self._submit(choice)
                await asyncio.sleep(0)  # a prompt may be long to encode
        while waiting:
            for update in await self._receive(None):
                if update.rejected is not None:
                    raise self._refusal(update.rejected)
                waiting.discard(update.id)
                self._held.append(update)

    async def deltas(self, silence: float | None = None) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Yield deltas until all choices are done, and an empty list after ``silence`` seconds.

        Raises:
            ApiError: the engine died or failed, or the client reads too slowly.
        """
        updates, self._held = self._held, []
        while True:
            found = map(self._advance, updates)
            deltas = [delta for delta in found if delta is not None]
            while self._followers:
                self._submit(self._followers.popleft())
                await asyncio.sleep(0)
            if deltas:
                yield deltas
            if not self._unfinished:
                return
            updates = await self._receive(silence)
            if not updates:
                yield []

    def close(self) -> None:
        """End unfinished sequences in the engine at once, and write the journal entry."""
        for retry in self._retries:
            retry.cancel()
        self._session.close()
        if self._journal is not None:
            journal, self._journal = self._journal, None
            if self._unfinished and self._entry.outcome != "refused":
                reason: FinishReason = "error" if self._entry.outcome == "error" else "abort"
                self._metrics.unfinished(reason, self._unfinished)
            if self._watch is not None:
                refused = self._entry.outcome == "refused"
                self._watch.ended(refused=refused, finished=not self._unfinished)
            self._complete(self._entry)
            journal.write(self._entry)

    def _complete(self, entry: JournalEntry) -> None:
        entry.ended = self._clock()
        entry.prompt_tokens = self.prompt_tokens
        entry.cached_tokens = sum(self._cached.values())
        entry.completion_tokens = self.completion_tokens

    def _choice(self, index: int, token_bytes: TokenBytes) -> AnswerChoice:
        plan = self.plan
        prompt = plan.prompts[index // plan.n]
        detokenizer = Detokenizer(
            token_bytes,
            plan.stop,
            plan.include_stop,
            plan.skip_special,
            prompt,
            plan.keep_special,
            plan.sampling[index // plan.n].min_tokens,
        )
        return AnswerChoice(index, index // plan.n, f"{plan.id}-{index}", detokenizer)

    def _submit(self, choice: AnswerChoice) -> None:
        plan, place = self.plan, choice.index % self.plan.n
        sampling = plan.sampling[choice.prompt]
        if place and sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=_wrap(sampling.seed + place))
        first = place == 0
        if not first and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        request = AddRequest(
            id=choice.id,
            prompt=plan.prompts[choice.prompt],
            sampling=sampling,
            arrival=plan.arrival if first else self._clock(),
            deadline=plan.arrival + plan.ttft_slo if first and plan.ttft_slo else None,
            tpot=plan.tpot_slo,
            service=plan.service(leads=first),
            priority=plan.priority,
            cache_scope=plan.cache_scope,
            request_id=self._entry.request_id,
        )
        try:
            self._session.submit(request)
        except EngineDiedError as error:
            self._entry.outcome = "error"
            raise unavailable(str(error)) from None

    def _advance(self, update: Update) -> ChoiceDelta | None:
        choice = self._choices[update.id]
        if choice.done:
            return None
        if update.rejected is not None:
            self._retry(choice, update.rejected)
            return None
        if update.error is not None or update.finish_reason == "error":
            self._entry.outcome = "error"
            if update.fault == "request":
                raise invalid(f"the request cannot be completed: {update.error}")
            raise failed(f"the engine failed this request: {update.error or 'no reason given'}")
        if update.queued is not None:
            self._trace(choice, update.queued)
        if update.cached_tokens is not None and choice.index % self.plan.n == 0:
            self._cached[choice.prompt] = update.cached_tokens
        if update.tokens or update.finish_reason is not None:
            return self._take(choice, update)
        return None

    def _take(self, choice: AnswerChoice, update: Update) -> ChoiceDelta:
        self._time(choice, len(update.tokens))
        if update.prompt_logprobs is not None:
            self._scores[choice.prompt] = update.prompt_logprobs
        begun, choice.begun = choice.begun, True
        if choice.tokens == 0 and choice.index % self.plan.n == 0:
            for follower in self._choices.values():
                if follower.prompt == choice.prompt and follower is not choice:
                    self._followers.append(follower)
        text, stopped_by, used = self._decode(choice, update)
        tokens, logprobs, finish = (
            update.tokens[:used],
            update.logprobs[:used],
            update.finish_reason,
        )
        choice.tokens += used
        if stopped_by is not None:
            finish = "stop"
            self._session.abort(choice.id)
        elif finish is not None:
            rest = choice.detokenizer.finish()
            text, stopped_by = text + rest.text, rest.stopped_by
        if finish is not None:
            self._finish(choice, finish)
        stop_reason = stopped_by if stopped_by is not None else self._stop_id(choice, update)
        scores = None if begun else self._scores.get(choice.prompt)
        return ChoiceDelta(
            choice.index, text, tokens, logprobs, finish, stop_reason, scores, update.embedding
        )

    def _decode(self, choice: AnswerChoice, update: Update) -> tuple[str, str | None, int]:
        """Text, the stop string that ended it, and how many of the tokens it took.

        Token by token if there are stop strings: where an answer ends must not depend on how many
        tokens happened to come at once.
        """
        shown = update.tokens
        if update.stop_token is not None and not self.plan.include_stop:
            shown = shown[:-1]
        if not self.plan.stop:
            return choice.detokenizer.push(shown).text, None, len(update.tokens)
        text = ""
        for used, token in enumerate(shown, 1):
            delta = choice.detokenizer.push([token])
            text += delta.text
            if delta.stopped_by is not None:
                return text, delta.stopped_by, used
        return text, None, len(update.tokens)

    def _stop_id(self, choice: AnswerChoice, update: Update) -> int | None:
        token = update.stop_token
        return token if token in self.plan.sampling[choice.prompt].stop_token_ids else None

    def _trace(self, choice: AnswerChoice, queued: float) -> None:
        """An instance makes its first token of this choice."""
        entry = self._entry
        if choice.tokens and entry.moved is None:
            entry.moved = (choice.last_tokens_at, self._clock())
        elif entry.prefill_began is None:
            entry.prefill_began = self.plan.arrival + queued

    def _time(self, choice: AnswerChoice, tokens: int) -> None:
        now = self._clock()
        if self._watch is not None:
            leads = choice.index % self.plan.n == 0
            self._watch.tokens(
                choice.index, leads=leads, before=choice.tokens, count=tokens, now=now
            )
        new_tokens = len(self.plan.prompts[choice.prompt]) - self._cached.get(choice.prompt, 0)
        if choice.tokens == 0:
            if choice.index % self.plan.n == 0 and not self.plan.offline:
                self._metrics.first_token(now - self.plan.arrival, new_tokens)
            if self._entry.first_token is None:
                self._entry.first_token = now
        elif tokens and not self.plan.offline:
            self._metrics.next_tokens((now - choice.last_tokens_at) / tokens, new_tokens)
        choice.last_tokens_at = now

    def _finish(self, choice: AnswerChoice, reason: FinishReason) -> None:
        choice.done = True
        self._unfinished -= 1
        if not self._unfinished:
            self._entry.outcome = reason
        self._metrics.finished(reason, self._clock() - self.plan.arrival)

    def _retry(self, choice: AnswerChoice, rejected: Rejected) -> None:
        if rejected.retry_after is None:
            raise self._refusal(rejected)
        loop = asyncio.get_running_loop()
        self._retries.add(loop.call_later(max(rejected.retry_after, 0.05), self._again, choice))

    def _again(self, choice: AnswerChoice) -> None:
        try:
            self._submit(choice)
        except ApiError as error:
            self._session.fail(EngineDiedError(error.message))

    async def _receive(self, silence: float | None) -> list[Update]:
        try:
            return await self._session.receive(silence)
        except EngineDiedError as error:
            self._entry.outcome = "error"
            reason = str(error)
            raise (failed(reason, 502) if error.answered else unavailable(reason)) from None
        except SlowReaderError:
            raise ApiError(
                408, "the answer was not read, so it was ended", code="client_too_slow"
            ) from None

    def _refusal(self, rejected: Rejected) -> ApiError:
        self._metrics.rejected(rejected)
        self._entry.outcome = "refused"
        if rejected.retry_after is None:
            return invalid(rejected.reason)
        return over_capacity(rejected.reason, rejected.retry_after)


def _wrap(seed: int) -> int:
    """Into the range of a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
