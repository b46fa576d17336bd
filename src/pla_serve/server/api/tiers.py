"""Which tier a request is of."""

from __future__ import annotations

from pla_serve.policy.tiers import CHOSEN_BY_SERVER, USUAL, Tier
from pla_serve.server.api.guard import tenant_name
from pla_serve.server.errors import invalid
from pla_serve.server.settings import ServerSettings

HEADER = "x-service-tier"
"""Header by which a gateway names the tier of requests that do not."""


class TierChoice:
    """Finds the tier of each request of one server.

    The request's own ``service_tier`` comes first, then the header, then what the operator has
    given its API key, then the tier named default. ``auto`` leaves the choice to those that follow.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._tiers = settings.tiers.by_name
        self._of_tenants = {
            tenant_name(place): name
            for place, name in settings.tiers.of_keys(settings.api_keys).items()
        }

    @property
    def any(self) -> bool:
        """Whether tiers are defined."""
        return bool(self._tiers)

    def of(self, asked: str | None, header: str | None, tenant: str) -> Tier | None:
        """Return the tier of a request; None for the default where that is not defined.

        Args:
            asked: its ``service_tier``.
            header: what `HEADER` says.
            tenant: of its API key.

        Raises:
            ApiError: 400, there is no tier of that name.
        """
        named = [(asked, "service_tier"), (header, HEADER)]
        for name, place in named:
            if name is not None and name != CHOSEN_BY_SERVER:
                return self._named(name, place)
        return self._named(self._of_tenants.get(tenant, USUAL), "service_tier")

    def _named(self, name: str, place: str) -> Tier | None:
        tier = self._tiers.get(name)
        if tier is None and name != USUAL:
            names = dict.fromkeys([CHOSEN_BY_SERVER, USUAL, *self._tiers])
            raise invalid(
                f"there is no tier {name[:64]!r}; this server has {', '.join(names)}", place
            )
        return tier
