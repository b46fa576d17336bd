"""Answers that are kept: asked for, continued, listed, deleted, cancelled, and whose they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pla_serve.server.limits import Limits
from tests.server.api.responses.published import check_answer, check_list
from tests.server.fake_core import ERROR_SEED, GATED_SEED, SILENT_SEED
from tests.server.server_harness import Live, until

SHOW_ALL = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
A, B = "sk-a", "sk-b"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    live = Live(drain_seconds=0.1, api_keys=(A, B), chat_template=SHOW_ALL, context=2048)
    live.wait_ready()
    yield live
    live.close()


def send(live: Live, method: str, path: str, key: str = A, **body: Any) -> httpx.Response:
    url = f"{live.url}/v1/responses{path}"
    headers = {"authorization": f"Bearer {key}"}
    return httpx.request(method, url, json=body or None, headers=headers, timeout=20)


def create(live: Live, key: str = A, **body: Any) -> dict[str, Any]:
    found = send(live, "POST", "", key, **body)
    assert found.status_code == 200, found.text
    content: dict[str, Any] = found.json()
    check_answer(content)
    return content


def test_an_answer_is_kept_for_its_own_key(live: Live) -> None:
    answer = create(live, input="hi")
    assert answer["store"] is True
    path = f"/{answer['id']}"
    assert send(live, "GET", path).json() == answer
    for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert send(live, method, path + rest, B).status_code == 404
    refused = send(live, "POST", "", B, input="x", previous_response_id=answer["id"])
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    assert send(live, "GET", path).status_code == 200
    deleted = send(live, "DELETE", path)
    assert deleted.json() == {"id": answer["id"], "object": "response", "deleted": True}
    assert send(live, "GET", path).status_code == 404
    assert send(live, "DELETE", path).status_code == 404


def test_an_answer_that_is_not_to_be_kept_is_not(live: Live) -> None:
    answer = create(live, input="hi", store=False)
    assert answer["store"] is False
    assert send(live, "GET", f"/{answer['id']}").status_code == 404


def test_a_conversation_goes_on_without_its_instructions(live: Live) -> None:
    first = create(live, input="one", instructions="Be a cat.")
    second = create(live, input="two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    said = "[system:Be a cat.][user:one]"
    text = second["output"][0]["content"][0]["text"]
    assert text == f"[user:one][assistant:{said}][user:two]"
    send(live, "DELETE", f"/{first['id']}")
    third = create(live, input="three", previous_response_id=second["id"])
    assert third["output"][0]["content"][0]["text"] == (
        f"[user:one][assistant:{said}][user:two][assistant:{text}][user:three]"
    )


def test_input_items_page_by_page(live: Live) -> None:
    first = create(live, input="one")
    items = [
        {"role": "user", "content": "two"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "done"},
    ]
    second = create(live, input=items, previous_response_id=first["id"])
    path = f"/{second['id']}/input_items"
    every = send(live, "GET", f"{path}?order=asc").json()
    check_list(every)
    kinds = [item["type"] for item in every["data"]]
    assert kinds == ["message", "message", "message", "function_call", "function_call_output"]
    assert every["has_more"] is False
    page = send(live, "GET", f"{path}?limit=2").json()
    assert [item["type"] for item in page["data"]] == kinds[:2:-1]
    assert page["has_more"] is True
    rest = send(live, "GET", f"{path}?limit=9&after={page['last_id']}").json()
    assert page["data"] + rest["data"] == every["data"][::-1]
    for query in ("limit=0", "limit=x", "order=up", "after=nobody", "page=2"):
        assert send(live, "GET", f"{path}?{query}").status_code == 400


def test_in_the_background(serve: Callable[..., Live], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    live = serve(env={"FAKE_GATE": str(gate)})
    with live.client() as client:
        begun = client.responses.create(
            input="hello", background=True, extra_body={"seed": GATED_SEED}
        )
        assert begun.status == "in_progress"
        assert begun.background is True
        assert client.responses.retrieve(begun.id).status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="not complete yet"):
            client.responses.create(input="x", previous_response_id=begun.id)
        gate.touch()
        until(lambda: client.responses.retrieve(begun.id).status == "completed")
        assert client.responses.retrieve(begun.id).output_text.startswith("<user>hello")
        assert client.responses.cancel(begun.id).status == "completed"


def test_cancelled_in_the_background(live: Live) -> None:
    asked = {"input": "hello", "background": True, "seed": SILENT_SEED}
    begun = create(live, **asked)
    assert send(live, "POST", f"/{begun['id']}/cancel", B).status_code == 404
    ended = send(live, "POST", f"/{begun['id']}/cancel").json()
    check_answer(ended)
    assert ended["status"] == "cancelled"
    until(lambda: live.metric("vllm:num_requests_running") == 0)
    refused = send(live, "POST", "", input="x", previous_response_id=begun["id"])
    assert refused.status_code == 400
    begun = create(live, **asked)
    assert send(live, "DELETE", f"/{begun['id']}").status_code == 200
    until(lambda: live.metric("vllm:num_requests_running") == 0)


def test_failed_in_the_background(live: Live) -> None:
    begun = create(live, input="hello", background=True, seed=ERROR_SEED)
    path = f"/{begun['id']}"
    answer = until(lambda: (a := send(live, "GET", path).json())["status"] == "failed" and a)
    check_answer(answer)
    assert answer["error"]["code"] == "server_error"


def test_only_background_answers_are_cancelled(live: Live) -> None:
    answer = create(live, input="hi")
    refused = send(live, "POST", f"/{answer['id']}/cancel")
    assert refused.status_code == 400
    assert "background" in refused.json()["error"]["message"]


def test_a_key_has_half_of_the_places_in_the_background(serve: Callable[..., Live]) -> None:
    live = serve(drain_seconds=0.1, api_keys=(A, B), limits=Limits(max_background_responses=2))
    asked = {"input": "hello", "background": True, "seed": SILENT_SEED}
    begun = create(live, **asked)
    assert send(live, "POST", "", **asked).status_code == 429
    assert create(live, key=B, **asked)["status"] == "in_progress"
    send(live, "POST", f"/{begun['id']}/cancel")
    assert create(live, **asked)["status"] == "in_progress"


def test_a_drain_waits_for_the_background(serve: Callable[..., Live], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    live = serve(env={"FAKE_GATE": str(gate)})
    create(live, input="hello", background=True, seed=GATED_SEED)
    until(lambda: live.instance.traffic.in_flight == 1)
    gate.touch()
    until(lambda: live.instance.traffic.in_flight == 0)


def test_without_a_store_nothing_is_kept(serve: Callable[..., Live]) -> None:
    live = serve(limits=Limits(max_stored_response_bytes=0))
    answer = create(live, input="hi")
    assert answer["store"] is False
    refused = send(live, "POST", "", input="x", background=True)
    assert refused.json()["error"]["param"] == "background"


def test_an_answer_that_is_too_large_says_that_it_is_not_kept(serve: Callable[..., Live]) -> None:
    limits = Limits(max_stored_response_bytes=4_000)
    live = serve(context=4096, limits=limits, max_unread_tokens=100_000)
    assert create(live, input="hi")["store"] is True
    answer = create(live, input="x" * 1_500)
    assert answer["store"] is (send(live, "GET", f"/{answer['id']}").status_code == 200)
    assert answer["store"] is False


def test_a_conversation_is_not_larger_than_a_body(serve: Callable[..., Live]) -> None:
    live = serve(max_body_mib=0.001, chat_template="{{ messages[-1].content[:9] }}")
    first = create(live, input="x" * 600)
    refused = send(live, "POST", "", input="y" * 300, previous_response_id=first["id"])
    assert refused.status_code == 413


def test_stored_answers_are_not_streamed_again(live: Live) -> None:
    answer = create(live, input="hi")
    refused = send(live, "GET", f"/{answer['id']}?stream=true")
    assert refused.json()["error"]["param"] == "stream"
