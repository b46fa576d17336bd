"""Arguments of calls in ``/v1/messages`` that the model did not write well."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pla_serve.server.api.anthropic.blocks import read_input


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r'{"a": "\ud83d", "b": "\ud83d\ude00"}', {"a": "\ufffd", "b": "\U0001f600"}),
        ('{"a": "one\ntwo"}', {"a": "one\ntwo"}),
        ('{"a": 1, "b": [2', {"a": 1, "b": [2]}),
        ('{"a": ' * 400 + "1" + "}" * 400, {}),
        ('{"a": ' * 100_000, {}),
        ('{"a": 1' + "0" * 5_000 + "}", {}),
        ("[1]", {}),
        ("nonsense", {}),
    ],
    ids=["half", "break", "cut", "deep", "deeper", "number", "list", "nonsense"],
)
def test_what_can_be_read_is_kept(text: str, found: Any) -> None:
    assert read_input(text) == found
    msgspec.json.encode(read_input(text))
