from __future__ import annotations

import json
import platform

from pla_serve.environment import describe


def test_it_says_where_a_result_came_from() -> None:
    found = json.loads(json.dumps(describe(["bench"])))
    assert found["date"].endswith("+00:00")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_gib"] > 0
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"]


def test_it_tells_no_folders_and_no_keys() -> None:
    command = [
        "/home/somebody/bin/pla-serve",
        "bench",
        "--trace=/data/private/t.csv",
        "-o",
        "~/results",
        "--base-url",
        "http://127.0.0.1:8000/v1",
        "--api-key",
        "sk-secret",
        "--api-key=sk-other",
    ]
    found = describe(command)
    assert found["command"] == (
        "pla-serve bench --trace=t.csv -o results --base-url http://127.0.0.1:8000/v1 "
        "--api-key '***' '--api-key=***'"
    )
