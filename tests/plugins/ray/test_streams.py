"""Streams that go on when replicas fail, against replicas that do what a test says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import msgspec
import pytest

from pla_serve.fleet.router.prefixes import Chain
from pla_serve.fleet.router.routed_request import RoutedRequest, with_seed
from pla_serve.plugins.ray.calls import ReplicaCall, read_call
from pla_serve.plugins.ray.streams import ContinuationOptions, ContinuedStream
from pla_serve.wire.codec import encode
from pla_serve.wire.engine import Accepted, AddRequest, Output, Rejected, SamplingParams

PROMPT = [3, 5, 8]
TOKENS = 12
NOW = 100.0
QUICK = ContinuationOptions(patience_seconds=0.2, liveness_seconds=0.05)


class Client:
    """Collects what a client gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.told: list[str] = []
        self.cached: list[int | None] = []

    def take(self, message: object) -> None:
        if isinstance(message, Output):
            self.tokens += message.tokens
            self.cached.append(message.cached_tokens)
            if message.finish_reason:
                self.told.append(message.finish_reason)
        elif isinstance(message, Rejected):
            self.told.append(f"rejected: {message.reason}")
        else:
            self.told.append("accepted")

    def fail(self, failure: Exception) -> None:
        self.told.append(f"failed: {failure}")


class Replica:
    """Makes tokens that follow from the prompt and their place, and fails at a place."""

    def __init__(self, name: str, dies_at: int = 1 << 30, how: str = "dies") -> None:
        self.name, self.dies_at, self.how = name, dies_at, how
        self.cancelled = 0
        self.messages: list[AddRequest] = []

    def answers(self, call: ReplicaCall) -> Answers:
        call.replica = self.name
        message = read_call(bytes_of(call), NOW).message
        self.messages.append(message)
        return Answers(self, message)


class Answers:
    def __init__(self, replica: Replica, message: AddRequest) -> None:
        self._replica, self._message = replica, message
        self._made = message.generated
        self._accepted = False

    async def __anext__(self) -> bytes:
        replica, id = self._replica, self._message.id
        if not self._accepted:
            self._accepted = True
            if replica.how == "refuses":
                return encode([Rejected(id=id, reason="full", retry_after=1.0)])
            if replica.how == "forbids":
                return encode([Rejected(id=id, reason="never", retry_after=None)])
            return encode([Accepted(id, 2)])
        if self._made >= replica.dies_at:
            if replica.how == "dies":
                raise RuntimeError("the actor died")
            if replica.how == "ends":
                raise StopAsyncIteration
            if replica.how == "errors":
                told = Output(id=id, tokens=[], finish_reason="error", error="no memory")
                return encode([told])
            if replica.how == "nonsense":
                return b"\xc1"
            await asyncio.Event().wait()
        self._made += 1
        finish = "length" if self._made == TOKENS else None
        token = oracle(self._message.prompt, self._made - 1)
        cached = 2 if self._made == self._message.generated + 1 else None
        return encode([Output(id=id, tokens=[token], finish_reason=finish, cached_tokens=cached)])

    def cancel(self) -> None:
        self._replica.cancelled += 1


def oracle(prompt: Sequence[int], place: int) -> int:
    return prompt[place % len(PROMPT)] + place


def bytes_of(call: ReplicaCall) -> bytes:
    kind, arguments = call.__reduce__()
    return bytes(kind(*arguments))


def answer(
    send: Callable[[ReplicaCall], Answers], options: ContinuationOptions = QUICK, **sampling: float
) -> tuple[Client, RoutedRequest]:
    request = AddRequest(
        id="r",
        prompt=list(PROMPT),
        sampling=SamplingParams(max_tokens=TOKENS, **{"temperature": 0, **sampling}),  # type: ignore[arg-type]
        arrival=NOW - 1,
        deadline=NOW + 2,
    )
    client = Client()
    routed = RoutedRequest(with_seed(request), client, "", Chain(request.prompt))
    asyncio.run(ContinuedStream(routed, send, options, lambda: NOW).run())
    return client, routed


def in_turn(*replicas: Replica) -> Callable[[ReplicaCall], Answers]:
    left = list(replicas)

    def send(call: ReplicaCall) -> Answers:
        return (left.pop(0) if len(left) > 1 else left[0]).answers(call)

    return send


WANTED = [oracle(PROMPT, place) for place in range(TOKENS)]


@pytest.mark.parametrize("how", ["dies", "ends", "errors", "hangs", "nonsense"])
@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_stream_goes_on_elsewhere_token_for_token(how: str, place: int) -> None:
    first, second = Replica("a", place, how), Replica("b")
    client, _ = answer(in_turn(first, second))
    assert client.tokens == WANTED
    assert client.told == ["accepted", "length"]
    (again,) = second.messages
    assert (again.prompt, again.generated) == (PROMPT + WANTED[:place], place)
    assert first.cancelled == second.cancelled == 1


def test_clients_are_told_of_the_cache_where_the_stream_began() -> None:
    client, _ = answer(in_turn(Replica("a", 4), Replica("b")))
    assert [cached for cached in client.cached if cached is not None] == [2]


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_deaths_between_tokens_is_survived(seed: int) -> None:
    chance = random.Random(seed)
    hows = ("dies", "errors", "ends")
    places = sorted(chance.sample(range(TOKENS), 6))
    replicas = [Replica(f"r{at}", at, chance.choice(hows)) for at in places]
    client, routed = answer(in_turn(*replicas, Replica("last")))
    assert client.tokens == WANTED
    assert len(routed.failures) == 6


def test_a_request_that_every_replica_dies_of_is_given_up() -> None:
    replicas = [Replica(name, 0) for name in "abcdef"]
    client, routed = answer(in_turn(*replicas), ContinuationOptions(most_failures=3))
    assert client.told == [
        "accepted",
        "failed: given up after 3 failures; the log of the API's replica has them",
    ]
    assert sum(len(replica.messages) for replica in replicas) == 3
    assert len(routed.failures) == 3


def test_replicas_that_failed_or_refused_it_are_left_out_until_a_token_comes() -> None:
    left_out: list[set[str]] = []
    replicas = iter([Replica("a", 0), Replica("b", how="refuses"), Replica("c", 2), Replica("d")])

    def send(call: ReplicaCall) -> Answers:
        call.replicas = 4
        left_out.append(set(call.leave_out))
        return next(replicas).answers(call)

    client, _ = answer(send)
    assert client.tokens == WANTED
    assert left_out == [set(), {"a"}, {"a", "b"}, {"c"}]


def test_a_refusal_of_all_is_the_clients() -> None:
    asked: list[str] = []

    def send(call: ReplicaCall) -> Answers:
        call.replicas = 3
        asked.append(f"r{len(asked)}")
        return Replica(asked[-1], how="refuses").answers(call)

    client, _ = answer(send)
    assert client.told == ["rejected: full"]
    assert len(asked) == 3


def test_a_request_that_no_replica_would_take_is_refused_at_once() -> None:
    client, _ = answer(in_turn(Replica("a", how="forbids")))
    assert client.told == ["rejected: never"]


def test_a_stream_that_has_begun_waits_for_room() -> None:
    replicas = iter([Replica("a", 3), *[Replica("b", how="refuses")] * 2, Replica("b")])

    def send(call: ReplicaCall) -> Answers:
        call.replicas = 1
        return next(replicas).answers(call)

    client, _ = answer(send)
    assert client.tokens == WANTED


def test_nobody_waits_for_a_replica_longer_than_patience() -> None:
    class Nowhere:
        async def __anext__(self) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

        def cancel(self) -> None: ...

    client, _ = answer(lambda call: Nowhere())  # type: ignore[arg-type, return-value]
    assert client.told == ["failed: no replica is ready"]


def test_sampling_gets_a_seed_that_is_the_same_everywhere() -> None:
    first, second = Replica("a", 3), Replica("b")
    answer(in_turn(first, second), temperature=1.0)
    seeds = {message.sampling.seed for message in (*first.messages, *second.messages)}
    assert len(seeds) == 1
    assert None not in seeds


def test_times_cross_clocks_as_differences() -> None:
    call = ReplicaCall(
        AddRequest(
            id="r",
            prompt=[1],
            sampling=SamplingParams(max_tokens=1),
            arrival=NOW - 1,
            deadline=NOW + 2,
        ),
        Chain([1]),
        lambda: NOW,
    )
    received = read_call(bytes_of(call), 5000.0).message
    assert (received.arrival, received.deadline) == (4999.0, 5002.0)
    assert msgspec.structs.replace(received, arrival=NOW - 1, deadline=NOW + 2) == call.message


def test_a_client_that_leaves_ends_the_request_at_its_replica() -> None:
    replica = Replica("a", 2, "hangs")

    async def leave() -> None:
        request = AddRequest(
            id="r", prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=9), arrival=NOW
        )
        routed = RoutedRequest(request, Client(), "", Chain([1, 2, 3]))
        stream = ContinuedStream(routed, replica.answers, clock=lambda: NOW)
        task = asyncio.create_task(stream.run())
        while len(routed.tokens) < 2:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert replica.cancelled == 1
