"""Who is told that a prompt is cached: nobody but those who may share it."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest

from pla_serve.server.api.cache_scope import CacheScopes
from tests.server.server_harness import MODEL, Live

KEYS = ("sk-one", "sk-two", "sk-three")


def cached(live: Live, key: str, prompt: str, cache_salt: str | None = None) -> int:
    extra = {} if cache_salt is None else {"cache_salt": cache_salt}
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:
        answer = client.completions.create(model=MODEL, prompt=prompt, extra_body=extra)
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.fixture
def tenants(serve: Callable[..., Live]) -> Live:
    return serve(api_keys=KEYS)


def test_a_key_is_not_told_what_another_one_sent(tenants: Live) -> None:
    assert cached(tenants, "sk-one", "a secret") == 0
    assert cached(tenants, "sk-two", "a secret") == 0
    assert cached(tenants, "sk-one", "a secret") == len("a secret") - 1


def test_a_salt_divides_the_cache_of_a_key(tenants: Live) -> None:
    for salt in (None, "a", "b"):
        assert cached(tenants, "sk-one", "x y", salt) == 0
        assert cached(tenants, "sk-one", "x y", salt) == len("x y") - 1
    assert cached(tenants, "sk-two", "x y", "a") == 0


def test_keys_share_the_cache_where_the_operator_says_so(serve: Callable[..., Live]) -> None:
    live = serve(api_keys=KEYS, share_prefix_cache=True)
    assert cached(live, "sk-one", "a system prompt") == 0
    assert cached(live, "sk-two", "a system prompt") > 0
    assert cached(live, "sk-two", "a system prompt", "salt") == 0


def test_an_empty_salt_is_refused(tenants: Live) -> None:
    for salt in ("", "s" * 1025):
        with pytest.raises(openai.BadRequestError, match="cache_salt"):
            cached(tenants, "sk-one", "x", salt)


@pytest.mark.parametrize(
    ("keys", "shared"), [((), False), (("a",), False), (("a", "a"), False), (("a", "b"), True)]
)
def test_without_tenants_all_requests_share_one_scope(keys: tuple[str, ...], shared: bool) -> None:
    scopes = CacheScopes(keys, shared=shared)
    for tenant in ("", "key-0", "key-1"):
        assert scopes.of(tenant, None) == ""
        assert scopes.of(tenant, "salt") == scopes.of("", "salt") != ""


def test_a_scope_belongs_to_the_key_and_not_to_its_place() -> None:
    """Instances keep their caches while a router starts again with other keys."""
    before = CacheScopes(("a", "b"), shared=False)
    after = CacheScopes(("new", "b", "a"), shared=False)
    assert before.of("key-0", None) == after.of("key-2", None)
    assert before.of("key-1", "s") == after.of("key-1", "s")
    everyone = [after.of(f"key-{n}", salt) for n in range(3) for salt in (None, "s", "t", "\ud800")]
    assert len(set(everyone)) == len(everyone)
    assert not any(key in scope for key in ("new",) for scope in everyone)
