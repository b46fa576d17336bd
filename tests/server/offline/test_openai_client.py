"""Files and batches through the real ``openai`` client, on a live server with the fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from pla_serve.server.offline_options import OfflineOptions
from tests.server.fake_core import CRASH_SEED, REJECT_FOR_GOOD_SEED, SILENT_SEED
from tests.server.offline.batch_client import (
    CHAT,
    chat_line,
    check_answers,
    jsonl,
    read_lines,
    submit,
    wait_over,
)
from tests.server.server_harness import Live, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    options = OfflineOptions(tmp_path_factory.mktemp("batches") / "new", batch_free_mib=0)
    live = Live(api_keys=("key", "other"), offline=options)
    until(lambda: live.instance.engine.is_ready, "the engine")
    yield live
    live.close()


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def stranger(server: Live) -> Iterator[openai.OpenAI]:
    with server.client(api_key="other") as client:
        yield client


def test_files_are_kept_as_they_are(client: openai.OpenAI) -> None:
    content = bytes(range(256)) * 3000 + b"\r\n--boundary\r\n"
    file = client.files.create(file=("of mine.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "of mine.jsonl", "batch")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == content
    assert file in list(client.files.list(purpose="batch"))
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    made = [client.files.create(file=("x", b"{}"), purpose="batch").id for _ in range(5)]
    assert [each.id for each in client.files.list(limit=2)][:5] == made[::-1]
    ahead = client.files.list(limit=2, order="asc", after=made[1])
    assert [each.id for each in ahead][:3] == made[2:]
    batches = [submit(client, jsonl([chat_line("a")])).id for _ in range(3)]
    assert [each.id for each in client.batches.list(limit=1)][:3] == batches[::-1]
    for id in batches:
        wait_over(client, id)


def test_lines_may_ask_for_embeddings(client: openai.OpenAI) -> None:
    url = "/v1/embeddings"
    lines = [
        {"custom_id": id, "method": "POST", "url": url, "body": {"input": [id, "d"]}}
        for id in ("a", "b")
    ]
    batch = wait_over(client, submit(client, jsonl(lines), endpoint=url).id)
    assert batch.status == "completed"
    answers = read_lines(client, batch.output_file_id)
    firsts = [each["response"]["body"]["data"][0]["embedding"] for each in answers]
    assert firsts == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_a_batch_is_answered_in_the_order_of_its_file(client: openai.OpenAI) -> None:
    lines = [chat_line(f"line {i}", f"text {i}") for i in range(40)]
    batch = submit(client, jsonl(lines), metadata={"for": "me"})
    assert batch.status == "validating"
    batch = wait_over(client, batch.id)
    assert batch.status == "completed"
    assert batch.metadata == {"for": "me"}
    assert batch.error_file_id is None
    assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    check_answers(client, batch, [line["custom_id"] for line in lines])
    answers = read_lines(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == [line["custom_id"] for line in lines]
    assert answers[7]["response"]["body"]["choices"][0]["message"]["content"] == "<use"
    assert answers[7]["error"] is None
    assert answers[7]["response"]["request_id"].startswith("req-")


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "abc", "max_tokens": 2}),
        ("/v1/responses", {"input": "abc", "max_output_tokens": 16}),
    ],
)
def test_other_endpoints(client: openai.OpenAI, endpoint: str, body: dict[str, object]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    batch = wait_over(client, submit(client, jsonl([line]), endpoint=endpoint).id)
    (answer,) = read_lines(client, batch.output_file_id)
    assert answer["response"]["status_code"] == 200
    if endpoint == "/v1/responses":
        assert answer["response"]["body"]["store"] is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(answer["response"]["body"]["id"])


def test_bad_lines_fail_alone(client: openai.OpenAI) -> None:
    lines = [
        b'{"custom_id": "no json"',
        b"[1, 2]",
        b'{"custom_id": "\xff"}',
        b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/chat/completions", "body": {}}',
        b"[" * 100_000,
        jsonl([chat_line("twice")]).strip(),
        jsonl([chat_line("twice")]).strip(),
        jsonl([chat_line("")]).strip(),
        jsonl([chat_line("x" * 513)]).strip(),
        jsonl([{**chat_line("get"), "method": "GET"}]).strip(),
        jsonl([{**chat_line("elsewhere"), "url": "/metrics"}]).strip(),
        jsonl([{**chat_line("list"), "body": [1]}]).strip(),
        jsonl([chat_line("streams", stream=True)]).strip(),
        jsonl([chat_line("unknown field", nonsense=1)]).strip(),
        jsonl([chat_line("refused", seed=REJECT_FOR_GOOD_SEED)]).strip(),
        jsonl([chat_line("urgent", priority=-5)]).strip(),
        b"",
        b"   ",
        jsonl([chat_line("good")]).strip(),
    ]
    batch = wait_over(client, submit(client, b"\n".join(lines)).id)
    assert batch.status == "completed"
    good = read_lines(client, batch.output_file_id)
    assert sorted(each["custom_id"] for each in good) == ["good", "twice"]
    bad = read_lines(client, batch.error_file_id)
    assert len(bad) == 15
    wrong = {each["custom_id"]: each for each in bad if each["response"] is None}
    assert {"twice", "get", "elsewhere", "list", "streams"} < set(wrong)
    assert "line 7" in wrong["twice"]["error"]["message"]
    answered = {each["custom_id"]: each for each in bad if each["response"]}
    assert set(answered) == {"unknown field", "refused", "urgent"}
    for each in answered.values():
        assert each["response"]["status_code"] == 400
        assert each["response"]["body"]["error"]["message"]


def test_odd_custom_ids_come_back_as_they_are(client: openai.OpenAI) -> None:
    ids = ["a\0b", "\n", "☃" * 512, "'; DROP TABLE lines; --", "\u202e", " "]
    batch = wait_over(client, submit(client, jsonl(chat_line(id) for id in ids)).id)
    assert [each["custom_id"] for each in read_lines(client, batch.output_file_id)] == ids


def test_an_output_file_is_no_good_input(client: openai.OpenAI) -> None:
    batch = wait_over(client, submit(client, jsonl([chat_line("a")])).id)
    assert batch.output_file_id is not None
    again = client.batches.create(
        input_file_id=batch.output_file_id, endpoint=CHAT, completion_window="24h"
    )
    over = wait_over(client, again.id)
    assert (over.status, over.output_file_id) == ("completed", None)
    (bad,) = read_lines(client, over.error_file_id)
    assert bad["error"]["code"] == "invalid_line"


def test_a_line_that_ends_the_engine_is_given_up(client: openai.OpenAI, server: Live) -> None:
    lines = [chat_line("good"), chat_line("kills", seed=CRASH_SEED)]
    batch = wait_over(client, submit(client, jsonl(lines)).id)
    check_answers(client, batch, ["good", "kills"])
    (answer,) = read_lines(client, batch.error_file_id)
    assert (answer["custom_id"], answer["response"]["status_code"]) == ("kills", 503)
    assert server.metric("pla_serve:offline_lines_total", outcome="retried") >= 2


def test_cancelled(client: openai.OpenAI) -> None:
    lines = [chat_line("good"), chat_line("never", seed=SILENT_SEED)]
    batch = submit(client, jsonl(lines))
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed, "one answer")  # type: ignore[union-attr]
    with pytest.raises(openai.ConflictError, match="still reads"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    over = wait_over(client, batch.id)
    assert over.status == "cancelled"
    assert [each["custom_id"] for each in read_lines(client, over.output_file_id)] == ["good"]
    assert client.batches.cancel(batch.id) == over
    assert client.files.delete(batch.input_file_id).deleted


def test_expired(client: openai.OpenAI) -> None:
    lines = [chat_line("good"), chat_line("never", seed=SILENT_SEED)]
    batch = wait_over(client, submit(client, jsonl(lines), completion_window="2s").id)
    assert batch.status == "expired"
    assert batch.expired_at is not None
    check_answers(client, batch, ["good", "never"])
    (late,) = read_lines(client, batch.error_file_id)
    assert late["error"]["code"] == "batch_expired"
    with pytest.raises(openai.ConflictError, match="is over"):
        client.batches.cancel(batch.id)


def test_nobody_sees_the_files_of_others(client: openai.OpenAI, stranger: openai.OpenAI) -> None:
    batch = wait_over(client, submit(client, jsonl([chat_line("a")])).id)
    for id in (batch.input_file_id, batch.output_file_id, "file-unknown"):
        assert id is not None
        for ask in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
            with pytest.raises(openai.NotFoundError) as refusal:
                ask(id)
            assert id in str(refusal.value)
    for look in (stranger.batches.retrieve, stranger.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            look(batch.id)
    with pytest.raises(openai.NotFoundError):
        stranger.batches.create(
            input_file_id=batch.input_file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
    with pytest.raises(openai.BadRequestError):
        stranger.batches.list(after=batch.id)
    assert not list(stranger.files.list())
    assert not list(stranger.batches.list())


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "/v1/score"},
        {"completion_window": "soon"},
        {"completion_window": "0s"},
        {"completion_window": "31d"},
        {"completion_window": "\u0661h"},
        {"metadata": {str(i): "" for i in range(17)}},
        {"extra_body": {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}},
    ],
)
def test_batches_that_cannot_be(client: openai.OpenAI, change: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError):
        submit(client, jsonl([chat_line("a")]), **change)


@pytest.mark.parametrize("content", [b"\n\n \n", b"\n"])
def test_a_file_without_lines_fails(client: openai.OpenAI, content: bytes) -> None:
    batch = wait_over(client, submit(client, content).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].code == "empty_file"


def test_a_second_server_is_told_so(serve: Callable[..., Live], tmp_path: Path) -> None:
    options = OfflineOptions(tmp_path, batch_free_mib=0)
    serve(offline=options)
    second = Live(offline=options)
    with pytest.raises(Exception, match="another server uses"):
        second.status.result(60)
    second._thread.join()
    second._listener.close()


def test_the_flag_is_named(client: openai.OpenAI, serve: Callable[..., Live]) -> None:
    with serve().client() as plain:
        for ask in (plain.files.list, plain.batches.list):
            with pytest.raises(openai.NotFoundError, match="--batch-dir"):
                ask()
        with pytest.raises(openai.NotFoundError, match="--batch-dir"):
            plain.files.create(file=b"{}", purpose="batch")


def test_what_a_stopped_server_leaves_is_taken_up(
    serve: Callable[..., Live], tmp_path: Path
) -> None:
    """A drain ends running lines, and the next server, with its keys in another order, runs them"""
    options = OfflineOptions(tmp_path, batch_free_mib=0)
    first = serve(ready=False, offline=options, api_keys=("a", "b"))
    lines = [chat_line(str(i), seed=SILENT_SEED if i == 3 else None) for i in range(6)]
    with first.client(api_key="b") as client:
        batch = submit(client, jsonl(lines), completion_window="60s")
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 5)  # type: ignore[union-attr]
    first.stop()
    (tmp_path / "files" / "left.part").write_bytes(b"half")
    second = serve(ready=False, offline=options, api_keys=("b", "a"))
    with second.client(api_key="b") as client:
        assert client.batches.cancel(batch.id).request_counts.completed == 5  # type: ignore[union-attr]
        over = wait_over(client, batch.id)
        done = [each["custom_id"] for each in read_lines(client, over.output_file_id)]
        assert done == ["0", "1", "2", "4", "5"]
    assert not (tmp_path / "files" / "left.part").exists()
