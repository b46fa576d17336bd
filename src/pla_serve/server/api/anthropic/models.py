"""Writes the list of models as Anthropic's clients read it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

VERSION_HEADER = "anthropic-version"
"""Header that only Anthropic's clients send."""


def model_card(card: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI's ``card`` of a model with Anthropic's fields beside its own."""
    created = datetime.fromtimestamp(card["created"], UTC)
    return {
        **card,
        "type": "model",
        "display_name": card["id"],
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "max_input_tokens": card["max_model_len"],
        "max_tokens": card["max_model_len"],
        "capabilities": None,
    }


def model_list(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the list of these models (see `model_card`), all on one page."""
    return {
        "object": "list",
        "data": cards,
        "has_more": False,
        "first_id": cards[0]["id"],
        "last_id": cards[-1]["id"],
    }
