"""Turns a sampled token into a message, and decides whether its sequence ends with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.run.scoring import join
from pla_serve.engine.sampling import Sampled
from pla_serve.wire.engine import FinishReason, Output, PromptLogprobs


def take_token(sequence: Sequence, sampled: Sampled, max_model_len: int) -> Output:
    """Append the token to ``sequence`` and return the message that carries it.

    The message has a finish reason if the sequence ends with the token. If the grammar turned out
    to end with the token before, there is none, and the reason is "stop". Without a token, because
    the logits were broken or a grammar excludes all tokens, the reason is "error". If no output is
    wanted (``max_tokens`` 0), the token is dropped.

    Args:
        max_model_len: most tokens of prompt and output together.
    """
    if sampled.error is not None:
        return failure(sequence, sampled.error, of_request=sampled.of_request)
    first = sequence.made == 0
    if sampled.ended:
        return Output(id=sequence.id, tokens=[], finish_reason="stop")
    if not sequence.request.sampling.max_tokens:
        return Output(
            id=sequence.id,
            tokens=[],
            prompt_logprobs=_prompt_logprobs(sequence),
            embedding=None if sequence.pool is None else _packed(sequence.pool.mean()),
            finish_reason="length",
            cached_tokens=sequence.cached_tokens,
            queued=sequence.queued_seconds,
        )
    scores = _prompt_logprobs(sequence) if first else None
    sequence.tokens.append(sampled.token)
    return Output(
        id=sequence.id,
        tokens=[sampled.token],
        prompt_logprobs=scores,
        logprobs=None if sampled.logprob is None else [sampled.logprob],
        finish_reason=_finish_reason(sequence, sampled, max_model_len),
        stop_token=sampled.token if sampled.stopped else None,
        cached_tokens=sequence.cached_tokens if first else None,
        queued=sequence.queued_seconds if first else None,
    )


def _prompt_logprobs(sequence: Sequence) -> PromptLogprobs | None:
    """Return the scores of the whole prompt, packed, and take them from the sequence."""
    if not sequence.request.scores_prompt:
        return None
    if not sequence.scores:
        return PromptLogprobs(top=0, logprobs=b"", ranks=b"", top_ids=b"", top_logprobs=b"")
    scored = join(sequence.scores)
    assert len(scored) == len(sequence.request.prompt) - 1
    sequence.scores = []
    return PromptLogprobs(
        top=scored.top_ids.shape[1],
        logprobs=_packed(scored.logprobs),
        ranks=_packed(scored.ranks),
        top_ids=_packed(scored.top_ids),
        top_logprobs=_packed(scored.top_logprobs),
    )


def _packed(numbers: NDArray[np.float32] | NDArray[np.int32]) -> bytes:
    return numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()


def failure(sequence: Sequence, error: str, *, of_request: bool) -> Output:
    """The last message of a request that failed; ``of_request`` if that is its own fault."""
    return Output(
        id=sequence.id,
        tokens=[],
        finish_reason="error",
        error=error,
        fault="request" if of_request else "engine",
    )


def ends_with_next(sequence: Sequence, max_model_len: int) -> bool:
    """Return whether ``sequence`` ends with its next token, whichever token that is."""
    return _certain_end(sequence, 1, max_model_len) is not None


def _finish_reason(sequence: Sequence, sampled: Sampled, max_model_len: int) -> FinishReason | None:
    if sampled.stopped or sampled.grammar_finished:
        return "stop"
    return _certain_end(sequence, 0, max_model_len)


def _certain_end(sequence: Sequence, more: int, max_model_len: int) -> FinishReason | None:
    """Return why ``sequence`` ends after ``more`` tokens that are no stop tokens, if it does."""
    if (
        sequence.generated + more >= sequence.request.sampling.max_tokens
        or len(sequence.tokens) + more >= max_model_len
    ):
        return "length"
    return None if sequence.request.hand_over is None else "handed_over"
