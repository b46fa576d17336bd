"""Between our messages and what other kinds of servers say."""

from __future__ import annotations

from contextlib import suppress

import httpx
import msgspec

from pla_serve.wire.engine import AddRequest, Output, Rejected, TokenLogprob

RETRY_SECONDS = 1.0
"""After a refusal that may be taken back, if the server does not say."""


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


def failure(id: str, message: str, code: int | None, begun: bool) -> Output | Rejected:
    """An error instead of tokens: the request's own fault if ``code`` says so and none came."""
    if not begun and code is not None and 400 <= code < 500:
        return Rejected(id=id, reason=message, retry_after=RETRY_SECONDS if code == 429 else None)
    return Output(id=id, tokens=[], finish_reason="error", error=message)


def refusal(id: str, response: httpx.Response, content: bytes) -> Rejected:
    """What the server said no with; it may change its mind about 429 and 5xx."""
    try:
        said = msgspec.json.decode(content)
        error = said.get("error", said)
        reason = error["message"] if isinstance(error, dict) else str(error)
    except (msgspec.DecodeError, AttributeError, KeyError):
        reason = content[:500].decode(errors="replace")
    later = None
    if response.status_code == 429 or response.status_code >= 500:
        try:
            later = float(response.headers.get("retry-after", RETRY_SECONDS))
        except ValueError:
            later = RETRY_SECONDS
    return Rejected(id=id, reason=f"{reason} (HTTP {response.status_code})", retry_after=later)


def samples(text: str) -> dict[str, float]:
    """Prometheus text as sums by name; of an ``_info`` metric also its labels with numbers."""
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
