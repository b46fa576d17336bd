"""Reads the JSON bodies of requests: bounded in size, time and memory, strict in what is JSON."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from pla_serve.server.bounded_json import decode
from pla_serve.server.errors import ApiError, invalid, over_capacity, unavailable, unsupported
from pla_serve.server.limits import Limits

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")

INLINE_BYTES = 16 * 2**10
"""Larger bodies are decoded and validated in a thread: it may take a millisecond for each."""
FREE_BYTES = 64 * 2**10
"""Bodies up to this size do not count as uploads."""


class BodyReader:
    """Reads bodies, and keeps the sum of the large ones within bounds.

    One thread decodes large bodies, so that a flood of them takes one core and the memory of one.
    Belongs to one event loop.
    """

    def __init__(self, max_body_bytes: int, limits: Limits) -> None:
        self.max_body_bytes = max_body_bytes
        self.limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="body")
        self._held: Counter[str] = Counter()
        self._total = 0

    def upload(self, client: str) -> Upload:
        """The body of one request of ``client``; it counts until `Upload.release`."""
        return Upload(self, client)

    def hold(self, client: str, size: int) -> None:
        """Count ``size`` bytes more; negative once they are gone.

        Raises:
            ApiError: 429, the client has too much under way; 503, all have.
        """
        if size > 0 and self._total + size > self.limits.max_upload_bytes:
            raise unavailable("too many large requests are being read; try again", 1.0)
        if size > 0 and self._held[client] + size > self.limits.max_upload_bytes // 2:
            raise over_capacity("too many large requests of yours are being read", 1.0)
        self._total += size
        self._held[client] += size
        if not self._held[client]:
            del self._held[client]

    async def run(self, work: Callable[[], Result]) -> Result:
        """``work()``, in the thread for large bodies."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Upload:
    """One body, from its first byte until its request is admitted. A context manager."""

    def __init__(self, reader: BodyReader, client: str) -> None:
        self.size = 0
        """Bytes read."""
        self._reader = reader
        self._client = client
        self._charged = 0

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *reason: object) -> None:
        self.release()

    def release(self) -> None:
        """The request is admitted or refused: what it holds is bounded elsewhere now."""
        if self._charged:
            self._reader.hold(self._client, -self._charged)
            self._charged = 0

    async def read_json(self, request: Request, model: type[Model]) -> Model:
        """The body as ``model``.

        Raises:
            ApiError: 400 malformed or invalid, 408 too slow, 413 too large, 415 not JSON, 429 and
                503 too much at once.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json")
        body = await self._read(request)
        return await self.run(lambda: validate(decode(body), model))

    def carry(self, size: int) -> None:
        """Count ``size`` bytes that the server adds to the body, such as earlier turns.

        Raises:
            ApiError: 413, they are too large together; 429 and 503, too much at once.
        """
        self.size += size
        if self.size > self._reader.max_body_bytes:
            raise _too_large(self._reader.max_body_bytes)
        self._charge()

    async def run(self, work: Callable[[], Result]) -> Result:
        """``work()``; in a thread if the body is large."""
        if self.size <= INLINE_BYTES:
            return work()
        return await self._reader.run(work)

    async def _read(self, request: Request) -> bytes:
        most, seconds = self._reader.max_body_bytes, self._reader.limits.body_seconds
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
            raise _too_large(most)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    self.size += len(part)
                    if self.size > most:
                        raise _too_large(most)
                    self._charge()
                    parts.append(part)
        except TimeoutError:
            raise too_slow(seconds) from None
        return b"".join(parts)

    def _charge(self) -> None:
        more = self.size - FREE_BYTES - self._charged
        if more > 0:
            self._reader.hold(self._client, more)
            self._charged += more


def validate(value: Any, model: type[Model]) -> Model:
    """Raises:
    ApiError: 400, with the first fault.
    """
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> ApiError:
    """Return the first fault, by the name that the client used."""
    first = error.errors(include_url=False, include_context=True, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    param = str(first["loc"][0])[:200] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return unsupported(where)
    if first["type"] in ("unsupported", "wrong"):
        code = "unsupported_parameter" if first["type"] == "unsupported" else None
        return invalid(first["msg"], first["ctx"]["param"], code)
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{where}: {message}" if where else message, param)


def too_slow(seconds: float) -> ApiError:
    """Return the refusal of a request whose body took longer than this."""
    return ApiError(408, f"the body did not arrive within {seconds:g} s")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")
