"""Other ranks enter exactly the layers that rank 0 enters, in its order, and decide nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.device.marks import Device, HostDevice
from pla_serve.engine.parallel.commands import (
    Abandon,
    BeginPass,
    Command,
    CommandReceiver,
    CommandSender,
    End,
    Go,
)
from pla_serve.engine.parallel.following import OutOfStep, follow
from pla_serve.engine.parallel.leading import LeadingExecutor
from pla_serve.engine.run.executor import Executed
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.runner import AtBoundary

LAYERS = 4
WHOLE = 9
"""A batch with this many tokens is computed as a whole, without boundaries."""


@dataclass
class Recorder:
    """An executor that writes down what it would compute."""

    layers: int = LAYERS
    log: list[tuple[object, ...]] = field(default_factory=list)
    device: Device = field(default_factory=HostDevice)

    def forward(self, requests: Sequence[SpanRequest], at_boundary: AtBoundary) -> Executed:
        name = tuple(requests[0].tokens)
        if len(name) == WHOLE:
            self.log.append((name, "whole"))
            return Executed(torch.empty(0), True)
        for layer in range(self.layers):
            at_boundary()
            self.log.append((name, layer))
        self.log.append((name, "head"))
        return Executed(torch.empty(0), False)

    def end_warm_up(self) -> None:
        self.log.append(("warm",))

    def use_idle_time(self) -> bool:
        self.log.append(("idle",))
        return False

    def counts(self) -> GridCounts | None:
        return None


class Left(Exception):
    """Error that a loop raises to leave a batch."""


def request(number: int, tokens: int = 2) -> SpanRequest:
    return SpanRequest([number] * tokens, 3, [(0, 2), (7, 9)], True)


def lead(executor: LeadingExecutor, rng: Random, numbers: Iterator[int], depth: int) -> None:
    """One batch as a loop would run it: others inside, and perhaps left in the middle."""
    number = next(numbers)

    def at_boundary() -> None:
        while depth < 4 and rng.random() < 0.3:
            lead(executor, rng, numbers, depth + 1)
        if rng.random() < 0.1:
            raise Left

    batch = [request(number, WHOLE if rng.random() < 0.2 else 2)]
    with suppress(Left):
        executor.forward(batch, at_boundary)


def over_the_wire(command: Command) -> Command:
    decoded: Command = msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=Command)
    return decoded


def replay(commands: list[Command], layers: int = LAYERS) -> list[tuple[object, ...]]:
    """Return the results of a follower that gets these commands."""
    follower = Recorder(layers)
    told = iter(map(over_the_wire, commands))
    follow(follower, lambda: next(told))
    assert next(told, None) is None, "it left before it was told to"
    return follower.log


@given(seed=st.integers(0, 2**32))
def test_followers_compute_what_the_leader_computes(seed: int) -> None:
    rng = Random(seed)
    leader, commands = Recorder(), []
    executor = LeadingExecutor(leader, commands.append)
    numbers = iter(range(60))
    try:
        while True:
            if rng.random() < 0.1:
                executor.use_idle_time()
            if rng.random() < 0.1:
                executor.end_warm_up()
            lead(executor, rng, numbers, 0)
    except StopIteration:
        # An error of the loop's own, deep inside: every batch on the stack is left.
        commands.append(End())
    assert replay(commands) == leader.log


def test_the_leader_speaks_before_it_computes() -> None:
    """Else the others would idle as long as it computes."""
    commands: list[Command] = []

    class Checked(Recorder):
        def forward(self, requests: Sequence[SpanRequest], at_boundary: AtBoundary) -> Executed:
            assert commands == [BeginPass.of(0, requests)]
            at_boundary()
            assert commands[1:] == [Go(0, 0)]
            return Executed(torch.empty(0), False)

    LeadingExecutor(Checked(), commands.append).forward([request(1)], lambda: None)


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ([Go(0, 0)], "between batches"),
        ([BeginPass.of(1, [request(0)])], "at depth 0"),
        ([BeginPass.of(0, [request(0)]), Go(0, 1)], "before layer 0 at depth 0"),
        ([BeginPass.of(0, [request(0)]), Abandon(1)], "before layer 0 at depth 0"),
        ([BeginPass.of(0, [request(0)]), BeginPass.of(0, [request(1)])], "at depth 1"),
        ([BeginPass.of(0, [request(0)]), End()], "before layer 0"),
    ],
)
def test_what_does_not_fit_is_not_guessed_at(commands: list[Command], message: str) -> None:
    with pytest.raises(OutOfStep, match=message):
        replay(commands)


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_ranks_with_other_layers_are_found_out(layers: int) -> None:
    commands: list[Command] = []
    executor = LeadingExecutor(Recorder(), commands.append)
    executor.forward([request(0)], lambda: None)
    executor.forward([request(1)], lambda: None)
    with pytest.raises(OutOfStep):
        replay([*commands, End()], layers)


def test_commands_arrive_in_order_at_each_rank(tmp_path: Path) -> None:
    receivers = [CommandReceiver(tmp_path, rank) for rank in (1, 2)]
    send = CommandSender(tmp_path, 3)
    sent: list[Command] = [BeginPass.of(0, [request(i)]) for i in range(500)] + [End()]
    for command in sent:
        send(command)
    for receive in receivers:
        got: list[Command] = []
        while not got or got[-1] != End():
            got.append(receive())
        assert [plain(command) for command in got] == [plain(command) for command in sent]
        receive.close()
    send.close(0)


def plain(command: Command) -> bytes:
    return msgspec.msgpack.encode(command)
