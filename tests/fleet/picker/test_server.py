"""The picker as Envoy sees it: a real gRPC channel, real links, fake engines."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pla_serve.fleet.picker.options import PickerOptions
from pla_serve.server.limits import Limits
from tests.fleet.router.routed import KEY, Routed
from tests.server.server_harness import DEADLINE, MODEL, Live, until

grpc = pytest.importorskip("grpc")

from pla_serve.fleet.picker import messages  # noqa: E402  (needs protobuf)
from pla_serve.fleet.picker.envoy_request import DESTINATION, SUBSET, SUBSET_SPACE  # noqa: E402
from pla_serve.fleet.picker.messages import (  # noqa: E402
    KIND,
    ProcessingRequest,
    ProcessingResponse,
)

BODY_MIB = 0.25


class Asker:
    """Asks the picker as Envoy does, one stream for each request."""

    def __init__(self, routed: Routed, lives: list[Live]) -> None:
        self.routed = routed
        self.lives = lives
        self.addresses = [f"127.0.0.1:{live.port}" for live in lives]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{routed.picker_port}")
        self._call = self._channel.stream_stream(
            messages.METHOD,
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )

    def ask(self, *asked: Any) -> list[Any]:
        """Send messages and end the stream; return all answers."""
        return list(self._call(iter(asked), timeout=DEADLINE))

    def open(self, asked: Iterator[Any]) -> Any:
        """Return a stream that goes on until it is cancelled."""
        return self._call(asked, timeout=DEADLINE)

    def close(self) -> None:
        self._channel.close()

    def picker_metric(self, name: str) -> float:
        registry = self.routed.registry
        value = registry.get_sample_value(f"pla_serve_picker:{name}", {"model_name": MODEL})
        return value or 0.0


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    lives = [Live(link_key=KEY) for _ in range(2)]
    for live in lives:
        live.wait_ready()
    routed = Routed(lives, picker=PickerOptions(picker_port=0), server={"max_body_mib": BODY_MIB})
    asker = Asker(routed, lives)
    yield asker
    asker.close()
    routed.close()
    for live in lives:
        live.close()


def head(
    path: str = "/v1/completions",
    mode: int = messages.BUFFERED,
    *,
    end: bool = False,
    subset: Any = None,
    **headers: str,
) -> Any:
    message = ProcessingRequest()
    sent = {":method": "POST", ":path": path, "content-type": "application/json", **headers}
    for name, value in sent.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode("latin-1"))
    message.request_headers.end_of_stream = end
    message.protocol_config.request_body_mode = mode
    if subset is not None:
        entry = message.metadata_context.filter_metadata.add(key=SUBSET_SPACE)
        entry.value.update({SUBSET: subset})
    return message


def body(data: bytes | dict[str, Any], *, end: bool = True) -> Any:
    message = ProcessingRequest()
    message.request_body.body = data if isinstance(data, bytes) else json.dumps(data).encode()
    message.request_body.end_of_stream = end
    return message


def answer_head(status: str = "200") -> Any:
    message = ProcessingRequest()
    message.response_headers.headers.headers.add(key=":status", raw_value=status.encode())
    return message


def destination(answer: Any, kind: str) -> str:
    """Return the address that an answer names, in both of its places."""
    assert answer.WhichOneof(KIND) == kind
    common = getattr(answer, kind).response
    [option] = common.header_mutation.set_headers
    assert option.header.key == DESTINATION
    assert option.append_action == messages.OVERWRITE
    assert common.clear_route_cache
    address: str = option.header.raw_value.decode()
    assert answer.dynamic_metadata["envoy.lb"][DESTINATION] == address
    return address


COMPLETION = {"model": MODEL, "prompt": "hello world", "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
MESSAGES = {**CHAT, "max_tokens": 4}
RESPONSE = {"model": MODEL, "input": "hello"}


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions?x=1", COMPLETION),
        ("/v1/completions", {**COMPLETION, "prompt": [[1, 2, 3], [4, 5]]}),
        ("/v1/chat/completions", CHAT),
        ("/v1/messages", MESSAGES),
        ("/v1/responses", RESPONSE),
    ],
)
def test_a_request_with_a_prompt_is_sent_to_an_instance(
    asker: Asker, path: str, sent: dict[str, Any]
) -> None:
    before = asker.routed.metric("dispatched_total")
    first, second, third = asker.ask(head(path), body(sent), answer_head())
    assert first.WhichOneof(KIND) == "request_headers"
    assert not first.request_headers.response.header_mutation.set_headers
    assert destination(second, "request_body") in asker.addresses
    assert third.WhichOneof(KIND) == "response_headers"
    assert asker.routed.metric("dispatched_total") == before + 1
    until(lambda: asker.routed.metric("instance_requests") == 0, "the end of the account")


def test_in_full_duplex_the_body_comes_back_whole_after_the_decision(asker: Asker) -> None:
    text = json.dumps({**COMPLETION, "prompt": "hello " * 40, "user": "x" * 150_000}).encode()
    asked = [head(mode=messages.FULL_DUPLEX), body(text[:70_000], end=False), body(text[70_000:])]
    decision, *pieces = asker.ask(*asked)
    assert destination(decision, "request_headers") in asker.addresses
    streamed = [each.request_body.response.body_mutation.streamed_response for each in pieces]
    assert b"".join(each.body for each in streamed) == text
    assert [each.end_of_stream for each in streamed] == [False] * (len(pieces) - 1) + [True]
    assert max(len(each.body) for each in streamed) <= 64 * 2**10


def test_in_full_duplex_trailers_end_the_body_as_well(asker: Asker) -> None:
    trailers = ProcessingRequest()
    trailers.request_trailers.SetInParent()
    asked = [head(mode=messages.FULL_DUPLEX), body(COMPLETION, end=False), trailers]
    decision, piece, last = asker.ask(*asked)
    destination(decision, "request_headers")
    assert not piece.request_body.response.body_mutation.streamed_response.end_of_stream
    assert last.WhichOneof(KIND) == "request_trailers"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{nope",
        b"[]",
        b"\xff\xfe\x00",
        b'{"prompt": "x", "model": "m", "n": "many"}',
        b"[" * 200_000,
        b'{"prompt": []}',
        b'{"model": "org/echo", "prompt": [1180591620717411303424]}',
        b'{"model": "org/echo", "prompt": ' + b'"' + b"x" * 200_000 + b'"}',
    ],
)
def test_what_cannot_be_read_goes_to_some_instance_which_says_what_is_wrong(
    asker: Asker, sent: bytes
) -> None:
    _, answer = asker.ask(head(), body(sent))
    assert destination(answer, "request_body") in asker.addresses


def test_requests_without_a_prompt_need_no_body(asker: Asker) -> None:
    [models] = asker.ask(head("/v1/models", end=True, **{":method": "GET"}))
    assert destination(models, "request_headers") in asker.addresses
    [upload] = asker.ask(head("/v1/files"))
    assert destination(upload, "request_headers") in asker.addresses
    [unread] = asker.ask(head(mode=messages.SKIPPED))
    assert destination(unread, "request_headers") in asker.addresses


@pytest.mark.parametrize("mode", [messages.BUFFERED, messages.FULL_DUPLEX])
def test_a_body_beyond_the_bound_is_refused(asker: Asker, mode: int) -> None:
    piece = b"x" * int(BODY_MIB * 2**20)
    *_, refusal = asker.ask(head(mode=mode), body(piece, end=False), body(piece))[:2]
    if mode == messages.BUFFERED:
        [_, refusal] = asker.ask(head(mode=mode), body(piece + b"x"))
    assert refusal.immediate_response.status.code == 413
    assert json.loads(refusal.immediate_response.body)["error"]["code"] == "request_too_large"


def test_a_body_that_does_not_come_is_refused_in_time(asker: Asker) -> None:
    routed = Routed(
        asker.lives,
        picker=PickerOptions(picker_port=0),
        server={"limits": Limits(body_seconds=0.2)},
    )
    other, held = Asker(routed, asker.lives), Held([head(mode=messages.FULL_DUPLEX)])
    try:
        [refusal] = other.open(held)
    finally:
        held.release()
        other.close()
        routed.close()
    assert refusal.immediate_response.status.code == 408


def test_envoy_chooses_of_which_instances_one_is_picked(asker: Asker) -> None:
    for address in asker.addresses:
        for subset in ([address, "10.0.0.1:1"], f" {address} ,10.0.0.1:1"):
            _, answer = asker.ask(head(subset=subset), body(COMPLETION))
            assert destination(answer, "request_body") == address
    _, refusal = asker.ask(head(subset=["10.0.0.1:1"]), body(COMPLETION))
    assert refusal.immediate_response.status.code == 503
    names = {each.header.key for each in refusal.immediate_response.headers.set_headers}
    assert names == {"content-type", "retry-after"}


def test_a_client_that_leaves_is_taken_off_the_account(asker: Asker) -> None:
    held = Held([head(), body(COMPLETION)])
    call = asker.open(held)
    next(call)
    destination(next(call), "request_body")
    assert asker.routed.metric("instance_requests") == 1
    assert asker.picker_metric("open_requests") == 1
    call.cancel()
    until(lambda: asker.picker_metric("open_requests") == 0, "the end of the stream")
    assert asker.routed.metric("instance_requests") == 0
    held.release()


def test_messages_in_an_order_that_makes_no_sense_harm_nobody(asker: Asker) -> None:
    empty = ProcessingRequest()
    orders: list[list[Any]] = [
        [],
        [empty],
        [answer_head(), head(), body(COMPLETION)],
        [body(COMPLETION), body(COMPLETION)],
        [answer_head("banana"), answer_head("")],
        [head(), head(), body(COMPLETION), body(COMPLETION), head(end=True)],
        [head(mode=77), body(b"\x00")],
        [head(**{"x-\u00ff": "\u00ff", "authorization": "Bearer \u00ff"}), body(COMPLETION)],
        [head(subset={"not": "a list"}), body(COMPLETION)],
    ]
    for order in orders:
        asker.ask(*order)
    until(lambda: asker.picker_metric("open_requests") == 0, "the end of all streams")
    until(lambda: asker.routed.metric("instance_requests") == 0, "the end of the accounts")
    _, answer = asker.ask(head(), body(COMPLETION))
    assert destination(answer, "request_body") in asker.addresses


class Held:
    """Messages of a request that does not end until it is released."""

    def __init__(self, asked: list[Any]) -> None:
        self._asked = iter(asked)
        self._released = threading.Event()

    def __iter__(self) -> Held:
        return self

    def __next__(self) -> Any:
        message = next(self._asked, None)
        if message is None:
            self._released.wait(DEADLINE)
            raise StopIteration
        return message

    def release(self) -> None:
        self._released.set()
