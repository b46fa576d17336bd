"""The OpenAPI document of a list of operations, and a page for people."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from pla_serve import __version__
from pla_serve.server.api.routes import Operation

REFERENCES = "#/components/schemas/{model}"
PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
"""A parameter in a path of Starlette's, with or without its convertor."""

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>PLA-Serve {version}</title>
<style>body{{font:16px sans-serif;max-width:50em;margin:2em auto}}td{{padding:.3em 1em}}</style>
<h1>PLA-Serve {version}</h1>
<p>Fields of requests and answers: <a href="openapi.json">openapi.json</a>.</p>
<table>{rows}</table></html>
"""


def openapi(operations: Sequence[Operation]) -> dict[str, Any]:
    """The description of an API, for clients that read OpenAPI 3.1."""
    bodies = [(each.body, "validation") for each in operations if each.body is not None]
    _, schemas = models_json_schema(bodies, ref_template=REFERENCES)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        path = PARAMETER.sub(r"{\1}", each.path)
        paths.setdefault(path, {})[each.method.lower()] = _describe(each)
    return {
        "openapi": "3.1.0",
        "info": {"title": "PLA-Serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }


def page(operations: Sequence[Operation]) -> str:
    """A table of the operations as HTML, without scripts."""
    rows = "".join(
        f"<tr><td>{each.method}<td><code>{html.escape(each.path)}</code>"
        f"<td>{html.escape(each.summary)}"
        for each in operations
    )
    return PAGE.format(version=__version__, rows=rows)


def _describe(operation: Operation) -> dict[str, Any]:
    answers = {"200": "The answer.", **operation.answers}
    described: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {status: {"description": text} for status, text in answers.items()},
    }
    names = PARAMETER.findall(operation.path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if operation.body is not None:
        schema = {"$ref": REFERENCES.format(model=operation.body.__name__)}
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return described
