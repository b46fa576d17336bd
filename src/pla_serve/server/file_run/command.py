"""``pla-serve batch``: answers a file of requests without a server, or through one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pla_serve.command_line import CliCommand, Given, fail
from pla_serve.engine.config import SCHEDULE, EngineConfig
from pla_serve.flags import Flag, FlagsOf
from pla_serve.logs import configure
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.knobs import check_knobs
from pla_serve.server.command import GraphFlags, load_for_api, located, read
from pla_serve.server.settings import ModelFlags, ServerSettings

if TYPE_CHECKING:
    from pla_serve.server.file_run.run import FileRun

INTERRUPTED = 130
ENGINE_FLAGS = (
    FlagsOf(ModelFlags, without=("model",)),
    FlagsOf(EngineConfig),
    FlagsOf(GraphFlags),
    FlagsOf(PolicyConfig, without=("interruptible", "layers"), panel=SCHEDULE),
    FlagsOf(
        ServerSettings,
        only=(
            "tool_parser",
            "reasoning_parser",
            "generation_config",
            "override_generation_config",
        ),
    ),
)
"""Flags of the engine that the command starts; they are those of ``serve``."""


@dataclass(frozen=True, slots=True)
class FileRunFlags:
    """Files, and who answers.

    Raises:
        ValueError: a field is out of range, or does nothing without another one.
    """

    input: Annotated[
        Path,
        Flag(
            "File of requests, one JSON object a line, as OpenAI's Batch API takes it.",
            argument=True,
        ),
    ]
    output: Annotated[
        Path,
        Flag(
            "File of answers, in the order in which they come. If it has answers of an earlier run "
            "over the same input, only the other lines are run.",
            also=("-o",),
        ),
    ]
    base_url: Annotated[
        str | None,
        Flag(
            "URL of a server that answers, in place of an engine in this process. It is asked "
            "through /v1/files and /v1/batches if it has them, else line by line."
        ),
    ] = None
    api_key: Annotated[
        str | None, Flag("Key for that server.", variable="PLA_SERVE_BATCH_API_KEY")
    ] = None
    lines_at_once: Annotated[
        int, Flag("Lines that are sent at once where they are sent one by one.", least=1, most=4096)
    ] = 32

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.api_key is not None and self.base_url is None:
            raise ValueError("--api-key does nothing without --base-url; give both or none")


def batch(given: Given) -> int:
    """Answer the lines of a file.

    Returns:
        0 when each line has its answer, 130 after Ctrl-C.

    Raises:
        SystemExit: the run could not go on; one line on standard error says why.
    """
    try:
        flags = given.make(FileRunFlags)
        ask = _through_server(flags) if flags.base_url else _with_engine(flags, given)
        if flags.base_url:
            for config in ENGINE_FLAGS:
                if given.fields(config.config):
                    name = next(iter(given.fields(config.config))).replace("_", "-")
                    raise ValueError(f"--{name} is for an engine here; drop it or --base-url")
    except (ValueError, OSError) as error:
        fail(error)
    configure("warning", "text", "batch")
    return _run(flags, ask)


BATCH = CliCommand("batch", batch, (FlagsOf(FileRunFlags), *ENGINE_FLAGS))

Ask = Callable[["FileRun"], Awaitable[None]]
"""Has the lines of a run answered."""


def _run(flags: FileRunFlags, ask: Ask) -> int:
    from pla_serve.server.engine.backend import EngineStartError
    from pla_serve.server.file_run.input import read_input
    from pla_serve.server.file_run.output import OutputError, OutputFile
    from pla_serve.server.file_run.progress import RunProgress
    from pla_serve.server.file_run.run import FileRun

    try:
        if flags.output.exists() and flags.output.samefile(flags.input):
            fail(f"{flags.input} is both input and output; name another output")
        asked = read_input(flags.input, ServerSettings(("m",), "m").max_body_bytes)
        output = OutputFile(flags.output)
    except (OSError, OutputError) as error:
        fail(error)
    try:
        output.check(asked.custom_ids)
        known = len(output.answered)
        progress = RunProgress(len(asked.custom_ids) - known, known)
        if known:
            progress.say(f"answered by an earlier run: {known} lines")
        run = FileRun(asked, output, progress)
        with progress:
            asyncio.run(_answer(run, ask))
        progress.say(f"{progress.summary}; answers are in {flags.output}")
        return 0
    except KeyboardInterrupt:
        progress.say(f"stopped: {progress.summary}. Start again to go on.")
        return INTERRUPTED
    except (OSError, OutputError, EngineStartError, ValueError) as error:
        fail(f"{error}. What was answered is in {flags.output}; start again to go on.")
    finally:
        output.close()


async def _answer(run: FileRun, ask: Ask) -> None:
    await run.refuse_wrong_lines()
    if run.waiting():
        await ask(run)
    await asyncio.to_thread(run.output.sync)


def _through_server(flags: FileRunFlags) -> Ask:
    async def ask(run: FileRun) -> None:
        from pla_serve.server.file_run.remote import remote_server
        from pla_serve.server.file_run.remote_batches import RemoteBatches

        assert flags.base_url is not None
        async with remote_server(flags.base_url, flags.api_key) as server:
            if await server.keeps_batches():
                await RemoteBatches(server, run).run()
            else:
                await run.send_all(server.send, flags.lines_at_once)

    return ask


def _with_engine(flags: FileRunFlags, given: Given) -> Ask:
    """Raises:
    ValueError: a flag of the engine is out of range.
    OSError: the chat template cannot be read.
    """
    config, settings, template = read(given)

    async def ask(run: FileRun) -> None:
        from starlette.types import ASGIApp

        from pla_serve.engine.host.process import CORE
        from pla_serve.server.engine.process import EngineSpec
        from pla_serve.server.offline.caller import Answered, LineCaller
        from pla_serve.server.offline.lines import LineRequest
        from pla_serve.server.offline.owners import EVERYBODY, Owners
        from pla_serve.server.run import InstanceServer

        source, model = await asyncio.to_thread(load_for_api, config, template, settings)
        spec = EngineSpec(located(config, source), CORE, log_level="warning", log_format="text")

        async def work(app: ASGIApp) -> None:
            caller = LineCaller(app, Owners(()))

            async def send(request: LineRequest, id: str) -> Answered:
                return await caller.call(EVERYBODY, request, id)

            await server.engine.ready()
            await run.send_all(send, flags.lines_at_once)

        server = InstanceServer(settings, spec, model)
        await server.run_for(work)

    return ask
