"""One call of ``pla-serve bench``: its settings, its run and its report."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
from rich.console import Console
from tokenizers import Tokenizer

from pla_serve.bench.client import Endpoint, RequestTarget
from pla_serve.bench.experiment import Experiment, ExperimentPlan, ExperimentResult, MakeWorkload
from pla_serve.bench.progress import ProgressView
from pla_serve.bench.replay import TRACE, TraceOptions, read_trace
from pla_serve.bench.report import ALL, Objectives
from pla_serve.bench.save import save_json
from pla_serve.bench.servers import Open, ServerEntry, ServerError, fresh, parse_entries, running
from pla_serve.bench.summary import summaries
from pla_serve.bench.table import comparison_table, run_table
from pla_serve.bench.text import load_tokenizer, make_filler
from pla_serve.bench.workload import TIME, BenchWorkload, WorkloadConfig, generate
from pla_serve.flags import Flag
from pla_serve.policy.knobs import check_knobs

SERVER, OUTPUT = "Server", "Output"
"""Panels of flags."""
DEFAULT_LOAD = 0.7


def read_object(text: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the text is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("it takes a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class BenchJob:
    """One call of ``pla-serve bench``: servers, load, and where the results go.

    Raises:
        ValueError: options that do not go together; the message says which.
    """

    serve_arguments: Annotated[
        tuple[str, ...],
        Flag(
            "After --: flags for every server that --compare starts, as serve takes them.",
            argument=True,
        ),
    ] = ()
    compare: Annotated[
        str | None,
        Flag(
            "Policies to run in turn, each on a fresh server, with the same requests at the same "
            "times: fcfs,hrrn:max-batch-tokens=512,length-aware.",
            panel=SERVER,
        ),
    ] = None
    base_url: Annotated[
        str,
        Flag(
            "Without --compare: the server to measure; any that speaks the OpenAI API.",
            panel=SERVER,
        ),
    ] = "http://127.0.0.1:8000"
    model: Annotated[
        str | None,
        Flag("Name to ask for. None: the first that the server lists.", panel=SERVER),
    ] = None
    api_key: Annotated[
        str | None, Flag("API key of the server.", panel=SERVER, variable="OPENAI_API_KEY")
    ] = None
    endpoint: Annotated[
        Endpoint, Flag("/v1/chat/completions or /v1/completions.", panel=SERVER)
    ] = "chat"
    token_ids: Annotated[
        bool,
        Flag(
            "Prompts as token ids, exact in size; needs --endpoint completions and single turns.",
            panel=SERVER,
            switch=True,
        ),
    ] = False
    tokenizer: Annotated[
        Path | None,
        Flag(
            "Model folder or tokenizer.json to size prompts with. None: the server's usage says "
            "how long words are.",
            panel=SERVER,
        ),
    ] = None
    ignore_eos: Annotated[
        bool,
        Flag(
            "Ask for answers of exactly the planned length, an extension that vLLM, SGLang and "
            "this server have.",
            panel=SERVER,
        ),
    ] = True
    extra_body: Annotated[
        dict[str, Any],
        Flag(
            "JSON object added to every request.",
            panel=SERVER,
            metavar="JSON",
            read=read_object,
            show=json.dumps,
        ),
    ] = field(default_factory=dict)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    trace: Annotated[
        Path | None,
        Flag("Replay this instead: a file of any format in docs/traces.md.", panel=TRACE),
    ] = None
    trace_options: TraceOptions = field(default_factory=TraceOptions)
    duration: Annotated[
        float | None,
        Flag(
            "Seconds of arrivals, in place of --requests; needs --rate.",
            unit="seconds",
            above=0,
            panel=TIME,
        ),
    ] = None
    rate: Annotated[
        float | None,
        Flag(
            "Requests a second, Poisson. For a trace without a common clock: session starts a "
            "second.",
            above=0,
            panel=TIME,
        ),
    ] = None
    load: Annotated[
        float | None,
        Flag(
            "In place of --rate: share of what the first server can do, which is measured first. "
            "Default without --rate: 0.7.",
            panel=TIME,
        ),
    ] = None
    salt: Annotated[
        str | None,
        Flag("Makes the text; a salt used before may meet a warm cache. None: random.", panel=TIME),
    ] = None
    repeat: Annotated[
        int, Flag("Runs of each entry, interleaved; medians count.", least=1, panel=TIME)
    ] = 1
    max_seconds: Annotated[
        float | None,
        Flag(
            "Longest run. None: 3 times the span of the arrivals, and 2 minutes.",
            unit="seconds",
            panel=TIME,
        ),
    ] = None
    warm: Annotated[
        bool, Flag("Send the same few requests first.", panel=TIME, name="--warm-up")
    ] = True
    idle: Annotated[
        bool,
        Flag(
            "First measure short prompts one at a time on the idle server.",
            panel=TIME,
            switch=True,
        ),
    ] = False
    objectives: Objectives = field(default_factory=Objectives)
    baseline: Annotated[
        str | None,
        Flag("Entry that the others are compared with. None: the first.", panel=OUTPUT),
    ] = None
    output: Annotated[
        Path | None, Flag("Writes OUTPUT.json and OUTPUT.png.", panel=OUTPUT, also=("-o",))
    ] = None
    records: Annotated[bool, Flag("Keep every request in the JSON.", panel=OUTPUT, switch=True)] = (
        False
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.duration is not None and self.rate is None:
            raise ValueError("--duration needs --rate; with --load give --requests")
        if self.rate is not None and self.load is not None:
            raise ValueError("--rate and --load exclude each other")
        if self.load is not None and self.trace is not None:
            raise ValueError("a trace has its own arrivals: use --speed, not --load")
        if self.load is not None and not self.load > 0:
            raise ValueError(f"--load must be positive, not {self.load}")
        if self.serve_arguments and self.compare is None:
            raise ValueError("flags after -- are for the servers that --compare starts")
        if self.token_ids and self.endpoint != "completions":
            raise ValueError("--token-ids needs --endpoint completions")
        if self.baseline is not None and self.baseline not in self.labels:
            raise ValueError(f"--baseline {self.baseline} is none of {', '.join(self.labels)}")

    @property
    def entries(self) -> tuple[ServerEntry, ...]:
        """Servers to measure in turn."""
        if self.compare is not None:
            return parse_entries(self.compare)
        return (ServerEntry(self.base_url, ()),)

    @property
    def labels(self) -> list[str]:
        """Names of the entries."""
        return [entry.label for entry in self.entries]

    @property
    def workload_maker(self) -> MakeWorkload:
        """Function that makes the workload of a repetition; a trace is the same in all of them."""
        if self.trace is None:
            return lambda rate, repetition: generate(
                replace(self.workload, rate=rate, seed=self.workload.seed + repetition)
            )
        first = read_trace(self.trace, self.trace_options)
        return lambda rate, repetition: first

    def parameters(self, salt: str) -> dict[str, object]:
        """Return the settings for the record, without secrets and folders."""
        fields = asdict(self)
        del fields["api_key"], fields["workload"], fields["trace_options"]
        for name in ("trace", "tokenizer", "output"):
            fields[name] = getattr(self, name).name if getattr(self, name) else None
        return fields | {"salt": salt}


def run(job: BenchJob, console: Console | None = None) -> int:
    """Run the experiment, print its tables and save its results.

    Returns:
        The exit status: 0, 1 if every request failed, 130 after Ctrl-C.

    Raises:
        RuntimeError: a server did not start, or failed before the load.
        ValueError: the trace cannot be read.
    """
    console = console or Console()
    salt = job.salt or secrets.token_hex(8)
    tokenizer = _tokenizer(job.tokenizer)
    plan = _plan(job, sized=tokenizer is not None)
    with ProgressView(console, job.objectives) as view:
        filler = make_filler(salt, tokenizer)
        experiment = Experiment(plan, filler, view.observe, view.tell)
        outcome = experiment.run()
    _show(job, outcome, console)
    if job.output is not None and outcome.runs:
        _save(job, outcome, salt, console)
    if outcome.interrupted:
        return 130
    return 0 if any(run.report.classes[ALL].succeeded for run in outcome.runs) else 1


def _tokenizer(path: Path | None) -> Tokenizer | None:
    found = load_tokenizer(path) if path else None
    if path and found is None:
        raise ValueError(f"--tokenizer {path} holds no tokenizer.json")
    return found


def _plan(job: BenchJob, *, sized: bool) -> ExperimentPlan:
    load = job.load if job.rate is not None or job.trace is not None else job.load or DEFAULT_LOAD
    make_workload = job.workload_maker
    return ExperimentPlan(
        entries=job.entries,
        open_server=_opener(job),
        target=RequestTarget(
            job.model or "",
            job.endpoint,
            job.ignore_eos,
            job.extra_body,
            job.objectives.tier_shares,
        ),
        make_workload=make_workload,
        objectives=job.objectives,
        rate=job.rate or 1.0,
        load=load,
        repeat=job.repeat,
        idle=job.idle,
        warm=job.warm,
        size_words=not sized,
        ids=job.token_ids,
        api_key=job.api_key,
        max_seconds=job.max_seconds,
    )


def _opener(job: BenchJob) -> Open:
    if job.compare is not None:
        tiers = [w for each in job.objectives.tier_shares for w in ("--tier", str(each.tier))]
        return fresh((*job.serve_arguments, *tiers))
    try:
        httpx.get(job.base_url, trust_env=False, timeout=10)
    except httpx.TransportError as error:
        raise ServerError(
            f"no server answers at {job.base_url} ({error}). Start one with pla-serve serve, "
            "name another with --base-url, or let --compare start its own"
        ) from None
    return running(job.base_url)


def _show(job: BenchJob, outcome: ExperimentResult, console: Console) -> None:
    if job.repeat == 1:
        for run in outcome.runs:
            console.print(run_table(run, job.objectives))
    else:
        for warning in dict.fromkeys(w for run in outcome.runs for w in run.report.warnings):
            console.print(f"warning: {warning}")
    if len(outcome.runs) > 1:
        baseline = job.baseline or job.labels[0]
        console.print(comparison_table(summaries(outcome, baseline), baseline))
    if outcome.interrupted:
        planned = job.repeat * len(job.entries)
        console.print(f"interrupted: {len(outcome.runs)} of {planned} runs", highlight=False)
    if outcome.costs is not None:
        console.print(f"{outcome.rate:.3f} requests/s", highlight=False)


def _save(job: BenchJob, outcome: ExperimentResult, salt: str, console: Console) -> None:
    from pla_serve.bench.figure import draw

    assert job.output is not None
    found = summaries(outcome, job.baseline or job.labels[0])
    json_path, png_path = output_paths(job.output)
    save_json(json_path, outcome, found, job.parameters(salt), records=job.records)
    draw(found, png_path, title=title(outcome.workloads), subtitle=_subtitle(outcome))
    console.print(f"saved {json_path} and {png_path}", highlight=False)


def output_paths(output: Path) -> tuple[Path, Path]:
    """JSON and picture of ``--output``; run-1.0 and run-1.0.json both name run-1.0.json."""
    name = output.stem if output.suffix in (".json", ".png") else output.name
    return output.with_name(f"{name}.json"), output.with_name(f"{name}.png")


def title(workloads: list[BenchWorkload]) -> str:
    name = workloads[0].name
    named = {
        "chat+documents": "Chat beside long documents",
        "chat": "Chat",
        "documents": "Documents",
    }
    return named.get(name, name)


def _subtitle(outcome: ExperimentResult) -> str:
    workload = outcome.workloads[0]
    runs = max(len(outcome.of(run.entry)) for run in outcome.runs)
    times = f", median of {runs} runs" if runs > 1 else ""
    return f"{workload.requests} requests, {outcome.rate:.2f} a second{times}"
