"""Ray Serve's request router with the decision of a fleet's router.

Ray pickles this module by value and sends it to every process that has a handle. So it holds the
router and nothing else, and whatever is decided is decided in modules that it imports.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from pla_serve.plugins.ray.calls import ReplicaCall
from pla_serve.plugins.ray.prompts import prompt_of
from pla_serve.plugins.ray.replicas import (
    DEFAULT_ROUTING,
    Assumptions,
    ReplicaChoice,
    RoutedPrompt,
    unpack_stats,
)
from pla_serve.policy.routing.registry import parse_routing


class PredictedRequestRouter(RequestRouter):
    """Sends each request where its first token is predicted to come soonest.

    For replicas of this project, which report their queues and costs, and for those of Ray Serve
    LLM, whose requests are recognised by ``messages`` or ``prompt``. Requests of any other kind may
    go to any replica. Keyword arguments (``request_router_kwargs``) are those of
    `initialize_state`.
    """

    def initialize_state(self, routing: str = DEFAULT_ROUTING, **assumed: Any) -> None:
        """Called by Ray once.

        Args:
            routing: a routing policy with its knobs, as ``pla-serve route --routing`` takes it.
            assumed: fields of `Assumptions`, for replicas that report nothing.

        Raises:
            ValueError: there is no such routing policy, or a field is out of range.
        """
        policy = None if routing == DEFAULT_ROUTING else parse_routing(routing)
        self._choice = ReplicaChoice(time.monotonic, policy, Assumptions(**assumed))

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the chosen replica, and behind it the others, should it take no more requests."""
        prompt = None if pending_request is None else _prompt(pending_request)
        if pending_request is None or prompt is None:
            return [candidate_replicas]
        call = _call(pending_request)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        id = pending_request.metadata.internal_request_id
        leave_out = call.leave_out if call is not None else ()
        chosen = self._choice.choose(id, prompt, by_name.keys(), leave_out)
        if chosen is None:
            return [candidate_replicas]
        pending_request.future.add_done_callback(lambda future: self._unsent(id, future))
        if call is not None:
            call.seconds, call.short, call.replicas = chosen.seconds, chosen.short, len(by_name)
        others = [replica for name, replica in by_name.items() if name != chosen.replica]
        return [[by_name[chosen.replica]], others]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note where a request went, and ask to be told of its first token."""
        id, name = pending_request.metadata.internal_request_id, replica_id.unique_id
        if self._choice.charged_to(id) != name:  # otherwise the prompt need not be read again
            prompt = _prompt(pending_request)
            if prompt is None:
                return
            self._choice.sent(id, name, prompt)
        call = _call(pending_request)
        if call is not None:
            loop = asyncio.get_running_loop()  # Ray runs routers on a loop of their own
            call.replica = name
            call.on_first = lambda cached: _tell(loop, self._choice.first_token, id, cached)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Take a request off the accounts."""
        self._choice.ended(internal_request_id, replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that has died."""
        super().on_replica_actor_died(replica_id)
        self._keep()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas there are, and what they say."""
        super().update_replicas(replicas)
        self._keep()
        for replica in replicas:
            stats = unpack_stats(replica.routing_stats)
            if stats is not None:
                self._choice.said(replica.replica_id.unique_id, stats, time.time())

    def _keep(self) -> None:
        self._choice.keep({id.unique_id for id in self.curr_replicas})

    def _unsent(self, id: str, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            self._choice.ended(id)


def _call(pending: PendingRequest) -> ReplicaCall | None:
    """Return the call among a request's arguments; None if it is not one of ours."""
    calls = (each for each in _arguments(pending) if isinstance(each, ReplicaCall))
    return next(calls, None)


def _prompt(pending: PendingRequest) -> RoutedPrompt | None:
    """Return the prompt of a request; None if none of its arguments has one."""
    call = _call(pending)
    if call is not None:
        message = call.message
        return RoutedPrompt(len(message.prompt), call.chain, message.deadline)
    found = (prompt_of(argument) for argument in _arguments(pending))
    return next((prompt for prompt in found if prompt is not None), None)


def _arguments(pending: PendingRequest) -> tuple[Any, ...]:
    return (*pending.args, *pending.kwargs.values())


def _tell(loop: asyncio.AbstractEventLoop, call: Any, *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *arguments)
