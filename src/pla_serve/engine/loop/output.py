"""Turns a sampled token into a message, and decides whether its sequence ends with it."""

from __future__ import annotations

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.sampling import Sampled
from pla_serve.wire.engine import FinishReason, Output


def take_token(sequence: Sequence, sampled: Sampled, max_model_len: int) -> Output:
    """Append the token to ``sequence`` and return the message that carries it.

    The message has a finish reason if the sequence ends with the token. Without a token, because
    the logits were broken or a grammar excludes all tokens, the reason is "error".

    Args:
        max_model_len: most tokens of prompt and output together.
    """
    if sampled.error is not None:
        return failure(sequence, sampled.error, of_request=sampled.of_request)
    first = sequence.made == 0
    sequence.tokens.append(sampled.token)
    return Output(
        id=sequence.id,
        tokens=[sampled.token],
        logprobs=None if sampled.logprob is None else [sampled.logprob],
        finish_reason=_finish_reason(sequence, sampled, max_model_len),
        stop_token=sampled.token if sampled.stopped else None,
        cached_tokens=sequence.cached_tokens if first else None,
        queued=sequence.queued_seconds if first else None,
    )


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
