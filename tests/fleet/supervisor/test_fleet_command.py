"""``pla-serve fleet``: whose flags are whose, and what is refused before anything starts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pla_serve.engine.transfer.credentials import fleet_secret
from pla_serve.fleet.fleet_command import START
from pla_serve.fleet.forwarding import Forwarded, options_of, passed_on, split, split_words
from pla_serve.fleet.route_command import ROUTE
from pla_serve.fleet.supervisor import launch
from pla_serve.fleet.supervisor.launch import LaunchPlan
from pla_serve.server.command import SERVE
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE
from tests.command_runner import CommandResult, pla_serve


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LaunchPlan]]:
    """Plans that would have been run."""
    found: list[LaunchPlan] = []

    def run(self: LaunchPlan) -> int:
        found.append(self)
        return 0

    monkeypatch.setattr(LaunchPlan, "run", run)
    yield found
    for plan in found:
        plan.close()


def fleet(*args: str) -> CommandResult:
    return pla_serve("fleet", *args)


def words_of(plan: LaunchPlan) -> tuple[list[list[str]], list[str]]:
    """Of the instances, and of the router."""
    commands = list(plan.commands())
    return [words for name, words in commands if name == "serve"], commands[-1][1]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_instances_share_a_secret_that_no_command_line_shows(
    plans: list[LaunchPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FLEET_SECRET_VARIABLE, raising=False)
    first, second = (launch.instance_environment("k") for _ in range(2))
    assert first[FLEET_SECRET_VARIABLE] != second[FLEET_SECRET_VARIABLE]
    fleet_secret(first)  # long enough for an instance
    monkeypatch.setenv(FLEET_SECRET_VARIABLE, "given by the operator, for all machines")
    given = launch.instance_environment("k")[FLEET_SECRET_VARIABLE]
    assert given == "given by the operator, for all machines"
    assert fleet("org/model", "--mixed", "1", "--decode", "1", "--port", free_port()).exit_code == 0
    assert not any(given in word for _, words in plans[0].commands() for word in words)


def test_flags_go_to_whom_they_belong(plans: list[LaunchPlan]) -> None:
    result = fleet(
        "org/model", "--short", "2", "--long", "1", "--port", free_port(), "--threads", "3",
        "--kv-cache-gib", "0.5", "--no-prefix-cache", "--policy=fcfs", "--routing", "round-robin",
        "--api-key", "k", "--load-format", "dummy", "--log-format", "json", "--log-level", "debug",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    instances, router = words_of(plans[0])
    assert [value(words, "--role") for words in instances] == ["short", "short", "long"]
    for words in instances:
        assert words[0] == "org/model"
        assert value(words, "--kv-cache-gib") == "0.5"
        assert value(words, "--threads") == "3"
        assert value(words, "--load-format") == "dummy"
        assert value(words, "--log-format") == "json"
        assert {"--no-prefix-cache", "--policy=fcfs"} <= set(words)
        assert "--api-key" not in words
        assert value(words, "--host") == "127.0.0.1"
    assert value(router, "--routing") == "round-robin"
    assert "--api-key" not in router  # keys travel in the environment
    assert value(router, "--load-format") == "dummy"
    assert value(router, "--log-level") == "debug"
    assert value(router, "--controller") == "balance"
    urls = [router[i + 1] for i, word in enumerate(router) if word == "--instance"]
    assert urls == [f"http://127.0.0.1:{value(words, '--port')}" for words in instances]
    assert len(set(urls)) == 3


def test_file_and_flags_go_together(plans: list[LaunchPlan], tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "model: a\ninstances: {mixed: 3}\nserve: {seed: 3}\nroute: {controller: off}\n"
        f"port: {free_port()}\ndevices: [cuda:0, cuda:1]\n"
    )
    assert fleet("--config", str(path)).exit_code == 0
    assert fleet("b", "--config", str(path), "--mixed", "1", "--port", free_port()).exit_code == 0
    (first, router), (second, _) = words_of(plans[0]), words_of(plans[1])
    assert [value(words, "--device") for words in first] == ["cuda:0", "cuda:1", "cuda:0"]
    assert value(first[0], "--seed") == "3"
    assert "--kv-cache-gib" not in first[0]  # devices have memory of their own
    assert router[0] == "a"
    assert [words[0] for words in second] == ["b"]


def test_instances_on_a_cpu_share_its_memory(
    plans: list[LaunchPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 10 * 2**30

    monkeypatch.setattr(launch.psutil, "virtual_memory", Memory)
    monkeypatch.setattr(launch.os.path, "exists", lambda path: False)
    assert fleet("m", "--mixed", "4", "--port", free_port()).exit_code == 0
    instances, router = words_of(plans[0])
    assert {value(words, "--kv-cache-gib") for words in instances} == {"1.000"}
    assert "--controller" not in router


def test_decode_instances_exchange_kv_where_it_is_possible(
    plans: list[LaunchPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("m", "--mixed", "1", "--decode", "1", "--port")
    for there in ("nixl_cu13", None):
        monkeypatch.setattr(launch, "installed_module", lambda there=there: there)
        assert fleet(*args, free_port()).exit_code == 0
    monkeypatch.setattr(launch, "installed_module", lambda: "nixl_cu13")
    assert fleet(*args, free_port(), "--no-kv-transfer").exit_code == 0
    found = [["--kv-transfer" in words for words in words_of(plan)[0]] for plan in plans]
    assert found == [[True, True], [False, False], [False, False]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["m"], "needs instances that prefill"),
        (["m", "--short", "2"], "who serves long prompts"),
        (["m", "--mixed", "1", "--kv-cache-gib", "x"], "serve: Invalid value for --kv-cache-gib"),
        (["m", "--mixed", "1", "--routing", "magic"], "route: Invalid value for --routing"),
        (["m", "--mixed", "1", "--controller", "magic"], "unknown controller 'magic'"),
        (["m", "--mixed", "1", "--config", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_mistakes_are_one_line(plans: list[LaunchPlan], args: list[str], message: str) -> None:
    result = fleet(*args, "--port", free_port())
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert plans == []


def test_unknown_flags_are_usage_errors(plans: list[LaunchPlan]) -> None:
    assert fleet("m", "--mixed", "1", "--nonsense", "3").exit_code == 2
    assert plans == []


def test_busy_port_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = fleet("m", "--mixed", "1", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 1
    assert "cannot listen" in result.stderr


def test_split_keeps_values_with_their_flags() -> None:
    serve, route = {"--a": False, "--on": True, "--seed": False}, {"--r": False, "--seed": False}
    words = ["m", "--a", "--own", "--own", "1", "--on", "--r=2", "--seed", "4", "--what"]
    rest, forwarded = split(words, {"--own"}, serve, route)
    assert rest == ["m", "--own", "1", "--what"]
    assert forwarded == Forwarded(("--a", "--own", "--on", "--seed", "4"), ("--r=2", "--seed", "4"))


def test_status_without_a_router_says_so() -> None:
    result = fleet("status", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "nobody answers" in result.stderr


def test_example_is_a_fleet(plans: list[LaunchPlan]) -> None:
    example = Path(__file__).parents[3] / "examples" / "fleet.yaml"
    result = fleet("--config", str(example), "--port", free_port())
    assert result.exit_code == 0, result.output
    assert len(words_of(plans[0])[0]) == 4


def test_the_help_names_every_flag_that_is_passed_on() -> None:
    instances, _, router = passed_on(START).partition("The router gets")
    for command in (SERVE, ROUTE):
        for flag in command.flags:
            if (
                not flag.names
                or flag.flag.hidden
                or not options_of(START).keys().isdisjoint(flag.names)
            ):
                continue
            _, forwarded = split_words([f"{flag.names[0]}=1"], START)
            assert (f"{flag.names[0]}," in instances.replace(". ", ", ")) == bool(forwarded.serve)
            assert (f"{flag.names[0]}," in router.replace(".", ", ")) == bool(forwarded.route)
    assert passed_on(START) in START.help


def test_help_shows_the_value_that_stands_for_no_bound() -> None:
    [flag] = [flag for flag in ROUTE.flags if flag.field == "max_predicted_wait"]
    assert "[0, or positive and finite]" in flag.help(whole=False)
