"""Passes the requests of the API's sessions to whatever places them on instances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pla_serve.server.engine.session import AnswerReceiver
from pla_serve.wire.engine import AddRequest, Inbound


class RequestTaker(Protocol):
    """Takes requests of all tenants, and passes answers to their receivers."""

    def submit(self, message: AddRequest, receiver: AnswerReceiver, tenant: str) -> None: ...

    def close(self, id: str) -> None:
        """End a request, also where it runs; ids that are unknown or have ended are ignored."""


class TenantRoutes:
    """Routes the sessions of one tenant; implements `MessageRoutes`.

    Args:
        taker: gets the requests.
        check_open: raises `EngineDiedError` once no more requests are taken.
    """

    def __init__(self, taker: RequestTaker, check_open: Callable[[], None], tenant: str) -> None:
        self._taker = taker
        self._check_open = check_open
        self._tenant = tenant
        self._receivers: dict[str, AnswerReceiver] = {}

    def open_route(self, id: str, session: AnswerReceiver) -> None:
        self._check_open()
        self._receivers[id] = session

    def close_route(self, id: str) -> None:
        """End a request. If it runs it is aborted here, and a later `AbortRequest` does nothing."""
        self._receivers.pop(id, None)
        self._taker.close(id)

    def send(self, message: Inbound) -> None:
        if isinstance(message, AddRequest):
            self._taker.submit(message, self._receivers[message.id], self._tenant)
