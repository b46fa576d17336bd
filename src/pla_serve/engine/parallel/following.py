"""Loop of the ranks other than 0: they run what rank 0 runs, and decide nothing."""

from __future__ import annotations

from contextlib import suppress

from pla_serve.engine.parallel.commands import (
    Abandon,
    BeginPass,
    Command,
    End,
    EndWarmUp,
    Go,
    ReceiveCommand,
    UseIdleTime,
)
from pla_serve.engine.run.executor import Executor
from pla_serve.engine.run.runner import PassAbandoned


class OutOfStep(Exception):
    """A command of rank 0 does not fit the batches that this rank runs."""


def follow(executor: Executor, receive: ReceiveCommand) -> None:
    """Obey the commands of rank 0 until `End`.

    Raises:
        OutOfStep: a command does not fit the ones before.
    """
    while True:
        command = receive()
        if isinstance(command, End):
            return
        if isinstance(command, BeginPass):
            _run(executor, receive, command, 0)
        elif isinstance(command, UseIdleTime):
            executor.use_idle_time()
        elif isinstance(command, EndWarmUp):
            executor.end_warm_up()
        else:
            raise _unexpected(command, "between batches")


def _run(executor: Executor, receive: ReceiveCommand, begin: BeginPass, depth: int) -> None:
    """Run one batch, and the batches that rank 0 runs inside it."""
    if begin.depth != depth:
        raise _unexpected(begin, f"at depth {depth}")
    layer = 0

    def at_boundary() -> None:
        nonlocal layer
        while True:
            command = receive()
            if isinstance(command, BeginPass):
                _run(executor, receive, command, depth + 1)
            elif command == Go(depth, layer):
                layer += 1
                return
            elif command == Abandon(depth):
                raise PassAbandoned
            else:
                raise _unexpected(command, f"before layer {layer} at depth {depth}")

    with suppress(PassAbandoned):
        executor.forward([span.request() for span in begin.requests], at_boundary)


def _unexpected(command: Command, where: str) -> OutOfStep:
    text = repr(command)
    return OutOfStep(f"rank 0 sent {text[:200]}, and this rank is {where}")
