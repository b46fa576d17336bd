"""Web pages of other origins may use the API where the operator names them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from pla_serve.server.cors_origins import check_origins
from tests.server.server_harness import MODEL, Live

PAGE = "https://chat.example.com"
ASKS = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


@pytest.fixture(scope="module")
def open_to_pages() -> Iterator[Live]:
    live = Live(cors_origins=(PAGE, "http://localhost:3000"), api_keys=("key",))
    live.wait_ready()
    yield live
    live.close()


def test_a_preflight_needs_no_key(open_to_pages: Live) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize"):
        answer = httpx.options(open_to_pages.url + path, headers={"origin": PAGE, **ASKS})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "origin" in answer.headers["vary"].lower()


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_reads_answers_and_refusals(open_to_pages: Live, stream: bool) -> None:
    body = {"model": MODEL, "prompt": "ab", "stream": stream}
    url = f"{open_to_pages.url}/v1/completions"
    for key, status in (("key", 200), ("wrong", 401)):
        headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
        answer = httpx.post(url, json=body, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers


def test_other_pages_get_no_leave(open_to_pages: Live) -> None:
    for origin in ("https://evil.example.com", "null", f"{PAGE}.evil.com", "http://localhost:3001"):
        url = f"{open_to_pages.url}/v1/completions"
        preflight = httpx.options(url, headers={"origin": origin, **ASKS})
        assert preflight.status_code == 400
        assert "access-control-allow-origin" not in preflight.headers
        headers = {"origin": origin, "authorization": "Bearer key"}
        answer = httpx.get(f"{open_to_pages.url}/v1/models", headers=headers)
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/metrics", "/fleet/link", "/fleet/instance", "/fleet", "/docs"])
def test_operators_and_routers_things_are_open_to_no_page(open_to_pages: Live, path: str) -> None:
    headers = {"origin": PAGE, "authorization": "Bearer key"}
    for answer in (
        httpx.options(open_to_pages.url + path, headers={"origin": PAGE, **ASKS}),
        httpx.get(open_to_pages.url + path, headers=headers),
    ):
        assert "access-control-allow-origin" not in answer.headers


def test_without_the_flag_no_page_has_leave(live: Live) -> None:
    answer = httpx.options(f"{live.url}/v1/completions", headers={"origin": PAGE, **ASKS})
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


def test_every_page() -> None:
    live = Live(cors_origins=("*",))
    try:
        live.wait_ready()
        answer = httpx.get(f"{live.url}/v1/models", headers={"origin": "null"})
        assert answer.headers["access-control-allow-origin"] == "*"
    finally:
        live.close()


@pytest.mark.parametrize("origin", ["example.com", "https://a.com/", "https://a.com/x", "", "a,b"])
def test_values_that_are_no_origins(origin: str) -> None:
    with pytest.raises(ValueError, match="scheme and a host"):
        check_origins([origin])
