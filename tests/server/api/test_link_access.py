"""Who may open a link, and who may read what operators read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from pla_serve.server.api.link_access import LinkAccess, is_local, operator_keys
from pla_serve.server.api.routes import Api
from pla_serve.server.link_key import find_link_key
from tests.server.link.hub_harness import FakeEngine, Router, make_hub
from tests.server.server_harness import Live

KEY, CLIENT = "of links", "of a client"
ORIGIN = (b"origin", b"http://127.0.0.1:8000")
REMOTE = ("192.0.2.7", 9)


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {key}".encode()


@pytest.mark.parametrize(
    ("access", "headers", "client", "status"),
    [
        # With a link key it is the key that counts, wherever it comes from.
        (LinkAccess(KEY, [CLIENT]), [bearer(KEY)], REMOTE, 101),
        (LinkAccess(KEY, [CLIENT]), [bearer(CLIENT)], ("127.0.0.1", 9), 401),
        (LinkAccess(KEY), [], ("127.0.0.1", 9), 401),
        # Clients' keys never open a link.
        (LinkAccess(None, [CLIENT]), [bearer(CLIENT)], ("127.0.0.1", 9), 403),
        (LinkAccess(None, [CLIENT]), [], ("127.0.0.1", 9), 403),
        # Without any keys: this machine, and no proxy's clients.
        (LinkAccess(None), [], ("127.0.0.1", 9), 101),
        (LinkAccess(None), [], ("::1", 9), 101),
        (LinkAccess(None), [], ("::ffff:127.0.0.1", 9), 101),
        (LinkAccess(None), [], None, 101),
        (LinkAccess(None), [], REMOTE, 403),
        (LinkAccess(None), [(b"x-forwarded-for", b"127.0.0.1")], ("127.0.0.1", 9), 403),
        # Web pages never.
        (LinkAccess(None), [ORIGIN], ("127.0.0.1", 9), 403),
        (LinkAccess(KEY), [ORIGIN, bearer(KEY)], ("127.0.0.1", 9), 403),
    ],
)
def test_who_may_open_a_link(
    access: LinkAccess,
    headers: list[tuple[bytes, bytes]],
    client: tuple[str, int] | None,
    status: int,
) -> None:
    async def main() -> None:
        router = Router(make_hub(FakeEngine(), access), *headers, client=client)
        await router.quiet()
        assert router.status == status
        if status == 101:
            await router.leave()

    asyncio.run(main())


def test_a_name_is_no_address_of_this_machine() -> None:
    assert not is_local(("localhost", 1))
    assert is_local(("127.8.8.8", 1))


def test_the_start_says_who_may_open_a_link() -> None:
    assert "link key" in LinkAccess(KEY).describe()
    assert "this machine only" in LinkAccess(None).describe()
    assert "closed" in LinkAccess(None, [CLIENT]).describe()


def test_the_page_of_an_instance_asks_for_a_key_where_there_are_keys() -> None:
    async def main() -> None:
        hub = make_hub(FakeEngine())
        pages = hub.routes(operator_keys(KEY, [CLIENT]))
        client = TestClient(Api(pages))
        for headers, code in ((None, 401), (KEY, 200), (CLIENT, 200), ("x", 401)):
            sent = {} if headers is None else {"authorization": f"Bearer {headers}"}
            assert client.get("/fleet/instance", headers=sent).status_code == code

    asyncio.run(main())
    assert operator_keys(KEY, []) is None


def test_metrics_ask_for_a_key_where_there_are_keys() -> None:
    live = Live(api_keys=(CLIENT,), link_key=KEY)
    try:
        live.wait_ready()
        for key, code in ((None, 401), ("x", 401), (CLIENT, 200), (KEY, 200)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{live.url}/metrics", headers=headers).status_code == code
        assert httpx.get(f"{live.url}/health").status_code == 200
        chat = {"prompt": "a", "max_tokens": 1}
        link_key = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{live.url}/v1/completions", json=chat, headers=link_key)
        assert answer.status_code == 401, "the link key is no API key"
    finally:
        live.close()


def test_the_key_is_found_in_a_file_or_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("  in a file\n")
    environment = {"PLA_SERVE_LINK_KEY": "in the environment"}
    assert find_link_key(file, environment) == "in a file"
    assert find_link_key(None, environment) == "in the environment"
    assert find_link_key(None, {}) is None
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        find_link_key(file, environment)
    with pytest.raises(OSError, match="nowhere"):
        find_link_key(tmp_path / "nowhere", environment)
