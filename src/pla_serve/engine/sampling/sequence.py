"""Sampling state of one sequence, which lives from batch to batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from pla_serve.engine.sampling.errors import SamplingError
from pla_serve.engine.sampling.grammars import GrammarFollower
from pla_serve.engine.sampling.noise import uniform
from pla_serve.engine.sampling.penalties import Additions, Penalties
from pla_serve.wire.engine import SamplingParams, TokenLogprob
from pla_serve.wire.limits import GREEDY_BELOW


class Sampled(NamedTuple):
    """Result of one step for one sequence."""

    token: int
    """-1 if there is an error."""
    logprob: TokenLogprob | None = None
    stopped: bool = False
    """Whether the token ends generation: EOS or a stop id. Its text is not sent to the client."""
    grammar_finished: bool = False
    """Whether the grammar allows nothing after this token. The token is part of the text."""
    error: str | None = None
    """Why there is no token. The sequence ends with this error."""
    of_request: bool = False
    """Whether the error is the request's own fault: no engine would do better."""
    ended: bool = False
    """Whether there is no token because the grammar allowed nothing after the one before."""
    late: bool = False
    """Whether the token is missing because its grammar takes time. The last token is computed again
    once the sequence `can_go_on`; until then it sits out."""


LATE = Sampled(-1, late=True)


class SequenceSampling:
    """Sampling state of one sequence; it survives recompute preemption.

    Args:
        prompt: prompt of the request, without output that a recomputation prefills again.
        eos_token_ids: ids that end a text of this model.
        vocab_size: width of the logits.
        key: key of the random numbers, from `noise.seed_key`.
        grammar: matcher of this sequence; None without a grammar.

    Raises:
        SamplingError: a token id is outside the vocabulary.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        *,
        vocab_size: int,
        key: bytes,
        grammar: GrammarFollower | None = None,
    ) -> None:
        self.params = params
        self.drawn = 0
        """Number of tokens accepted so far."""
        self._promised = 0
        self._proposed: tuple[int, TokenLogprob | None] | None = None
        """Next token, which is chosen and whose effect on the grammar is not known yet."""
        self.grammar = grammar
        self.greedy = params.temperature < GREEDY_BELOW
        self._key = key
        stop_ids = frozenset(params.stop_token_ids)
        self.stop_ids = stop_ids if params.ignore_eos else stop_ids | eos_token_ids
        if grammar is not None:
            # A grammar ends its text with EOS, so EOS stops the sequence even with ignore_eos.
            self.stop_ids |= grammar.eos_token_ids
        early_stops = sorted(stop_ids | eos_token_ids | self.stop_ids)
        self._early_stops = Additions(dict.fromkeys(early_stops, -inf)) if early_stops else None
        bias = params.logit_bias or {}
        _check_ids("logit_bias", bias, vocab_size)
        self.bias = Additions(bias) if bias else None
        """Values to add to logits in each step, or None."""
        _check_ids("stop_token_ids", stop_ids, vocab_size)
        self.penalties: Penalties | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            _check_ids("the prompt", prompt, vocab_size)
            self.penalties = Penalties(
                prompt,
                presence=params.presence_penalty,
                frequency=params.frequency_penalty,
                repetition=params.repetition_penalty,
            )
        self._bare = (
            self.greedy and self.penalties is None and self.bias is None and self.grammar is None
        )

    @property
    def position(self) -> int:
        """Position in the output of the next token to be chosen."""
        return self.drawn + self._promised

    @property
    def plain(self) -> bool:
        """Whether the next token is the argmax of the unchanged logits."""
        return self._bare and self.position >= self.params.min_tokens

    @property
    def needs_last_token(self) -> str | None:
        """Why a token cannot be chosen before the one before it is known; None if it can."""
        if self.grammar is not None:
            return "grammar"
        if self.penalties is not None:
            return "penalties"
        return None if self.params.logprobs is None else "logprobs"

    @property
    def ended(self) -> bool:
        """Whether the grammar has turned out to allow nothing after the last token."""
        grammar = self.grammar
        return (
            grammar is not None
            and grammar.error is None
            and not self.chosen
            and grammar.settled
            and grammar.finished
        )

    @property
    def lags(self) -> bool:
        """Whether a step had better not run before the sequence `can_go_on`."""
        return self.grammar is not None and self.grammar.lags

    def promise(self) -> None:
        """Count a token that was chosen and will be accepted later, so that the next can be chosen.

        Call it only if ``needs_last_token`` is None.
        """
        self._promised += 1

    @property
    def can_go_on(self) -> bool:
        """Whether the next step can run: the grammar is ready, or has failed."""
        return self.grammar is None or self.grammar.ready

    @property
    def grammar_error(self) -> str | None:
        """Message for the client if the grammar has failed; None otherwise."""
        return None if self.grammar is None else self.grammar.error

    @property
    def chosen(self) -> bool:
        """Whether the next token is chosen already and waits for the grammar."""
        return self._proposed is not None

    def forbidden(self) -> Additions | None:
        """Return what excludes tokens that would end the text too early; None if any may end it."""
        early = self.position < self.params.min_tokens
        if not early or (self.grammar is not None and self.grammar.must_stop):
            return None
        return self._early_stops

    def uniform(self) -> float:
        """Return the random number for the next token; it changes only with ``position``."""
        return uniform(self._key, self.position)

    def resume(self, output: Sequence[int]) -> None:
        """Accept tokens that another engine has chosen for this request.

        Raises:
            SamplingError: the request would have ended with them, or they violate the grammar.
        """
        for token in output:
            sampled = self.accept(token, None)
            if sampled.error is not None:
                raise SamplingError(f"the output so far does not fit the request: {sampled.error}")
            if sampled.stopped or sampled.grammar_finished:
                raise SamplingError(f"nothing is left to make: the output has ended with {token}")

    def propose(self, token: int, logprob: TokenLogprob | None) -> None:
        """Record ``token`` as the next one, and pass it to the grammar.

        `settle` makes it part of the output, once the grammar has answered.
        """
        self._proposed = (token, logprob)
        if self.grammar is not None and token not in self.stop_ids:
            self.grammar.advance(token)

    def settle(self, *, last: bool) -> Sampled:
        """Make the chosen token part of the output.

        What it does to the grammar may not be known yet, and shows in the next step: an error, or
        that the text has `ended`.

        Args:
            last: the sequence ends with this token anyway, so the result has to say whether the
                grammar ends as well. It is `LATE` if the grammar has not answered.
        """
        if last and self.grammar is not None and not self.grammar.settled:
            return LATE
        return self._take()

    def accept(self, token: int, logprob: TokenLogprob | None) -> Sampled:
        """Append ``token``, which another engine chose, without waiting for the grammar.

        If the token violates the grammar, a later step returns the error.
        """
        self.propose(token, logprob)
        return self._take()

    def close(self) -> None:
        """Release the grammar of a sequence that has ended. Repeated calls do nothing."""
        if self.grammar is not None:
            self.grammar.close()

    def _take(self) -> Sampled:
        assert self._proposed is not None
        (token, logprob), self._proposed = self._proposed, None
        self.drawn += 1
        self._promised = max(0, self._promised - 1)
        if self.penalties is not None:
            self.penalties.seen.add(token)
        stopped = token in self.stop_ids
        finished = False
        if self.grammar is not None and not stopped:
            if self.grammar.error is not None:
                return Sampled(-1, error=self.grammar.error, of_request=True)
            finished = self.grammar.settled and self.grammar.finished
        return Sampled(token, logprob, stopped, finished)


def _check_ids(
    what: str, ids: Sequence[int] | frozenset[int] | dict[int, float], size: int
) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < size):
        wrong = next(token for token in ids if not 0 <= token < size)
        raise SamplingError(f"{what} names token id {wrong}; this model's ids are 0 to {size - 1}")
