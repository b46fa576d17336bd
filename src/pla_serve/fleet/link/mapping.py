"""Translates between the messages of this project and those of other kinds of servers."""

from __future__ import annotations

from contextlib import suppress

import httpx
import msgspec
import numpy as np

from pla_serve.wire.engine import AddRequest, Output, PromptLogprobs, Rejected, TokenLogprob

RETRY_SECONDS = 1.0
"""``retry_after`` of a refusal for want of room, if the server does not give one."""
MOST_RETRY_SECONDS = 3600.0
"""Longest ``Retry-After`` that is believed."""
FAULTS_OF_REQUESTS = (400, 413, 422, 501)
"""HTTP statuses that mean that every server of this kind would refuse the request. 501 means that
the server lacks a feature that the request asks for."""


class Unmappable(Exception):
    """A parameter that this kind of server does not have. The message names it."""


def check_continuation(server: str, request: AddRequest) -> None:
    """Check that a server of another kind can continue a request that an instance has begun.

    Args:
        server: name of the kind of server, for the message.

    Raises:
        Unmappable: the server would not continue the request correctly.
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
    """Return a token's log probability with its rank and the ``most`` likeliest tokens.

    A token that is less likely than all of ``others`` gets the rank after theirs.
    """
    likely = sorted(others, key=lambda item: -item[1])
    rank = 1 + sum(value > logprob for _, value in likely)
    return TokenLogprob(logprob, rank, likely[:most])


def packed_scores(scores: list[TokenLogprob], top: int) -> PromptLogprobs:
    """Pack the scores of a prompt, from its second token on.

    Args:
        top: likeliest tokens that each place may have. If some place has fewer, all are cut to
            that, because rows are equally long.
    """
    top = min([top, *(len(each.top) for each in scores)])
    ids = [[token for token, _ in each.top[:top]] for each in scores]
    values = [[value for _, value in each.top[:top]] for each in scores]
    return PromptLogprobs(
        top=top,
        logprobs=np.array([each.logprob for each in scores], "<f4").tobytes(),
        ranks=np.array([each.rank for each in scores], "<i4").tobytes(),
        top_ids=np.array(ids, "<i4").tobytes(),
        top_logprobs=np.array(values, "<f4").tobytes(),
    )


def failure(id: str, message: str, code: int | None, begun: bool) -> Output | Rejected:
    """Map an error that a server sent in its stream instead of tokens.

    A server that has begun to stream and then answers 503 is up, but has no room for this request.
    """
    if not begun and code in FAULTS_OF_REQUESTS:
        return Rejected(id=id, reason=message, retry_after=None)
    if not begun and code in (429, 503):
        return Rejected(id=id, reason=message, retry_after=RETRY_SECONDS)
    return Output(id=id, tokens=[], finish_reason="error", error=message)


def refusal(id: str, response: httpx.Response, content: bytes) -> Output | Rejected:
    """Map an HTTP status other than 200.

    Returns:
        `Rejected` without a time if the request is at fault, and with one if the server has no
        room: 429, and 503 that says when to come back. Anything else is a failure of the server,
        which counts for its circuit.
    """
    status, again = response.status_code, response.headers.get("retry-after")
    reason = f"{_reason(content)} (HTTP {status})"
    if status in FAULTS_OF_REQUESTS:
        return Rejected(id=id, reason=reason, retry_after=None)
    if status == 429 or (status == 503 and again is not None):
        return Rejected(id=id, reason=reason, retry_after=_seconds(again))
    return Output(id=id, tokens=[], finish_reason="error", error=reason)


def _reason(content: bytes) -> str:
    """Return the message of an error's body, or the begin of a body of another form."""
    try:
        said = msgspec.json.decode(content)
        error = said.get("error", said)
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, KeyError):
        return content[:500].decode(errors="replace")


def _seconds(header: str | None) -> float:
    """Return the seconds of a ``Retry-After``; `RETRY_SECONDS` for a date or nonsense."""
    try:
        seconds = RETRY_SECONDS if header is None else float(header)
    except ValueError:
        return RETRY_SECONDS
    return seconds if 0 <= seconds <= MOST_RETRY_SECONDS else RETRY_SECONDS


def samples(text: str) -> dict[str, float]:
    """Parse Prometheus text: return the sum of each metric over its labels, by name.

    Numeric labels of a metric named ``*_info`` are returned as ``NAME.LABEL``.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line[0] == "#":
            continue
        head, _, value = line.rpartition(" ")
        name, _, labels = head.partition("{")
        with suppress(ValueError):
            found[name] = found.get(name, 0.0) + float(value)
        if name.endswith("_info"):
            for pair in labels.rstrip("}").split(","):
                label, _, number = pair.partition("=")
                with suppress(ValueError):
                    found[f"{name}.{label}"] = float(number.strip('"'))
    return found
