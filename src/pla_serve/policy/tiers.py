"""A tier is what an operator promises to a kind of request.

interactive = parse_tier("interactive:ttft=300ms,tpot=40ms")
batch = parse_tier("batch")  # promises nothing: its requests wait, and are not refused for it
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pla_serve.policy.decodes import LOOSE_TARGET
from pla_serve.policy.protocol import ServiceLevel

MOST_TIERS = 32
"""A server has at most so many tiers, because each has metrics of its own."""
USUAL = "default"
"""Requests have this tier if they name none and nobody has given them one. It need not be defined:
then it promises nothing, and targets are those of the server."""
CHOSEN_BY_SERVER = "auto"
"""A request says this to leave the choice to the server; no tier has this name."""
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
UNITS = {"ms": 1e-3, "s": 1.0}
RANGES = {"ttft": (1e-3, 1e6), "tpot": (1e-3, 1e3)}
"""Least and most seconds of each target."""
FORM = "NAME[:ttft=300ms,tpot=40ms]"


@dataclass(frozen=True, slots=True)
class Tier:
    """A name, and targets in seconds; None promises nothing of that kind."""

    name: str
    ttft: float | None = None
    """It bounds the time from arrival to first token."""
    tpot: float | None = None
    """It bounds the time from one token to the next."""

    @property
    def service(self) -> ServiceLevel:
        """How its requests are admitted and ordered."""
        promises = self.ttft is not None or self.tpot is not None
        return ServiceLevel.PROMISED if promises else ServiceLevel.BULK

    @property
    def token_target(self) -> float | None:
        """TPOT target of its requests in seconds: that of bulk work is loose, and so finite."""
        return LOOSE_TARGET if self.service is ServiceLevel.BULK else self.tpot

    def __str__(self) -> str:
        """Text that `parse_tier` reads back as an equal tier."""
        targets = {"ttft": self.ttft, "tpot": self.tpot}
        given = [f"{key}={value:g}s" for key, value in targets.items() if value is not None]
        return f"{self.name}:{','.join(given)}" if given else self.name


@dataclass(frozen=True, slots=True)
class TierShare:
    """A tier, and its share of the requests of a workload."""

    tier: Tier
    share: float


def parse_tier(text: str) -> Tier:
    """Read a tier.

    Raises:
        ValueError: the text is not of the form `FORM`; the message says what is wrong with it.
    """
    name, colon, rest = text.partition(":")
    if not NAME.fullmatch(name) or name == CHOSEN_BY_SERVER:
        raise ValueError(
            f"{name!r} cannot name a tier; a name has at most 32 lower-case letters, digits, - and "
            f"_, begins with a letter, and is not {CHOSEN_BY_SERVER}"
        )
    targets: dict[str, float] = {}
    for pair in rest.split(",") if colon else ():
        key, _, value = pair.partition("=")
        if key not in RANGES:
            raise ValueError(f"tier {name} has no target {key!r}; write {FORM}")
        if key in targets:
            raise ValueError(f"tier {name} has two targets {key}; drop one")
        targets[key] = _seconds(name, key, value)
    return Tier(name, targets.get("ttft"), targets.get("tpot"))


def parse_tier_share(text: str) -> TierShare:
    """Read a tier of a workload, ``NAME[:ttft=300ms,tpot=40ms,share=0.3]``; the share is 1 if none.

    Shares are weights: each tier gets its own over the sum of all.

    Raises:
        ValueError: the text has another form, or the share is not above 0.
    """
    name, _, rest = text.partition(":")
    pairs = [pair for pair in rest.split(",") if pair]
    shares = [pair.removeprefix("share=") for pair in pairs if pair.startswith("share=")]
    targets = ",".join(pair for pair in pairs if not pair.startswith("share="))
    tier = parse_tier(f"{name}:{targets}" if targets else name)
    try:
        (share,) = [float(number) for number in shares] or [1.0]
    except ValueError:
        raise ValueError(f"tier {name} needs one share, a number such as share=0.3") from None
    if not 0 < share < float("inf"):
        raise ValueError(f"the share of tier {name} must be above 0 and finite, not {share}")
    return TierShare(tier, share)


def tiers_by_name(texts: Iterable[str]) -> dict[str, Tier]:
    """Read the tiers of a server.

    Raises:
        ValueError: one is not well formed, two have one name, or there are too many.
    """
    found: dict[str, Tier] = {}
    for text in texts:
        tier = parse_tier(text)
        if tier.name in found:
            raise ValueError(f"two tiers are named {tier.name}; drop one")
        found[tier.name] = tier
    if len(found) > MOST_TIERS:
        raise ValueError(f"{len(found)} tiers are too many; at most {MOST_TIERS} may be defined")
    return found


def _seconds(name: str, key: str, text: str) -> float:
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{key} of tier {name} is a duration with its unit, such as 300ms or 1.5s, not {text!r}"
        )
    seconds = float(match[1]) * UNITS[match[2]]
    least, most = RANGES[key]
    if not least <= seconds <= most:
        raise ValueError(f"{key} of tier {name} must lie between {least:g} and {most:g} s")
    return seconds
