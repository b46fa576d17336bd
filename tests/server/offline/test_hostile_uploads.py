"""Uploads that nobody should send: what is refused, and that nothing of them stays."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from pla_serve.server.limits import Limits
from pla_serve.server.offline.upload import shown_name
from pla_serve.server.offline_options import OfflineOptions
from tests.server.offline.batch_client import chat_line, jsonl, read_lines, submit, wait_over
from tests.server.server_harness import DEADLINE, Live, until

FORM = "multipart/form-data; boundary=x"
PURPOSE = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
END = b"\r\n--x--\r\n"
HEAD = (
    b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    options = OfflineOptions(
        folder,
        max_batch_file_mib=1,
        max_batch_key_gib=3 / 1024,
        max_batch_lines=50,
        batch_free_mib=0,
    )
    live = Live(offline=options, limits=Limits(body_seconds=1.0), max_body_mib=0.1)
    live.wait_ready()
    yield live
    live.close()


@pytest.fixture
def client(server: Live, folder: Path) -> Iterator[openai.OpenAI]:
    """A client; after the test no file may be there that no list has."""
    with server.client() as client:
        yield client
        known = {file.id for file in client.files.list()}
        until(
            lambda: {path.name for path in (folder / "files").iterdir()} == known, "a clean folder"
        )
        for id in known:
            client.files.delete(id)


def post(server: Live, body: bytes, kind: str = FORM) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/files", content=body, headers={"content-type": kind}, timeout=DEADLINE
    )


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", FORM, 400),
        (b"no form", FORM, 400),
        (PURPOSE + FILE + b"cut off", FORM, 400),
        (PURPOSE + b"--x--\r\n", FORM, 400),
        (FILE + b"no purpose" + END, FORM, 400),
        (PURPOSE + FILE + b"1\r\n" + FILE + b"2" + END, FORM, 400),
        (PURPOSE + PURPOSE + FILE + b"1" + END, FORM, 400),
        (PURPOSE.replace(b"batch", b"bat") + FILE + b"1" + END, FORM, 400),
        (PURPOSE.replace(b"batch", b"fine-tune") + FILE + b"1" + END, FORM, 400),
        (PURPOSE.replace(b"batch", b"b" * 500_000), FORM, 400),
        (PURPOSE.replace(b"purpose", b"expires_after[seconds]") + FILE + END, FORM, 400),
        (b"--x\r\n\r\nheadless" + END, FORM, 400),
        (b"--x\r\nA: " + b"y" * 100_000 + b"\r\n\r\n", FORM, 400),
        (b"--x\r\n" + b"A: y\r\n" * 10_000, FORM, 400),
        (PURPOSE + FILE + b"z" * (2**20 + 1) + END, FORM, 413),
        (b"z" * (2**21), FORM, 413),
        (b"{}", "application/json", 415),
        (b"{}", "", 415),
        (b"{}", "multipart/form-data", 400),
        (b"{}", "multipart/form-data; boundary=" + "y" * 300, 400),
    ],
)
def test_refused(client: openai.OpenAI, server: Live, body: bytes, kind: str, status: int) -> None:
    answer = post(server, body, kind)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert not list(client.files.list())


def test_almost_boundaries_belong_to_the_file(client: openai.OpenAI, server: Live) -> None:
    content = b"\r\n--\r\n--y\r\n-x\r\n\r\n--" * 20_000
    id = post(server, PURPOSE + FILE + content + END).json()["id"]
    assert client.files.content(id).content == content


def test_an_upload_that_is_too_slow_or_leaves(client: openai.OpenAI, server: Live) -> None:
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as slow:
        slow.sendall(HEAD + PURPOSE + FILE + b"some")
        assert b" 408 " in slow.recv(4096)
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as gone:
        gone.sendall(HEAD + PURPOSE + FILE + b"some")
    assert not list(client.files.list())


def test_names_are_shown_and_never_used(client: openai.OpenAI, folder: Path) -> None:
    before = {path for path in folder.parent.rglob("*") if "files" not in path.parts}
    for name in ("../../evil", "/etc/passwd", "..", "a\\..\\b", "batches.sqlite", "x" * 3000):
        file = client.files.create(file=(name, b"{}"), purpose="batch")
        assert "/" not in file.filename
        assert len(file.filename) <= 255
        assert client.files.content(file.id).content == b"{}"
    assert {path for path in folder.parent.rglob("*") if "files" not in path.parts} == before


@pytest.mark.parametrize(
    ("given", "shown"),
    [("../a", "a"), ("..", "file"), ("", "file"), ("C:\\x\\y.jsonl", "y.jsonl"), ("a\nb", "ab")],
)
def test_shown_names(given: str, shown: str) -> None:
    assert shown_name(given) == shown


@pytest.mark.parametrize("id", ["..", "../lock", "%2e%2e%2flock", "file-%00", "x" * 5000, "☃"])
def test_ids_are_not_paths(client: openai.OpenAI, server: Live, id: str) -> None:
    for path in (f"/v1/files/{id}", f"/v1/files/{id}/content", f"/v1/batches/{id}"):
        assert httpx.get(server.url + path).status_code == 404, path


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=-1", "limit=²", "order=up"])
def test_lists_are_bounded(client: openai.OpenAI, server: Live, query: str) -> None:
    assert httpx.get(f"{server.url}/v1/files?{query}").status_code == 400


def test_one_line_without_an_end(client: openai.OpenAI) -> None:
    """It is longer than a request may be, so it is refused, and the line after it is not."""
    content = b'{"custom_id": "' + b"x" * 700_000 + b'"}\n' + jsonl([chat_line("good")])
    batch = wait_over(client, submit(client, content).id)
    (bad,) = read_lines(client, batch.error_file_id)
    assert bad["error"]["code"] == "line_too_long"
    (good,) = read_lines(client, batch.output_file_id)
    assert good["custom_id"] == "good"
    alone = wait_over(client, submit(client, b"x" * 700_000).id)
    assert (alone.status, alone.request_counts.failed) == ("completed", 1)  # type: ignore[union-attr]


def test_too_many_lines(client: openai.OpenAI) -> None:
    for content in (jsonl(chat_line(str(i)) for i in range(51)), b"\n" * 500_000):
        batch = wait_over(client, submit(client, content).id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == "too_many_lines"


def test_the_quota_of_a_key(client: openai.OpenAI) -> None:
    made = [client.files.create(file=("x", b"y" * 2**20), purpose="batch") for _ in range(3)]
    with pytest.raises(openai.APIStatusError, match="delete some") as refusal:
        client.files.create(file=("x", b"y"), purpose="batch")
    assert refusal.value.status_code == 413
    client.files.delete(made[0].id)
    client.files.create(file=("x", b"y"), purpose="batch")


def test_a_disk_without_space_refuses(serve: Callable[..., Live], tmp_path: Path) -> None:
    live = serve(offline=OfflineOptions(tmp_path, batch_free_mib=2**30))
    with live.client() as client:
        for ask in (
            lambda: client.files.create(file=("x", b"y"), purpose="batch"),
            lambda: client.batches.create(
                input_file_id="x", endpoint="/v1/completions", completion_window="24h"
            ),
        ):
            with pytest.raises(openai.InternalServerError, match="too little space") as refusal:
                ask()
            assert refusal.value.status_code == 507


def test_many_uploads_at_once_are_bounded(client: openai.OpenAI, server: Live) -> None:
    """Of a server without keys all clients are one owner, who may have 8 uploads under way."""
    open_ones = []
    try:
        for _ in range(9):
            each = socket.create_connection(("127.0.0.1", server.port), DEADLINE)
            each.sendall(HEAD + PURPOSE)
            open_ones.append(each)
        answers = sorted(each.recv(4096).split()[1] for each in open_ones)
    finally:
        for each in open_ones:
            each.close()
    assert answers.count(b"429") >= 1
    assert set(answers) <= {b"408", b"429"}
