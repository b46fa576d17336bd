"""``pla-serve fleet status``: shows the router's ``/fleet`` as a table."""

from __future__ import annotations

import json
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table


class StatusError(Exception):
    """Raised if the state cannot be read; the message says what to do."""


def fetch(url: str, api_key: str | None) -> dict[str, Any]:
    """Read ``/fleet`` of the router at ``url``.

    Raises:
        StatusError: nobody answers, or no router does.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    root = url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{root}/fleet", headers=headers, timeout=10, trust_env=False)
    except httpx.HTTPError as error:
        raise StatusError(f"nobody answers at {root}: {error}; name the router: --url") from None
    if answer.status_code == 401:
        raise StatusError("the router asks for a key: --api-key, or PLA_SERVE_API_KEY")
    if answer.status_code != 200:
        raise StatusError(f"{root} answers {answer.status_code}; it is no router of a fleet")
    content: dict[str, Any] = answer.json()
    return content


def show(content: dict[str, Any], *, as_json: bool, console: Console | None = None) -> None:
    """Print the state to standard output, as a table or as JSON."""
    console = console or Console()
    if as_json:
        console.print_json(json.dumps(content))
        return
    console.print(_table(content["instances"]))
    desired = content["desired"]
    wanted = (
        f"; there should be {desired['prefill']} for prefill"
        + (f", {desired['decode']} for decode" if desired["decode"] else "")
        if desired
        else ""
    )
    console.print(
        f"{content['status']}; {content['requests_in_flight']} requests in flight, "
        f"{content['requests_parked']} without an instance; controller {content['controller']}, "
        f"{content['moves_total']} moves{wanted}"
    )


def _table(instances: list[dict[str, Any]]) -> Table:
    table = Table()
    names = ("instance", "role", "state", "short", "long", "decode", "queued s", "KV")
    for name in names:
        # An address is folded and not cut, because its end is the port.
        table.add_column(name, justify="left" if name in names[:3] else "right", overflow="fold")
    for instance in instances:
        report = instance["report"]
        load = report["load"] if report else {}
        queued = load.get("queued_short_seconds", 0) + load.get("queued_long_seconds", 0)
        table.add_row(
            instance["url"],
            instance["role"] or "",
            _state(instance),
            str(load.get("short_waiting", "")),
            str(load.get("long_waiting", "")),
            str(load.get("running", "")),
            f"{queued:.2f}" if report else "",
            f"{load['kv_usage']:.0%}" if report else "",
        )
    return table


def _state(instance: dict[str, Any]) -> str:
    if instance["unfit"]:
        return f"unfit: {instance['unfit']}"
    if not instance["connected"]:
        return f"down: {instance['last_loss'] or 'not connected yet'}"
    if instance["circuit"] != "closed":
        return f"up, circuit {instance['circuit']}"
    return "up" if instance["open"] else "draining"
