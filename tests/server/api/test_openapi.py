"""schemathesis, against the server's own description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from pla_serve.server.offline_options import OfflineOptions
from tests.server.server_harness import Live

DRAIN = "/drain"
"""Left out: it would take the server away from the other tests. See test_drain.py."""


def test_no_request_causes_a_server_error(live: Live) -> None:
    assert try_operations(live, "/") == 30


def test_no_request_to_files_and_batches_causes_a_server_error(
    serve: Callable[..., Live], tmp_path: Path
) -> None:
    live = serve(offline=OfflineOptions(tmp_path, batch_free_mib=0))
    assert try_operations(live, "/v1/files") + try_operations(live, "/v1/batches") == 9


def try_operations(live: Live, begin: str) -> int:
    """Send requests to each operation whose path begins so; return how many there are."""
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    operations = [each for each in found if each.path.startswith(begin) and each.path != DRAIN]
    for operation in operations:

        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def no_server_error(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error])

        no_server_error()
    return len(operations)


def test_bodies_are_described(live: Live) -> None:
    document = httpx.get(f"{live.url}/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "ttft_slo_ms"} <= set(fields)
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
