"""The command line: its flags are those on record, and every one of them can be given."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest

from pla_serve.cli import COMMANDS
from pla_serve.command_line import CliCommand, CommandGroup, Given, parse
from pla_serve.flags import CommandFlag, Flag, FlagsOf
from pla_serve.policy.knobs import Knob
from tests.command_runner import pla_serve

RECORD = Path(__file__).parent / "command_line.json"
"""The flags as they were under typer, before they were read from the config dataclasses."""

NEW = {
    "serve": {
        *("--max-head-bytes", "--head-seconds", "--body-seconds", "--idle-seconds"),
        *("--max-connections", "--max-connections-per-address", "--max-upload-bytes"),
        *("--engine-silence-seconds", "--share-prefix-cache", "--listen-fd", "--metrics-key"),
        *("--enable-priority", "--link-key-file", "--tool-parser", "--itl-slo-ms"),
        "--reasoning-parser",
        *("--generation-config", "--override-generation-config", "--cpu-kernels"),
        *("--max-stored-responses", "--max-stored-response-bytes", "--stored-response-seconds"),
        *("--max-background-responses", "--cors-origin"),
        *("--quantization", "--stored-profile"),
        *("--batch-dir", "--batch-lines-at-once", "--max-batch-lines", "--max-batch-file-mib"),
        *("--max-batch-key-gib", "--batch-free-mib"),
        *("--tier", "--key-tier"),
    },
    "route": {
        *("--max-head-bytes", "--head-seconds", "--body-seconds", "--idle-seconds"),
        *("--max-connections", "--max-connections-per-address", "--max-upload-bytes"),
        *("--share-prefix-cache", "--metrics-key"),
        *("--enable-priority", "--link-key-file", "--tool-parser"),
        "--reasoning-parser",
        *("--generation-config", "--override-generation-config"),
        *("--max-stored-responses", "--max-stored-response-bytes", "--stored-response-seconds"),
        *("--max-background-responses", "--cors-origin"),
        *("--tier", "--key-tier"),
        *("--picker-port", "--picker-host", "--picker-requests"),
    },
    "fleet start": {"--serve-word", "--route-word"},
    "simulate": {"--slo-token-seconds", "--tier"},
    "bench": {"--tier"},
}
"""Flags that came later: the limits of clients, the key for /metrics, the formats of tool calls and
reasoning, kernels on a CPU, what is kept of answers, offline batches, tiers, the endpoint
picker, and the hidden ones by which ``fleet`` passes on what is for its processes."""
NEW_COMMANDS = {"batch"}
CHANGED: dict[tuple[str, str], dict[str, Any]] = {
    # The help shows what holds where a flag is not given; that was "None" and a sentence before.
    ("fleet start", "--host"): {"default": "127.0.0.1"},
    ("fleet start", "--port"): {"default": 8000},
    ("fleet start", "--drain-seconds"): {"default": 30.0},
    ("fleet start", "--mixed"): {"default": 0},
    ("fleet start", "--short"): {"default": 0},
    ("fleet start", "--long"): {"default": 0},
    ("fleet start", "--decode"): {"default": 0},
    ("simulate", "--max-pause"): {"default": 600.0},
    ("simulate", "--down-seconds"): {"default": 30.0},
}


def commands() -> dict[str, CliCommand]:
    """Every command by the words that call it."""
    found = {}
    for lazy in COMMANDS:
        loaded = lazy.load()
        if isinstance(loaded, CommandGroup):
            found |= {f"{loaded.name} {command.name}": command for command in loaded.commands}
        else:
            found[loaded.name] = loaded
    return found


EVERY_FLAG = [
    pytest.param(command, flag, id=f"{name} {' '.join(flag.names) or flag.field}")
    for name, command in commands().items()
    for flag in command.flags
]


def type_name(flag: CommandFlag) -> str:
    """``int``, ``Path``, or choices such as ``auto|cpu``; of a list, what it is a list of."""
    hint = flag.value_type
    choices = get_args(hint)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    if flag.repeats:
        hint = choices[0]
    return str(hint.__name__)


def on_record(flag: CommandFlag) -> dict[str, Any]:
    default: Any = flag.flag.none if flag.default is None else flag.default
    if flag.flag.read is not None:
        default = flag.default_text or None
    return {
        "names": sorted(flag.names),
        "off": [] if flag.off_name is None else [flag.off_name],
        "argument": flag.flag.argument,
        "type": "str" if flag.flag.read is not None else type_name(flag),
        "repeats": flag.repeats,
        "default": default if isinstance(default, (int, float, str)) else None,
        "required": flag.required,
        "panel": flag.flag.panel or None,
        "variable": flag.flag.variable or None,
        "hidden": flag.flag.hidden,
    }


def test_flags_are_those_on_record() -> None:
    recorded = json.loads(RECORD.read_text())
    found = commands()
    assert set(found) == set(recorded) | NEW_COMMANDS
    for name, command in found.items():
        if name in NEW_COMMANDS:
            continue
        flags = [on_record(flag) for flag in command.flags]
        kept = [flag for flag in flags if NEW.get(name, set()).isdisjoint(flag["names"])]
        assert len(flags) - len(kept) == len(NEW.get(name, ()))
        texts = {n for flag in command.flags if flag.flag.read is not None for n in flag.names}
        expected = []
        for flag in recorded[name]:
            for other in flag["names"]:
                flag = flag | CHANGED.get((name, other), {})
            if not texts.isdisjoint(flag["names"]):  # a function reads the text
                default = flag["default"]
                flag = flag | {"type": "str", "default": None if default is None else str(default)}
            expected.append(flag)
        kept.sort(key=lambda flag: (not flag["argument"], flag["names"]))
        assert kept == expected, name


SAMPLES = {int: "7", float: "2.5", bool: None, Path: "/some/file"}


def sample(flag: CommandFlag) -> tuple[str | None, Any]:
    """A word that the flag takes, and the value that it becomes."""
    if flag.flag.read is not None:
        word = flag.default_text or "2"
        try:
            return word, flag.flag.read(word)
        except ValueError:
            word = next(w for w in ("balance", "round-robin", "8x2") if _reads(flag, w))
            return word, flag.flag.read(word)
    hint = get_args(flag.value_type)[0] if flag.repeats else flag.value_type
    if choices := get_args(hint):
        return choices[-1], choices[-1]
    if hint is bool:
        return None, True
    word = SAMPLES.get(hint, "word")
    assert word is not None
    return word, hint(word)


def _reads(flag: CommandFlag, word: str) -> bool:
    assert flag.flag.read is not None
    try:
        flag.flag.read(word)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("command", "flag"), EVERY_FLAG)
def test_every_name_of_every_flag_sets_its_field(command: CliCommand, flag: CommandFlag) -> None:
    needed = [
        word
        for other in command.flags
        if other.required and other != flag
        for word in (*other.names[:1], sample(other)[0] or "")
    ]
    word, value = sample(flag)
    expected = (value,) if flag.repeats else value
    for name in flag.names:
        words = [name] if word is None else [name, word]
        assert parse(command, [*needed, *words]).fields(flag.config)[flag.field] == expected
        if word is not None and name.startswith("--"):
            equals = parse(command, [*needed, f"{name}={word}"])
            assert equals.fields(flag.config)[flag.field] == expected
    if flag.flag.argument:
        assert word is not None
        given = parse(command, [*needed, "--", word])
        assert given.fields(flag.config)[flag.field] == expected
    if flag.off_name is not None:
        off = parse(command, [*needed, flag.off_name])
        assert off.fields(flag.config)[flag.field] is False


@pytest.mark.parametrize(("command", "flag"), EVERY_FLAG)
def test_every_flag_has_help(command: CliCommand, flag: CommandFlag) -> None:
    assert flag.help(whole=False).strip()
    assert flag.default is not MISSING or flag.required


@pytest.mark.parametrize("words", [c.split() for c in commands()], ids=" ".join)
def test_help_shows_every_flag_but_hidden_ones(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = pla_serve(*words, "--help")
    assert result.exit_code == 0
    for flag in commands()[" ".join(words)].flags:
        for name in flag.names:
            assert (f"{name} " in result.stdout) is not flag.flag.hidden, name
    assert "None" not in result.stdout


def test_help_of_all_imports_no_command() -> None:
    code = (
        "import sys; from pla_serve.cli import main; main(['--help']); "
        "print([m for m in sys.modules if m.startswith('pla_serve.') and 'command' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['pla_serve.command_line']"
    for command in COMMANDS:
        assert command.name in done.stdout


# The adapter


@dataclass(frozen=True, slots=True)
class Greeting:
    name: Annotated[str, Flag("Who is greeted.", variable="GREETED")] = "you"
    wait: Annotated[float | None, Flag("Seconds; 0: none.", none=0)] = 3.0
    loud: Annotated[bool, Flag("In capitals.", switch=True)] = False
    plain: int = 3
    knob: Annotated[int, Knob("A knob.", least=1)] = 1


def greeting(*words: str) -> Given:
    return parse(CliCommand("greet", lambda given: 0, (FlagsOf(Greeting),)), words)


def test_given_says_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert greeting().fields(Greeting) == {}
    assert greeting().make(Greeting) == Greeting()
    assert greeting("--name", "you").fields(Greeting) == {"name": "you"}
    assert greeting("--name", "Ada").make(Greeting, name="Bo").name == "Bo"
    monkeypatch.setenv("GREETED", "Cy")
    assert greeting().fields(Greeting) == {"name": "Cy"}
    assert greeting("--name", "Ada").make(Greeting).name == "Ada"


def test_a_number_may_stand_for_none() -> None:
    assert greeting("--wait", "0").make(Greeting).wait is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--knob", "2"], "--knob"),
        (["--plain", "2"], "--plain"),
        (["--no-loud"], "--no-loud"),
        (["--wait", "long"], "--wait"),
        (["Ada"], "Ada"),
        (["--nam", "Ada"], "--name"),
    ],
)
def test_what_cannot_be_read_is_named(words: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        greeting(*words)


def test_knobs_become_flags_where_a_panel_is_named() -> None:
    flags = FlagsOf(Greeting, only=("knob",), panel="Knobs", also={"knob": ("-k",)})
    command = CliCommand("greet", lambda given: 0, (flags,))
    assert parse(command, ["-k", "4"]).make(Greeting).knob == 4
    assert [flag.flag.panel for flag in command.flags] == ["Knobs"]


def test_two_flags_of_one_name_are_a_mistake() -> None:
    command = CliCommand("greet", lambda given: 0, (FlagsOf(Greeting), FlagsOf(Greeting)))
    with pytest.raises(ValueError, match="two flags"):
        _ = command.flags


def test_unknown_commands_are_usage_errors() -> None:
    assert pla_serve("sing").exit_code == 2
