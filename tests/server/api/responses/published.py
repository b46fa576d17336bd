"""OpenAI's types and its OpenAPI description as the measure of answers and events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from openai import BaseModel
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.published import check

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
UNDECLARED = {"store"}
"""Fields that OpenAI's servers send and its types leave out."""
ALSO_IN_EVENTS = {"bytes", "name"}
"""Fields that the description has, and the types of this version of the client have not."""


def check_answer(content: Any) -> Response:
    """Validate an answer strictly; nothing may be in it that the types do not know."""
    check("openai", "Response", content)
    answer = Response.model_validate(content, strict=True)
    assert set(_extras(answer)) <= UNDECLARED
    return answer


def check_event(content: Any) -> Any:
    """Validate one event of a stream in the same way."""
    check("openai", "ResponseStreamEvent", content)
    event = EVENT.validate_python(content, strict=True)
    assert set(_extras(event)) <= UNDECLARED | ALSO_IN_EVENTS
    return event


def check_list(content: Any) -> ResponseItemList:
    """Validate a list of input items in the same way."""
    check("openai", "ResponseItemList", content)
    items = ResponseItemList.model_validate(content, strict=True)
    assert not set(_extras(items))
    return items


def check_order(events: list[dict[str, Any]]) -> None:
    """Check the order of the events of one stream, and that deltas add up to what they say."""
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete", "response.failed")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    open_item: dict[str, Any] | None = None
    grown, done = "", []
    for event in events[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert open_item is None
            assert event["output_index"] == len(done)
            open_item, grown = event["item"], ""
            continue
        assert open_item is not None
        assert event["output_index"] == len(done)
        assert event.get("item_id", open_item["id"]) == open_item["id"]
        if kind.endswith(".delta"):
            grown += event["delta"]
        elif kind.endswith(("text.done", "arguments.done")):
            assert event.get("text", event.get("arguments")) == grown
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == open_item["id"]
            done.append(event["item"])
            open_item = None
    assert open_item is None
    if kinds[-1] != "response.failed":
        assert events[-1]["response"]["output"] == done


def _extras(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from _extras(each)
    elif isinstance(value, BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name))
