"""A real Envoy with the configuration of deploy/envoy, and a router that it asks, as processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from pla_serve.bench.servers import free_port
from tests.fleet.router.routed import KEY
from tests.server.server_harness import MODEL, ROOT, make_tokenizer, until

CONFIG = Path(__file__).parents[3] / "deploy" / "envoy" / "envoy.yaml"
INSTALLED = Path.home() / ".cache/pla-serve/envoy/bin/envoy"

CONFIG_JSON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260}


def find_envoy() -> str | None:
    """Return the path of Envoy: of $ENVOY, on the PATH, or in the environment of its own."""
    named = os.environ.get("ENVOY") or shutil.which("envoy")
    return named or (str(INSTALLED) if INSTALLED.exists() else None)


class PickerProcess:
    """`pla-serve route --picker-port` before some instances, in a process of its own."""

    def __init__(self, folder: Path, instances: Sequence[str]) -> None:
        model = folder / "model"
        make_tokenizer().save_pretrained(str(model))
        (model / "config.json").write_text(json.dumps(CONFIG_JSON))
        port, self.port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "pla_serve", "route", str(model), "--load-format", "dummy"),
            *("--served-model-name", MODEL, "--port", str(port), "--picker-port", str(self.port)),
            *(word for url in instances for word in ("--instance", url)),
        ]
        environment = {**os.environ, "PLA_SERVE_LINK_KEY": KEY}
        self._log = (folder / "picker.log").open("wb")
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        until(lambda: _answers(f"{self.url}/ready"), "the picker")
        until(lambda: self.metric("router:instance_up") == len(instances), "all links")

    def metric(self, name: str) -> float:
        """Return the sum over the samples whose names begin with ``name``, labels included."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"pla_serve_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Envoy:
    """Envoy in front of instances, with a picker."""

    def __init__(
        self,
        folder: Path,
        picker_port: int,
        instance_ports: Sequence[int],
        *,
        body_bytes: int | None = None,
        mode: str = "BUFFERED",
    ) -> None:
        found = find_envoy()
        assert found is not None
        port, admin = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load(CONFIG.read_text())
        config["admin"] = {"address": _address("127.0.0.1", admin)}
        listener = config["static_resources"]["listeners"][0]
        listener["address"] = _address("127.0.0.1", port)
        if body_bytes is not None:
            listener["per_connection_buffer_limit_bytes"] = body_bytes
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        processing = manager["http_filters"][0]["typed_config"]["processing_mode"]
        if mode == "FULL_DUPLEX_STREAMED":
            processing |= {"request_body_mode": mode, "request_trailer_mode": "SEND"}
        for cluster in config["static_resources"]["clusters"]:
            ports = {"picker": [picker_port], "instances": instance_ports}.get(cluster["name"])
            if ports is not None:
                cluster["load_assignment"]["endpoints"] = [
                    {"lb_endpoints": [{"endpoint": {"address": _address("127.0.0.1", each)}}]}
                    for each in ports
                ]
        path = folder / f"envoy-{port}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [found, "-c", str(path), "--concurrency", "1", "--log-level", "warning"]
        self._log = (folder / f"envoy-{port}.log").open("wb")
        self._process = subprocess.Popen(
            [*command, "--disable-hot-restart"], stdout=self._log, stderr=subprocess.STDOUT
        )
        ready = f"http://127.0.0.1:{admin}/ready"
        until(lambda: _answers(ready), "Envoy")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
