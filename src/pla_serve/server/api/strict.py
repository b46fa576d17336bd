"""Strict models of requests: they refuse coercion, NaN and unknown fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """A JSON object of a request.

    Clients send null for fields that they leave out, so a null of an optional field is dropped.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _few_fields(cls, value: Any, validate: Any) -> Any:
        """Refuse an object of many unknown fields at once: each would be an error of its own."""
        if not isinstance(value, dict):
            return validate(value)
        known = {field.alias or name: field for name, field in cls.model_fields.items()}
        if len(value) > len(known):
            unknown = next(str(name) for name in value if name not in known)[:200]
            raise refuse(unknown, f"{unknown} is not supported")
        if None in value.values():
            value = {
                name: each
                for name, each in value.items()
                if each is not None or name not in known or known[name].is_required()
            }
        return validate(value)


def refuse(param: str, message: str) -> PydanticCustomError:
    """Return a validation error that the client gets as `unsupported_parameter`."""
    return PydanticCustomError("unsupported", "{reason}", {"reason": message, "param": param})


def wrong(param: str, message: str) -> PydanticCustomError:
    """Return an error about fields that contradict each other; ``param`` is the one to correct."""
    return PydanticCustomError("wrong", "{reason}", {"reason": message, "param": param})


def at_most(entries: int) -> Callable[[Any], Any]:
    """Return a validator that refuses objects with more entries before it looks at them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"at most {entries} entries, not {len(value)}")
        return value

    return check
