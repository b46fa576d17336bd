"""Between our requests and those of other kinds of servers."""

from __future__ import annotations

from pla_serve.engine.messages import AddRequest, TokenLogprob


class Unmappable(Exception):
    """A parameter that this kind of server does not have. The message names it."""


def check_continuation(server: str, request: AddRequest) -> None:
    """Raises:
    Unmappable: ``server`` cannot go on with what another instance began.
    """
    sampling = request.sampling
    if request.generated and (sampling.presence_penalty or sampling.frequency_penalty):
        raise Unmappable(
            f"{server} counts presence_penalty and frequency_penalty from the start of its own "
            "output, so it cannot go on with an answer that another instance began"
        )
    if request.generated and sampling.grammar is not None:
        raise Unmappable(
            f"{server} begins every grammar at its start, so it cannot go on with an answer that "
            "another instance began"
        )


def rank_among(logprob: float, others: list[tuple[int, float]], most: int) -> TokenLogprob:
    """With the ``most`` likely ones. Ranks beyond those that are known are the first unknown."""
    likely = sorted(others, key=lambda item: -item[1])
    rank = 1 + sum(value > logprob for _, value in likely)
    return TokenLogprob(logprob, rank, likely[:most])
