"""``/drain``: notice to a server that it will end, and the withdrawal of that notice."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.generations import client_of
from pla_serve.server.api.guard import Traffic
from pla_serve.server.api.link_access import LinkAccess
from pla_serve.server.api.routes import Operation
from pla_serve.server.api.strict import Strict
from pla_serve.server.errors import ApiError, json_response

PATH = "/drain"
MOST_GRACE_SECONDS = 3600.0


class DrainNotice(Strict):
    """When the server will end."""

    grace_seconds: Annotated[float, Field(ge=0, le=MOST_GRACE_SECONDS)]
    """Seconds from now. A router moves away by then what runs here."""


def drain_operations(traffic: Traffic, bodies: BodyReader, access: LinkAccess) -> list[Operation]:
    """Return the operations, for those who may open a link: clients' keys do not drain a server."""

    def check(request: Request) -> None:
        if (refusal := access.refusal(request.scope)) is not None:
            raise refusal
        if traffic.ending:
            raise ApiError(409, "the server is shutting down; that cannot be changed any more")

    async def give_notice(request: Request) -> Response:
        check(request)
        with bodies.upload(client_of(request)) as upload:
            notice = await upload.read_json(request, DrainNotice)
        traffic.give_notice(notice.grace_seconds)
        return json_response(_state(traffic), 202)

    async def withdraw(request: Request) -> Response:
        check(request)
        traffic.withdraw_notice()
        return json_response(_state(traffic))

    told = {"409": "The server is ending already.", "403": "Not who may open a link."}
    return [
        Operation(
            "POST",
            PATH,
            give_notice,
            "Takes no new requests from now on, and tells routers when the server will end.",
            body=DrainNotice,
            answers=told,
        ),
        Operation("DELETE", PATH, withdraw, "Takes requests again.", answers=told),
    ]


def _state(traffic: Traffic) -> dict[str, object]:
    left = traffic.ends_in
    state = {"status": "draining" if traffic.draining else "ready"}
    return {**state, "ends_in": left, "requests": traffic.in_flight}
