"""Links to servers of other kinds: one HTTP stream a request, health and load by polling."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import msgspec

from pla_serve.fleet.link.bounded import (
    LEAST_LINE_BYTES,
    MOST_EVENT_BYTES,
    STREAM,
    BoundedTransport,
    read_error,
    read_lines,
)
from pla_serve.fleet.link.dialect import (
    NONSENSE,
    Broken,
    Dialect,
    read_event,
    read_facts,
    read_load,
)
from pla_serve.fleet.link.liveness import Backoff, Retries
from pla_serve.fleet.link.mapping import Unmappable, refusal, samples
from pla_serve.fleet.link.protocol import (
    Inbound,
    InstanceFacts,
    InstanceReport,
    LinkDown,
    LinkEvents,
    LinkRefused,
    LossCause,
    RequestAnswer,
    Role,
)
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Begin,
    Output,
    Rejected,
    Release,
    Reserve,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LIVENESS_SECONDS = 5.0
"""Longest time for an answer to ``/health``, which such servers give between other work."""
STALL_SECONDS = 60.0
"""A server that has requests and sends nothing for any of them for this long counts as hung."""


@dataclass(frozen=True, slots=True)
class HttpLinkTimes:
    """How long a link to a server of another kind waits, in seconds.

    Attributes:
        liveness: longest time for an answer to ``/health``.
        stall: silence on all streams of the server that means a hang.
        poll: time between two looks at health and load.
        backoff: pauses between attempts to connect.
    """

    liveness: float = LIVENESS_SECONDS
    stall: float = STALL_SECONDS
    poll: float = POLL_SECONDS
    backoff: Backoff = field(default_factory=Backoff)


class HttpLink:
    """A `Link` to a server of another kind, whose role is known to this router only.

    A connection that fails in the middle of an answer counts as the loss of the whole server: all
    requests move, and it is back as soon as it answers ``/health``.

    Args:
        url: of the server, ``http://host:port``.
        api_key: sent as a bearer token.
        times: how long it waits for what.
    """

    def __init__(
        self,
        url: str,
        events: LinkEvents,
        dialect: Dialect,
        *,
        api_key: str | None = None,
        times: HttpLinkTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._events = events
        self._dialect = dialect
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._times = times = times or HttpLinkTimes()
        self._clock = clock
        self._closing = asyncio.Event()
        self._client: httpx.AsyncClient | None = None
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._ended: asyncio.Future[str] | None = None
        self._role: Role = "mixed"
        self._draining = False
        self._heard = 0.0
        self._retries = Retries(self._url, times.backoff, self._closing)
        self._facts: InstanceFacts | None = None
        self._report: InstanceReport | None = None
        self._connected = False

    @property
    def url(self) -> str:
        return self._url

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def facts(self) -> InstanceFacts | None:
        return self._facts

    @property
    def last_report(self) -> InstanceReport | None:
        return self._report

    def set_role(self, role: Role) -> None:
        self._role = role

    def drain(self, on: bool) -> None:
        self._draining = on

    def send(self, message: Inbound) -> None:
        if not self._connected:
            raise LinkDown(f"there is no connection to {self._url}")
        if isinstance(message, AddRequest):
            self._start(message)
        elif isinstance(message, AbortRequest):
            task = self._requests.pop(message.id, None)
            if task is not None:
                task.cancel()
        elif not isinstance(message, Release):
            id = message.request.id if isinstance(message, Reserve) else message.id
            what = "begin" if isinstance(message, Begin) else type(message).__name__.lower()
            self._reject(id, f"{self._dialect.kind} servers have no KV transfer ({what})", None)

    def _start(self, request: AddRequest) -> None:
        if request.id in self._requests:
            self._reject(request.id, f"request {request.id} runs already", None)
            return
        if not self._requests:
            self._heard = self._clock()
        task = asyncio.create_task(self._run(request))
        task.add_done_callback(self._done)
        self._requests[request.id] = task

    async def run(self) -> None:
        while not self._closing.is_set():
            reason = await self._live()
            if not self._closing.is_set():
                await self._retries.pause(reason)

    async def close(self) -> None:
        self._closing.set()
        self._end("this router closed the link")

    async def _live(self) -> str:
        """Serve one connected period, from the first answer to the loss; return why it ended."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        inner = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        async with httpx.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            timeout=httpx.Timeout(self._times.liveness, pool=None),
            transport=BoundedTransport(inner, self._times.liveness),
            trust_env=False,
        ) as client:
            try:
                facts, metrics = await self._introduce(client)
            except (httpx.HTTPError, Broken) as error:
                return f"cannot connect: {str(error) or type(error).__name__}"
            self._client = client
            self._facts = facts
            ended = self._ended = asyncio.get_running_loop().create_future()
            self._connected = True
            self._retries.connected()
            log.info("linked to %s", self._url)
            self._events.connected(self, facts)
            self._tell(metrics)
            watch = asyncio.create_task(self._watch(client, metrics))
            reason = "the link was cancelled"
            try:
                await asyncio.wait({ended, watch}, return_when=asyncio.FIRST_COMPLETED)
                reason = watch.result() if watch.done() else ended.result()
            finally:
                self._lose(reason)
                watch.cancel()
                with suppress(asyncio.CancelledError):
                    await watch
        return reason

    async def _introduce(
        self, client: httpx.AsyncClient
    ) -> tuple[InstanceFacts, Mapping[str, float]]:
        """Wait for a healthy server; return its facts and metrics."""
        (await client.get("/health")).raise_for_status()
        response = await client.get("/v1/models")
        if response.status_code in (401, 403):
            raise LinkRefused(
                f"{self._url} refused the link: HTTP {response.status_code}. The API key has to be "
                "one of its keys."
            )
        response.raise_for_status()
        try:
            model = response.json()["data"][0]
            if not isinstance(model["max_model_len"], int):
                raise TypeError
        except NONSENSE:
            raise Broken("/v1/models does not say how long a prompt may be") from None
        metrics = await self._samples(client)
        started = metrics.get("process_start_time_seconds")
        boot = f"{started}" if started is not None else f"link-{self._clock()}"
        return await read_facts(self._dialect, client, model, metrics, boot), metrics

    async def _samples(self, client: httpx.AsyncClient) -> Mapping[str, float]:
        """Return the server's metrics; none where they are not offered.

        vLLM redirects to the path with a slash. No redirect is followed, or a server could have the
        router ask other machines.
        """
        response = await client.get("/metrics")
        if response.is_redirect:
            response = await client.get("/metrics/")
        return await asyncio.to_thread(samples, response.text) if response.is_success else {}

    async def _watch(self, client: httpx.AsyncClient, metrics: Mapping[str, float]) -> str:
        """Poll until the server is lost, and return why. ``metrics``: the last that are known."""
        while True:
            await asyncio.sleep(self._times.poll)
            if self._requests and self._clock() - self._heard > self._times.stall:
                return f"nothing came for {len(self._requests)} requests in {self._times.stall:g} s"
            try:
                (await client.get("/health")).raise_for_status()
                with suppress(httpx.TimeoutException):  # it lives; its load is as it was
                    metrics = await self._samples(client)
            except httpx.HTTPStatusError as error:
                return f"/health says {error.response.status_code}"
            except httpx.HTTPError as error:
                return f"no answer to /health: {str(error) or type(error).__name__}"
            self._tell(metrics)

    def _tell(self, metrics: Mapping[str, float]) -> None:
        self._report = InstanceReport(
            role=self._role,
            ready=True,
            draining=self._draining,
            kv_tokens=self._facts.kv_tokens if self._facts else 0,
            requests=len(self._requests),
            load=read_load(self._dialect, metrics),
        )
        self._events.report(self, self._report)

    async def _run(self, request: AddRequest) -> None:
        """Run one request from its post to its last token."""
        assert self._client is not None
        assert self._facts is not None
        try:
            body = self._dialect.body(request, self._facts.model)
            await self._stream(self._client, request, msgspec.json.encode(body))
        except Unmappable as error:
            self._answered(Rejected(id=request.id, reason=str(error), retry_after=None))
        except (httpx.HTTPError, Broken) as error:
            self._end(f"an answer broke off: {str(error) or type(error).__name__}")
        finally:
            if self._requests.get(request.id) is asyncio.current_task():
                del self._requests[request.id]

    async def _stream(self, client: httpx.AsyncClient, request: AddRequest, body: bytes) -> None:
        post = client.stream(
            "POST",
            self._dialect.path,
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(self._times.liveness, read=None, pool=None),
            extensions=STREAM,
        )
        async with post as response:
            if not response.is_success:
                content = await read_error(response, self._times.liveness)
                self._answered(refusal(request.id, response, content))
                return
            answer = self._dialect.answer(request)
            accepted = False  # such servers check requests after they have said 200
            left = max(1, request.sampling.max_tokens - request.generated)
            idle = 0
            async for line in read_lines(response):
                idle += max(len(line), LEAST_LINE_BYTES)
                if idle > MOST_EVENT_BYTES:
                    raise Broken(f"{idle} bytes without a token")
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                message = await read_event(answer, line[6:])
                self._heard = self._clock()
                if message is None:
                    continue
                idle = 0
                if isinstance(message, Output):
                    if not accepted:
                        self._answered(Accepted(request.id, None))
                    left -= len(message.tokens)
                    if left < 0:
                        raise Broken("more tokens than were asked for")
                accepted = True
                self._answered(message)
                if isinstance(message, Rejected) or message.finish_reason is not None:
                    return
        raise Broken("the stream ended before the answer did")

    def _answered(self, message: RequestAnswer) -> None:
        """Pass an answer on to the owner, unless the request was aborted or moved."""
        if self._connected and self._requests.get(_id(message)) is asyncio.current_task():
            self._events.message(self, message)

    def _reject(self, id: str, reason: str, retry_after: float | None) -> None:
        """Refuse a request, in a later turn of the loop: callers of `send` expect no answer yet."""

        def tell() -> None:
            if self._connected:
                rejected = Rejected(id=id, reason=reason, retry_after=retry_after)
                self._events.message(self, rejected)

        asyncio.get_running_loop().call_soon(tell)

    def _done(self, task: asyncio.Task[None]) -> None:
        """End the link if a request's task failed, so that no request is left without an end."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a request failed", self._url, exc_info=error)
            self._end(f"the link failed: {error!r}")

    def _end(self, reason: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(reason)

    def _lose(self, reason: str) -> None:
        self._connected = False
        self._report = None
        for task in self._requests.values():
            task.cancel()
        self._requests.clear()
        log.log(
            logging.INFO if self._closing.is_set() else logging.WARNING,
            "lost %s: %s",
            self._url,
            reason,
        )
        self._events.lost(self, reason, LossCause.BROKEN)


def _id(message: RequestAnswer) -> str:
    return message.id
