"""Flags that define tiers, and say which keys have which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pla_serve.flags import Flag
from pla_serve.policy.knobs import check_knobs
from pla_serve.policy.tiers import FORM, USUAL, Tier, tiers_by_name

TIERS = "Tiers"


@dataclass(frozen=True, slots=True)
class TierOptions:
    """Tiers of a server.

    Example: ``TierOptions(("interactive:ttft=300ms,tpot=40ms", "batch"), ("sk-night=batch",))``.

    Raises:
        ValueError: a tier is not well formed, or a key has none that is defined.
    """

    tiers: Annotated[
        tuple[str, ...],
        Flag(
            "A tier that requests may ask for as service_tier, with what is promised to them: the "
            "time to the first token, and from one token to the next. Requests whose targets are "
            "predicted not to be kept get a 429. A tier without targets is bulk work: it waits. "
            f"One named {USUAL} is for requests that name none. Repeat it for each tier.",
            panel=TIERS,
            name="--tier",
            metavar=FORM,
        ),
    ] = ()
    key_tiers: Annotated[
        tuple[str, ...],
        Flag(
            "Tier of the requests of an API key that name none; repeat it for several keys.",
            panel=TIERS,
            name="--key-tier",
            metavar="KEY=NAME",
            variable="PLA_SERVE_KEY_TIER",
        ),
    ] = ()

    def __post_init__(self) -> None:
        check_knobs(self)
        names = [USUAL, *self.by_name]
        for number, text in enumerate(self.key_tiers, 1):
            key, equals, name = text.rpartition("=")
            if not (key and equals) or name not in names:
                raise ValueError(
                    f"number {number} of --key-tier must be KEY=NAME, where NAME is one of "
                    f"{', '.join(names)}"
                )

    @property
    def by_name(self) -> dict[str, Tier]:
        """The tiers that are defined."""
        return tiers_by_name(self.tiers)

    def of_keys(self, keys: Sequence[str]) -> dict[int, str]:
        """Return the names of tiers by the places of their keys among ``keys``.

        Raises:
            ValueError: a tier is for a key that is not among them, or has one already.
        """
        found: dict[int, str] = {}
        for number, text in enumerate(self.key_tiers, 1):
            key, _, name = text.rpartition("=")
            if key not in keys:
                raise ValueError(
                    f"number {number} of --key-tier is for a key that no --api-key names"
                )
            place = keys.index(key)
            if place in found:
                raise ValueError(f"number {number} of --key-tier is for a key that has a tier")
            found[place] = name
        return found
