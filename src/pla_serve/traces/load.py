"""Loads a trace that is named by a text, and lays its requests on one clock.

::

    FILE[:KEY=VALUE...]                    a recorded trace, any format that `files` reads
    gen:KIND[:KEY=VALUE...]                generated, see `generator`
    mix:SOURCE@SHARE+SOURCE@SHARE[+...]    several of those, see `mix`

    mooncake.csv.gz:max-input=32768
    gen:burst-short:requests=5000:factor=10
    mix:lmsys.csv.gz@0.9+mooncake.csv.gz:min-new=2049@0.1

A shell leaves such a text as it is. Keys of a file are the fields of `FileOptions`, those of a
generated trace the fields of `generator.GeneratorOptions`, with hyphens for underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import TypeVar

from pla_serve.traces.blocks import block_size
from pla_serve.traces.cached import recount_cached
from pla_serve.traces.clock import ClockOptions, on_one_clock, own_clocks, start_sessions
from pla_serve.traces.files import read_rows
from pla_serve.traces.generator import KINDS, GeneratorOptions, generate_rows
from pla_serve.traces.mix import Part, mix
from pla_serve.traces.rows import Row, TraceError
from pla_serve.traces.sharegpt import CountTokens, about_four_characters

_Options = TypeVar("_Options", "FileOptions", GeneratorOptions)
_OPTION = re.compile(r"^(?P<rest>.+):(?P<key>[A-Za-z_-]+)=(?P<value>[^:/]*)$")
_PART = re.compile(r"(?P<source>.+?)@(?P<share>[0-9.eE-]+)(?:\+|$)")


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Limits on the rows of a file that are used.

    Raises:
        ValueError: a field is below 1.
    """

    min_new: int | None = None
    max_new: int | None = None
    min_input: int | None = None
    max_input: int | None = None
    first: int | None = None
    """Number of rows that are read at all, before any is left out."""
    block_tokens: int | None = None
    """Tokens in one block, where they cannot be inferred from the counts."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value}")

    def keeps(self, row: Row) -> bool:
        """Whether a row is within the limits."""
        return (
            (self.min_new is None or row.new_tokens >= self.min_new)
            and (self.max_new is None or row.new_tokens <= self.max_new)
            and (self.min_input is None or row.input_tokens >= self.min_input)
            and (self.max_input is None or row.input_tokens <= self.max_input)
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of a trace on one clock."""

    name: str
    """Text that named it, with file names in place of paths."""
    rows: tuple[Row, ...]
    """Rows in the order of their arrivals, the first at 0, and numbered in it. Their
    ``cached_tokens`` are what earlier rows explain; ``block_tokens`` is known where there are
    blocks."""
    clock: str
    """Description of where the arrivals come from."""
    left_out: int
    """Number of rows that were left out because their prompts exceed ``max_input_tokens``."""
    recorded: tuple[Row, ...] = ()
    """Rows with recorded times, where each session has a clock of its own; otherwise empty."""

    def restarted(self, span: float, seed: int, *, max_pause: float = inf) -> Trace:
        """Return the trace with sessions that start over ``span`` seconds (`start_sessions`).

        Raises:
            ValueError: its sessions have no clocks of their own.
        """
        if not self.recorded:
            raise ValueError(f"sessions of {self.name} are on one clock, and start as recorded")
        rows = _numbered(start_sessions(self.recorded, span, seed, max_pause=max_pause))
        clock = f"session starts uniform over {span:g} s, pauses of at most {max_pause:g} s"
        return replace(self, rows=rows, clock=clock)


@dataclass(frozen=True, slots=True)
class _Loader:
    seed: int
    count_tokens: CountTokens
    max_input_tokens: int | None
    max_requests: int | None

    def source(self, text: str) -> tuple[str, list[Row], int]:
        """Return name, rows, and number of rows with too long prompts, of a file or generator."""
        rest, options = _split_options(text)
        if rest.startswith("gen:"):
            kind = next((k for k in KINDS if k == rest.removeprefix("gen:")), None)
            if kind is None:
                raise TraceError(f"{rest} is not known; there are gen:" + ", gen:".join(KINDS))
            rows = generate_rows(kind, _parse(GeneratorOptions, options, rest), self.seed)
            return (text, *self._fitting(rows, text))
        path = Path(rest)
        keep = _parse(FileOptions, options, path.name)
        rows = read_rows(path, keep.first, self.count_tokens)
        kept, over = self._fitting(_complete(rows, keep, path.name), path.name)
        kept = [row for row in kept if keep.keeps(row)]
        if not kept:
            raise TraceError(f"no request of {path.name} is within its limits; widen them")
        return path.name + text[len(rest) :], kept, over

    def _fitting(self, rows: list[Row], name: str) -> tuple[list[Row], int]:
        limit = self.max_input_tokens
        kept = rows if limit is None else [row for row in rows if row.input_tokens <= limit]
        if not kept:
            raise TraceError(f"every prompt of {name} is longer than {limit} tokens")
        return kept, len(rows) - len(kept)

    def mixture(self, text: str) -> tuple[str, list[Row], int]:
        parts, names, over = [], [], 0
        for source, share in _split_mix(text):
            name, rows, dropped = self.source(source)
            parts.append(Part(name, rows, share))
            names.append(f"{name}@{share:g}")
            over += dropped
        return "mix:" + "+".join(names), mix(parts, self.seed, self.max_requests), over


def load_trace(
    spec: str,
    *,
    seed: int = 0,
    max_input_tokens: int | None = None,
    max_requests: int | None = None,
    session_span: float = 3600.0,
    think_seconds: float = 5.0,
    count_tokens: CountTokens = about_four_characters,
) -> Trace:
    """Load a trace on one clock; equal arguments give equal rows.

    Turns of a session arrive no earlier than their recorded times. A replay should let each also
    wait for the previous answer, and for ``think`` where that is known.

    Args:
        spec: text of the form that this module describes.
        seed: for all that is drawn; `clock.on_one_clock` says what that is.
        max_input_tokens: longer prompts are left out.
        max_requests: number of requests to keep, the first ones to arrive.
        count_tokens: counts the tokens of texts, for formats without counts.

    Raises:
        TraceError: the spec or a file cannot be read; the message says what to change.
        ValueError: an option is out of range.
    """
    for name, value in (("max_input_tokens", max_input_tokens), ("max_requests", max_requests)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    clock = ClockOptions(seed, session_span=session_span, think_seconds=think_seconds)
    loader = _Loader(seed, count_tokens, max_input_tokens, max_requests)
    if spec.startswith("mix:"):
        name, rows, over = loader.mixture(spec)
    else:
        name, rows, over = loader.source(spec)
    timed, words = on_one_clock(rows, clock)
    if spec.startswith("gen:"):
        words = "generated"
    timed = timed[:max_requests]
    recorded: tuple[Row, ...] = ()
    if own_clocks(rows):
        kept = {row.index for row in timed}
        recorded = tuple(row for row in rows if row.index in kept)
    return Trace(name, _numbered(timed), words, over, recorded)


def _numbered(timed: list[Row]) -> tuple[Row, ...]:
    return tuple(replace(row, index=i) for i, row in enumerate(recount_cached(timed)))


def _complete(rows: list[Row], options: FileOptions, name: str) -> list[Row]:
    """Return the rows with the size of their blocks and with ``cached_tokens``."""
    size = options.block_tokens or block_size(rows, name)
    if size is not None:
        rows = [replace(row, block_tokens=size) if row.blocks else row for row in rows]
    return rows if all(row.cached_tokens is not None for row in rows) else recount_cached(rows)


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    """Split ``:key=value`` off the end of a text; a path may hold colons itself."""
    options: dict[str, str] = {}
    while match := _OPTION.match(text):
        text = match["rest"]
        key = match["key"].replace("-", "_")
        if key in options:
            raise TraceError(f"{match['key']} is given twice")
        options[key] = match["value"]
    return text, options


def _split_mix(text: str) -> Iterable[tuple[str, float]]:
    body = text.removeprefix("mix:")
    parts = list(_PART.finditer(body))
    if len(parts) < 2 or sum(len(part[0]) for part in parts) != len(body):
        raise TraceError(f"{text!r}: a mixture is written mix:FILE@0.9+FILE:min-new=2049@0.1")
    try:
        return [(part["source"], float(part["share"])) for part in parts]
    except ValueError:
        raise TraceError(f"{text!r}: a share after @ is not a number") from None


def _parse(kind: type[_Options], given: dict[str, str], name: str) -> _Options:
    known = {field.name: str(field.type) for field in fields(kind)}
    values: dict[str, float] = {}
    for key, text in given.items():
        if key not in known:
            has = ", ".join(field.replace("_", "-") for field in known)
            raise TraceError(f"{name} has no option {key.replace('_', '-')}; it has {has}")
        try:
            values[key] = int(text) if known[key].startswith("int") else float(text)
        except ValueError:
            what = "a whole number" if known[key].startswith("int") else "a number"
            key = key.replace("_", "-")
            raise TraceError(f"{name}: {key}={text} is not {what}") from None
    try:
        return kind(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise TraceError(f"{name}: {error}") from None
