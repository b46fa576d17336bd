"""``pla-serve calibrate``: from a running server to a machine profile in a file."""

from __future__ import annotations

import asyncio
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer


def calibrate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The machine profile to write, .json.")
    ],
    base_url: Annotated[
        str, typer.Option(help="A pla-serve server that serves nobody else meanwhile.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the machine. Default: the file's name.")
    ] = None,
    transfer_bytes_per_second: Annotated[
        float,
        typer.Option(help="Between two such instances; not measured. Default: 10 Gbit/s."),
    ] = 1.25e9,
    transfer_seconds: Annotated[
        float, typer.Option(help="Fixed cost of a transfer; not measured.")
    ] = 1e-3,
) -> None:
    """Measure a running engine into a machine profile for pla-serve simulate --machine."""
    from pla_serve.bench.profile import ProfileError, Transfer

    try:
        if output.suffix != ".json":
            raise ProfileError(f"the machine profile is a .json file, not {output.name}")
        if not (transfer_bytes_per_second > 0 and transfer_seconds >= 0):
            raise ProfileError("a transfer has a positive rate and no negative time")
        transfer = Transfer(transfer_bytes_per_second, transfer_seconds)
        asyncio.run(_run(base_url, api_key, name or output.stem, output, transfer))
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"pla-serve: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None


async def _run(base_url: str, api_key: str | None, name: str, output: Path, transfer: Any) -> None:
    import msgspec

    from pla_serve import __version__
    from pla_serve.bench.calibrate import Probe
    from pla_serve.bench.client import Target
    from pla_serve.bench.profile import drive, machine_of, wait_idle
    from pla_serve.bench.text import make_filler
    from pla_serve.bench.transport import HttpTransport

    salt = secrets.token_hex(8)
    transport = HttpTransport(base_url, api_key)
    try:
        card = (await transport.get("/v1/models"))["data"][0]
        longest = int(card.get("max_model_len") or 2048)
        target = Target(card["id"], "completions")
        probe = Probe(transport, target, make_filler(salt), "calibrate", ids=True)
        await wait_idle(lambda: read_metrics(base_url))
        await drive(probe, longest, lambda text: typer.secho(text, err=True))
        await wait_idle(lambda: read_metrics(base_url))
    finally:
        await transport.close()
    day = datetime.now(UTC).date().isoformat()
    source = f"pla-serve calibrate {__version__}, {day}, {card['id']}"
    machine = machine_of(read_metrics(base_url), name, source, transfer)
    output.write_bytes(msgspec.json.format(msgspec.json.encode(machine), indent=2) + b"\n")
    typer.echo(f"saved {output}")


def read_metrics(base_url: str) -> dict[tuple[str, str], float]:
    """Samples of the server's ``/metrics`` by name and label ``per``.

    Raises:
        RuntimeError: there is no such page.
    """
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    root = base_url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{root}/metrics", trust_env=False, timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise RuntimeError(f"cannot read {root}/metrics: {error}") from None
    return {
        (sample.name, sample.labels.get("per", "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
