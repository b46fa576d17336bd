"""The list of an answer's input items, page by page."""

from __future__ import annotations

from typing import Any

from pla_serve.server.api.formats import Json
from pla_serve.server.errors import invalid, unsupported

MOST_ITEMS = 100
ITEMS_OF_A_PAGE = 20


def input_list(items: list[Json], query: dict[str, str]) -> Json:
    """Return one page of ``items``, the last first unless the query says ``order=asc``.

    Raises:
        ApiError: 400, the query is not understood.
    """
    known = {"limit", "order", "after", "include", "include[]"}
    if not query.keys() <= known:
        raise unsupported(min(query.keys() - known)[:200])
    order, limit = query.get("order", "desc"), _limit(query.get("limit"))
    if order not in ("asc", "desc"):
        raise invalid("order is asc or desc", "order")
    ordered = items if order == "asc" else items[::-1]
    start = 0
    if (after := query.get("after")) is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise invalid(f"there is no item {after[:200]!r}", "after")
        start = places[0] + 1
    page = ordered[start : start + limit]
    ids: list[Any] = [item["id"] for item in page]
    return {
        "object": "list",
        "data": page,
        "first_id": ids[0] if ids else "",
        "last_id": ids[-1] if ids else "",
        "has_more": start + limit < len(ordered),
    }


def _limit(text: str | None) -> int:
    if text is None:
        return ITEMS_OF_A_PAGE
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= MOST_ITEMS):
        raise invalid(f"limit is a number from 1 to {MOST_ITEMS}", "limit")
    return int(text)
