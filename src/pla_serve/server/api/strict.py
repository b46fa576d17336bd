"""Strict models of requests: they refuse coercion, NaN and unknown fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """A JSON object of a request.

    Clients send null for fields that they leave out, so a null of an optional field is dropped.
    JSON has one kind of numbers, so 4.0 is a whole number here, as for OpenAI and vLLM.
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
        if any(isinstance(each, float | list) for each in value.values()):
            value = {
                name: _as_whole(each, known[name].annotation) if name in known else each
                for name, each in value.items()
            }
        if None in value.values():
            value = {
                name: each
                for name, each in value.items()
                if each is not None or name not in known or known[name].is_required()
            }
        return validate(value)


def _as_whole(value: Any, annotation: Any) -> Any:
    """Return a float as an int if its field takes whole numbers only; so in a list of them."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and _takes_whole(annotation) else value
    if isinstance(value, list) and _takes_whole_lists(annotation):
        return whole_numbers(value)
    return value


def whole_numbers(items: list[Any]) -> list[Any]:
    """Return a list in which whole numbers such as 4.0 are integers: JSON has no other ones."""
    if float not in set(map(type, items)):
        return items
    return [int(each) if type(each) is float and each.is_integer() else each for each in items]


@cache
def _takes_whole(annotation: Any) -> bool:
    kinds = set(_kinds(annotation))
    return int in kinds and float not in kinds


@cache
def _takes_whole_lists(annotation: Any) -> bool:
    lists = [kind for kind in _kinds(annotation) if get_origin(kind) is list]
    return any(_takes_whole(item) for kind in lists for item in get_args(kind))


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from _kinds(each)
    else:
        yield annotation


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
