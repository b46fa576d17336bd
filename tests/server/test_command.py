"""Flags of ``pla-serve serve``: what they become, and what is said of bad ones."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pla_serve.engine.config import EngineConfig
from pla_serve.policy.config import PolicyConfig
from pla_serve.server import command
from pla_serve.server.settings import ServerSettings
from tests.command_runner import CommandResult, pla_serve


class Started:
    """Takes the place of `command.start`."""

    def __call__(
        self,
        engine: EngineConfig,
        server: ServerSettings,
        template: str | None,
        log_level: str,
        log_format: str,
    ) -> int:
        self.engine, self.server = engine, server
        self.template, self.log_level, self.log_format = template, log_level, log_format
        return 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr(command, "start", started)
    return started


def serve(*args: str, **options: Any) -> CommandResult:
    return pla_serve("serve", *args, **options)


def test_defaults_are_those_of_the_configs(started: Started) -> None:
    assert serve().exit_code == 0
    assert started.engine == EngineConfig()
    name = EngineConfig().model
    assert started.server == ServerSettings(model_names=(name,), model_root=name)


def test_every_setting_has_a_flag(started: Started, tmp_path: Path) -> None:
    """Sets each flag to something else than its default, and finds no field left at it."""
    (tmp_path / "template").write_text("hello")
    (tmp_path / "key").write_text("of links")
    flags = {
        "--load-format": "dummy", "--dtype": "float32", "--device": "cpu", "--seed": 3,
        "--max-model-len": 99, "--block-size": 8, "--kv-cache-gib": 0.5,
        "--short-kv-reserve": 0.1, "--threads": 1,
        "--policy": "length-aware:interruptible=false:layers=4",
        "--max-batch-tokens": 100, "--max-batch-requests": 3, "--long-chunk-tokens": 50,
        "--boundary-tokens": 10, "--long-share": 0.4, "--express-burst-seconds": 1,
        "--itl-slo-ms": 30, "--patience": 3, "--express-wait-seconds": 0,
        "--max-queued-tokens": 5, "--attention-backend": "sdpa", "--capture-shapes": "8x2",
        "--capture-tokens": 64, "--capture-padding-cap": 0.5, "--run-ahead-layers": 3,
        "--max-predicted-wait": 7, "--served-model-name": "m", "--host": "::1", "--port": 1,
        "--api-key": "k", "--max-body-mib": 1, "--keep-alive-seconds": 1,
        "--max-unread-tokens": 5, "--stall-seconds": 1, "--restart-wait": 1,
        "--drain-seconds": 1, "--chat-template": tmp_path / "template", "--log-level": "debug",
        "--log-format": "json", "--role": "long", "--otlp-endpoint": "http://127.0.0.1:4318",
        "--max-head-bytes": 999, "--head-seconds": 1, "--body-seconds": 1, "--idle-seconds": 1,
        "--max-connections": 1, "--max-connections-per-address": 0, "--max-upload-bytes": 1,
        "--engine-silence-seconds": 1, "--metrics-key": "m", "--listen-fd": 9,
        "--link-key-file": tmp_path / "key", "--tool-parser": "hermes", "--cpu-kernels": "torch",
        "--reasoning-parser": "deepseek_r1", "--generation-config": "vllm",
        "--override-generation-config": '{"top_k": 3}', "--max-stored-responses": 9,
        "--max-stored-response-bytes": 9, "--stored-response-seconds": 9,
        "--quantization": "none", "--max-background-responses": 9,
        "--cors-origin": "https://chat.example.com",
        "--batch-dir": tmp_path / "batches", "--batch-lines-at-once": 1, "--max-batch-lines": 9,
        "--tier": "quick:ttft=1s", "--key-tier": "k=quick",
        "--max-batch-file-mib": 1, "--max-batch-key-gib": 1, "--batch-free-mib": 1,
    }  # fmt: skip
    words = [str(word) for flag in flags.items() for word in flag]
    switches = (
        *("--no-prefix-cache", "--kv-transfer", "--compile-layers", "--no-async-scheduling"),
        "--no-stored-profile",
        *("--share-prefix-cache", "--enable-priority"),
    )
    result = serve("some/model", *switches, *words)
    assert result.exit_code == 0, result.output
    policy = started.engine.policy_config
    default_server = ServerSettings(model_names=("x",), model_root="x")
    for mine, default in (
        (started.engine, EngineConfig()),
        (policy, PolicyConfig()),
        (started.server, default_server),
        (started.server.limits, default_server.limits),
        (started.server.offline, default_server.offline),
        (started.server.tiers, default_server.tiers),
    ):
        for field in fields(default):
            if field.name == "tensor_parallel_size":
                continue  # excludes --kv-transfer, see the test of vLLM's names; has fields
            assert getattr(mine, field.name) != getattr(default, field.name), field.name
    assert (started.template, started.log_level) == ("hello", "debug")
    assert started.log_format == "json"


def test_flags_of_batches_need_their_folder() -> None:
    result = serve("--max-batch-lines", "9")
    assert result.exit_code != 0
    assert "--max-batch-lines does nothing without --batch-dir" in result.output


def test_names_of_vllm(started: Started) -> None:
    serve(
        "--model", "m", "--max-num-batched-tokens", "77", "--max-num-seqs", "5",
        "--long-prefill-token-threshold", "33",
    )  # fmt: skip
    assert started.engine.model == "m"
    policy = started.engine.policy_config
    assert (policy.max_batch_tokens, policy.max_batch_requests) == (77, 5)
    assert policy.long_chunk_tokens == 33


@pytest.mark.parametrize("name", ["--tensor-parallel-size", "-tp"])
def test_tensor_parallelism_by_the_names_of_vllm(started: Started, name: str) -> None:
    assert serve(name, "2").exit_code == 0
    assert started.engine.tensor_parallel_size == 2


def test_keys_come_from_the_environment(started: Started) -> None:
    serve(env={"PLA_SERVE_API_KEY": "one two"})
    assert started.server.api_keys == ("one", "two")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tier", "auto"], "cannot name a tier"),
        (["--tier", "a:ttft=1"], "with its unit"),
        (["--tier", "a", "--tier", "a:ttft=1s"], "two tiers are named a"),
        (["--api-key", "sk-1", "--key-tier", "sk-1=night"], "one of default"),
        (["--tier", "a", "--key-tier", "sk-1=a"], "a key that no --api-key names"),
        (["--tier", "a", "--key-tier", "=a"], "must be KEY=NAME"),
        (
            ["--tier", "a", "--api-key", "sk-1", "--key-tier", "sk-1=a", "--key-tier", "sk-1=a"],
            "a key that has a tier",
        ),
    ],
)
def test_bad_tiers_are_refused_without_showing_a_key(flags: list[str], reason: str) -> None:
    result = serve(*flags)
    assert result.exit_code != 0
    said = " ".join(result.output.split())
    assert reason in said
    assert "sk-1" not in said


def test_zero_means_no_bound_on_the_wait(started: Started) -> None:
    serve("--max-predicted-wait", "0")
    assert started.engine.max_predicted_wait is None


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--long-share", "2"], "long_share must lie between 0 and 1"),
        (["--port", "70000"], "port must lie in 0..65535"),
        (["--max-batch-tokens", "0"], "max_batch_tokens must be at least 1"),
        (["--keep-alive-seconds", "nan"], "keep_alive_seconds must be positive"),
        (["--served-model-name", ""], "at least one name"),
        (["--chat-template", "/nowhere/at/all"], "/nowhere/at/all"),
        (["a", "--model", "b"], "two models"),
        (["--kv-transfer", "-tp", "2"], "drop one of the two"),
        (["--policy", "fcfs", "--patience", "1"], "policy fcfs does not use --patience"),
        (["--policy", "laps", "--max-num-batched-tokens", "9"], "use --max-batch-tokens"),
        (
            ["--policy", "length-aware:patience=1", "--patience", "1"],
            "--patience is given as a flag and as a knob",
        ),
    ],
)
def test_bad_values_are_one_line(started: Started, args: list[str], reason: str) -> None:
    result = serve(*args)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_knobs_of_the_policy_are_settings_too(started: Started) -> None:
    serve("--policy", "laps:window_seconds=0.01:max_batch_requests=3", "--boundary-tokens", "9")
    assert started.engine.policy == "laps:window_seconds=0.01:max_batch_requests=3"
    policy = started.engine.policy_config
    assert (policy.max_batch_requests, policy.boundary_tokens) == (3, 9)


@pytest.mark.parametrize(
    "args", [["--policy", "magic"], ["--policy", "fcfs:depth=1"], ["--nonsense"], ["--port", "x"]]
)
def test_unknown_flags_and_choices_are_usage_errors(started: Started, args: list[str]) -> None:
    assert serve(*args).exit_code == 2


def test_busy_port_is_said_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = serve("/no/such/model", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 1
    assert "cannot listen" in result.stderr
    assert "--port" in result.stderr


def test_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = serve(str(tmp_path / "nowhere"), "--port", "0")
    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pla_serve.cli import main; main(['serve', '--help'])\n"
        "heavy = ('torch', 'transformers', 'starlette', 'zmq', 'scipy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_graphs_are_turned_off_by_name(started: Started) -> None:
    assert serve("m", "--no-graphs").exit_code == 0
    assert started.engine.capture_shapes == "none"
    assert "drop one" in serve("m", "--no-graphs", "--capture-shapes", "8x2").output
    assert "no shape" in serve("m", "--capture-shapes", "8by2").output


def test_tiers_of_keys_come_from_the_environment(started: Started) -> None:
    keys = {"PLA_SERVE_API_KEY": "one two", "PLA_SERVE_KEY_TIER": "one=night two=default"}
    assert serve("--tier", "night", env=keys).exit_code == 0
    assert started.server.tiers.key_tiers == ("one=night", "two=default")
    assert serve(env={"PLA_SERVE_API_KEY": "one", "PLA_SERVE_KEY_TIER": ""}).exit_code == 0
    assert started.server.tiers.key_tiers == ()
