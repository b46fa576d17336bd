"""Calls that are JSON objects: ``{"name": "f", "arguments": {...}}``."""

from __future__ import annotations

from functools import partial

from pla_serve.server.tools.events import AnswerText, CallArguments
from pla_serve.server.tools.script import ScriptReader, ScriptStep, json_or_none

NAME_KEY = "name"
ARGUMENT_KEYS = ("arguments", "parameters")


def read_call_object(reader: ScriptReader) -> ScriptStep[bool]:
    """Read one object and emit its call; False, and its text as content, if it is none.

    Arguments that follow the name are emitted as they come. Those that stand before it wait for it.
    """
    yield from reader.skip_space()
    if (yield from reader.next_is(["{"])) is None:
        return False
    reader.record()
    reader.drop("{")
    name: str | None = None
    early: str | None = None
    index: int | None = None
    while (key := (yield from _next_key(reader))) is not None:
        if key in ARGUMENT_KEYS and name is not None and index is None:
            index = reader.begin(name)
            yield from reader.take_json(partial(CallArguments, index))
            continue
        value = yield from reader.take_json()
        if key == NAME_KEY and isinstance(found := json_or_none(value), str):
            name = found
        elif key in ARGUMENT_KEYS:
            early = value
    text = reader.recorded()
    if index is None and name is None:
        reader.emit(AnswerText(text))
        return False
    if index is None and name is not None:
        index = reader.begin(name)
        reader.emit(CallArguments(index, "{}" if early is None else early))
    return True


def _next_key(reader: ScriptReader) -> ScriptStep[str | None]:
    """Read up to the value of the next key; None behind the end, or where no key stands."""
    yield from reader.skip_space()
    if (yield from reader.next_is([","])):
        reader.drop(",")
        yield from reader.skip_space()
    if (yield from reader.next_is(["}"])):
        reader.drop("}")
        return None
    key = json_or_none((yield from reader.take_json()))
    yield from reader.skip_space()
    if not isinstance(key, str) or not (yield from reader.next_is([":"])):
        return None
    reader.drop(":")
    return key


def read_call_array(reader: ScriptReader) -> ScriptStep[None]:
    """Read calls from an array, ``[call, call, …]``, and emit each of them.

    Reading stops behind the closing bracket, or at the first element that is no call. The opening
    bracket may be missing.
    """
    yield from reader.skip_space()
    if (yield from reader.next_is(["["])):
        reader.drop("[")
    while True:
        yield from reader.skip_space()
        if (yield from reader.next_is(["]"])):
            reader.drop("]")
            return
        if (yield from reader.next_is([","])):
            reader.drop(",")
        elif not (yield from read_call_object(reader)):
            return
