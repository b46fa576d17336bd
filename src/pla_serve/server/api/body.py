"""Reads a JSON request body: bounded in size and time, strict in what it takes for JSON."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from pla_serve.server.api.errors import ApiError, invalid, unsupported

Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: Request, model: type[Model], max_bytes: int, seconds: float) -> Model:
    """The body as ``model``.

    Raises:
        ApiError: 400 malformed or invalid, 408 too slow, 413 too large, 415 not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json")
    return validate(decode(await read(request, max_bytes, seconds)), model)


async def read(request: Request, max_bytes: int, seconds: float) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s") from None
    return b"".join(parts)


def decode(body: bytes) -> Any:
    """msgspec refuses NaN, Infinity, numbers out of range and bad UTF-8; the stdlib does not."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


def validate(value: Any, model: type[Model]) -> Model:
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


def _explain(error: ValidationError) -> ApiError:
    """The first fault, by the name that the client used."""
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


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")
