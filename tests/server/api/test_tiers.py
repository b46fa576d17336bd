"""Which tier a request is of, and how answers show it: through the clients of the APIs."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from anthropic import Anthropic

from pla_serve.policy.tiers import Tier
from pla_serve.server.api.generations import of_tier
from pla_serve.server.api.tiers import HEADER, TierChoice
from pla_serve.server.errors import ApiError
from pla_serve.server.generation.generation import GenerationPlan
from pla_serve.server.settings import ServerSettings
from pla_serve.server.tier_options import TierOptions
from pla_serve.wire.engine import SamplingParams
from tests.server.server_harness import MODEL, Live

HELLO = [{"role": "user", "content": "hi"}]
TIERS = TierOptions(
    ("interactive:ttft=300s,tpot=100s", "flex", "night"), ("of the night=night", "usual=default")
)
KEYS = ("key", "of the night", "usual")


@pytest.fixture(scope="module")
def tiered() -> Iterator[Live]:
    server = Live(tiers=TIERS, api_keys=KEYS)
    server.wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(tiered: Live) -> Iterator[openai.OpenAI]:
    with tiered.client() as client:
        yield client


@pytest.mark.parametrize(
    ("asked", "header", "shown"),
    [
        ("interactive", None, "interactive"),
        ("flex", "interactive", "flex"),
        (None, "flex", "flex"),
        ("auto", "flex", "flex"),
        ("auto", "auto", "default"),
        (None, "", "default"),
        (None, None, "default"),
        ("default", "flex", "default"),
    ],
)
def test_the_request_then_the_header_then_the_key(
    tiered: Live, client: openai.OpenAI, asked: str | None, header: str | None, shown: str
) -> None:
    before = tiered.metric("pla_serve:tier_requests_total", tier=shown, outcome="met")
    headers = {} if header is None else {HEADER: header}
    options = {} if asked is None else {"service_tier": asked}
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_headers=headers, **options
    )
    assert answer.service_tier == shown
    counted = tiered.metric("pla_serve:tier_requests_total", tier=shown, outcome="met") - before
    assert counted == (shown != "default")


def test_a_key_has_a_tier_of_its_own(tiered: Live) -> None:
    with tiered.client(api_key="of the night") as client:
        for asked, shown in (("auto", "night"), ("default", "default"), ("flex", "flex")):
            answer = client.chat.completions.create(model=MODEL, messages=HELLO, service_tier=asked)
            assert answer.service_tier == shown


def test_every_chunk_of_a_stream_shows_it(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, service_tier="flex", stream=True
    ) as stream:
        assert {chunk.service_tier for chunk in stream} == {"flex"}
    completion = client.completions.create(
        model=MODEL, prompt="hi", extra_body={"service_tier": "flex"}
    )
    assert completion.to_dict()["service_tier"] == "flex"


@pytest.mark.parametrize("name", ["priority", "", "Flex", "of the night", "x" * 64, "é\n"])
def test_unknown_tiers_are_refused_with_the_list(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, service_tier=name)
    assert caught.value.param == "service_tier"
    assert "this server has auto, default, interactive, flex, night" in caught.value.message


@pytest.mark.parametrize("tier", [3, ["flex"], "x" * 65, {"name": "flex"}])
def test_what_is_no_name_is_refused(client: openai.OpenAI, tier: object) -> None:
    with pytest.raises(openai.BadRequestError, match="service_tier"):
        client.chat.completions.create(
            model=MODEL, messages=HELLO, extra_body={"service_tier": tier}
        )


def test_an_unknown_name_in_the_header_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="there is no tier 'gold'"):
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers={HEADER: "gold"})


def test_responses_show_it(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hi", service_tier="flex")
    assert answer.service_tier == "flex"
    with pytest.raises(openai.BadRequestError, match="there is no tier 'scale'"):
        client.responses.create(model=MODEL, input="hi", service_tier="scale")


def test_messages_show_it(tiered: Live) -> None:
    with Anthropic(base_url=tiered.url, api_key="of the night", max_retries=0) as client:
        for asked, shown in (("auto", "night"), ("standard_only", "standard")):
            answer = client.messages.create(
                model=MODEL, max_tokens=5, messages=HELLO, service_tier=asked
            )
            assert answer.usage.service_tier == shown


@pytest.mark.parametrize(
    ("tier", "own", "targets"),
    [
        ("interactive", {}, (300.0, 100.0)),
        ("interactive", {"ttft_slo_ms": 500, "tpot_slo_ms": 50}, (0.5, 0.05)),
        ("flex", {}, (None, 1.0)),
        ("flex", {"ttft_slo_ms": 1, "tpot_slo_ms": 1}, (None, 1.0)),
        ("flex", {"tpot_slo_ms": 9000}, (None, 9.0)),
    ],
)
def test_own_targets_hurry_no_bulk_work(
    tier: str, own: dict[str, float], targets: tuple[float | None, float]
) -> None:
    asked = {name.removesuffix("_ms"): value / 1000 for name, value in own.items()}
    plan = GenerationPlan(
        "x", [[1]], [SamplingParams(max_tokens=1)], 1, 0.0,
        asked.get("ttft_slo"), asked.get("tpot_slo"), 0, "", (), False, True,
    )  # fmt: skip
    made = of_tier(plan, TIERS.by_name[tier])
    assert (made.ttft_slo, made.tpot_slo) == targets


def test_without_tiers_answers_are_as_before(live: Live) -> None:
    with live.client() as client:
        plain = client.chat.completions.create(model=MODEL, messages=HELLO)
        assert "service_tier" not in plain.to_dict()
        asked = client.chat.completions.create(model=MODEL, messages=HELLO, service_tier="auto")
        assert asked.service_tier == "default"
        with pytest.raises(openai.BadRequestError, match=r"this server has auto, default$"):
            client.chat.completions.create(model=MODEL, messages=HELLO, service_tier="flex")
    assert "tier_requests_total{" not in httpx.get(f"{live.url}/metrics").text


def test_a_tier_named_default_is_for_requests_that_name_none() -> None:
    settings = ServerSettings(
        ("m",), "m", tiers=TierOptions(("default:ttft=1s",), ("a=default",)), api_keys=("a",)
    )
    choice = TierChoice(settings)
    for asked in (None, "auto", "default"):
        assert choice.of(asked, None, "key-0") == Tier("default", 1.0)
    with pytest.raises(ApiError, match=r"this server has auto, default$"):
        choice.of("standard", None, "")
