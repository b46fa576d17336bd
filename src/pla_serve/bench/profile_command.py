"""``pla-serve calibrate``: measures a running server and writes a machine profile."""

from __future__ import annotations

import asyncio
import secrets
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pla_serve.command_line import CliCommand, Given, fail
from pla_serve.flags import Flag, FlagsOf
from pla_serve.policy.knobs import check_knobs


@dataclass(frozen=True, slots=True)
class CalibrateFlags:
    """Flags of ``calibrate``.

    Raises:
        ValueError: a field is out of range.
    """

    output: Annotated[Path, Flag("Machine profile to write, .json.", also=("-o",))]
    base_url: Annotated[str, Flag("A pla-serve server that serves nobody else meanwhile.")] = (
        "http://127.0.0.1:8000"
    )
    api_key: Annotated[str | None, Flag("API key of the server.", variable="OPENAI_API_KEY")] = None
    name: Annotated[str | None, Flag("Name of the machine. None: that of the file.")] = None
    transfer_bytes_per_second: Annotated[
        float,
        Flag(
            "Rate of a transfer between two such instances, not measured; 1.25e9 is 10 Gbit/s.",
            unit="bytes",
            above=0,
        ),
    ] = 1.25e9
    transfer_seconds: Annotated[
        float, Flag("Fixed time of a transfer, not measured.", unit="seconds", least=0)
    ] = 1e-3

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.output.suffix != ".json":
            raise ValueError(f"the machine profile is a .json file, not {self.output.name}")


def calibrate(given: Given) -> int:
    """Measure a server and write the profile of its machine."""
    try:
        asyncio.run(_run(given.make(CalibrateFlags)))
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    return 0


CALIBRATE = CliCommand("calibrate", calibrate, (FlagsOf(CalibrateFlags),))


async def _run(flags: CalibrateFlags) -> None:
    import msgspec

    from pla_serve import __version__
    from pla_serve.bench.calibrate import Probe
    from pla_serve.bench.client import RequestTarget
    from pla_serve.bench.profile import Transfer, drive, machine_of, wait_idle
    from pla_serve.bench.text import make_filler
    from pla_serve.bench.transport import HttpTransport

    salt = secrets.token_hex(8)
    transport = HttpTransport(flags.base_url, flags.api_key)
    try:
        card = (await transport.get("/v1/models"))["data"][0]
        longest = int(card.get("max_model_len") or 2048)
        target = RequestTarget(card["id"], "completions")
        probe = Probe(transport, target, make_filler(salt), "calibrate", ids=True)
        await wait_idle(lambda: read_metrics(flags.base_url, flags.api_key))
        await drive(probe, longest, lambda text: print(text, file=sys.stderr))
        await wait_idle(lambda: read_metrics(flags.base_url, flags.api_key))
    finally:
        await transport.close()
    day = datetime.now(UTC).date().isoformat()
    source = f"pla-serve calibrate {__version__}, {day}, {card['id']}"
    transfer = Transfer(flags.transfer_bytes_per_second, flags.transfer_seconds)
    name = flags.name or flags.output.stem
    machine = machine_of(read_metrics(flags.base_url, flags.api_key), name, source, transfer)
    flags.output.write_bytes(msgspec.json.format(msgspec.json.encode(machine), indent=2) + b"\n")
    print(f"saved {flags.output}")


def read_metrics(base_url: str, api_key: str | None = None) -> dict[tuple[str, str], float]:
    """Read the samples of the server's ``/metrics``, by name and label ``per``.

    Raises:
        RuntimeError: the page cannot be read.
    """
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    root = base_url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{root}/metrics", headers=headers, trust_env=False, timeout=10)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise RuntimeError(f"cannot read {root}/metrics: {error}") from None
    return {
        (sample.name, sample.labels.get("per", "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
