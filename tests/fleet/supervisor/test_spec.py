"""Fleets as files and as command lines."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import msgspec
import pytest

from pla_serve.fleet.forwarding import check_words
from pla_serve.fleet.supervisor.commands import (
    instance_command,
    router_command,
    take_secrets,
    threads_each,
)
from pla_serve.fleet.supervisor.launch import instance_environment
from pla_serve.fleet.supervisor.spec import FleetSpec, Health, Pools, check, read_spec

FILE = """
model: some/model
port: 9000
instances: {short: 2, long: 1, decode: 1}
threads: 2
devices: [cuda:0, cuda:1]
serve:
  kv_cache_gib: 1.5
  prefix-cache: false
route:
  routing: class-pools
  api-key: [one, two]
health:
  hang_seconds: 5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(text)
    return path


def test_file_says_what_is_started(tmp_path: Path) -> None:
    spec = check(read_spec(write(tmp_path, FILE)))
    assert spec.instances == Pools(short=2, long=1, decode=1)
    assert spec.health == Health(hang_seconds=5)
    assert [name for name, _ in spec.names] == ["short-0", "short-1", "long-0", "decode-0"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, descriptor = str(listener.getsockname()[1]), str(listener.fileno())
        words = instance_command(spec, 2, "long", listener, 2)
        front = router_command(spec, listener, ["http://a:1", "http://b:2"])
    assert words[3:] == [
        "serve", "some/model", "--host", "127.0.0.1", "--port", port, "--role", "long",
        "--listen-fd", descriptor,
        "--threads", "2", "--drain-seconds", "30.0", "--device", "cuda:0",
        "--kv-cache-gib", "1.5", "--no-prefix-cache",
    ]  # fmt: skip
    assert front[3:] == [
        "route", "some/model", "--host", "127.0.0.1", "--port", "9000",
        "--listen-fd", descriptor, "--drain-seconds", "30.0",
        "--instance", "http://a:1", "--instance", "http://b:2",
        "--routing", "class-pools", "--api-key", "one", "--api-key", "two",
    ]  # fmt: skip


def test_keys_of_a_file_travel_in_the_environment(tmp_path: Path) -> None:
    spec = check(read_spec(write(tmp_path, FILE)))
    words = [*router_command_words(spec), "--metrics-key=m", "--api-key", "three"]
    words += ["--key-tier", "one=night", "--key-tier=two=day"]
    rest, secrets = take_secrets(words)
    assert secrets == {
        "PLA_SERVE_API_KEY": "one two three",
        "PLA_SERVE_KEY_TIER": "one=night two=day",
        "PLA_SERVE_METRICS_KEY": "m",
    }
    assert not {"one", "two", "three", "m", "--api-key", "one=night", "--key-tier"} & set(rest)
    for bad in (["--api-key", "two words"], ["--api-key="], ["--api-key"]):
        with pytest.raises(ValueError, match="spaces"):
            take_secrets(bad)


def test_tiers_of_keys_in_the_environment_are_for_the_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Instances have neither the keys nor the tiers."""
    monkeypatch.setenv("PLA_SERVE_API_KEY", "one")
    monkeypatch.setenv("PLA_SERVE_KEY_TIER", "one=night")
    check_words("serve", [])
    assert instance_environment("link")["PLA_SERVE_KEY_TIER"] == ""
    router = ["--instance", "http://127.0.0.1:1"]
    check_words("route", [*router, "--tier", "night"])
    with pytest.raises(ValueError, match="route: number 1 of --key-tier"):
        check_words("route", router)


def router_command_words(spec: FleetSpec) -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return router_command(spec, listener, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instances: {shrt: 1}", "shrt"),
        ("instances: {short: two}", "$.instances.short"),
        ("colour: red", "colour"),
        ("a: [", "not YAML"),
        ("- a", "Expected `object`"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_spec(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs instances that prefill"),
        ({"instances": Pools(decode=2)}, "needs instances that prefill"),
        ({"instances": Pools(short=2)}, "who serves long prompts"),
        ({"instances": Pools(long=2, decode=1)}, "who serves short prompts"),
        ({"instances": Pools(mixed=-1)}, "must not be negative"),
        ({"instances": Pools(mixed=1), "port": 0}, "port must lie"),
        ({"instances": Pools(mixed=1), "threads": 0}, "threads must be at least 1"),
        ({"instances": Pools(mixed=1), "drain_seconds": -1}, "drain_seconds"),
        ({"instances": Pools(mixed=1), "health": Health(hang_seconds=0)}, "health.hang_seconds"),
        ({"instances": Pools(mixed=1), "serve": {"port": 1}}, "--port of serve itself"),
        ({"instances": Pools(mixed=1), "route": {"instance": ["x"]}}, "--instance of route"),
    ],
)
def test_what_cannot_serve_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(msgspec.structs.replace(FleetSpec(), **changes))


def test_long_and_mixed_instances_serve_everybody() -> None:
    check(FleetSpec(instances=Pools(mixed=1, long=1)))


@pytest.mark.parametrize(("cores", "instances", "each"), [(8, 4, 2), (2, 4, 1), (8, 3, 2)])
def test_cores_are_shared_out(cores: int, instances: int, each: int) -> None:
    assert threads_each(cores, instances) == each
