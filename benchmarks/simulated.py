"""What the scheduling promises of a 32B model on an H200, checked on virtual time.

    python benchmarks/simulated.py sweep --traces FOLDER       # all baselines, all knobs
    python benchmarks/simulated.py claims                      # the bounds, from the sweep
    python benchmarks/simulated.py patience --traces FOLDER    # what the bounded wait costs
    python benchmarks/simulated.py one-class                   # one class only, and bursts
    python benchmarks/simulated.py stiff --traces FOLDER       # an engine without preemption
    python benchmarks/simulated.py tokens --traces FOLDER      # streams beside long prompts

`sweep` takes about twenty minutes of one core; `sweep --only length-aware` renews those runs alone,
after a change of the policy. FOLDER holds the traces that `simulations/workloads.py` names.
Results go to benchmarks/results/simulated-*.json and .png.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from simulations import claims as bounds
from simulations import knobs, one_class, patience, pictures, rows, tables, workloads
from simulations import tokens as streams
from simulations.running import run

from pla_serve.environment import describe

app = cyclopts.App(help=(__doc__ or "").split("\n\n")[0])
console = Console()
if not console.is_terminal:
    console.width = 150  # a log need not be narrow

AT_LEAST_1 = Number(gte=1)
Traces = Annotated[Path, Parameter(help="Folder of the trace files.")]
Out = Annotated[Path, Parameter(help="Folder of the results.")]
Jobs = Annotated[int, Parameter(help="Runs at the same time.", validator=AT_LEAST_1)]
Requests = Annotated[
    int | None, Parameter(help="Only the first of each trace.", validator=AT_LEAST_1)
]
RESULTS = Path("benchmarks/results")


@app.command
def sweep(
    *,
    traces: Traces,
    out: Out = RESULTS,
    jobs: Jobs = 1,
    requests: Requests = None,
    only: Annotated[
        str, Parameter(help="Policies to run again, separated by commas. Default: all.")
    ] = "",
) -> None:
    """Every baseline with every knob, and length-aware as it comes."""
    path = out / "simulated-sweep.json"
    known = knobs.policies()
    names = only.split(",") if only else list(known)
    if unknown := set(names) - set(known):
        raise ValueError(f"--only knows {', '.join(known)}, and not {', '.join(sorted(unknown))}")
    results = rows.load(path) if only else rows.Results([], [])
    results.note(names)
    specs = [spec for name in names for spec in known[name]]
    for source in workloads.SOURCES:
        trace = workloads.read(source, traces, requests)
        for load in workloads.LOADS:
            reports = run(trace, load, specs, workloads.setting(), console, jobs=jobs)
            results.renew(rows.runs_of(source.label, reports))
            rows.save(results, path)
    console.print(f"saved {path}", highlight=False)


@app.command
def claims(*, out: Out = RESULTS) -> None:
    """The bounds, checked against the sweep."""
    results = rows.load(out / "simulated-sweep.json")
    checks = bounds.check_all(results.workloads)
    tables.show(checks, console)
    path = out / "simulated-claims.json"
    rows.save_plain(
        path,
        {
            "recorded": results.recorded,
            "checks": [{**asdict(check), "holds": check.holds} for check in checks],
        },
    )
    pictures.short_p90(results.workloads, path.with_suffix(".png"))
    console.print(f"saved {path} and the picture", highlight=False)


@app.command(name="patience")
def patience_curve(
    *, traces: Traces, out: Out = RESULTS, jobs: Jobs = 1, requests: Requests = None
) -> None:
    """The guaranteed bound on waiting, and what it costs."""
    curves = patience.measure(traces, console, jobs, requests)
    path = out / "simulated-patience.json"
    rows.save_plain(path, {"environment": describe(), "curves": curves})
    patience.show(curves, console)
    pictures.patience(curves, path.with_suffix(".png"))
    console.print(f"saved {path} and the picture", highlight=False)


@app.command(name="one-class")
def one_class_runs(
    *,
    out: Out = RESULTS,
    jobs: Jobs = 1,
    seeds: Annotated[
        int, Parameter(help="Generated traces of each kind.", validator=AT_LEAST_1)
    ] = 5,
    requests: Requests = None,
) -> None:
    """Length-aware to fcfs where one class is all there is, or bursts."""
    found = one_class.measure(seeds, console, jobs, requests)
    path = out / "simulated-one-class.json"
    rows.save_plain(path, {"environment": describe(), "comparisons": found})
    one_class.show(found, console)
    console.print(f"saved {path}", highlight=False)


@app.command
def tokens(*, traces: Traces, out: Out = RESULTS, jobs: Jobs = 1) -> None:
    """Gaps and pauses of streams, under length-aware and under fcfs with chunks of many sizes."""
    closed = streams.closed(console)
    found = streams.measure(traces, console, jobs)
    path = out / "simulated-tokens.json"
    checks = streams.bounds(found)
    rows.save_plain(
        path, {"environment": describe(), "runs": found, "checks": checks, "closed": closed}
    )
    streams.show(found, console)
    console.print(f"saved {path}", highlight=False)


@app.command
def stiff(*, traces: Traces, out: Out = RESULTS, requests: Requests = None) -> None:
    """Without preemption at layers, against all baselines of the sweep that have none either."""
    results = rows.load(out / "simulated-sweep.json")
    setting = workloads.setting(preemption=False)
    checks, ours = [], []
    for source in workloads.SOURCES:
        trace = workloads.read(source, traces, requests)
        for load in workloads.LOADS:
            fresh = rows.runs_of(source.label, run(trace, load, [knobs.OURS], setting, console))
            runs = next(runs for runs in results.workloads if runs.key == fresh.key)
            if not runs.same_work(fresh):
                raise ValueError(f"{source.label} at {load} differs from the sweep's: run it again")
            ours.append({"label": source.label, "load": load, **rows.named(fresh.rows[0])})
            checks += bounds.stiff_checks(runs, fresh.rows[0])
    tables.show(checks, console)
    path = out / "simulated-stiff.json"
    rows.save_plain(
        path,
        {
            "environment": describe(),
            "length_aware": ours,
            "checks": [{**asdict(check), "holds": check.holds} for check in checks],
        },
    )
    console.print(f"saved {path}", highlight=False)


def main() -> None:
    try:
        app()
    except ValueError as error:
        raise SystemExit(f"simulated.py: {error}") from None


if __name__ == "__main__":
    main()
