"""What a sampled token means for its sequence, and what is said of it."""

from __future__ import annotations

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.sampling import Sampled
from pla_serve.wire.engine import FinishReason, Output


def take_token(sequence: Sequence, sampled: Sampled, max_model_len: int) -> Output:
    """Append the token to ``sequence``; the message that carries it, and why it ends, if it does.

    Args:
        max_model_len: most tokens of prompt and output together.
    """
    if sampled.error is not None:
        return Output(id=sequence.id, tokens=[], finish_reason="error", error=sampled.error)
    first = sequence.made == 0
    sequence.tokens.append(sampled.token)
    return Output(
        id=sequence.id,
        tokens=[sampled.token],
        logprobs=None if sampled.logprob is None else [sampled.logprob],
        finish_reason=_ends(sequence, sampled, max_model_len),
        stop_token=sampled.token if sampled.stopped else None,
        cached_tokens=sequence.cached_tokens if first else None,
        queued=sequence.queued_seconds if first else None,
    )


def ends_with_next(sequence: Sequence, max_model_len: int) -> bool:
    """Whether ``sequence`` ends with its next token, whatever that is."""
    return _certain_end(sequence, 1, max_model_len) is not None


def _ends(sequence: Sequence, sampled: Sampled, max_model_len: int) -> FinishReason | None:
    if sampled.stopped or sampled.grammar_finished:
        return "stop"
    return _certain_end(sequence, 0, max_model_len)


def _certain_end(sequence: Sequence, coming: int, max_model_len: int) -> FinishReason | None:
    """What ends it after ``coming`` more tokens, if no stop does before."""
    if (
        sequence.generated + coming >= sequence.request.sampling.max_tokens
        or len(sequence.tokens) + coming >= max_model_len
    ):
        return "length"
    return None if sequence.request.hand_over is None else "handed_over"
