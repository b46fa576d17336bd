"""Output files: what is dropped, what is refused, and what is never touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pla_serve.server.file_run.output import OutputError, OutputFile
from pla_serve.server.offline.records import answered_line, refused_line


def numbers(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def filled(path: Path) -> bytes:
    file = OutputFile(path)
    assert file.add(answered_line(2, "b", 200, "req-1", b'{"ok":true}'))
    assert file.add(refused_line(1, None, "invalid_line", "line 1: it is no JSON"))
    assert not file.add(answered_line(2, "b", 200, "req-2", b"{}"))
    file.close()
    return path.read_bytes()


def test_answers_are_known_again(tmp_path: Path) -> None:
    content = filled(tmp_path / "out")
    assert numbers(tmp_path / "out") == ["batch_req_2", "batch_req_1"]
    file = OutputFile(tmp_path / "out")
    assert file.answered == {2: "b", 1: None}
    file.check({1: None, 2: "b", 3: "c"})
    file.close()
    assert (tmp_path / "out").read_bytes() == content


def test_a_line_that_was_cut_off_anywhere_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out"
    content = filled(path)
    first = content.index(b"\n") + 1
    for length in range(first, len(content)):
        path.write_bytes(content[:length])
        file = OutputFile(path)
        assert file.answered == {2: "b"}
        assert file.add(refused_line(1, None, "invalid_line", "again"))
        file.close()
        assert numbers(path) == ["batch_req_2", "batch_req_1"]


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b'{"custom_id": "a", "method": "POST"}\n',
        b'{"id":"batch_req_0","custom_id":"a"}\n',
        b'{"id":"batch_req_00000000000000000000001","custom_id":"a"}\n',
        b'{"id":"batch_req_1","custom_id":"a"}\nmy notes',
        b'{"id":"batch_req_1","custom_id":"a"}\n{"id":"batch_req_1","custom_id":"a"}\n',
        b"\xff\xfe\n",
        b"\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_files_of_others_are_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="remove"):
        OutputFile(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("asked", [{}, {2: "b"}, {1: None, 2: "other"}, {1: "a", 2: "b"}])
def test_answers_to_another_input_are_refused(tmp_path: Path, asked: dict[int, str | None]) -> None:
    filled(tmp_path / "out")
    file = OutputFile(tmp_path / "out")
    with pytest.raises(OutputError, match="Name another output"):
        file.check(asked)
    file.close()


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "out")
    with pytest.raises(OutputError, match="another run"):
        OutputFile(tmp_path / "out")
    file.close()
    OutputFile(tmp_path / "out").close()


def test_what_cannot_be_read_again_is_refused() -> None:
    with pytest.raises(OutputError, match="no regular file"):
        OutputFile(Path("/dev/null"))
