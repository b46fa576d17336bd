"""The page over HTTP: who may watch, what is sent with its files, and how watching ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from pla_serve.server.page.feed import MOST_WATCHERS
from tests.server.server_harness import DEADLINE, Live, until

KEY = {"authorization": "Bearer right"}
UNSAFE = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|setHTML"
)


def samples(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The samples of a stream, decoded."""
    assert answer.status_code == 200
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def watch(live: Live, **headers: str) -> Any:
    return httpx.stream("GET", f"{live.url}/ui/events", headers=headers, timeout=DEADLINE)


def files(live: Live) -> dict[str, httpx.Response]:
    """All files that the page refers to, from file to file."""
    found: dict[str, httpx.Response] = {}
    ahead = ["ui"]
    while ahead:
        path = ahead.pop()
        if path in found:
            continue
        answer = httpx.get(f"{live.url}/{path}")
        assert answer.status_code == 200, path
        found[path] = answer
        ahead += re.findall(r'(?:src|href)="(ui/[^"]+)"', answer.text)
        ahead += [f"ui/{name}" for name in re.findall(r'from "\./([^"]+)"', answer.text)]
    return found


def test_files_are_whole_and_cannot_run_what_others_write(live: Live) -> None:
    found = files(live)
    assert {"ui", "ui/page.js", "ui/page.css", "ui/chat.js", "ui/stream.js"} <= set(found)
    for path, answer in found.items():
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not UNSAFE.search(answer.text), path
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text), path
    page = found["ui"].text
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|<style", page)


def test_page_needs_no_key_and_has_no_data(serve: Callable[..., Live]) -> None:
    live = serve(api_keys=("right",), model_names=("secret-model",))
    assert not [path for path, answer in files(live).items() if "secret-model" in answer.text]
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
        answer = httpx.get(f"{live.url}/ui/events", headers=headers)
        assert answer.status_code == 401
        assert "secret-model" not in answer.text
    with watch(live, **KEY) as answer:
        assert next(samples(answer))["model"] == "secret-model"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_do_not_watch(live: Live, site: str) -> None:
    answer = httpx.get(f"{live.url}/ui/events", headers={"sec-fetch-site": site})
    assert answer.status_code == 403


def test_sample_tells_of_engine_and_latencies(serve: Callable[..., Live]) -> None:
    live = serve(env={"FAKE_PAUSE": "0.02"})
    with watch(live) as answer:
        stream = samples(answer)
        first = next(stream)
        assert first["kind"] == "instance"
        assert first["status"] == "ready"
        assert first["engine"]["layers"] == 2
        with live.client() as client:
            client.completions.create(model="alias", prompt="x" * 300, max_tokens=8)
            client.completions.create(model="alias", prompt="x", max_tokens=8)
        for sample in stream:
            ttft = {kind: sample["latency"][kind]["ttft"] for kind in ("short", "long")}
            if ttft["short"][0] and ttft["long"][0]:
                break
        assert ttft["short"][0] == ttft["long"][0] == 1
        assert 0 < ttft["long"][1] <= ttft["long"][2]
        assert sample["latency"]["long"]["itl"][0] >= 1
        assert "cost" not in sample["load"]


def test_places_are_bounded_and_come_free(serve: Callable[..., Live]) -> None:
    live = serve()
    with ExitStack() as open_streams:
        streams = [open_streams.enter_context(watch(live)) for _ in range(MOST_WATCHERS)]
        assert [each.status_code for each in streams] == [200] * MOST_WATCHERS
        answer = open_streams.enter_context(watch(live))
        assert answer.status_code == 503
        answer.read()
        assert "close a page" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "15"

    def again() -> bool:
        with watch(live) as answer:
            return bool(answer.status_code == 200)

    until(again, "a free place")


def test_watchers_do_not_hold_up_the_end(serve: Callable[..., Live]) -> None:
    live = serve()
    with watch(live) as answer:
        stream = samples(answer)
        next(stream)
        live._loop.call_soon_threadsafe(live.instance.stop)
        last = list(stream)[-1]
        assert last["status"] == "draining"
    assert live.stop() == 0


def test_loss_of_the_engine_is_shown(serve: Callable[..., Live]) -> None:
    live = serve()
    with watch(live) as answer:
        stream = samples(answer)
        assert next(stream)["restarts"] == 0
        with live.client() as client, pytest.raises(Exception, match=r"50\d"):
            client.completions.create(model="alias", prompt="abc", seed=666)
        sample = next(each for each in stream if each["restarts"])
        assert sample["last_loss"]


def test_description_for_programs_leaves_the_page_out(live: Live) -> None:
    document = httpx.get(f"{live.url}/openapi.json").json()
    assert not [path for path in document["paths"] if path.startswith("/ui")]
    assert httpx.post(f"{live.url}/ui").status_code == 405
    assert httpx.get(f"{live.url}/ui/nothing.js").status_code == 404
    assert httpx.get(f"{live.url}/ui/..%2f..%2frun.py").status_code == 404
