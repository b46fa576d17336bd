"""Makes a workload of a recorded trace.

Prompts are filler in which equal blocks give equal text, so that prompts share the same prefixes as
in the trace.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pla_serve.bench.text import FillerPart
from pla_serve.bench.workload import TIME, BenchTurn, BenchWorkload, Session
from pla_serve.flags import Flag
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.traces.arrivals import poisson
from pla_serve.traces.blocks import SeenBlocks, block_size
from pla_serve.traces.clock import common_clock
from pla_serve.traces.files import read_rows
from pla_serve.traces.rows import Row, TraceError, root

TRACE = "Recorded trace"
OverLength = Literal["drop", "clip"]


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Settings of the replay of a trace.

    Raises:
        ValueError: a field is out of range.
    """

    speed: Annotated[float, Flag("2 sends everything in half the time.", above=0, panel=TRACE)] = (
        1.0
    )
    max_requests: Annotated[
        int | None,
        Flag(
            "Number of requests; of a trace the first ones. None: 200, or all of a trace.",
            unit="requests",
            least=1,
            panel=TIME,
            name="--requests",
        ),
    ] = None
    max_input_tokens: Annotated[
        int | None, Flag("Longest prompt.", unit="tokens", least=1, panel=TRACE)
    ] = None
    over_length: Annotated[
        OverLength,
        Flag("Whether longer prompts are left out, or clipped at the end.", panel=TRACE),
    ] = "drop"
    max_output_tokens: Annotated[
        int | None, Flag("Longer answers are cut.", unit="tokens", least=1, panel=TRACE)
    ] = None
    block_tokens: Annotated[
        int | None,
        Flag(
            "Size of the trace's blocks. None: inferred from the file.",
            unit="tokens",
            least=1,
            panel=TRACE,
        ),
    ] = None
    rate: Annotated[
        float | None,
        Knob(
            "Sessions a second, where the trace has no common clock: starts are drawn, Poisson.",
            above=0,
        ),
    ] = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_knobs(self)


def read_trace(path: Path, options: TraceOptions = TraceOptions()) -> BenchWorkload:
    """Make a workload from a file of any format that `traces.files` reads.

    Raises:
        TraceError: the file is missing, malformed, or needs an option that was not given.
    """
    rows = read_rows(path, options.max_requests)
    block = options.block_tokens or block_size(rows, path.name)
    kept, fate = _fit(rows, options)
    if not kept:
        raise TraceError(
            f"every prompt of {path.name} is longer than {options.max_input_tokens} tokens; "
            "raise the limit or clip"
        )
    turns = _turns(kept, block, options)
    if common_clock(rows):
        sessions, clock = _by_arrivals(kept, turns, options.speed), "the trace's arrivals"
    else:
        sessions, clock = _by_sessions(kept, turns, options, path.name)
    parameters: dict[str, object] = {
        "trace": path.name,
        "clock": clock,
        "speed": options.speed,
        "requests": len(kept),
        "block_tokens": block,
        "max_input_tokens": options.max_input_tokens,
        **fate,
    }
    return BenchWorkload(path.name, sessions, parameters)


def _fit(rows: list[Row], options: TraceOptions) -> tuple[list[Row], dict[str, object]]:
    """Return the rows to send, and how many were dropped or clipped, for the record."""
    limit = options.max_input_tokens
    over = 0 if limit is None else sum(row.input_tokens > limit for row in rows)
    if options.over_length == "drop":
        kept = [row for row in rows if limit is None or row.input_tokens <= limit]
        return kept, {"dropped_too_long": over, "clipped": 0}
    return rows, {"dropped_too_long": 0, "clipped": over}


def _turns(rows: list[Row], block: int | None, options: TraceOptions) -> list[BenchTurn]:
    """Return the requests in the order of the rows.

    Where the trace does not say how much of a prompt was cached, new tokens are planned as if all
    earlier blocks were.
    """
    seen = SeenBlocks()
    turns = []
    for row, (pieces, shared) in zip(rows, _prompts(rows, block), strict=True):
        cached = row.cached_tokens
        if row.blocks is None or block is None:
            cached = shared
        elif cached is None:
            cached = block * seen.add(row.blocks)
        turns.append(_turn(row, pieces, cached, options))
    return turns


def _turn(
    row: Row, pieces: tuple[FillerPart, ...], cached: int, options: TraceOptions
) -> BenchTurn:
    limit = options.max_input_tokens or row.input_tokens
    return BenchTurn(
        f"r{row.index}",
        "trace",
        beginning(pieces, limit),
        max(1, min(row.input_tokens, limit) - cached),
        min(row.output_tokens, options.max_output_tokens or row.output_tokens),
    )


def _prompts(rows: list[Row], block: int | None) -> Iterator[tuple[tuple[FillerPart, ...], int]]:
    """Yield each prompt, and the tokens that it shares with the previous prompt of its session.

    The second is for rows without blocks only. A prompt shares no more than that previous prompt:
    filler holds no answers, though a trace may count them as cached.
    """
    last: dict[str, tuple[FillerPart, ...]] = {}
    for row in rows:
        own = f"row{row.index}"
        if row.blocks is not None and block is not None:
            yield _from_blocks(row, row.blocks, block, own), 0
            continue
        shared = beginning(last.get(row.session or "", ()), row.cached_tokens or 0)
        tokens = sum(piece.tokens for piece in shared)
        rest = row.input_tokens - tokens
        pieces = (
            (*shared, FillerPart(own, rest)) if rest > 0 else beginning(shared, row.input_tokens)
        )
        if row.session is not None:
            last[row.session] = pieces
        yield pieces, min(tokens, row.input_tokens)


def _from_blocks(
    row: Row, blocks: tuple[range, ...], block: int, own: str
) -> tuple[FillerPart, ...]:
    pieces = [FillerPart(f"block{number}", block) for run in blocks for number in run]
    tail = row.input_tokens - len(pieces) * block
    if tail > 0:
        pieces.append(FillerPart(own, tail))
    return beginning(tuple(pieces), row.input_tokens)


def beginning(pieces: tuple[FillerPart, ...], tokens: int) -> tuple[FillerPart, ...]:
    """Return the first ``tokens`` tokens of a prompt, or all of it if it has fewer."""
    kept: list[FillerPart] = []
    for piece in pieces:
        if tokens <= 0:
            break
        kept.append(FillerPart(piece.key, min(piece.tokens, tokens)))
        tokens -= piece.tokens
    return tuple(kept)


def _by_arrivals(rows: list[Row], turns: list[BenchTurn], speed: float) -> tuple[Session, ...]:
    """Return a session for each request, due at the recorded time."""
    single = [
        Session((row.arrival or 0.0) / speed, (turn,), remembers=False)
        for row, turn in zip(rows, turns, strict=True)
    ]
    return tuple(sorted(single, key=lambda session: session.start))


def _by_sessions(
    rows: list[Row], turns: list[BenchTurn], options: TraceOptions, name: str
) -> tuple[tuple[Session, ...], str]:
    """Return sessions at drawn times, and a description of the times for the record."""
    if options.rate is None:
        raise TraceError(f"{name} has no common clock: give the sessions' starts with --rate")
    groups: dict[str, list[tuple[Row, BenchTurn]]] = {}
    for row, turn in zip(rows, turns, strict=True):
        groups.setdefault(row.session or f"row{row.index}", []).append((row, turn))
    times = poisson(len(groups), options.rate, 1, random.Random(f"{options.seed}/starts"))
    starts: dict[str, float] = {}
    sessions = [
        _session(starts.setdefault(root(key), times[len(starts)]), members, options.speed)
        for key, members in groups.items()
    ]
    sessions.sort(key=lambda session: session.start)
    return tuple(sessions), f"session starts drawn, Poisson, {options.rate:g}/s; then the session's"


def _session(start: float, members: list[tuple[Row, BenchTurn]], speed: float) -> Session:
    """Return one session. Its sub-agents share its clock; no turn precedes an earlier answer."""
    first = (members[0][0].arrival or 0.0) / speed
    turns = tuple(_timed(row, turn, first, speed) for row, turn in members)
    return Session(start + first, turns, remembers=False)


def _timed(row: Row, turn: BenchTurn, first: float, speed: float) -> BenchTurn:
    """Return a turn with its time: by the recorded think time, or else by the recorded arrival."""
    offset = 0.0 if row.think is not None else max(0.0, (row.arrival or 0.0) / speed - first)
    return BenchTurn(
        turn.id,
        turn.kind,
        turn.pieces,
        turn.new_tokens,
        turn.max_tokens,
        offset=offset,
        think=(row.think or 0.0) / speed,
    )
