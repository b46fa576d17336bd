"""``pla-serve bench``: from flags to an experiment and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SERVER, WORK, TRACE, TIME, GOALS, OUTPUT = (
    "Server",
    "Built-in workload",
    "Recorded trace",
    "Load",
    "Objectives",
    "Output",
)
DEFAULT_URL = "http://127.0.0.1:8000"


def bench(
    serve_arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- SERVE FLAGS]",
            help="After --: flags for every server that --compare starts, as serve takes them.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Policies to run in turn, each on a fresh server, with the same requests at the "
            "same times: fcfs,hrrn:max-batch-tokens=512,length-aware.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    base_url: Annotated[
        str,
        typer.Option(
            help="Without --compare: the server to measure; any that speaks the OpenAI API.",
            rich_help_panel=SERVER,
        ),
    ] = DEFAULT_URL,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name to ask for. Default: the first that the server lists.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", rich_help_panel=SERVER)
    ] = None,
    endpoint: Annotated[
        Literal["chat", "completions"],
        typer.Option(help="/v1/chat/completions or /v1/completions.", rich_help_panel=SERVER),
    ] = "chat",
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids",
            help="Prompts as token ids, exact in size; needs --endpoint completions and "
            "single turns.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A model folder or tokenizer.json to size prompts with. Default: the server's "
            "usage says how long words are.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask for answers of exactly the planned length, an extension that vLLM, SGLang "
            "and this server have.",
            rich_help_panel=SERVER,
        ),
    ] = True,
    extra_body: Annotated[
        str, typer.Option(help="JSON object added to every request.", rich_help_panel=SERVER)
    ] = "{}",
    workload: Annotated[
        Literal["chat+documents", "chat", "documents"],
        typer.Option(
            help="Multi-turn chat sessions with turns of LMSYS size, long documents, or both.",
            rich_help_panel=WORK,
        ),
    ] = "chat+documents",
    document_share: Annotated[
        float, typer.Option(help="Share of requests.", rich_help_panel=WORK)
    ] = 0.1,
    document_tokens: Annotated[
        str, typer.Option(help="Range of sizes.", rich_help_panel=WORK)
    ] = "2048-4096",
    output_tokens: Annotated[
        str, typer.Option(help="Range of answer lengths.", rich_help_panel=WORK)
    ] = "16-48",
    mean_turns: Annotated[
        float, typer.Option(help="Of a chat session; geometric.", rich_help_panel=WORK)
    ] = 2.0,
    think_seconds: Annotated[
        float,
        typer.Option(
            help="Mean time between an answer and the next turn; exponential.", rich_help_panel=WORK
        ),
    ] = 5.0,
    longest_message: Annotated[
        int, typer.Option(help="Chat messages are clipped to it, in tokens.", rich_help_panel=WORK)
    ] = 2048,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Replay this instead: a file of any format in docs/traces.md.",
            rich_help_panel=TRACE,
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="2 sends it twice as fast.", rich_help_panel=TRACE)
    ] = 1.0,
    max_input_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt.", rich_help_panel=TRACE)
    ] = None,
    over_length: Annotated[
        Literal["drop", "clip"],
        typer.Option(help="What to do with longer ones.", rich_help_panel=TRACE),
    ] = "drop",
    max_output_tokens: Annotated[
        int | None, typer.Option(help="Longer answers are cut.", rich_help_panel=TRACE)
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option(help="Size of the trace's blocks. Default: inferred.", rich_help_panel=TRACE),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many. Default: 200, or all of a trace.", rich_help_panel=TIME
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            help="Seconds of arrivals, in place of --requests; needs --rate.", rich_help_panel=TIME
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second, Poisson. For a trace without a common clock: session starts.",
            rich_help_panel=TIME,
        ),
    ] = None,
    load: Annotated[
        float | None,
        typer.Option(
            help="In place of --rate: share of what the first server can do, which is measured "
            "first. Default without --rate: 0.7.",
            rich_help_panel=TIME,
        ),
    ] = None,
    burst: Annotated[
        int, typer.Option(min=1, help="Sessions that start at once.", rich_help_panel=TIME)
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Of sizes and times; repetitions count on.", rich_help_panel=TIME)
    ] = 0,
    salt: Annotated[
        str | None,
        typer.Option(
            help="Makes the text; a salt used before may meet a warm cache. Default: random.",
            rich_help_panel=TIME,
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            min=1, help="Runs of each entry, interleaved; medians count.", rich_help_panel=TIME
        ),
    ] = 1,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Longest run. Default: 3 times the span of the arrivals, and 2 minutes.",
            rich_help_panel=TIME,
        ),
    ] = None,
    warm: Annotated[
        bool,
        typer.Option(
            "--warm-up/--no-warm-up", help="The same few requests first.", rich_help_panel=TIME
        ),
    ] = True,
    idle: Annotated[
        bool,
        typer.Option(
            "--idle",
            help="First measure short prompts one at a time on the idle server.",
            rich_help_panel=TIME,
        ),
    ] = False,
    short_tokens: Annotated[
        int,
        typer.Option(
            help="At most so many new tokens are short, whatever the server's boundary.",
            rich_help_panel=GOALS,
        ),
    ] = 256,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="For all requests.", rich_help_panel=GOALS)
    ] = None,
    slo_ttft_long_ms: Annotated[
        float | None, typer.Option(help="For long ones, if another.", rich_help_panel=GOALS)
    ] = None,
    slo_itl_ms: Annotated[
        float | None, typer.Option(help="For the mean gap of an answer.", rich_help_panel=GOALS)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Entry that the others are compared with. Default: the first.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Writes OUTPUT.json and OUTPUT.png.", rich_help_panel=OUTPUT
        ),
    ] = None,
    records: Annotated[
        bool,
        typer.Option("--records", help="Keep every request in the JSON.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Measure a server under load: TTFT, ITL, throughput and goodput of short and long prompts."""
    from pla_serve.bench.job import BenchJob, run
    from pla_serve.bench.replay import TraceOptions
    from pla_serve.bench.report import Objectives
    from pla_serve.bench.workload import WorkloadConfig
    from pla_serve.traces.lengths import Lmsys

    try:
        if duration is not None and rate is None:
            raise ValueError("--duration needs --rate; with --load give --requests")
        job = BenchJob(
            compare=compare,
            serve_arguments=tuple(serve_arguments or ()),
            base_url=base_url,
            model=model,
            api_key=api_key,
            endpoint=endpoint,
            token_ids=token_ids,
            tokenizer=tokenizer,
            ignore_eos=ignore_eos,
            extra_body=_object(extra_body),
            workload=WorkloadConfig(
                mix=workload,
                requests=max(1, round(rate * duration)) if rate and duration else requests or 200,
                burst=burst,
                seed=seed,
                document_share=document_share,
                document_tokens=_range("--document-tokens", document_tokens),
                message=Lmsys(high=longest_message),
                mean_turns=mean_turns,
                think_seconds=think_seconds,
                output_tokens=_range("--output-tokens", output_tokens),
            ),
            trace=trace,
            trace_options=TraceOptions(
                speed=speed,
                max_requests=requests,
                max_input_tokens=max_input_tokens,
                over_length=over_length,
                max_output_tokens=max_output_tokens,
                block_tokens=block_tokens,
                rate=rate,
                seed=seed,
            ),
            rate=rate,
            load=load,
            salt=salt,
            repeat=repeat,
            max_seconds=max_seconds,
            warm=warm,
            idle=idle,
            objectives=Objectives(
                short_tokens=short_tokens,
                ttft_short=_seconds(slo_ttft_ms),
                ttft_long=_seconds(slo_ttft_ms if slo_ttft_long_ms is None else slo_ttft_long_ms),
                itl=_seconds(slo_itl_ms),
            ),
            baseline=baseline,
            output=output,
            records=records,
        )
        code = run(job)
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"pla-serve: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _range(flag: str, text: str) -> tuple[int, int]:
    """``2048-4096``, or one number for both ends."""
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(f"{flag} takes a range such as 2048-4096, not {text!r}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("--extra-body takes a JSON object")
    return value
