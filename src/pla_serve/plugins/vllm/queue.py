"""vLLM's queue of waiting requests, of which a step sees only those that it may admit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus


class HeldQueue(RequestQueue):
    """Holds every waiting request; is false, and has no first one, unless some are on offer.

    vLLM's admission loop goes on while ``bool(queue)``, looks at the first and pops it, or leaves
    it and stops; ``len`` counts unfinished requests. So a request that is not on offer waits
    without being lost. What is on offer is set before a step (`offer`) and withdrawn after it.

    Requests are the *urgent*, which lost their KV memory or have something of vLLM's to wait for,
    and the others, which a policy orders.
    """

    def __init__(self) -> None:
        self._held: dict[str, Request] = {}
        self._urgent: dict[str, Request] = {}
        self._offers: deque[Request] = deque()
        self._arrived: list[Request] = []

    def offer(self, requests: Iterable[Request]) -> None:
        """Let the next step admit these requests, in this order."""
        self._offers = deque(requests)

    def withdraw(self) -> None:
        """Offer no requests any more, because the step is over."""
        self._offers.clear()

    def take_arrivals(self) -> list[Request]:
        """Return the requests that were added since the last call, without urgent ones."""
        arrived = [request for request in self._arrived if request.request_id in self._held]
        self._arrived = []
        return [request for request in arrived if request.request_id not in self._urgent]

    @property
    def urgent(self) -> list[Request]:
        """Urgent requests, the last preempted first, as vLLM resumes them."""
        return list(reversed(self._urgent.values())) if self._urgent else []

    def get(self, request_id: str) -> Request | None:
        """Return a waiting request, whether on offer or not; None if it is unknown."""
        return self._held.get(request_id)

    def holds(self, request: Request) -> bool:
        """Whether this object waits, and not another request with the same id."""
        return self._held.get(request.request_id) is request

    def add_request(self, request: Request) -> None:
        self._held[request.request_id] = request
        if request.status in _POLICY_ORDERS:
            self._arrived.append(request)
        else:
            self._urgent[request.request_id] = request

    def pop_request(self) -> Request:
        if not self._offers:
            raise IndexError("pop from a queue with nothing on offer")
        request = self._offers.popleft()
        self._forget(request)
        return request

    def peek_request(self) -> Request:
        if not self._offers:
            raise IndexError("peek from a queue with nothing on offer")
        return self._offers[0]

    def prepend_request(self, request: Request) -> None:
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put back requests that a step has skipped."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        if request.request_id not in self._held:
            raise ValueError(f"{request.request_id} is not in the queue")
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove requests. Unknown ones are ignored: vLLM removes them from both of its queues."""
        gone = [request for request in requests if request.request_id in self._held]
        for request in gone:
            self._forget(request)
        if gone and self._offers:
            ids = {request.request_id for request in gone}
            self._offers = deque(r for r in self._offers if r.request_id not in ids)

    def __bool__(self) -> bool:
        return bool(self._offers)

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Request]:
        """Yield all waiting requests, urgent ones first, the others in order of arrival."""
        urgent = self.urgent
        yield from urgent
        for request_id, request in self._held.items():
            if request_id not in self._urgent:
                yield request

    def _forget(self, request: Request) -> None:
        del self._held[request.request_id]
        self._urgent.pop(request.request_id, None)


_POLICY_ORDERS = (
    RequestStatus.WAITING,
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
)
